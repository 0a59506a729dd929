"""What the development environment is made of."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import version

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

USER, DEVELOPER = LOCKS = ("requirements.txt", "requirements-dev.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def requirements(text):
    lines = re.sub(r" *\\\n *--hash=\S+", "", text).splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def locked(name):
    return requirements((ROOT / name).read_text())


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_requirement_has_one_version_and_its_hashes(name):
    text = (ROOT / name).read_text()
    entries = re.split(r"\n(?=[A-Za-z0-9])", text.split("\n", 2)[2])
    assert len(entries) == len(locked(name))
    for entry in entries:
        assert re.match(
            r"[A-Za-z0-9._\[\]-]+==[\w.!+]+( ; .+)? \\\n( +--hash=sha256:[0-9a-f]{64}( \\)?\n)+", entry + "\n"
        ), entry
    assert not re.search(r"://|--(extra-)?index|--find-links|--trusted-host", text)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (USER, [*EXTRAS["cli"], *EXTRAS["dashboard"], *EXTRAS["supervisor"]]),
        (DEVELOPER, [*map(str, locked(USER)), *EXTRAS["postgres"], *PROJECT["dependency-groups"]["dev"]]),
    ],
)
def test_lock_file_holds_requirements_and_their_dependencies(name, wanted):
    pins = {}
    for each in locked(name):
        pins.setdefault(each.name.lower(), []).append(next(iter(each.specifier)).version)
    for each in map(Requirement, wanted):
        found = [one for one in pins[each.name.lower()] if each.specifier.contains(one)]
        assert found if each.marker else found == pins[each.name.lower()], each


def test_user_of_the_whole_system_installs_no_developer_tool():
    asked = {Requirement(each).name for name in ("cli", "dashboard", "supervisor") for each in EXTRAS[name]}
    assert asked == {"typer", "streamlit", "supervisor", "honcho"}
    others = [*EXTRAS["postgres"], *EXTRAS["bench"], *PROJECT["dependency-groups"]["dev"]]
    assert {each.name for each in locked(USER)}.isdisjoint(Requirement(each).name.lower() for each in others)


def test_environment_is_the_locked_one():
    wanted = [each for each in locked(DEVELOPER) if each.marker is None or each.marker.evaluate()]
    assert len(wanted) > 50
    assert {each.name: version(each.name) for each in wanted} == {
        each.name: next(iter(each.specifier)).version for each in wanted
    }


class WithoutTyping(ast.NodeTransformer):
    """Removes what only type checkers read."""

    def visit_If(self, node):  # noqa: N802
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def test_queue_imports_only_the_standard_library():
    names = set()
    # Imported when a queue on PostgreSQL is opened
    on_postgres = ("pqueue_sqlalchemy.py", "pqueue_connections.py", "pqueue_listener.py")
    paths = [path for path in ROOT.glob("pqueue*.py") if path.name not in on_postgres]
    for node in (node for path in paths for node in ast.walk(WithoutTyping().visit(ast.parse(path.read_text())))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {node.module} if isinstance(node, ast.ImportFrom) else {each.name for each in node.names}
    foreign = {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, "annotationlib"}
    assert {name for name in foreign if not name.startswith("pqueue")} == set()
