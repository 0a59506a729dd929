"""Enqueueing in a transaction of the application, whose connection is of SQLAlchemy or psycopg."""

# ruff: noqa: F401, F811 - pytest finds fixtures by their names

from __future__ import annotations

from contextlib import ExitStack, closing

import psycopg
import pytest
import sqlalchemy
from postgres_server import Server
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from test_postgres import database, server
from test_postgres_isolation import let_server_be_older

import pqueue
from pqueue import LeaseLost, QueueError
from test_pqueue import PATIENCE_SECONDS


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    number: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture(params=["sqlite", "postgres"])
def queue(request, tmp_path):
    url = tmp_path / "q.db" if request.param == "sqlite" else request.getfixturevalue("database")
    with pqueue.open_queue(url) as queue:
        yield queue


@pytest.fixture
def engine(queue):
    if isinstance(queue, pqueue.PersistentQSQLite):
        engine = sqlalchemy.create_engine(f"sqlite:///{queue.path}")
    else:
        conninfo = dict(queue._conninfo)
        engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(**conninfo))
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def test_session_of_sqlalchemy_commits_and_rolls_back_its_jobs(queue, engine):
    with Session(engine) as session, session.begin():
        session.add(Order(number=7))
        with queue.join(session):
            job_id = queue.enqueue("book", {"number": 7})
    with pytest.raises(ZeroDivisionError), Session(engine) as session, session.begin():
        session.add(Order(number=8))
        with queue.join(session):
            queue.enqueue("book", {"number": 8})
        raise ZeroDivisionError
    with Session(engine) as session:
        assert session.scalars(sqlalchemy.select(Order.number)).all() == [7]
    assert [job.id for job in queue.list_jobs()] == [job_id]


def test_connection_of_sqlalchemy_commits_and_rolls_back_its_jobs(queue, engine):
    with engine.connect() as connection:
        with queue.join(connection):  # the first use of the connection
            job_id = queue.enqueue("book")
        connection.commit()
        with queue.join(connection):
            queue.enqueue("book")
        connection.rollback()
    assert [job.id for job in queue.list_jobs()] == [job_id]


def test_connection_of_sqlalchemy_that_commits_each_statement_or_is_closed_is_not_joined(queue, engine):
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        with pytest.raises(QueueError, match="commits each statement by itself"), queue.join(connection):
            pass
    with pytest.raises(QueueError, match="closed"), queue.join(connection):
        pass
    assert queue.count_jobs() == 0


def test_application_that_closes_its_connection_in_the_block_is_told_that_it_ended(queue, engine):
    with engine.connect() as connection:
        with pytest.raises(QueueError, match="cannot continue in a transaction that has ended"), queue.join(connection):
            queue.enqueue("t")
            connection.connection.driver_connection.close()
            queue.enqueue("t")
        connection.invalidate()
    assert queue.count_jobs() == 0


@pytest.mark.parametrize("queue", ["postgres"], indirect=True)
def test_connection_of_psycopg_takes_part_in_its_transaction_only(queue, database):
    with closing(psycopg.connect(database, autocommit=True)) as connection:
        with pytest.raises(QueueError, match="commits each statement by itself"), queue.join(connection):
            pass
        with connection.transaction(), queue.join(connection):
            queue.enqueue("t")
        with connection.transaction():
            connection.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            connection.execute("SELECT 1")
            with queue.join(connection):
                queue.enqueue("another", queue="new")
        with pytest.raises(QueueError, match="read-only"), connection.transaction():
            connection.execute("SET TRANSACTION READ ONLY")
            with queue.join(connection):
                pass
        with pytest.raises(psycopg.errors.DivisionByZero), connection.transaction():
            try:
                connection.execute("SELECT 1 / 0")
            finally:
                with pytest.raises(QueueError, match="has failed"), queue.join(connection):
                    pass
        connection.execute("SET synchronous_commit = off")
        with connection.transaction():
            with queue.join(connection):
                queue.enqueue("t")
            assert connection.execute("SHOW synchronous_commit").fetchone() == ("on",)
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("off",)
    assert queue.count_jobs() == 3


@pytest.mark.parametrize("queue", ["postgres"], indirect=True)
@pytest.mark.parametrize("ends", [Session.commit, lambda session: (session.commit(), session.bind.dispose())])
def test_application_that_commits_in_the_block_wakes_consumers_and_leaves_no_transaction_open(
    queue, engine, database, ends
):
    with psycopg.connect(database, autocommit=True) as other:
        other.execute("LISTEN pqueue")
        with Session(engine) as session, queue.join(session):
            queue.enqueue("t")
            ends(session)
        (notify,) = other.notifies(timeout=PATIENCE_SECONDS, stop_after=1)
        assert notify.payload == ""
        open_ones = "SELECT query FROM pg_stat_activity WHERE state = 'idle in transaction'"
        assert other.execute(open_ones).fetchall() == []
    assert queue.count_jobs() == 1


