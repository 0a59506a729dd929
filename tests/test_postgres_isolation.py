"""The queue among the application's tables, settings and roles, and the settings and rights that a DBA chose."""

# ruff: noqa: F401, F811 - pytest finds fixtures by their names

from __future__ import annotations

import os
import re
import time
import uuid
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from unittest import mock

import psycopg
import pytest
import sqlalchemy
from conftest import ROOT
from test_postgres import (
    PostgresCase,
    PostgresContractCase,
    database,
    execute_on_tables,
    server,
    set_defaults,
    shared_database,
)

import pqueue
from pqueue import NotStored, QueueBusy, QueueError
from pqueue_connections import Link, parse_url
from pqueue_sqlalchemy import PersistentQSQLAlchemy
from test_pqueue import wait_until


def with_query(url, **parameters):
    return sqlalchemy.make_url(url).update_query_dict(parameters).render_as_string(hide_password=False)


@pytest.fixture
def queue(database):
    with closing(PersistentQSQLAlchemy(database)) as queue:
        yield queue


@pytest.fixture
def admin(database):
    with psycopg.connect(database, autocommit=True) as admin:
        yield admin


# Names


def test_application_reaches_its_own_tables_and_not_the_queues(admin, queue):
    for name in ("jobs", "queues", "consumers", "history", "version", "pending_counts"):
        admin.execute(f"CREATE TABLE public.{name} (id bigint, title text)")
        admin.execute(f"INSERT INTO public.{name} VALUES (1, 'plumber wanted')")
    job_id = queue.enqueue("mail")
    with queue.transaction() as db:
        for name in ("jobs", "queues", "consumers", "history", "version", "pending_counts"):
            assert db.exec_driver_sql(f"DELETE FROM {name} WHERE id = 1").rowcount == 1
        queue.enqueue("another")
    assert admin.execute("SELECT count(*) FROM public.jobs").fetchone() == (0,)
    assert [job.task for job in queue.list_jobs()] == ["another", "mail"]
    assert queue.dequeue("w").id == job_id


@pytest.mark.parametrize("path", ["app, public", "", '"$user"', "public, pg_catalog", "nosuch"])
def test_transaction_has_the_search_path_of_the_role(server, database, path):
    PersistentQSQLAlchemy(database).close()
    name = sqlalchemy.make_url(database).database
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute("CREATE SCHEMA app")
        admin.execute(f"ALTER DATABASE {name} SET search_path = {path or chr(39) * 2}")
        with psycopg.connect(database) as plain:
            expected = plain.execute("SHOW search_path").fetchone()
    with closing(PersistentQSQLAlchemy(database)) as queue:
        for _ in range(2):
            with queue.transaction() as db:
                assert db.exec_driver_sql("SHOW search_path").one() == expected
                queue.enqueue("t")
                assert db.exec_driver_sql("SHOW search_path").one() == expected
            queue.complete(queue.dequeue("w"))


def test_functions_of_the_application_are_not_called_by_the_queue(server, database, admin, queue):
    """CVE-2018-1058: a function or an operator that fits better, in a schema that comes first."""
    admin.execute("CREATE TABLE public.calls (n int)")
    for name, arguments in (
        ("substr", "text, int"),
        ("replace", "text, unknown, unknown"),
        ("set_config", "text, text, bool"),
    ):
        with suppress(psycopg.Error):
            admin.execute(
                f"CREATE FUNCTION public.{name}({arguments}) RETURNS text LANGUAGE sql AS "
                "'INSERT INTO public.calls VALUES (1); SELECT NULL::text'"
            )
    set_defaults(server, database, {})
    admin.execute(f"ALTER DATABASE {sqlalchemy.make_url(database).database} SET search_path = public, pg_catalog")
    with closing(PersistentQSQLAlchemy(database)) as other:
        other.enqueue_many("t", range(3))
        other.complete(other.dequeue("w"))
        other.list_jobs(text="x")
    assert admin.execute("SELECT count(*) FROM public.calls").fetchone() == (0,)


OVERRIDES = """
CREATE SCHEMA override;
CREATE FUNCTION override.now() RETURNS timestamptz LANGUAGE sql AS 'SELECT timestamptz ''2000-01-01''';
CREATE FUNCTION override.hashtextextended(text, bigint) RETURNS bigint LANGUAGE plpgsql AS 'BEGIN RAISE ''mine''; END';
CREATE FUNCTION override.pg_notify(text, text) RETURNS void LANGUAGE plpgsql AS 'BEGIN RAISE ''mine''; END';
CREATE FUNCTION override.never(text, text) RETURNS bool LANGUAGE sql AS 'SELECT false';
CREATE OPERATOR override.= (LEFTARG = text, RIGHTARG = text, FUNCTION = override.never)"""


