"""Change one thing of the sources at a time, at random, in a copy of them, and list what no test notices.

make mutants MODULES="pqueue_move.py pqueue_tasks.py" N=60 SEEDS="1 2"

Changes: a comparison inverted or moved by its bound, `and` for `or`, a `not` removed, a number increased, a truth value
inverted, None returned, a statement removed, and a term of a condition in SQL replaced by one that is always true.
--terms tries all of the last kind, nothing else.

The tests are the contract suite on SQLite, the model test and those named after a module; for PostgreSQL's modules,
its tests. They run once to record which test runs which lines, in child processes, too; those that fail then, as on a
busy machine, are left out. A change is then tried with the tests that run its statement, first with those that are fast
and noticed others; that of a constant, or of a function that is called at import, with those that use it. It is
noticed, too, by a test that takes much longer than it did.
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
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from run import memory

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "--assert=plain"]
ON_SQLITE = ["test_pqueue.py", "tests/test_model.py", "-knot AtNormalDurability and not killed_anywhere"]
ON_POSTGRES = [f"tests/test_postgres{part}.py" for part in ("", "_connections", "_isolation", "_load", "_plans")]
ON_POSTGRES += ["tests/test_join.py", "tests/test_pooler.py"]
ON_POSTGRES += ["-kPostgresContract or not Contract and not at_the_limit"]  # which takes too long when recorded
OF_POSTGRES = {"pqueue_listener.py", "pqueue_postgres.py", "pqueue_sqlalchemy.py"}
RECORDING_SECONDS = 3600
EXTRA_SECONDS = 30  # in addition to twice the time a test took before, after which it has noticed the mutant

# Loaded by every Python that the tests start, and by pytest as a plugin: writes each test, its duration, and its lines,
# and of lines that run while a module is imported, for which of its lines.
RECORDER = """
'PYTEST_DONT_REWRITE'
import fcntl, os, sys, threading
from os import write  # which a test may replace
opened = os.open(os.environ["MUTANTS_RECORD"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
output = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 1000)  # tests close lower ones
os.close(opened)
names, seen, importing = {}, set(), []

def record(line):
    try:
        write(output, f"{line}\\n".encode())
    except OSError:  # closed by a test of daemons, in its child
        pass

def trace(frame, event, _):
    path = frame.f_code.co_filename
    if path not in names:
        name = os.path.basename(path)
        names[path] = name if name.startswith("pqueue") else None
    if names[path] is None:
        return None
    if frame.f_code.co_name == "<module>":
        if event == "call":
            importing.append((names[path], frame))
        elif event == "return":
            importing[:] = [each for each in importing if each[1] is not frame]
        return trace
    line = f"{names[path]}:{frame.f_lineno}"
    for name, module in importing[-1:]:
        line = f"import {name}:{module.f_lineno} {line}"
    if line not in seen:
        seen.add(line)
        record(line)
    return trace

def pytest_runtest_logstart(nodeid):
    seen.clear()
    for name in [name for name in sys.modules if name.startswith("pqueue")]:
        for value in list(vars(sys.modules[name]).values()):
            getattr(value, "cache_clear", int)()  # so that each test runs what is cached
    record(f"test {nodeid}")

def pytest_runtest_logreport(report):
    record(f"{'failed' if report.failed else 'took'} {report.duration} {report.nodeid}")

sys.settrace(trace)
threading.settrace(trace)
"""

# A plugin of pytest when it tries a mutant: ends it if a test takes too long.
LIMITER = """
'PYTEST_DONT_REWRITE'
import faulthandler, sys
limits = {}

def pytest_runtest_logstart(nodeid):
    faulthandler.dump_traceback_later(limits[nodeid], exit=True, file=sys.__stderr__)
"""

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
TERM_ENDS = re.compile(r"\s(?:AND|OR|ORDER|GROUP|LIMIT|RETURNING|UNION|WHEN|ELSE|END|ON|DO|(?<!DISTINCT\s)FROM)\b")
CONDITION = re.compile(r"[=<>]|\b(?:IS|IN|EXISTS)\b|^\{")


@dataclass(frozen=True)
class Change:
    module: str
    line: int
    start: int
    end: int
    new: str


def changes(module: str, text: str) -> Iterator[Change]:
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
                line = text.count("\n", 0, begin + start) + 1
                yield Change(module, line, begin + start, begin + stop, "1 = 1")
        elif (new := changed(node, source)) is not None:
            yield Change(module, node.lineno, *span(node), new)


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


class Place(NamedTuple):
    """A statement without those in it."""

    module: str
    lines: set[int]
    runs: set[int]  # the lines that show whether a test runs it
    names: set[str]  # which it mentions
    defines: set[str]  # constants and classes; none in a function


def places(module: str, parent: ast.AST, *, in_function: bool = False) -> Iterator[Place]:
    for node in ast.iter_child_nodes(parent):
        is_function = isinstance(node, ast.FunctionDef)
        items: list[Place] = []
        if isinstance(parent, ast.Module) and isinstance(value := getattr(node, "value", None), ast.Dict):
            items = [*of_items(module, value)]
            yield from items
        yield from places(module, node, in_function=in_function or is_function)
        if isinstance(node, ast.stmt):
            whole = set(lines_of(node))
            inside = {line for each in ast.walk(node) if isinstance(each, ast.stmt) and each is not node
                      for line in lines_of(each)}  # fmt: skip
            inside = inside.union(*(each.lines for each in items))
            own = whole - inside or whole
            found = [each for each in ast.walk(node) if getattr(each, "lineno", 0) not in inside]
            names = mentioned(found)
            targets = [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else getattr(node, "targets", [])
            defines = {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
            if isinstance(node, ast.ClassDef):
                defines = {node.name}
            runs = set() if not in_function and not is_function else whole if is_function else own
            yield Place(module, own, runs, names, set() if in_function else defines)


def of_items(module: str, value: ast.Dict) -> Iterator[Place]:
    """Yield each item of a dictionary that replaces what its keys name."""
    for key, item in zip(value.keys, value.values, strict=True):
        if isinstance(key, ast.Name | ast.Attribute):
            lines = set(range(key.lineno, (item.end_lineno or key.lineno) + 1))
            names = mentioned([*ast.walk(key), *ast.walk(item)])
            yield Place(module, lines, set(), names, {key.id if isinstance(key, ast.Name) else key.attr})


def mentioned(nodes: Iterable[ast.AST]) -> set[str]:
    names = {each.id for each in nodes if isinstance(each, ast.Name)}
    return names | {each.attr for each in nodes if isinstance(each, ast.Attribute)}


def lines_of(node: ast.stmt) -> range:
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
    return range(first, (node.end_lineno or first) + 1)


class Record:
    """Which tests run which statements."""

    def __init__(self, trees: dict[str, ast.AST], tests: Iterable[ast.AST], record: Iterable[str]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.noticed: Counter[str | None] = Counter()
        self.failed: set[str] = set()
        self._tests: dict[str, set[str]] = defaultdict(set)  # by module:line
        self._importers: dict[str, set[str]] = defaultdict(set)  # the lines that run this one at import
        self._places = [place for module, tree in trees.items() for place in places(module, tree)]
        self._named_by = {
            node.name: mentioned([*ast.walk(node)])
            for tree in tests
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
        }
        test = ""
        for line in record:
            kind, _, rest = line.rstrip().partition(" ")
            if kind == "test":
                test = rest
            elif kind in ("took", "failed"):
                seconds, _, name = rest.partition(" ")
                self.seconds[name] += float(seconds)
                self.failed |= {name} if kind == "failed" else set()
            elif kind == "import":
                importer, _, line = rest.partition(" ")
                self._importers[line].add(importer)
            elif test:
                self._tests[kind].add(test)

    def tests(self, change: Change) -> list[str]:
        """Return the tests that may notice the change: first those that are fast and noticed others."""
        here = self._at(f"{change.module}:{change.line}")
        found: set[str] = set()
        seen: set[str] = set()
        imported: set[str] = set()
        while here:
            place = here.pop()
            if not place.runs and not place.defines:  # a call when the module is imported
                found |= self.seconds.keys()
            lines = [f"{place.module}:{line}" for line in place.runs]
            found = found.union(*(self._tests[line] for line in lines))
            importers = set[str]().union(*(self._importers[line] for line in lines)) - imported
            imported |= importers
            here += [each for line in importers for each in self._at(line)]
            if new := place.defines - seen:
                seen |= new
                found |= {
                    test for test in self.seconds if self._names(test) & {*new, change.module.removesuffix(".py")}
                }
                here += [each for each in self._places if each.names & new and each is not place]
        return sorted(found - self.failed, key=lambda test: self.seconds[test] / (1 + self.noticed[test]))

    def limit(self, test: str) -> float:
        """Return after how many seconds it has noticed a mutant."""
        return EXTRA_SECONDS + 2 * self.seconds[test]

    def _at(self, line: str) -> list[Place]:
        module, _, number = line.partition(":")
        return [each for each in self._places if each.module == module and int(number) in each.lines]

    def _names(self, test: str) -> set[str]:
        return self._named_by.get(test.partition("[")[0].rpartition("::")[2], set())


def is_noticed(folder: Path, text: str, change: Change, record: Record) -> bool | None:
    """Return whether a test notices this change in the folder's copy; None when it makes no program."""
    mutant = text[: change.start] + change.new + text[change.end :]
    try:
        compile(mutant, change.module, "exec")
    except SyntaxError:
        return None
    tests = record.tests(change)
    path = folder / change.module
    path.write_text(mutant)
    # Python would take the code of one mutant for that of another of the same size and time.
    for compiled in folder.glob(f"__pycache__/{path.stem}.*"):
        compiled.unlink()
    try:
        seconds = sum(map(record.limit, tests))
        failed = failure(["-plimiter", *tests], folder, seconds, PYTHONDONTWRITEBYTECODE="1") if tests else None
    finally:
        path.write_text(text)
    record.noticed[failed] += 1
    return failed is not None


def failure(arguments: list[str], folder: Path, seconds: float, **variables: str) -> str | None:
    """Run tests until one fails, and return its name, "" if it is not known, or None if all passed."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}t", dir=folder.parent))
    with (temporary / "output").open("w+") as output:
        child = subprocess.Popen(
            [*PYTEST, f"--basetemp={temporary}/b", *arguments],  # short, as the path of a socket must be
            cwd=folder,
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TMPDIR": str(temporary), **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            if child.wait(seconds) == 0:
                return None
            output.seek(0)
            return "".join(re.findall(r"^(?:FAILED|ERROR|SUBFAILED\[.*\]) (\S+)", output.read(), re.MULTILINE)[:1])
        except subprocess.TimeoutExpired:
            return ""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # what the tests have left running, too
            child.wait()
            shutil.rmtree(temporary, ignore_errors=True)


def recorded(folder: Path, texts: dict[str, str], suite: list[str]) -> Record:
    output, plugins = folder.with_name("record"), folder.with_name("plugins")
    plugins.mkdir()
    (plugins / "sitecustomize.py").write_text(RECORDER)
    variables = {"MUTANTS_RECORD": str(output), "PYTHONPATH": str(plugins), "PYTHONDONTWRITEBYTECODE": ""}
    failure([*suite, "-psitecustomize", "--maxfail=0"], folder, RECORDING_SECONDS, **variables)
    with output.open() as lines:
        sources = {module: ast.parse(text) for module, text in texts.items()}
        tests = [ast.parse((ROOT / each).read_text()) for each in suite if each.endswith(".py")]
        record = Record(sources, tests, lines)
    print(f"{len(record.seconds)} tests recorded", *(f"{test} failed" for test in sorted(record.failed)), sep="\n")
    limits = {test: record.limit(test) for test in record.seconds}
    (folder / "limiter.py").write_text(LIMITER.replace("limits = {}", f"{limits = }"))
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--number", type=int, default=60, help="changes for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--terms", action="store_true", help="all terms of the modules' SQL")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    texts = {path.name: path.read_text() for path in sorted(ROOT.glob("pqueue*.py"))}
    suite = ON_POSTGRES
    if not OF_POSTGRES.intersection(options.modules):
        named = [f"tests/test_{module.removeprefix('pqueue_')}" for module in options.modules]  # as tests/test_move.py
        suite = [*ON_SQLITE, *(file for file in named if (ROOT / file).exists())]
    found = [change for module in options.modules for change in changes(module, texts[module])]
    rounds = {0: [each for each in found if each.new == "1 = 1"]} if options.terms else {
        seed: random.Random(seed).sample(found, min(options.number, len(found))) for seed in options.seeds
    }  # fmt: skip
    folders: SimpleQueue[Path] = SimpleQueue()

    def attempt(change: Change) -> bool | None:
        folder = folders.get()
        try:
            return is_noticed(folder, texts[change.module], change, record)
        finally:
            folders.put(folder)

    with tempfile.TemporaryDirectory(prefix="pq", dir=memory()) as place, ThreadPoolExecutor(options.workers) as pool:
        ignored = shutil.ignore_patterns(".*", "var", "*.egg-info", "__pycache__")
        first = shutil.copytree(ROOT, Path(place) / "0", ignore=ignored)
        record = recorded(first, texts, suite)
        folders.put(first)
        for number in range(1, options.workers):
            folders.put(shutil.copytree(first, Path(place) / str(number)))
        for seed, chosen in rounds.items():
            print(f"{len(chosen)} of {len(found)} changes{f', seed {seed}' if seed else ''}", flush=True)
            verdicts = {pool.submit(attempt, change): change for change in chosen}
            killed = survived = 0
            for number, future in enumerate(as_completed(verdicts), 1):
                killed += future.result() is True
                if number % 20 == 0:
                    print(f"{number} tried", flush=True)
                if future.result() is False:
                    survived += 1
                    print(description(verdicts[future], texts, record), flush=True)
            print(f"{killed} of {killed + survived} killed: {killed / max(1, killed + survived):.2f}", flush=True)
    return 0


def description(change: Change, texts: dict[str, str], record: Record) -> str:
    old = " ".join(texts[change.module][change.start : change.end].split())
    tests = record.tests(change)
    return f"{change.module}:{change.line}: {old[:90]!r} -> {change.new[:90]!r} ({len(tests)} tests)"


if __name__ == "__main__":
    sys.exit(main())
