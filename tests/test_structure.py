"""Which module imports which, and who uses the private attributes of a class."""

from __future__ import annotations

import ast
import re
import sys
from itertools import chain

import pytest
from conftest import ROOT
from test_mutants import MUTANTS, marks, sources, without_guard

PROGRAMS = {"producer", "consumer", "admin", "manager", "ops"}
PATHS = [*ROOT.glob("pqueue*.py"), *(ROOT / f"{name}.py" for name in PROGRAMS), *ROOT.glob("pqueue_tools/[!_]*.py")]
PRODUCT = {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in PATHS}
CORE = {name for name in PRODUCT if name.startswith("pqueue") and "." not in name} - {
    "pqueue_sqlalchemy",
    "pqueue_connections",
    "pqueue_listener",
}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
NAMEDTUPLE = {"_asdict", "_fields", "_make", "_replace"}  # which are public
PRIVATE_USES = {
    # Functions of os and atexit, for a process that was forked.
    "pqueue_tools.concurrency": {"_exit"},
    "pqueue_tools.keeper": {"_exit"},
    # The number of threads, and the state of asyncio, which are not public.
    "pqueue_tools.leftovers": {"_count", "_event_loop_policy", "_get_running_loop", "_set_running_loop"},
    "pqueue_tools.processes": {"_exit"},
    "pqueue_tools.worker": {"_exit", "_clear", "_run_exitfuncs"},
    # A queue fills another one.
    "pqueue_move": {
        "_transaction",
        "_lock_out_writers",
        "_reset_ids",
        "_count_pending",
        "_read",
        "_let_groups_take_turns",
        "_attach",
    },
    # The frames of a thread; a queue is one thing with its session.
    "pqueue_sqlite": {
        *("_getframe", "_connect", "_error", "_sqlite_errors", "_sessions", "_synchronous"),
        *("_writer_lock", "_consumer_locks", "_result_locks"),
    },
    # A queue is one thing with its session and its listener, and a fork resets all.
    "pqueue_sqlalchemy": {
        *("_db_errors", "_busy_seconds", "_after_fork", "_pool", "_settings", "_sql", "_wrap", "_wake_waiters", "_read")
    },
    "pqueue_listener": {
        *("_transaction", "_connect_raw", "_mark_running", "_busy_seconds", "_pool", "_settings", "_sql")
    },
}


