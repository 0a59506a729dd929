"""The statements that PostgreSQL receives, without a server. `make sql` writes them to docs/postgres.sql."""

from __future__ import annotations

import re
import textwrap
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest

import pqueue_dependencies
import pqueue_groups
import pqueue_handlers
import pqueue_move
import pqueue_outcomes
import pqueue_postgres
import pqueue_schedules
import pqueue_schema
from pqueue_postgres import DIFFERENCES, NAMED, POSTGRES, translated

PAGE = Path(__file__).resolve().parent.parent / "docs" / "postgres.sql"
HEAD = """\
-- What PostgreSQL receives. Written by `make sql`: do not edit.
-- The text of a search, and a few one-line statements, are put together where they are used.
"""
VERB = re.compile(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH|LOCK)\b")


def statements(module: ModuleType) -> dict[str, str]:
    """Return a module's public statements by name."""
    texts = {name: value for name, value in vars(module).items() if name.isupper() and isinstance(value, str)}
    return {name: sql for name, sql in texts.items() if name[0] != "_" and VERB.match(sql)}


def comments(module: ModuleType) -> dict[str, str]:
    """Return the comment above each constant of a module by name."""
    source = Path(str(module.__file__)).read_text()
    found = re.findall(r"((?:^ *# .*\n)+)^([A-Z_]+) = ", source, re.MULTILINE)
    lines = {name: re.findall(r"# (?!guard: )(.*)", above) for above, name in found}
    return {name: " ".join(each) for name, each in lines.items() if each}


MODULES = (
    pqueue_schema,
    pqueue_move,
    pqueue_schedules,
    pqueue_dependencies,
    pqueue_handlers,
    pqueue_outcomes,
    pqueue_groups,
)
SHARED = {name: sql for module in MODULES for name, sql in statements(module).items()}
ABOUT = {name: about for module in MODULES for name, about in comments(module).items()}
WHY = {sql: reason for reason, statements in DIFFERENCES.items() for sql in statements}
RETURNS = "; returns their ids"  # in a reason: on PostgreSQL alone
OWN_ABOUT = comments(pqueue_postgres)
OWN = {name: sql for name, sql in statements(pqueue_postgres).items() if sql not in POSTGRES.values()}
BUILT = {  # from the width of a claim
    f"{build.__name__}({width})": (" ".join((build.__doc__ or "").split()), build(width))
    for build, width in (
        (pqueue_postgres.claim_alone, 1),
        (pqueue_postgres.complete_and_claim, 1),
        (pqueue_postgres.complete_and_claim, pqueue_postgres.SHARES),
    )
}
DIFFERING = [name for name in SHARED if SHARED[name] in POSTGRES]


def page() -> str:
    """Return the whole text of docs/postgres.sql."""
    parts = [HEAD, "-- The schema\n"]
    parts += [sent(sql) for sql in chain(*pqueue_postgres.MIGRATIONS)]
    parts.append("-- While a queue has a limit\n")
    parts += [sent(sql) for sql in (*pqueue_postgres.START_COUNTING, *pqueue_postgres.RECOUNT)]
    parts.append("-- Statements that all backends share\n")
    for name, sql in SHARED.items():
        parts.append(shown(name, [ABOUT.get(name, ""), f"differs because {WHY[sql]}" if sql in WHY else ""], sql))
    parts.append("-- Statements that only PostgreSQL has\n")
    parts += [shown(name, [OWN_ABOUT.get(name, "")], sql) for name, sql in OWN.items()]
    alone = {name: pqueue_postgres.ALONE[SHARED[name]] for name in ("ENQUEUE", "ENQUEUE_MANY")}
    parts += [shown(f"{name} as its own transaction", [], sql) for name, sql in alone.items()]
    parts += [shown(f"HEALTH: {name}", [], sql) for name, sql in pqueue_postgres.HEALTH.items()]
    parts += [shown(name, [about], sql) for name, (about, sql) in BUILT.items()]
    return "\n".join(parts)


def sent(sql: str) -> str:
    return f"{translated(sql)[0].decode().strip()};\n"


def shown(name: str, about: list[str], sql: str) -> str:
    text, names = translated(sql)
    head = [*(line for each in about for line in textwrap.wrap(each, 117)), *textwrap.wrap(numbered(names), 117)]
    return f"-- {name}\n" + "".join(f"-- {line}\n" for line in head) + f"{text.decode().strip()};\n"


def numbered(names: list[str]) -> str:
    return ", ".join(f"${number} {name}" for number, name in enumerate(names, 1))


def columns(sql: str) -> list[str]:
    """Return the names of the columns that a statement returns; of an expression without a name, its text."""
    text = " ".join(sql.split())
    if text.startswith("WITH "):  # what its last statement returns
        if len(outside(text, " INSERT INTO ")) > 1:
            return []
        text = f"SELECT {outside(text, ' SELECT ')[-1]}"
    if text.startswith("SELECT FROM "):
        return []
    if " RETURNING " in text:
        found = text.rpartition(" RETURNING ")[2]
    elif text.startswith("SELECT "):
        found = outside(text.removeprefix("SELECT "), " FROM ")[0]
    else:
        return []
    return [re.sub(r"^.* AS |^\w+\.", "", each) for each in outside(found, ", ")]


def outside(text: str, separator: str) -> list[str]:
    """Split a text where the separator is not in parentheses."""
    parts, start, depth = [], 0, 0
    for at, mark in enumerate(text):
        depth += {"(": 1, ")": -1}.get(mark, 0)
        if depth == 0 and text.startswith(separator, at):
            parts.append(text[start:at])
            start = at + len(separator)
    return [*parts, text[start:]]


def test_table_holds_shared_statements_that_differ():
    assert len(DIFFERING) == len(POSTGRES)
    assert [name for name in DIFFERING if POSTGRES[SHARED[name]] == SHARED[name]] == []


@pytest.mark.parametrize("name", DIFFERING)
def test_statement_for_postgresql_has_the_parameters_and_columns_of_the_shared_one(name):
    ours, shared = POSTGRES[SHARED[name]], SHARED[name]
    assert set(NAMED.findall(ours)) == set(NAMED.findall(shared))
    assert columns(ours) == (["id"] if WHY[shared].endswith(RETURNS) else columns(shared))


@pytest.mark.parametrize("module", [pqueue_schema, pqueue_postgres], ids=lambda module: module.__name__)
def test_statement_has_a_description(module):
    described = comments(module)
    assert [
        name for name, sql in statements(module).items() if sql in (SHARED | OWN).values() if name not in described
    ] == []


@pytest.mark.parametrize(
    ("sql", "names"),
    [
        ("SELECT a, (SELECT b FROM t) <= :now AS due FROM t", ["a", "due"]),
        ("UPDATE t SET a = (SELECT 1 FROM u) RETURNING t.id, count(a, b) AS n", ["id", "n"]),
        ("DELETE FROM t", []),
    ],
)
def test_columns_of_a_statement_are_read_from_its_text(sql, names):
    assert columns(sql) == names


@pytest.mark.parametrize("name", SHARED)
def test_statement_for_postgresql_reads_json_as_postgresql_does(name):
    """A list of ids that a shared statement did not take from THESE would not be translated."""
    assert "json_each(" not in translated(SHARED[name])[0].decode()


def test_page_of_postgresqls_statements_is_up_to_date():
    assert PAGE.read_text() == page(), "docs/postgres.sql is out of date: run make sql, and look at what changed"


if __name__ == "__main__":
    PAGE.write_text(page())
