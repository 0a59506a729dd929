"""Whether an SQLite database is a queue, and of which version."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import cast

from pqueue_schema import APPLICATION_ID, MIGRATIONS, SQLITE_TYPES, TABLES, expect_known
from pqueue_values import SchemaMismatch, command_line

OUR_TABLES = f"SELECT name, sql LIKE '%STRICT' FROM sqlite_master WHERE type = 'table' AND name IN {TABLES}"
DEFINITIONS = "SELECT type, name, sql FROM sqlite_master"


def schema_of(*triggers: dict[str, str]) -> set[tuple[str, str, str]]:
    """Return the schema of a queue with these triggers as SQLite reports it: types, names and statements."""
    with closing(sqlite3.connect(":memory:")) as model:
        for statement in chain(*MIGRATIONS, *(each.values() for each in triggers)):
            model.execute(statement.format_map(SQLITE_TYPES))
        return set(model.execute(DEFINITIONS))


def is_dump(connection: sqlite3.Connection) -> bool:
    """Return whether this is a queue restored from the output of .dump, which omits its application id and version."""
    marks = connection.execute("SELECT * FROM pragma_application_id, pragma_user_version").fetchone()
    return bool(marks == (0, 0) and schema_of() <= set(connection.execute(DEFINITIONS)))


def adopt_dump(connection: sqlite3.Connection) -> None:
    """Set the application id and the schema version of such a queue."""
    if is_dump(connection):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")


def expect_ours(connection: sqlite3.Connection, path: Path) -> int:
    """Return the version of a database that is a queue or empty."""
    owner, version, tables = connection.execute(
        "SELECT *, (SELECT count(*) FROM sqlite_master) FROM pragma_application_id, pragma_user_version"
    ).fetchone()
    # guard: another program's file is refused
    if owner != APPLICATION_ID and (owner or version or tables):
        instead = "choose another path, or let the queue create the file before the other program"
        raise SchemaMismatch(f"cannot use {path}: expected a queue, got another program's database; {instead}")
    return cast(int, version)


def schema_version(connection: sqlite3.Connection, path: Path) -> int:
    """Return the schema version of a queue, 0 for an empty database. Raises SchemaMismatch for any other."""
    version = expect_ours(connection, path)
    expect_known(path, version)
    ours = dict(connection.execute(OUR_TABLES))
    # guard: a file without our tables is refused
    if version and (missing := [name for name in TABLES if name not in ours]):
        raise SchemaMismatch(
            f"cannot use {path}: expected the tables of a queue; missing: {', '.join(missing)}; stop all programs and "
            f"run {command_line()} restore with a backup"
        )
    # guard: a file from before 0.1 is refused
    if version and 0 in ours.values():
        raise SchemaMismatch(
            f"cannot use {path}: it was created by a version before 0.1: finish its jobs with that version, "
            "then move the file away"
        )
    return version
