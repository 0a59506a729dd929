"""Change one thing of a module at a time, at random, in a copy of the sources, and list what no test notices.

make mutants MODULE=pqueue_move.py N=60 SEED=1

Changes: a comparison inverted or moved by its bound, `and` for `or`, a `not` removed, a number increased, a truth value
inverted, None returned, a statement removed, and a term of a condition in SQL replaced by one that is always true.
--terms tries all of the last kind, nothing else. The tests are the contract suite on SQLite, the model test and those
named after the module; for pqueue_sqlalchemy.py PostgreSQL's contract suite.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from run import memory

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 180  # which a mutant may take before it counts as noticed
CONTRACT = """
import sys, test_pqueue, unittest
from test_pqueue import SQLiteContract, SQLiteContractAtNormalDurability
cases = [each for each in vars(test_pqueue).values() if isinstance(each, type) and issubclass(each, unittest.TestCase)]
cases.remove(SQLiteContractAtNormalDurability)  # which differs from SQLiteContract in one setting
cases.sort(key=lambda case: case is not SQLiteContract)  # first what notices most
suite = unittest.TestSuite(map(unittest.defaultTestLoader.loadTestsFromTestCase, cases))
sys.exit(not unittest.TextTestRunner(failfast=True).run(suite).wasSuccessful())
"""
ON_SQLITE = [
    [sys.executable, "-W", "error", "-c", CONTRACT],
    [sys.executable, "-m", "pytest", "-qx", "tests/test_model.py"],
]
ON_POSTGRES = [[sys.executable, "-m", "pytest", "-qx", "tests/test_postgres.py", "-k", "PostgresContract"]]

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
TERM_BEGINS = re.compile(r"\b(?:WHERE|AND|THEN)\s+")
TERM_ENDS = re.compile(r"\s(?:AND|OR|ORDER|GROUP|LIMIT|RETURNING|UNION|WHEN|ELSE|END|ON|DO|FROM)\b")
CONDITION = re.compile(r"[=<>]|\b(?:IS|IN|EXISTS)\b|^\{")


@dataclass(frozen=True)
class Change:
    start: int
    end: int
    new: str
    line: int


def changes(text: str) -> Iterator[Change]:
    """Yield each change that can be made to a module."""
    tree = ast.parse(text)
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def span(node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno and node.end_col_offset is not None
        return offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)

    def offset(line: int, column: int) -> int:
        """Columns count bytes of UTF-8."""
        whole = text[starts[line - 1] : starts[line]]
        return starts[line - 1] + len(whole.encode()[:column].decode())

    def source(node: ast.expr) -> str:
        return text[slice(*span(node))]

    for node in nodes(tree):
        if isinstance(node, ast.Constant | ast.JoinedStr) and isinstance(getattr(node, "value", ""), str):
            begin, end = span(node)
            for start, stop in terms(text[begin:end]):
                yield Change(begin + start, begin + stop, "1 = 1", text.count("\n", 0, begin + start) + 1)
        elif (new := changed(node, source)) is not None:
            yield Change(*span(node), new, node.lineno)


def nodes(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Yield expressions and statements, but no docstrings, and nothing within f-strings."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        if isinstance(child, ast.expr | ast.stmt):
            yield child
        if not isinstance(child, ast.JoinedStr):
            yield from nodes(child)


def changed(node: ast.expr | ast.stmt, source) -> str | None:
    """Return what may replace this node."""
    match node:
        case ast.Compare(left=left, ops=[operator], comparators=[right]) if type(operator) in COMPARISONS:
            return f"{source(left)} {COMPARISONS[type(operator)]} {source(right)}"
        case ast.BoolOp(op=operator, values=values):
            return (" or " if isinstance(operator, ast.And) else " and ").join(f"({source(each)})" for each in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return f"({source(operand)})"
        case ast.Constant(value=bool(value)):
            return repr(not value)
        case ast.Constant(value=int(value) | float(value)):
            return repr(value + 1)
        case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            return "return None"
        case ast.Expr(value=value) if not isinstance(value, ast.Yield | ast.YieldFrom):
            return "pass"
        case ast.AugAssign() | ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            return "pass"
    return None


def terms(text: str) -> Iterator[tuple[int, int]]:
    """Yield where the terms of conditions are in a text that holds SQL."""
    if not re.search(r"\bWHERE\b|\bCHECK \(CASE\b|\bAND [a-z_.]+ (?:IS|<|=)", text):
        return
    for begin in TERM_BEGINS.finditer(text):
        start = at = begin.end()
        depth = 0
        while at < len(text) and depth >= 0 and not (depth == 0 and (text[at] in ",;" or TERM_ENDS.match(text, at))):
            depth += (text[at] in "({") - (text[at] in ")}")
            at += 1
        term = text[start : at - (depth < 0)].rstrip(' \n"')
        if CONDITION.search(term):
            yield start, start + len(term)


def commands(module: str) -> list[list[str]]:
    if module == "pqueue_sqlalchemy.py":
        return ON_POSTGRES
    own = ROOT / f"tests/test_{module.removeprefix('pqueue_')}"  # such as tests/test_move.py
    return (
        [*ON_SQLITE, [sys.executable, "-m", "pytest", "-qx", str(own.relative_to(ROOT))]] if own.exists() else ON_SQLITE
    )


def survives(folder: Path, module: str, text: str, change: Change) -> bool | None:
    """Return whether no test notices this change in the folder's copy; None when it makes no program."""
    mutant = text[: change.start] + change.new + text[change.end :]
    try:
        compile(mutant, module, "exec")
    except SyntaxError:
        return None
    (folder / module).write_text(mutant)
    try:
        return all(passes(command, folder) for command in commands(module))
    finally:
        (folder / module).write_text(text)


def passes(command: list[str], folder: Path) -> bool:
    child = subprocess.Popen(
        command,
        cwd=folder,
        # Two mutants may have the same size and time, by which Python would take the code of one for the other's.
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder.parent)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return child.wait(SECONDS) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # what the tests have left running, too
        child.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module")
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--terms", action="store_true", help="all terms of the module's SQL")
    options = parser.parse_args()
    text = (ROOT / options.module).read_text()
    found = list(changes(text))
    if options.terms:
        found = [each for each in found if each.new == "1 = 1"]
    random.Random(options.seed).shuffle(found)
    chosen = found if options.terms else found[: options.number]
    print(f"{len(chosen)} of {len(found)} changes of {options.module}, seed {options.seed}", flush=True)
    killed = survived = 0
    folders: SimpleQueue[Path] = SimpleQueue()

    def attempt(change: Change) -> bool | None:
        folder = folders.get()
        try:
            return survives(folder, options.module, text, change)
        finally:
            folders.put(folder)

    with tempfile.TemporaryDirectory(prefix="pq", dir=memory()) as place, ThreadPoolExecutor(os.cpu_count()) as pool:
        for number in range(os.cpu_count() or 1):
            ignored = shutil.ignore_patterns(".*", "var", "docs", "*.egg-info", "__pycache__")
            folders.put(shutil.copytree(ROOT, Path(place) / str(number), ignore=ignored))
        verdicts = {pool.submit(attempt, change): change for change in chosen}
        for future in as_completed(verdicts):
            change = verdicts[future]
            killed += future.result() is False
            if future.result():
                survived += 1
                old = " ".join(text[change.start : change.end].split())
                print(f"{options.module}:{change.line}: {old[:90]!r} -> {change.new[:90]!r}", flush=True)
    print(f"{killed} of {killed + survived} killed: {killed / max(1, killed + survived):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
