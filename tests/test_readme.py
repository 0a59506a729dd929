"""README.md and docs/*.md: their code blocks are run, their links lead somewhere.

The blocks of a document are run in order in one empty folder. The info string of a block says what happens to it:

    ```python            run by Python          ```sh                  run by the shell
    ```python tasks.py   written to tasks.py    ```sh no-run: REASON   shown only
    ```text              shown only             ```text output         what the block before it prints

Times, consumers and process ids in an output may differ.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch
from urllib.error import HTTPError

import pytest
from conftest import PATIENCE_SECONDS, ROOT, Place, wait_until

import admin
import pqueue
from bench.run import parser
from pqueue_tools.testing import drain, temporary_queue

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = {"pqueue": "admin.py"} | {
    f"pqueue-{name}": f"{name}.py" for name in ("producer", "consumer", "manager", "ops")
}
BLOCK = re.compile(r"^```([^\n]+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
VARIES = re.compile(r'[0-9-]+T[0-9:.]+Z|consumer=\S+|pid=\d+|database=\S+|traceback="(?:[^"\\]|\\.)*"')


@dataclass(frozen=True)
class Block:
    language: str
    info: str
    code: str

    @property
    def is_run(self) -> bool:
        return self.language in ("python", "sh") and not self.info


def blocks(document: Path) -> list[Block]:
    found = BLOCK.findall(document.read_text())
    return [Block(*info.partition(" ")[::2], code) for info, code in found]


class Folder(Place):
    """An empty folder, and commands named as those of the installed package."""

    def __init__(self, folder: Path, **variables: str) -> None:
        super().__init__(folder / "work")
        self.folder.mkdir(parents=True)
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.variables = variables
        for name, program in SCRIPTS.items():
            script = self.bin / name
            script.write_text(
                f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(ROOT / program))} "$@"\n'
            )
            script.chmod(0o755)

    def run_document(self, document: Path) -> list[str]:
        """Run the blocks of a document and return what each has printed."""
        outputs: list[str] = []
        for block in blocks(document):
            if block.info == "output":
                assert VARIES.sub("#", outputs[-1]) == VARIES.sub("#", block.code), document
            elif block.is_run:
                outputs.append(self._run_block(block))
            elif not block.info.startswith("no-run") and block.language != "text":
                self.write(block.info, block.code)
        return outputs

    def _run_block(self, block: Block) -> str:
        paths = f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        python = os.pathsep.join([self.variables.get("PYTHONPATH", ""), str(ROOT)]).strip(os.pathsep)
        done = subprocess.run(
            [sys.executable, "-c", block.code] if block.language == "python" else ["bash", "-euc", block.code],
            cwd=self.folder,
            env=self.environment(**{**self.variables, "PATH": paths, "PYTHONPATH": python, "COLUMNS": "100"}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{block.code}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_each_block_is_run_or_says_why_not(document):
    text = document.read_text()
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(blocks(document)), "a block without a language"
    for block in blocks(document):
        if block.info.startswith("no-run"):
            assert re.fullmatch(r"no-run: .{8,}", block.info), block.info
        elif block.language == "python":
            compile(block.code, document.name, "exec")
        elif block.language not in ("sh", "text"):
            assert block.info, f"{block.language}: expected a file name, or no-run and the reason"


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if path.name != "operations.md"], ids=lambda p: p.name)
def test_blocks_of_each_document_run(document, tmp_path):
    Folder(tmp_path).run_document(document)


@pytest.fixture
def project(tmp_path):
    """The project of docs/deployment.md, with its examples as files, elsewhere than in /srv/app."""
    project = Folder(tmp_path)
    (project.folder / "venv").mkdir()
    (project.folder / "venv/bin").symlink_to(project.bin)
    project.write("tasks.py", "from pqueue import task\n\n\n@task()\ndef report(job): ...\n")
    (project.folder / "var/log").mkdir(parents=True)
    for block in blocks(ROOT / "docs/deployment.md"):
        if not block.info.startswith("no-run"):
            project.write(block.info, block.code.replace("/srv/app", str(project.folder)))
    yield project
    project.close()


def test_crontab_in_the_docs_works(project):
    project.queue().enqueue("report", key="nightly-report")
    lines = (project.folder / "crontab").read_text().splitlines()
    commands = [line.split(None, 5)[5].replace("\\%", "%") for line in lines if "* * *" in line]
    variables = dict(line.split("=") for line in lines if "* * *" not in line)
    for command in commands:
        done = subprocess.run(
            ["sh", "-ec", command],
            env=project.environment(**variables),
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert (done.returncode, done.stderr) == (0, "")
    assert "no consumer is alive" in done.stdout
    assert project.queue().count_jobs() == 1
    assert list(project.folder.glob("var/backup-20*.db"))


def test_supervisor_program_in_the_docs_runs(project):
    with (project.folder / "supervisord.conf").open("a") as file:
        file.write(f"[supervisord]\nlogfile = {project.folder}/log\npidfile = {project.folder}/pid\n")
    supervisord = str(Path(sys.executable).parent / "supervisord")
    child = project.start_command([supervisord, "-n", "-c", "supervisord.conf"], PYTHONPATH=str(ROOT))
    wait_until((project.folder / "var/queue.db").exists)
    queue = project.queue()
    job_id = queue.enqueue("report")
    wait_until(lambda: queue.get(job_id).state == "completed")
    wait_until(lambda: {each["name"] for each in queue.consumers()} == {f"consumer_0{number}" for number in range(3)})
    child.terminate()
    assert child.wait(PATIENCE_SECONDS) == 0
    assert {each["state"] for each in queue.consumers()} == {"stopped"}


def test_admin_commands_run_alike_with_and_without_typer(tmp_path):
    document = ROOT / "docs/operations.md"
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked/typer.py").write_text("raise ImportError")
    folders = [Folder(tmp_path / "with"), Folder(tmp_path / "without", PYTHONPATH=str(tmp_path / "blocked"))]
    with ThreadPoolExecutor() as pool:
        outputs = pool.map(lambda folder: folder.run_document(document), folders)
    for with_typer, without in zip(*outputs, strict=True):
        assert _without_times(with_typer) == _without_times(without)


def _without_times(output: str) -> list[str]:
    """Return the words of an output, with everything that differs between two runs replaced."""
    return re.sub(r"[0-9a-f]{64}|[0-9][0-9a-f:.,T_-]*Z?( (m?s|min|h)\b)?|with(out)?/", "#", output).split()


def test_every_admin_command_is_run_in_the_docs():
    code = "".join(block.code for block in blocks(ROOT / "docs/operations.md") if block.is_run)
    others = {"completion"}  # which tests/test_install.py runs: it needs an installed copy
    assert set(re.findall(r"^pqueue ([a-z-]+)", code, re.MULTILINE)) == set(admin.COMMANDS) - others


@pytest.mark.parametrize("program", ["producer", "consumer"])
def test_every_option_is_in_the_docs(place, program):
    options = set(re.findall(r"--[a-z-]+", place.run(f"{program}.py", "--help").stdout)) - {"--help"}
    documented = re.findall(rf"`pqueue-{program} (--[a-z-]+)`", (ROOT / "docs/operations.md").read_text())
    assert options == set(documented)


def test_every_variable_is_in_the_docs():
    sources = [path for pattern in ("*.py", "pqueue_tools/*.py") for path in ROOT.glob(pattern)]
    read = re.compile(r"""environ(?:\.get\(|\[)"(PQUEUE_[A-Z_]+)""")
    used = {name for path in sources if not path.name.startswith("test_") for name in read.findall(path.read_text())}
    assert used
    assert used <= set(re.findall(r"`(PQUEUE_[A-Z_]+)`", (ROOT / "docs/operations.md").read_text()))


def test_diagram_is_the_modules():
    diagram = re.search(r"```text\n( +enqueue  .*?)```", (ROOT / "docs/tasks.md").read_text(), re.DOTALL)[1]
    assert diagram in (ROOT / "pqueue.py").read_text()


def programs() -> list[Block]:
    text = (ROOT / "docs/tasks.md").read_text()
    section = text[text.index("\n## Programs\n") : text.index("\n## Test a task\n")]
    return [Block(*info.partition(" ")[::2], code) for info, code in BLOCK.findall(section)]


def test_everyday_programs_are_short():
    lines = [line for block in programs() if block.language == "python" for line in block.code.splitlines()]
    assert len([line for line in lines if line and not line.startswith(("import ", "from "))]) <= 110


def test_program_that_fetches_retries_as_the_server_asks(monkeypatch):
    """The one program that the document cannot run: it has no server."""
    names: dict[str, Any] = {"__name__": "programs"}
    (code,) = (block.code for block in programs() if block.info == "programs.py")
    with patch.dict(pqueue.TASKS, clear=True), temporary_queue() as queue:
        exec(code, names)  # noqa: S102
        answers = [HTTPError("u", code, "no", {"Retry-After": "60"}, None) for code in (429, 503, 404)]
        monkeypatch.setitem(names, "urlopen", Mock(side_effect=answers))
        job_id, now = names["fetch"].enqueue("http://localhost"), time.time()
        assert [drain(queue, now=now + delay) != [] for delay in (0, 59, 60, 61, 70)] == [
            True,
            False,
            True,
            False,
            True,
        ]
        assert queue.get(job_id).error.startswith("DoNotRetry: http://localhost: HTTP Error 404")
        headers = Message(), Message()
        headers[1]["Retry-After"] = "Wed, 21 Oct 2026 07:28:00 GMT"
        answers = [HTTPError("u", 429, "no", each, None) for each in headers]
        monkeypatch.setitem(names, "urlopen", Mock(side_effect=answers))
        names["fetch"].enqueue("http://localhost")
        assert [job.state for delay in (100, 200) for job in drain(queue, now=now + delay)] == ["scheduled"] * 2


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_every_link_leads_somewhere():
    for document in DOCUMENTS:
        text = document.read_text()
        for link in re.findall(r"\]\(([^)#\s]*#?[^)\s]*)\)|(?:src|srcset)=\"([^\"]+)\"", text):
            path, _, anchor = "".join(link).partition("#")
            if "://" in path:
                continue
            target = document.parent / path if path else document
            assert target.exists(), f"{document.name}: {path}"
            assert not anchor or anchor in _anchors(target), f"{document.name}: #{anchor}"


def _anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_commands_of_the_benchmark_are_ones_that_it_accepts():
    texts = [path.read_text() for path in [*DOCUMENTS, ROOT / "bench/run.py"]]
    pattern = re.compile(r"`python -m bench([^`]*)`|^ *python -m bench([^[\n#]*)(?:#.*)?$", re.MULTILINE)
    found = ["".join(options) for text in texts for options in pattern.findall(text)]
    assert len(found) > 10
    for options in found:
        parser().parse_args(shlex.split(options.replace("\n", " ")))