class Older:
    """A connection to a server before PostgreSQL 18, which does not report the search_path."""

    def __init__(self, driver):
        self._driver, self.pgconn, self.pipeline_status = driver, self, driver.pgconn.pipeline_status

    def __getattr__(self, name):
        return getattr(self._driver, name)

    def parameter_status(self, name):
        return None if name == b"search_path" else self._driver.pgconn.parameter_status(name)


def let_server_be_older(monkeypatch):
    ours = Link.ours

    @contextmanager
    def of_an_older_server(link):
        with mock.patch.object(link, "driver", Older(link.driver)), ours(link):
            yield

    monkeypatch.setattr(Link, "ours", of_an_older_server)


@pytest.mark.parametrize("where", ["transaction", "join"])
@pytest.mark.parametrize(
    ("sets_it", "is_older"),
    [(True, False), (False, False), (False, True)],
    ids=["by SET", "of the database", "of the database on an older server"],
)
def test_verbs_in_a_transaction_call_no_function_of_the_application(
    database, admin, monkeypatch, where, sets_it, is_older
):
    """Even if its search_path puts them before those of PostgreSQL, as for tests with a now() of their own."""
    if is_older:
        let_server_be_older(monkeypatch)
    admin.execute(OVERRIDES)
    path = "override, public, pg_catalog"
    if not sets_it:
        admin.execute(f"ALTER DATABASE {sqlalchemy.make_url(database).database} SET search_path = {path}")
    with closing(pqueue.open_queue(database)) as queue:
        ids = queue.enqueue_many("t", range(3), queue="mails")
        jobs = queue.dequeue_many("w", 2, queues=["mails"])
        with ExitStack() as undo:
            if where == "join":
                connection = undo.enter_context(psycopg.connect(**queue._conninfo))
                execute = connection.execute
            else:
                execute = undo.enter_context(queue.transaction()).exec_driver_sql
            if sets_it:
                execute(f"SET LOCAL search_path = {path}")
            with queue.join(connection) if where == "join" else nullcontext():
                ids.append(queue.enqueue("t", key="k", queue="mails"))
                ids += queue.enqueue_many("t", [1], keys=["l"], queue="mails")
                assert queue.enqueue("t", key="k", queue="mails") == ids[3]
                queue.complete(jobs[0])
                queue.fail(jobs[1], "x")
                queue.cancel(ids[2])
            assert execute("SELECT CAST(extract(year FROM now()) AS int)").fetchone() == (2000,)
            assert execute("SHOW search_path").fetchone() == (path,)
        states = [queue.get(job_id).state for job_id in ids]
        assert states == ["completed", "scheduled", "cancelled", "pending", "pending"]


# What the application leaves in the session

LEFT = [
    "SET search_path TO public",
    "SET default_transaction_read_only = on",
    "SET ROLE pg_monitor",
    "SET SESSION AUTHORIZATION pg_monitor",
    "SET statement_timeout = 1",
    "SET lock_timeout = 1",
    "SET TIME ZONE 'Asia/Kathmandu'",
    "SET synchronous_commit = off",
    "SET default_transaction_isolation = serializable",
    "SET client_encoding = LATIN1",
    "SET array_nulls = off",
    "SET enable_indexscan = off",
    "SET session_replication_role = replica",
    "CREATE TEMP TABLE jobs (id bigint, state text)",
    "CREATE TEMP TABLE queues AS SELECT 'default' AS name, 1 AS paused, 0 AS max_pending",
    "CREATE TEMP TABLE text (id int)",  # which is also a type
    "CREATE TEMP TABLE json (id int)",
    "PREPARE left_over AS SELECT 1",
    "DECLARE left_over CURSOR WITH HOLD FOR SELECT 1",
    "LISTEN something",
    "SELECT pg_advisory_lock(7)",
    "DEALLOCATE ALL",
]
STATE = """
SELECT name, setting FROM pg_settings WHERE name NOT LIKE 'transaction_%' AND name NOT LIKE '%read_only'
UNION ALL SELECT 'role', current_user || session_user
UNION ALL SELECT 'temporary', relname FROM pg_class WHERE relpersistence = 't'
UNION ALL SELECT 'cursor', name FROM pg_cursors WHERE is_holdable
UNION ALL SELECT 'channel', pg_listening_channels()
UNION ALL SELECT 'lock', objid::text FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()
ORDER BY 1, 2"""


def state_of(queue):
    """Return the state of the session that transaction() takes next."""
    link = queue._pool.take(for_application=True)
    try:
        return link.driver.execute(STATE).fetchall()
    finally:
        queue._pool.give_back(link)