@pytest.mark.parametrize("queue", ["postgres"], indirect=True)
@pytest.mark.parametrize("where", ["join", "transaction"])
def test_lease_that_was_lost_is_noticed_in_a_pipeline_of_the_application(queue, database, where):
    """psycopg's pipeline returns before the server has answered."""
    queue.enqueue("t")
    job = queue.dequeue("w")
    queue.cancel(job.id)
    with pytest.raises(LeaseLost), ExitStack() as undo:
        if where == "join":
            driver = undo.enter_context(psycopg.connect(database))
            undo.enter_context(queue.join(driver))
        else:
            driver = undo.enter_context(queue.transaction()).connection.driver_connection
        undo.enter_context(driver.pipeline())
        assert queue.enqueue("next", key="k") == queue.enqueue("next", key="k")
        queue.complete(job)
    assert [each.state for each in queue.list_jobs()] == ["cancelled"]


def test_transaction_of_two_phases_is_joined(tmp_path):
    own = Server(tmp_path / "server").create().start(max_prepared_transactions=2)
    try:
        with pqueue.open_queue(own.url) as queue, closing(psycopg.connect(own.url)) as connection:
            queue.enqueue("t")
            job = queue.dequeue("w")
            queue._open_listener()._awaited_until = float("inf")  # as if a process waited for a result
            connection.tpc_begin("a b")
            with queue.join(connection):
                queue.complete(job)
                job_id = queue.enqueue("another", queue="new")
            connection.tpc_prepare()
            assert queue.get(job.id).state == "processing"
            connection.tpc_commit()
            assert [queue.get(each).state for each in (job.id, job_id)] == ["completed", "pending"]
            engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(own.url))
            with Session(engine, twophase=True) as session, session.begin(), queue.join(session):
                queue.enqueue("t")
            engine.dispose()
            assert queue.count_jobs(state="pending") == 2
    finally:
        own.kill()


SETTINGS = {
    "TimeZone": "Asia/Kathmandu",
    "DateStyle": "German, DMY",
    "IntervalStyle": "iso_8601",
    "extra_float_digits": "-15",
    "bytea_output": "escape",
    "standard_conforming_strings": "off",
    "client_encoding": "LATIN1",
    "quote_all_identifiers": "on",
    "array_nulls": "off",
    "search_path": "",
}


@pytest.mark.parametrize("queue", ["postgres"], indirect=True)
@pytest.mark.parametrize("name", SETTINGS)
def test_connection_is_joined_whatever_its_settings(queue, name):
    with psycopg.connect(**queue._conninfo) as connection:
        connection.execute("SELECT set_config(%s, %s, false)", (name, SETTINGS[name]))
        with queue.join(connection):
            job_id = queue.enqueue("日本", 0.1, key="ß")
    job = queue.get(job_id)
    assert (job.task, job.payload, job.key) == ("日本", 0.1, "ß")


@pytest.mark.parametrize("queue", ["postgres"], indirect=True)
def test_connection_without_an_encoding_to_an_older_server_is_joined(queue, monkeypatch):
    let_server_be_older(monkeypatch)
    with psycopg.connect(**queue._conninfo) as connection:
        connection.execute("SET client_encoding = SQL_ASCII")
        with queue.join(connection):
            job_id = queue.enqueue("日本")
    assert queue.get(job_id).task == "日本"


@pytest.mark.parametrize("queue", ["postgres"], indirect=True)
def test_connection_to_another_database_is_not_joined(queue, server):
    with closing(psycopg.connect(server)) as connection:
        with pytest.raises(QueueError, match="got one to another database"), queue.join(connection):
            pass
        connection.rollback()
    with pytest.raises(QueueError, match="closed"), queue.join(connection):
        pass


class AppSession(AsyncSession):
    """As an application may derive it."""


@pytest.mark.filterwarnings("error")  # a coroutine that is not awaited
@pytest.mark.parametrize("kind", [AsyncSession, AppSession, AsyncConnection, AsyncEngine])
def test_asynchronous_connection_is_refused(queue, kind):
    engine = create_async_engine("postgresql+psycopg://host/db")  # which does not connect yet
    given = engine if kind is AsyncEngine else kind(engine)
    with pytest.raises(ValueError, match="^expected a synchronous connection or Session, got <"), queue.join(given):
        pass
