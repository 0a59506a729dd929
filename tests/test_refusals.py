"""What a PostgreSQL server refuses: each program says it in one line, and a password is shown nowhere."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from postgres_server import Server

import pqueue
from test_pqueue import wait_until

PASSWORD = f"hunter{os.getpid()}"  # the titles of all processes are looked at
PROGRAMS = [
    ["producer.py", "--count", 1],
    ["consumer.py", "--drain"],
    ["admin.py", "stats"],
    ["admin.py", "enqueue", "t"],
]


@pytest.fixture(scope="module")
def primary(tmp_path_factory):
    """A server with a queue that asks everybody but its owner for a password."""
    server = Server(tmp_path_factory.mktemp("servers") / "primary").create().start()
    queue = pqueue.open_queue(server.url)
    queue.enqueue("t")
    queue.close()
    for role in ("owner SUPERUSER", "weak"):
        server.ask(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")
    rules = server.data / "pg_hba.conf"
    rules.write_text("host all owner,weak 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
    server.ask("SELECT pg_reload_conf()")
    yield server
    server.kill()


@pytest.fixture(scope="module")
def standby(primary):
    server = Server(primary.folder.parent / "standby").copy(primary).start()
    yield server
    server.kill()


def url(server, user: str = "owner", password: str = PASSWORD) -> str:
    return f"postgresql://{user}:{password}@{server.address}:{server.port}/postgres"


def refusals(place, variables: dict[str, str], programs=PROGRAMS) -> list[str]:
    """Return what each program says: one line, without the password."""
    said = []
    for program, *arguments in programs:
        done = place.run(program, *arguments, **variables)
        text = done.stdout + done.stderr
        assert done.returncode == 1, (program, text)
        assert len([line for line in text.splitlines() if " started " not in line]) == 1, (program, text)
        assert PASSWORD not in text
        said.append(text)
    return said


def test_wrong_password_is_reported(place, primary):
    for text in refusals(place, {"PQUEUE_URL": url(primary, password=f"not{PASSWORD}")}):
        assert "user or password refused" in text


def test_dashboard_that_is_refused_says_so_without_the_password(place, primary):
    page = health(place.dashboard(PQUEUE_URL=url(primary, password=f"not{PASSWORD}")))
    assert "user or password refused" in page
    assert PASSWORD not in page + place.children[0].out.read_text()


def health(address: str) -> str:
    with pytest.raises(HTTPError) as refused, urlopen(f"{address}/healthz"):  # noqa: S310
        pass
    with refused.value as answer:
        return answer.read().decode()


def test_role_without_rights_is_reported(place, primary):
    for text in refusals(place, {"PQUEUE_URL": url(primary, "weak")}):
        assert "permission denied" in text


def test_write_on_a_standby_is_refused_by_name(place, standby):
    for text in refusals(place, {"PQUEUE_URL": url(standby)}, [PROGRAMS[n] for n in (0, 1, 3)]):
        assert "it is a read-only standby" in text


def test_standby_serves_readers(place, standby):
    done = place.run("admin.py", "stats", PQUEUE_URL=url(standby))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_no_process_bears_the_password_in_its_title_while_the_system_works(place, primary, standby):
    variables = {"PQUEUE_URL": url(primary)}
    programs = [
        place.start("producer.py", "--interval", "0.05", **variables),
        place.start("consumer.py", **variables),
        place.start("ops.py", "--port", 0, **variables),
    ]
    queue = pqueue.open_queue(variables["PQUEUE_URL"])
    wait_until(lambda: queue.stats()["states"]["completed"] > 5)
    titles = [title(process) for process in Path("/proc").glob("[0-9]*")]
    assert any("consumer.py" in each for each in titles)
    assert not [each for each in titles if PASSWORD in each]
    assert not any(PASSWORD in child.out.read_text() for child in programs)
    queue.close()


def title(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