@pytest.mark.parametrize("end", ["commit", "roll back", "COMMIT inside"])
@pytest.mark.parametrize("statement", LEFT)
def test_nothing_the_application_sets_outlives_its_transaction(queue, statement, end):
    with queue.transaction() as db:
        db.exec_driver_sql("SELECT 1")
    before = state_of(queue)
    for _ in range(6):  # so that statements are prepared
        queue.enqueue("日本")
    ends = {"roll back": pytest.raises(ZeroDivisionError), "COMMIT inside": pytest.raises(QueueError, match="ended")}
    with ends.get(end, nullcontext()), queue.transaction() as db:
        db.exec_driver_sql(statement)
        if end == "roll back":
            raise ZeroDivisionError
        if end == "COMMIT inside":
            db.exec_driver_sql("COMMIT")
    assert [each for each in state_of(queue) if each not in before] == []
    assert queue.enqueue_many("日本", ["€", None])
    with queue.transaction():
        job = queue.enqueue("日本", key="k")
        queue.cancel(job)
    assert len(queue.dequeue_many("w", 8)) == 8


@pytest.mark.parametrize(
    "statement", [each for each in LEFT if not each.startswith(("SET ROLE", "SET SESSION", "SET stat"))]
)
def test_verbs_in_the_same_transaction_work_whatever_the_application_has_set(queue, statement):
    queue.limit("default", 5)
    other_id = queue.enqueue("t", key="other")
    job = queue.dequeue("w")
    if "read_only" in statement:
        statement += "; SET client_min_messages = warning"
    with queue.transaction() as db:
        db.exec_driver_sql(statement)
        job_id = queue.enqueue("follow-up", "日本", key="k")
        queue.enqueue_many("t", ["日本"])
        queue.complete(job, "€")
        queue.cancel(job_id)
    assert queue.get(other_id).state == "completed"
    assert queue.get(job_id).state == "cancelled"


def test_verbs_in_a_transaction_read_the_catalog_although_temporary_tables_have_its_names(queue):
    """As a DBA copies pg_stat_activity or pg_locks to look at it."""
    queue.limit("default", 5)
    assert queue.dequeue("w") is None
    used = set(re.findall(r"pg_catalog\.(\w+)", (ROOT / "docs" / "postgres.sql").read_text()))
    with queue.transaction() as db:
        for name in used:
            db.exec_driver_sql(f"CREATE TEMP TABLE {name} (mine int)")
        queue.enqueue("t")
        queue.complete(queue.dequeue("w"))
        queue.limit("other", 5)
        queue.pause("default")
        assert queue.check()["problems"] == []
    assert {"pg_locks", "pg_class", "pg_trigger", "xid8", "regclass"} < used


def test_commit_of_the_application_waits_for_the_disk_whatever_it_has_set(queue):
    seen = []
    with queue.transaction() as db:
        db.exec_driver_sql("SET LOCAL synchronous_commit = off")
        driver = queue._session()._link.driver
        execute = driver.execute

        def look_before_the_commit(sql, **options):
            execute(sql.removesuffix("COMMIT"), **options)
            seen.append(execute("SHOW synchronous_commit").fetchone())
            return execute("COMMIT")

        driver.execute = look_before_the_commit
    del driver.execute
    assert seen == [("on",)]


def test_deferred_trigger_of_the_application_runs_with_its_settings(admin, queue):
    admin.execute("CREATE TABLE notes (path text)")
    admin.execute("CREATE TABLE orders (n int)")
    admin.execute(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "INSERT INTO notes VALUES (current_setting('search_path')); RETURN NULL; END $$"
    )
    admin.execute(
        "CREATE CONSTRAINT TRIGGER note AFTER INSERT ON orders DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION note()"
    )
    with queue.transaction() as db:
        db.exec_driver_sql("INSERT INTO orders VALUES (1)")
    assert admin.execute("SELECT path FROM notes").fetchone() == ('"$user", public',)


# What the DBA sets

HOSTILE = {
    "search_path": "pg_temp",
    "synchronous_commit": "off",
    "statement_timeout": "1000",
    "lock_timeout": "1",
    "idle_in_transaction_session_timeout": "2000",
    "idle_session_timeout": "3000",
    "transaction_timeout": "5000",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "client_encoding": "SQL_ASCII",
    "array_nulls": "off",
    "row_security": "off",
    "exit_on_error": "on",
    "session_replication_role": "replica",
    "enable_indexscan": "off",
    "plan_cache_mode": "force_custom_plan",
    "lc_messages": "C",
    "timezone": "Asia/Kathmandu",
    "temp_buffers": "100",
    "work_mem": "64",
    "maintenance_work_mem": "1024",
    "max_stack_depth": "100",
    "quote_all_identifiers": "on",
    "standard_conforming_strings": "off",
    "transform_null_equals": "on",
    "datestyle": "SQL, DMY",
    "intervalstyle": "sql_standard",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "join_collapse_limit": "1",
    "from_collapse_limit": "1",
    "geqo_threshold": "2",
    "random_page_cost": "1000000",
    "cpu_operator_cost": "1000000",
    "cursor_tuple_fraction": "0",
    "jit_above_cost": "0",
    "parallel_setup_cost": "0",
    "min_parallel_table_scan_size": "0",
    "track_activities": "off",
    "default_tablespace": "nosuch",
    "temp_tablespaces": "nosuch",
    "application_name": "mine",
}