def nodes(tree, *, in_functions):
    """Yield the nodes of a module, but not those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        if in_functions or not isinstance(node, FUNCTION):
            yield from nodes(node, in_functions=in_functions)


def imported(name, *, in_functions=True):
    """Return the modules that a module imports: their full names if they are of the product."""
    found = set()
    for node in nodes(PRODUCT[name], in_functions=in_functions):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{each.name}" for each in node.names}
            found |= (full & set(PRODUCT)) or {node.module}
    return {each if each in PRODUCT else each.partition(".")[0] for each in found}


def graph():
    lines = [f"{name} -> {', '.join(sorted(imported(name) & set(PRODUCT)))}" for name in sorted(PRODUCT)]
    return "\n".join(["imports:", *lines])


def foreign(name, *allowed):
    """Return what a module imports apart from the standard library, the core, pqueue_tools and what is allowed."""
    standard = {*sys.stdlib_module_names, "annotationlib"}  # new in Python 3.14
    return {each for each in imported(name) - {*standard, *allowed} if each.partition("_")[0] != "pqueue"}


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_program_imports_the_core_and_the_tools_only(name):
    assert foreign(name) == set(), graph()


@pytest.mark.parametrize("name", sorted(CORE))
def test_core_module_imports_the_standard_library_and_the_core_only(name):
    assert foreign(name) == set(), graph()
    assert not {each for each in imported(name) if each.startswith("pqueue_tools")}, graph()


@pytest.mark.parametrize("name", sorted(set(PRODUCT) - CORE - PROGRAMS))
def test_tool_or_backend_imports_no_program(name):
    assert foreign(name, "streamlit", "typer", "sqlalchemy", "psycopg", "pytest") == set(), graph()


def test_modules_import_each_other_in_one_direction():
    imports = {name: imported(name, in_functions=False) & set(PRODUCT) for name in PRODUCT}
    while leaves := {name for name, needed in imports.items() if not needed}:
        imports = {name: needed - leaves for name, needed in imports.items() if name not in leaves}
    assert imports == {}, graph()


GUIDE = (ROOT / "docs/code.md").read_text()


def test_reading_guide_names_each_module_of_the_core_below_those_that_it_imports():
    listed = re.findall(r"^\| `(\w+)` \|", GUIDE, re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in ROOT.glob("pqueue*.py"))
    for number, name in enumerate(listed):
        assert imported(name, in_functions=False) & set(listed[number:]) == set(), name


def test_reading_guide_names_what_exists():
    there = set(PRODUCT)
    for name, tree in PRODUCT.items():
        for each in tree.body:
            there |= {f"{name}.{each.name}"} if isinstance(each, FUNCTION[:2]) else set()
            there |= {f"{name}.{ast.unparse(target)}" for target in getattr(each, "targets", ())}
            if isinstance(each, ast.ClassDef):
                there |= {f"{each.name}.{method}" for method in defined(each)}
    named = set(re.findall(r"`([\w/]+(?:\.\w+)+)`", GUIDE))
    assert {each for each in named - there if not (each.endswith(".py") and (ROOT / each).exists())} == set()
    assert len(named) > 30


def defined(scope):
    """Return the attributes that a class defines, in its body or through self."""
    names = {each.name for each in ast.walk(scope) if isinstance(each, FUNCTION[:2])}
    names |= {each.target.id for each in scope.body if isinstance(each, ast.AnnAssign)}
    targets = [each for each in ast.walk(scope) if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)]
    return names | {each.attr for each in targets if ast.unparse(each.value) == "self"}


def private_uses(tree):
    """Return the private attributes of other objects that are used outside of the class that defines them."""
    classes = [each for each in tree.body if isinstance(each, ast.ClassDef)]
    own = {id(node): names for each in classes for names in [defined(each)] for node in ast.walk(each)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            is_own = ast.unparse(node.value) in ("self", "cls", "super()") or node.attr in own.get(id(node), ())
            if not is_own and node.attr not in NAMEDTUPLE:
                yield node.attr


def test_private_names_are_not_imported_by_another_module():
    found = {
        name: [
            each.name
            for node in nodes(tree, in_functions=True)
            if isinstance(node, ast.ImportFrom)
            for each in node.names
            if each.name.startswith("_")
        ]
        for name, tree in PRODUCT.items()
    }
    assert {name: names for name, names in found.items() if names} == {}


def test_private_attributes_stay_within_their_class():
    uses = {name: set(private_uses(tree)) - PRIVATE_USES.get(name, set()) for name, tree in PRODUCT.items()}
    assert {name: found for name, found in uses.items() if found} == {}


def test_structure_checks_detect_violations():
    assert set(private_uses(ast.parse("class A:\n def f(self, b):\n  self._x = b._x + b._y\n\nq._z"))) == {"_y", "_z"}
    chained = set(chain.from_iterable(imported(name) for name in PRODUCT))
    assert {"pqueue", "pqueue_tools.process", "streamlit", "argparse"} <= chained


def docstrings(tree):
    """Return the nodes of all docstrings but those of functions: a command's is its help."""
    places = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef))]
    return {id(node.body[0].value) for node in places if node.body and isinstance(node.body[0], ast.Expr)}


@pytest.mark.parametrize("name", sorted(PRODUCT))
def test_message_names_a_program_as_it_is_called_in_a_checkout_or_an_installed_copy(name):
    left_out = docstrings(PRODUCT[name])
    texts = [node for node in ast.walk(PRODUCT[name]) if isinstance(node, ast.Constant) and id(node) not in left_out]
    fixed = re.compile(rf"\b({'|'.join(PROGRAMS)})\.py\b|\bpqueue-({'|'.join(PROGRAMS)})\b")
    # The docstrings of program_name and command_line, which decide; a message of completion, only given in a checkout.
    allowed = {"pqueue_values": 2, "admin": 1}.get(name, 0)
    found = [node.value for node in texts if isinstance(node.value, (str, bytes)) and fixed.search(str(node.value))]
    assert len(found) <= allowed, found


def test_mutant_changes_the_statement_below_its_mark():
    """Found here within seconds; `test_mutants.py`, which also runs them, takes minutes."""
    texts = [path.read_text() for path in sources(ROOT)]
    for mutant in MUTANTS:
        (text,) = (text for text in texts if marks(mutant.guard, text))
        assert without_guard(mutant, text) != text
