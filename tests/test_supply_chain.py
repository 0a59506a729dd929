"""What the development environment is made of."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import version

from conftest import ROOT
from packaging.requirements import Requirement

LOCK = (ROOT / "requirements.txt").read_text()


def requirements(text):
    lines = re.sub(r" *\\\n *--hash=\S+", "", text).splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def test_every_locked_requirement_has_one_version_and_its_hashes():
    entries = re.split(r"\n(?=[A-Za-z0-9])", LOCK.split("\n", 2)[2])
    assert len(entries) == len(requirements(LOCK))
    for entry in entries:
        assert re.match(
            r"[A-Za-z0-9._\[\]-]+==[\w.!+]+( ; .+)? \\\n( +--hash=sha256:[0-9a-f]{64}( \\)?\n)+", entry + "\n"
        ), entry


def test_lock_holds_what_is_asked_for_and_names_no_place():
    locked = {}
    for each in requirements(LOCK):
        locked.setdefault(each.name.lower(), []).append(next(iter(each.specifier)).version)
    for wanted in requirements((ROOT / "requirements.in").read_text()):
        assert all(wanted.specifier.contains(one) for one in locked[wanted.name.lower()]), wanted
    assert not re.search(r"://|--(extra-)?index|--find-links|--trusted-host", LOCK)


def test_environment_is_the_locked_one():
    wanted = [each for each in requirements(LOCK) if each.marker is None or each.marker.evaluate()]
    assert len(wanted) > 50
    assert {each.name: version(each.name) for each in wanted} == {
        each.name: next(iter(each.specifier)).version for each in wanted
    }


def test_queue_imports_the_standard_library_alone():
    names = set()
    paths = [path for path in ROOT.glob("pqueue*.py") if path.name != "pqueue_sqlalchemy.py"]
    for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text()))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {node.module} if isinstance(node, ast.ImportFrom) else {each.name for each in node.names}
    foreign = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert {name for name in foreign if not name.startswith("pqueue")} == set()