WITHOUT_TIMEOUTS = {name: value for name, value in HOSTILE.items() if "timeout" not in name}  # those of the database


class HostileSettingsContract(PostgresContractCase, PostgresCase):
    """For a role and a database whose settings would change what statements do, or cut them off."""

    settings = WITHOUT_TIMEOUTS

    @pytest.fixture(autouse=True)
    def _role(self, roles):
        self.url = roles.add("hostile", "ALTER ROLE {role} SUPERUSER")
        role = sqlalchemy.make_url(self.url).username
        for name, value in HOSTILE.items():
            if "timeout" in name:
                roles.admin.execute(f"ALTER ROLE {role} SET {name} = {value}")

    def execute(self, db, sql, **params):
        return execute_on_tables(db, sql, params)

    def test_settings_of_the_queue_are_its_own(self):
        self.assertEqual(self.queue._read("SHOW synchronous_commit"), [("on",)])
        self.assertEqual(self.queue._read("SHOW statement_timeout"), [("0",)])
        self.assertEqual(self.queue.check()["problems"], [])


@pytest.mark.parametrize(
    "limits",
    [
        {"statement_timeout": "1000"},  # connecting must take less
        {"lock_timeout": "1"},
        {"idle_session_timeout": "1000"},
        {"transaction_timeout": "1000"},
        {"idle_in_transaction_session_timeout": "1"},
    ],
)
def test_time_limit_of_the_role_does_not_take_its_job_from_a_consumer(server, database, limits):
    PersistentQSQLAlchemy(database).close()
    set_defaults(server, database, limits)
    with closing(PersistentQSQLAlchemy(database)) as queue:
        queue.enqueue_many("t", range(300))
        job = queue.dequeue("w", lease_seconds=60)
        pid = queue._listener._link.driver.info.backend_pid
        time.sleep(1.2)  # longer than each limit
        queue.extend(job, 60)
        queue.heartbeat("w")
        assert queue._listener._link.driver.info.backend_pid == pid
        queue.complete(job)
        assert len(queue.dequeue_many("w", 128)) == 128
        queue.prune(0)


def test_time_limit_of_the_role_holds_for_the_statements_of_the_application(server, database):
    PersistentQSQLAlchemy(database).close()
    set_defaults(server, database, {"statement_timeout": "200"})
    with closing(PersistentQSQLAlchemy(database)) as queue:
        with pytest.raises(sqlalchemy.exc.OperationalError, match="statement timeout"), queue.transaction() as db:
            db.exec_driver_sql("SELECT pg_sleep(30)")
        queue.enqueue("t")


def test_limit_of_temporary_files_is_an_error_that_says_so(server, database):
    PersistentQSQLAlchemy(database).close()
    set_defaults(server, database, {"work_mem": "64", "temp_file_limit": "0"})
    with closing(PersistentQSQLAlchemy(database)) as queue:
        with pytest.raises(QueueError, match="cannot use .*: temporary file size exceeds") as refused:
            queue.enqueue_many("t", ["x" * 1000] * 1000)
        assert not isinstance(refused.value, QueueBusy)
        queue.enqueue("t")


@pytest.mark.parametrize("durability", ["full", "normal"])
@pytest.mark.parametrize("mode", ["off", "local", "remote_write", "on", "remote_apply"])
def test_full_durability_waits_for_the_disk_whatever_the_database_says(server, database, durability, mode):
    set_defaults(server, database, {"synchronous_commit": mode})
    with closing(PersistentQSQLAlchemy(database, durability=durability)) as queue:
        queue.enqueue("t")
        expected = "off" if durability == "normal" else "on" if mode == "off" else mode
        assert queue._read("SHOW synchronous_commit") == [(expected,)]
        with queue.transaction() as db:
            assert db.exec_driver_sql("SHOW synchronous_commit").scalar() == expected
        assert queue.check()["problems"] == []


# Encodings


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "EUC_JP"])
def test_environment_does_not_choose_the_encoding(database, encoding):
    with mock.patch.dict(os.environ, {"PGCLIENTENCODING": encoding}), closing(PersistentQSQLAlchemy(database)) as queue:
        queue.enqueue("t", "日本")
        job = queue.dequeue("w")
        assert job.payload == "日本"
        queue.complete(job, "€")
        queue.enqueue("t", "日本")
        queue.fail(queue.dequeue("w"), "ValueError: 日本")
        assert queue.get(job.id).result == "€"


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_database_of_another_encoding_is_refused(server, encoding):
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
        url = sqlalchemy.make_url(server).set(database=name, drivername="postgresql")
        with pytest.raises(QueueError, match=f"expected a database with ENCODING 'UTF8', got {encoding}") as caught:
            pqueue.open_queue(url.render_as_string(hide_password=False))
        assert not isinstance(caught.value, QueueBusy)
        admin.execute(f"DROP DATABASE {name}")


# Schemas


def test_queues_in_two_schemas_of_a_database_know_nothing_of_each_other(database):
    with ExitStack() as undo:
        billing, mail = (
            undo.enter_context(closing(pqueue.open_queue(url)))
            for url in (database, with_query(database, schema="Mail-App"))
        )
        job_id = billing.enqueue("invoice", 7, key="k")
        assert mail.dequeue("worker") is None
        assert mail.enqueue("letter", 8, key="k") == job_id  # each counts its own
        assert (billing.dequeue("worker").task, mail.dequeue("worker").task) == ("invoice", "letter")
        assert [len(each.consumers()) for each in (billing, mail)] == [1, 1]
        mail.limit("default", 1)
        mail.enqueue("letter")
        with pytest.raises(pqueue.QueueFull):
            mail.enqueue("letter")
        billing.enqueue_many("invoice", range(5))
        billing.limit("default", 5)
        with pytest.raises(pqueue.QueueFull):
            billing.enqueue("invoice")
        assert billing.check()["problems"] == mail.check()["problems"] == []
        assert mail.name.endswith("?schema=Mail-App")
        assert billing._listener is not None
        wakeups = billing._listener._wakeups
        mail.enqueue("letter", queue="other")
        assert billing._read("SELECT 1") == [(1,)]
        assert billing._listener._wakeups == wakeups  # its channel is another


class OtherSchemaContract(PostgresContractCase, PostgresCase):
    """With another queue in the same database."""

    @pytest.fixture(autouse=True)
    def _schema(self, database):
        with closing(pqueue.open_queue(database)) as other:
            other.enqueue("of the other queue")
            self.url = with_query(database, schema="user")  # a keyword
            yield
            assert [job.state for job in other.list_jobs()] == ["pending"]

    def execute(self, db, sql, **params):
        db.exec_driver_sql('SET LOCAL search_path TO "user", public')
        return db.execute(sqlalchemy.text(sql), params)


@pytest.mark.parametrize("name", ["", "pg_mine", "information_schema", "a.b", 'a"b', "x" * 64, "a b", "1a", "ä"])
def test_schema_name_that_cannot_be_is_refused(database, name):
    with pytest.raises(ValueError, match="expected a schema of at most 63"):
        pqueue.open_queue(with_query(database, schema=name) if name else database + "&schema=")


# Rights


class Roles:
    """Roles of one database; `url` is that of a role."""

    def __init__(self, server, database):
        self.database, self.suffix = sqlalchemy.make_url(database), uuid.uuid4().hex[:8]
        self.admin = psycopg.connect(database, autocommit=True)
        self.names = []

    def add(self, name, *grants, schema="pqueue"):
        role = f"{name}_{self.suffix}"
        self.names.append(role)
        self.admin.execute(f'CREATE ROLE "{role}" LOGIN')
        for grant in grants:
            self.admin.execute(grant.format(role=role, schema=schema))
        return self.database.set(username=role).render_as_string(hide_password=False)

    def close(self):
        for role in self.names:
            self.admin.execute(f'DROP OWNED BY "{role}" CASCADE')
            self.admin.execute(f'DROP ROLE "{role}"')
        self.admin.close()


@pytest.fixture
def roles(server, database):
    with closing(Roles(server, database)) as roles:
        yield roles


def documented(role):
    """Return the statements of docs/postgres.md that give a role its rights."""
    text = (ROOT / "docs" / "postgres.md").read_text()
    block = text.split("-- " + role, 1)[1].split("\n--", 1)[0].split("```", 1)[0]
    lines = [each.strip() for each in block.split("\n", 1)[1].split(";") if each.strip()]
    return [each.replace(f" {role}", " {role}") for each in lines]


def test_owner_of_the_schema_alone_creates_the_queue(roles):
    url = roles.add("owner", *documented("owner"))
    with closing(pqueue.open_queue(url)) as queue:
        queue.limit("default", 10)
        queue.enqueue("t")
        queue.complete(queue.dequeue("w"))
        assert queue.check()["problems"] == []


def use_what_others_add(queue):
    """Use groups, dependencies, handlers, schedules, retention and expected outcomes."""
    queue.enqueue("t", queue="groups", group="a")
    queue.enqueue("t", queue="groups", group="b")
    queue.weigh("groups", "a", 2)
    queue.limit("groups", running=2, rate=(10, 60.0))
    parent = queue.enqueue("t", queue="family")
    queue.enqueue("t", queue="family", after=[parent])
    queue.on_failed("family", "handler")
    queue.fail(queue.dequeue("w", queues=["family"]), "ValueError: no", retry=False)
    queue.complete(queue.dequeue("w", queues=["groups"]))
    queue.resubmit(parent)
    queue.schedule("hourly", "t", every_seconds=3600)
    queue.pause_schedule("hourly")
    queue.unschedule("hourly")
    queue.keep("default", completed=1)
    queue.expect("default", max_wait_seconds=60)
    queue.enqueue("t", expires_at=1.0)
    queue.dequeue("w", now=queue.now() + 60)
    queue.prune_kept(now=queue.now() + 60)


def test_documented_grants_suffice_and_no_more_is_possible(roles):
    hardening = "ALTER DEFAULT PRIVILEGES FOR ROLE {role} REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC"
    owner = roles.add("owner", *documented("owner"), hardening)
    with closing(pqueue.open_queue(owner)) as queue:
        queue.limit("limited", 5)
        queue.enqueue("t", queue="limited")
    producer, worker, reader = (roles.add(name, *documented(name)) for name in ("producer", "worker", "reader"))
    with closing(pqueue.open_queue(producer)) as queue:
        queue.enqueue("t", key="k")
        queue.enqueue("t", key="k")
        queue.enqueue("t", key="hourly", key_seconds=3600, now=1.0)
        assert queue.enqueue("t", key="hourly", key_seconds=3600).is_new
        queue.enqueue_many("t", range(3), queue="new")
        queue.enqueue("t", queue="limited")
        queue.enqueue("t", queue="grouped", group="a")
        with pytest.raises(QueueError, match=r"role producer_\w+ lacks INSERT, UPDATE, DELETE on table pqueue.history"):
            queue.cancel(1)
        with pytest.raises(QueueError, match=r"role producer_\w+ lacks UPDATE, DELETE on table pqueue.jobs"):
            queue.enqueue("t", after=[1])
    with closing(pqueue.open_queue(worker)) as queue:
        while job := queue.dequeue("w"):
            queue.complete(job)
        queue.enqueue("t")
        use_what_others_add(queue)
        queue.pause("default")
        queue.cancel(queue.list_jobs(state="pending")[0].id)
        queue.prune(0)
        assert queue.check()["problems"] == []
        queue.limit("limited", None)
    with closing(pqueue.open_queue(reader, create=False)) as queue:
        queue.stats()
        queue.list_jobs()
        queue.consumers()
        queue.failures()
        queue.outcomes()
        queue.expectations()
        queue.schedules()
        queue.handlers()
        queue.retention()
        queue.limits("groups", "a")
        queue.dependencies(1)
        queue.operations()
        assert queue.check()["problems"] == []
        with pytest.raises(QueueError, match=r"lacks INSERT, UPDATE, DELETE on table pqueue.jobs") as refused:
            queue.enqueue("t")
        assert "cannot use" in str(refused.value)


@pytest.mark.parametrize("kind", ["worker", "reader"])
def test_role_with_the_documented_grants_finds_a_sequence_that_is_behind(roles, kind):
    with closing(pqueue.open_queue(roles.add("owner", *documented("owner")))) as queue:
        queue.enqueue("t")
    roles.admin.execute("SELECT setval('pqueue.jobs_id_seq', 1, false)")
    with closing(pqueue.open_queue(roles.add(kind, *documented(kind)))) as queue:
        (problem,) = queue.check()["problems"]
        assert problem.startswith("the ids of jobs continue at 1, but 1 is taken")


def test_producer_cannot_execute_functions_with_the_rights_of_the_owner(admin, roles):
    """By a temporary type: PostgreSQL looks for types there first, unless a search_path names pg_temp."""
    with closing(pqueue.open_queue(roles.add("owner", *documented("owner")))) as queue:
        queue.limit("default", 5)
    with closing(pqueue.open_queue(roles.add("producer", *documented("producer")))) as queue, queue.transaction() as db:
        db.exec_driver_sql("CREATE TEMP TABLE callers AS SELECT current_user AS name")
        db.exec_driver_sql("GRANT INSERT ON callers TO PUBLIC")
        db.exec_driver_sql(
            "CREATE FUNCTION pg_temp.note(pg_catalog.text) RETURNS bool LANGUAGE sql AS "
            "'INSERT INTO callers VALUES (current_user) RETURNING true'"
        )
        db.exec_driver_sql("CREATE DOMAIN pg_temp.text AS pg_catalog.text CHECK (pg_temp.note(VALUE))")
        queue.enqueue("t")
        queue.enqueue("t", group="a")
        assert db.exec_driver_sql("SELECT DISTINCT name FROM callers").fetchall() == [(roles.names[1],)]


def test_worker_is_told_that_the_first_limit_is_set_by_the_owner(roles):
    pqueue.open_queue(roles.add("owner", *documented("owner"))).close()
    with closing(pqueue.open_queue(roles.add("worker", *documented("worker")))) as queue:
        with pytest.raises(QueueError, match=r"role worker_\w+ does not own table pqueue.jobs"):
            queue.limit("default", 5)
        assert "default" not in queue.stats()["queues"]  # nothing was changed


def test_worker_is_told_which_right_it_lacks_to_move_jobs_to_the_queue(roles, tmp_path):
    pqueue.open_queue(roles.add("owner", *documented("owner"))).close()
    worker = roles.add("worker", *documented("worker"))
    with closing(pqueue.open_queue(tmp_path / "old.db")) as old, closing(pqueue.open_queue(worker)) as new:
        old.enqueue("t")
        with pytest.raises(QueueError, match=r"role worker_\w+ lacks UPDATE on sequence pqueue.jobs_id_seq$"):
            old.copy_to(new)
        assert new.count_jobs() == 0
        roles.admin.execute(f"GRANT UPDATE ON ALL SEQUENCES IN SCHEMA pqueue TO {roles.names[1]}")
        old.copy_to(new)
        assert new.count_jobs() == 1


@pytest.fixture
def forbid(admin):
    """A function that lets an event trigger of the DBA refuse what changes tables, and one that ends that."""

    def begin(event):
        admin.execute(
            "CREATE FUNCTION public.refuse() RETURNS event_trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE 'no changes of tables'; END $$"
        )
        admin.execute(f"CREATE EVENT TRIGGER refuse ON {event} EXECUTE FUNCTION public.refuse()")

    def end():
        admin.execute("DROP EVENT TRIGGER refuse")
        admin.execute("DROP FUNCTION public.refuse")

    return begin, end


@pytest.mark.parametrize("event", ["ddl_command_start", "ddl_command_end", "sql_drop"])
def test_operator_removes_limits_although_the_tables_may_not_be_changed(admin, queue, forbid, event):
    triggers = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'pending%'"
    begin, end = forbid
    queue.limit("default", 1)
    queue.enqueue("t")
    begin(event)
    queue.limit("other", 1)
    queue.limit("other", None)
    queue.limit("default", None)
    queue.enqueue("t")
    assert admin.execute(triggers).fetchone()[0] == 4  # which count nothing
    queue.check()
    queue.compact()
    queue.clear("default")
    end()
    queue.limit("default", None)
    assert admin.execute(triggers).fetchone()[0] == 0


@pytest.mark.parametrize("event", ["ddl_command_start", "ddl_command_end"])
def test_operator_is_told_that_the_first_limit_changes_the_tables(admin, queue, forbid, event):
    begin, end = forbid
    queue.enqueue("t")
    begin(event)
    expected = r"no changes of tables \(the first limit of pending jobs adds triggers to table jobs\)$"
    with pytest.raises(QueueError, match=expected) as refused:
        queue.limit("default", 1)
    assert not isinstance(refused.value, QueueBusy)
    queue.enqueue("t")  # nothing was changed
    assert queue.operations() == []
    end()
    queue.limit("default", 2)
    with pytest.raises(QueueError, match="limit"):
        queue.enqueue("t")


def test_policy_of_the_database_holds_in_every_verb(admin, roles):
    with closing(pqueue.open_queue(roles.add("owner", *documented("owner")))) as queue:
        queue.enqueue("t", queue="theirs")
        ours = queue.enqueue("t", queue="ours")
    worker = roles.add("worker", *documented("worker"))
    admin.execute("ALTER TABLE pqueue.jobs ENABLE ROW LEVEL SECURITY")
    admin.execute("CREATE POLICY ours ON pqueue.jobs USING (queue = 'ours')")
    with closing(pqueue.open_queue(worker)) as queue:
        assert [job.id for job in queue.list_jobs()] == [ours]
        with pytest.raises(QueueError, match="row-level security"):
            queue.enqueue("t", queue="theirs")
        assert [job.id for job in queue.dequeue_many("w", 9)] == [ours]
        admin.execute("ALTER TABLE pqueue.queues ENABLE ROW LEVEL SECURITY")
        admin.execute("CREATE POLICY ours ON pqueue.queues USING (name = 'ours') WITH CHECK (true)")
        with pytest.raises(NotStored, match="did not store the job; run .* doctor"):
            queue.enqueue("t", queue="theirs")
    admin.execute("ALTER TABLE pqueue.version ENABLE ROW LEVEL SECURITY")
    with pytest.raises(QueueError, match=r"expected a row in table pqueue.version, got none: row-level security may"):
        pqueue.open_queue(worker)


@pytest.mark.parametrize("right", ["", "USAGE ON SCHEMA pqueue", "SELECT ON ALL TABLES IN SCHEMA pqueue"])
def test_error_does_not_blame_the_role_of_the_queue_for_that_of_a_transaction(admin, queue, database, roles, right):
    roles.add("other", *([f"GRANT {right} TO {{role}}"] if right else []))
    (other,) = roles.names
    with suppress(QueueError), queue.transaction() as db:
        db.exec_driver_sql(f'SET ROLE "{other}"')
        with pytest.raises(QueueError, match="the role of this transaction lacks a right on (schema|table) pqueue"):
            queue.enqueue("t")
    with psycopg.connect(database) as connection:
        connection.execute(f'SET ROLE "{other}"')
        with (
            pytest.raises(QueueError, match="the role of this transaction lacks a right on (schema|table) pqueue"),
            queue.join(connection),
        ):
            queue.enqueue("t")
    assert queue.enqueue("t")


def test_statement_that_an_error_advises_names_what_must_be_quoted(admin, database, roles):
    worker = roles.add("Worker's")
    with pytest.raises(QueueError, match="or run (CREATE SCHEMA .*)") as refused:
        pqueue.open_queue(with_query(worker, schema="team-A"))
    admin.execute(str(refused.value).partition("or run ")[2])
    with closing(pqueue.open_queue(with_query(worker, schema="team-A"))) as queue:
        assert queue.enqueue("t")


@pytest.mark.parametrize(
    ("grants", "message"),
    [
        ((), r"lacks CREATE on database test_\w+: grant it, or run CREATE SCHEMA pqueue AUTHORIZATION weak_"),
        (("CREATE SCHEMA pqueue",), r"role weak_\w+ lacks USAGE, CREATE on schema pqueue"),
        (("CREATE SCHEMA pqueue", "GRANT USAGE ON SCHEMA pqueue TO {role}"), r"role weak_\w+ lacks CREATE on schema"),
    ],
)
def test_right_that_is_missing_to_create_the_queue_is_named(roles, grants, message):
    with pytest.raises(QueueError, match=message) as refused:
        pqueue.open_queue(roles.add("weak", *grants))
    assert str(refused.value).startswith("cannot open ")
    assert not isinstance(refused.value, QueueBusy)


def test_right_that_is_missing_to_read_the_version_is_named(database, roles):
    PersistentQSQLAlchemy(database).close()
    with pytest.raises(QueueError, match=r"role weak_\w+ lacks SELECT, .* on table pqueue.version"):
        pqueue.open_queue(roles.add("weak", "GRANT USAGE ON SCHEMA pqueue TO {role}"), create=False)


def test_right_that_is_missing_is_reported_though_no_connection_is_left_to_ask_which(queue, roles):
    url = roles.add("reader", *documented("reader"), "ALTER ROLE {role} CONNECTION LIMIT 1")
    with (
        closing(PersistentQSQLAlchemy(url, busy_seconds=3600)) as weak,
        pytest.raises(QueueError, match="permission denied for table [a-z]+$"),
        weak.transaction(),
    ):
        weak.enqueue("t")


def test_right_that_is_missing_to_call_a_function_is_named(admin, queue, roles):
    admin.execute("REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA pqueue FROM PUBLIC")
    grants = [each for each in documented("producer") if "FUNCTION" not in each]
    with (
        closing(pqueue.open_queue(roles.add("weak", *grants))) as weak,
        pytest.raises(QueueError, match=r"role weak_\w+ lacks EXECUTE on function pqueue.count_pending$"),
    ):
        weak.enqueue("t")


def test_function_whose_owner_lost_its_rights_is_named(admin, queue, roles):
    roles.add("former")
    (former,) = roles.names
    admin.execute(f'ALTER FUNCTION pqueue.note_group OWNER TO "{former}"')
    (problem,) = queue.check()["problems"]
    assert f"function pqueue.note_group() belongs to {former}, which lacks a right on the tables" in problem
    with pytest.raises(QueueError, match="the owner of function note_group lacks a right on (schema|table) pqueue"):
        queue.enqueue("t", group="a")
    with pytest.raises(QueueError, match="the owner of function note_group"), queue.transaction():
        queue.enqueue("t", group="a")
    admin.execute(problem.partition("run ")[2])
    assert queue.check()["problems"] == []
    assert queue.enqueue("t", group="a")


def test_role_whose_transactions_are_read_only_reads_and_is_told_why_it_cannot_write(database, roles):
    PersistentQSQLAlchemy(database).close()
    url = roles.add("reader", *documented("reader"), "ALTER ROLE {role} SET default_transaction_read_only = on")
    with closing(pqueue.open_queue(url)) as queue:
        assert queue.check()["problems"] == []
        with pytest.raises(QueueError, match="default_transaction_read_only is on") as refused:
            queue.enqueue("t")
        assert "standby" not in str(refused.value)


def test_producer_in_a_transaction_that_only_reads_is_told_so(queue):
    with pytest.raises(QueueError, match="its transactions are read-only"), queue.transaction() as db:
        db.exec_driver_sql("SET TRANSACTION READ ONLY")
        queue.enqueue("t")
