"""Bad input on every side that takes any: arguments, URLs, the environment, requests, include files, databases.

The input is the same in each run; PQUEUE_SOAK=N tries N times as much, at random.
"""

# ruff: noqa: E501 - bad input is long

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from conftest import PATIENCE_SECONDS, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ops import Site

import admin
import consumer
import manager
import ops
import pqueue
import pqueue_sqlalchemy
import producer
from bench import run as bench
from pqueue_sqlite import PAGE_BYTES
from pqueue_tools import dashboard, dashboard_actions, dashboard_http, file_task, report, supervisor

SOAK = int(os.environ.get("PQUEUE_SOAK", "1"))
SECONDS = 30  # in which every single input must be done with
PASSWORD = "hunter2"
TRIED: dict[str, int] = {}

NASTY = st.sampled_from(
    [
        "", " ", "-", "--", "-1", "0", "1", "2", "9" * 30, "1e999", "nan", "inf", "٣", "1" * 5000, "0x10", "1h", "99999999999d",
        "../../etc/passwd", "/dev/null", "/dev/null/x", "x" * 300, "a/../../b", "%s%n", "%(here)s", "%(ENV_PATH)s", "{0}", "~",
        "\x1b[31m", "\x9b31m", "\u202e", "\udcff", "\r\nSet-Cookie: x", "'; DROP TABLE jobs; --", "[", "null", "NaN", "true",
        '{"file": "../x"}', "[" * 2000, '"\\ud800"', "2026-11-24T12:00", "0001-01-01", "9999-12-31T23:59:59-23:59",
    ]
)  # fmt: skip
ARGUMENT = NASTY | st.text(st.characters(exclude_characters="\0/"), max_size=20)  # the kernel passes no NUL


def fuzz(examples):
    return settings(
        max_examples=examples * SOAK,
        deadline=None,
        derandomize=SOAK == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def figures():
    yield
    print(*(f"\n{number} {what} tried" for what, number in TRIED.items()))


def tried(what):
    TRIED[what] = TRIED.get(what, 0) + 1


@contextmanager
def in_time():
    """Fail when it takes too long. A consumer takes the signal for itself, so request it again in each."""

    def fail(*_):
        raise AssertionError(f"not done within {SECONDS} s")

    before = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


STREAMS = ("strict", "backslashreplace")  # as Python opens them


def run(main, arguments):
    """Run a program in this process; return its exit code and what it said. It must be 0, 1 or 2, without traceback."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors, write_through=True) for errors in STREAMS)
    with in_time(), redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]
    assert code in (0, 1, 2), arguments
    assert "Traceback" not in said[1], said[1]
    assert PASSWORD not in "".join(said), arguments
    return code, *said


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)  # so that ../.. leads nowhere else
    monkeypatch.chdir(tmp_path / "a/b")
    for name in ("PQUEUE_URL", "PQUEUE_FILES", "PQUEUE_DURABILITY", "PQUEUE_OPS_READONLY", "PQUEUE_OPS_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(file_task, "files_directory", Path("var/files"))
    return tmp_path / "a/b"


def populate(queue, pages=1):
    """Make jobs of each state but processing, which would make `move` wait."""
    for number in range(12 * pages):
        job_id = queue.enqueue(
            "work", {"n": number, "text": "x" * (number % 5) * 1000}, key=f"k{number}", max_attempts=1
        )
        if number % 6 < 4:
            job = queue.dequeue("anna")
            (queue.complete if number % 2 else queue.fail)(job, "ValueError: no")
        elif number % 6 == 4:
            queue.cancel(job_id)
    queue.enqueue("later", delay_seconds=3600)


# Arguments


@pytest.fixture(params=["argparse", "typer"])
def front(request, monkeypatch):
    if request.param == "argparse":
        monkeypatch.setitem(sys.modules, "typer", None)
    return request.param


@st.composite
def admin_arguments(draw):
    """A command with arguments of every kind, sensible or not, in any order."""
    name = draw(st.sampled_from(sorted(set(admin.COMMANDS) - {"torture"})))
    words = []
    for each in draw(st.lists(st.sampled_from(admin.COMMANDS[name].parameters), max_size=6)):
        value = draw(ARGUMENT | st.sampled_from(["1", "7d", "failed", "work", "default", "none", "anna", "copy.db"]))
        words += [each.name] if each.flag else [each.name, value] if each.is_option else [value]
    words += draw(st.lists(ARGUMENT, max_size=2))
    return [name, *draw(st.permutations(words) if draw(st.booleans()) else st.just(words))]


@fuzz(250)
@given(arguments=admin_arguments() | st.lists(ARGUMENT, max_size=4))
def check_admin(arguments):
    tried("command lines")
    _, out, err = run(admin.main, arguments)
    assert err.count("\n") <= 1 or "note: " in err, err
    assert "\x1b" not in out + err
    assert "\x9b" not in out + err


def test_any_command_line_is_answered_in_one_line(folder, front):
    queue = pqueue.open_queue()
    populate(queue)
    check_admin()
    assert queue.check()["problems"] == []
    queue.close()


@pytest.fixture(autouse=True)
def added_consumers_run(monkeypatch):
    monkeypatch.setattr(supervisor, "_expect_started", lambda *_: None)


PROGRAMS = {
    "consumer": (consumer.main, consumer._parser(), ["--drain", "--max-jobs", "3"]),
    "producer": (producer.main, producer._parser(), ["--count", "1", "--interval", "0"]),
    "manager": (manager.main, manager._parser(), []),
    "ops": (ops.main, ops._parser(), []),
    "bench": (bench.main, bench.parser(), []),
}
OPTIONS = ["--host", "--port", "--help", "-h", "--no-such", "--json", "--name", "--queue", "--import", "--directory"]
HOSTS = ["127.0.0.1", "::1", "", "localhost", "a..b", "x" * 70, "[", "\udcff"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_given_any_arguments_end_with_a_sentence(folder, monkeypatch, program):
    main, parser, limits = PROGRAMS[program]
    known = OPTIONS + ([word for action in parser._actions for word in action.option_strings] if parser else [])
    monkeypatch.setattr(dashboard_http.Server, "serve_forever", lambda _: None)
    monkeypatch.setattr(os, "execv", lambda *_: sys.exit(0))
    monkeypatch.setattr(bench, "describe_machine", lambda: sys.exit(0))  # the arguments were good
    monkeypatch.setattr(bench, "MEASURES", {})
    monkeypatch.setenv("PQUEUE_OPS_PASSWORD", "x")  # so that any host is tried
    with closing(pqueue.open_queue()) as queue:
        populate(queue)

    @fuzz(100)
    @given(st.lists(st.sampled_from(known) | ARGUMENT, max_size=5))
    def check(arguments):
        tried("command lines")
        if "--host" in arguments[:-1]:  # nothing that would be looked up elsewhere
            at = arguments.index("--host") + 1
            arguments[at] = HOSTS[len(arguments[at]) % len(HOSTS)]
        with_path, path = sys.path[:], dict(os.environ)
        run(main, [*arguments, *limits])
        sys.path[:] = with_path
        os.environ.update(path)

    check()
    with closing(pqueue.open_queue()) as queue:
        assert queue.check()["problems"] == []


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=4),
    max_leaves=12,
)


def test_payload_is_stored_as_it_is_or_refused(folder):
    with closing(pqueue.open_queue(durability="normal")) as queue:

        @fuzz(200)
        @given(VALUES | st.binary(max_size=4) | st.just({1, 2}) | st.just(object()))
        def check(payload):
            tried("payloads")
            try:
                job_id = queue.enqueue("t", payload)
            except ValueError as error:
                assert "\n" not in str(error)  # noqa: PT017
            else:
                stored = queue.get(job_id).payload
                assert stored == json.loads(json.dumps(payload))
                assert report.for_people("payload", stored, 0) is not None

        check()

        @fuzz(200)
        @given(ARGUMENT | VALUES.map(lambda value: json.dumps(value)))
        def check_text(text):
            tried("payloads")
            before = queue.count_jobs()
            code, _, err = run(admin.main, ["enqueue", "t", "--", text])
            assert (queue.count_jobs() - before, err.count("\n")) == ((1, 0) if code == 0 else (0, 1))

        check_text()


# URLs and the environment


@fuzz(300)
@given(
    st.sampled_from(["postgresql://", "postgres://", "postgresql+psycopg://", "mysql://", "sqlite://", "Postgresql:/", ""]),
    ARGUMENT.map(lambda text: quote(text, errors="surrogatepass")) | st.text("abc:@[]%/?#é", max_size=6),
    st.sampled_from(["@127.0.0.1:1/d", "@[::1]:1", "@127.0.0.1:x/d", "@127.0.0.1:99999/", "@/d?host=127.0.0.1&port=1"]),
    st.sampled_from(["", "?sslmode=bogus", "?connect_timeout=x", "?bogus=1", "?options=-c%20x", "?%00", "#", "?password=b"]),
)  # fmt: skip
def check_url(scheme, user, host, query):
    tried("URLs")
    url = f"{scheme}{user}:{PASSWORD}{host}{query}"
    for open_it in (
        pqueue.sqlite_path,
        lambda url: pqueue_sqlalchemy.PersistentQSQLAlchemy(url, busy_seconds=1).close(),
    ):
        try:
            open_it(url)
        except (pqueue.QueueError, ValueError) as error:
            assert PASSWORD not in str(error) or scheme.startswith("sqlite")  # noqa: PT017 - there it is part of a path
            assert "\n" not in str(error)  # noqa: PT017


def test_no_url_makes_anything_tell_its_password(folder):
    check_url()


@pytest.mark.parametrize(
    "name", ["PQUEUE_URL", "PQUEUE_DURABILITY", "PQUEUE_FILES", "COLUMNS", "SUPERVISOR_PROCESS_NAME"]
)
def test_environment_may_say_anything(folder, monkeypatch, name):
    @fuzz(30)
    @given(ARGUMENT)
    def check(value):
        tried("environments")
        monkeypatch.setenv(name, value)
        monkeypatch.setattr(file_task, "files_directory", Path(os.environ.get("PQUEUE_FILES", "var/files")))
        run(producer.main, ["--count", "1", "--interval", "0"])
        run(consumer.main, ["--drain", "--max-jobs", "1"])
        for command in ("stats", "list-jobs", "doctor", "monitor"):
            run(admin.main, [command])

    check()


@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"TZ": "x/:"}],
)
def test_terminal_that_cannot_show_a_name_stops_no_program(place, variables):
    place.write("my_tasks.py", "from pqueue import task\n\n@task('t\\xe4sk\\u2026')\ndef run(job): pass\n")
    with closing(place.queue()) as queue:
        queue.enqueue("täsk…", {"text": "日本"}, queue="日本")
    drained = place.run("consumer.py", "--import", "my_tasks", "--drain", **variables)
    assert (drained.returncode, drained.stderr) == (0, "")
    assert "task=" in drained.stdout
    for arguments in (["list-jobs"], ["show", "1"], ["list-jobs", "--json"], ["stats"], ["monitor", "--once"]):
        done = place.run("admin.py", *arguments, **variables)
        assert (done.returncode, done.stderr) == (0, ""), arguments


# Requests


@pytest.fixture
def site(folder, monkeypatch):
    """A dashboard that holds against its thread whatever it did not expect."""
    errors = []
    monkeypatch.setattr(dashboard, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(dashboard_http.Server, "handle_error", lambda *_: errors.append(sys.exc_info()[1]))
    with closing(pqueue.open_queue()) as queue:
        populate(queue)
    site = Site()
    yield site
    site.close()
    assert [error for error in errors if not isinstance(error, OSError)] == []


def exchange(site, request):
    """Send bytes, half-close, and return the answer."""
    request = request.replace(b"LONG", b"y" * 70_000)
    with socket.create_connection(("127.0.0.1", site.port), timeout=SECONDS) as client:
        with suppress(OSError):  # it may have answered and gone before it has read all
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
        answer = b""
        with suppress(ConnectionError):
            while part := client.recv(65536):
                answer += part
    return answer


TOKEN = st.sampled_from(
    ["GET", "GET", "GET", "POST", "POST", "HEAD", "PUT", "TRACE", "CONNECT", "PRI", "get", "G\0T", ""]
)
TARGET = st.sampled_from(
    [
        "/", "/jobs", "/job/1", "/job/0", "/api/jobs", "/api/jobs/1", "/api/stats", "/metrics", "/healthz", "/act/cancel",
        "http://[", "//[", "*", "/job/" + "1" * 400, "/%00", "/\xff", "/job/%2e%2e/1", "/act/../jobs", "/?" + "&" * 900,
    ]
)  # fmt: skip
FIELD = st.sampled_from(
    ["state", "queue", "task", "text", "before_id", "id", "said", "back", "max_pending", "consumer", "scope"]
)
QUERY = st.dictionaries(FIELD, ARGUMENT | st.text(max_size=20), max_size=4).map(
    lambda query: urlencode(query, errors="surrogatepass")
)
LINE = st.sampled_from(
    [
        "Content-Length: 5", "Content-Length: -5", "Content-Length: 99999999999999999999", "Content-Length: 1_0",
        "Transfer-Encoding: chunked", "Expect: 100-continue", "Authorization: Basic !!!", "Authorization: Basic 4pyT",
        "Origin: http://[", "Origin: null", "Host: [", "Host: ]:[", "Host: 127.0.0.1:99999", "Connection: Upgrade",
        "X: LONG", "no colon", ": empty", " folded", "Cookie: \xff\xfe", "Referer: javascript:1",
    ]
) | st.text(max_size=40)  # fmt: skip


@st.composite
def requests(draw):
    lines = [
        f"{draw(TOKEN)} {draw(TARGET)}{draw(st.just('') | QUERY.map('?{}'.format))} HTTP/{draw(st.sampled_from(['1.1', '1.1', '1.1', '1.0', '2.0', '9', '']))}"
    ]
    lines += ["Host: 127.0.0.1"] * (draw(st.integers(0, 5)) > 0)
    lines += draw(st.lists(LINE, max_size=4))
    lines += ["X: y"] * (150 if draw(st.integers(0, 9)) == 0 else 0)
    head = "\r\n".join(lines).encode("utf-8", "surrogatepass")
    whole = head + b"\r\n\r\n" + draw(st.binary(max_size=20) | st.just(b"5\r\nid=12\r\n0\r\n\r\n"))
    return whole[: draw(st.integers(0, len(whole)))] if draw(st.integers(0, 3)) == 0 else whole


def test_server_survives_any_bytes_and_keeps_serving(site):
    @fuzz(600)
    @given(requests() | st.binary(max_size=300))
    def check(request):
        tried("requests")
        answer = exchange(site, request)
        status = re.match(rb"HTTP/1\.[01] (\d+) ", answer)
        assert not status or int(status[1]) in (*range(200, 500), 501, 503, 505), answer[:200]

    check()
    form = f"token={site.server.token}&queue=default&back=http://["
    for line, header, body, answer in (
        ("GET http://[ HTTP/1.1", "X: y", "", b" 400 "),
        ("POST http://[ HTTP/1.1", "X: y", form, b" 400 "),
        ("POST /act/pause HTTP/1.1", "X: y", form, b"Location: /?said="),
        ("POST /act/pause HTTP/1.1", "Origin: http://[", form, b" 400 "),
        ("POST /act/pause HTTP/1.1", "X: y", "a=1&" * 3000, b" 400 "),
    ):
        request = f"{line}\r\nHost: 127.0.0.1\r\n{header}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        assert answer in exchange(site, request.encode()), request[:99]
    assert site.ask("/healthz")[0] in (200, 503)


def test_server_refuses_a_form_with_anything_in_it_in_a_sentence(site):
    @fuzz(250)
    @given(
        st.sampled_from([*dashboard_actions.ACTIONS, "jobs", "x"]),
        st.dictionaries(FIELD | st.just("action"), ARGUMENT, max_size=5),
    )
    def check(action, fields):
        tried("requests")
        body = urlencode({"token": site.server.token, **fields}, errors="surrogatepass")
        status, text, headers = site.ask(f"/act/{action}", body=body)
        assert status in (303, 404, 409), text
        assert "\n" not in headers.get("Location", "")
        assert text.count("\n") <= 1

    check()


def test_incomplete_requests_delay_no_other(site):
    halves = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(50)]
    for number, half in enumerate(halves):
        half.sendall((b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" * 9)[: number * 5])
        tried("requests")
    assert site.ask("/healthz")[0] in (200, 503)
    for half in halves:
        half.close()


# Include files of the manager

WORD = st.sampled_from(
    ["default", "50% off", "%(here)s", "%(ENV_HOME)s", "a\nb", "a ;b", "a#b", "'", '"', "$(id)", "a b", "\\", "-x"]
)


def test_supervisor_reads_exactly_the_requested_group_options(folder, monkeypatch):
    from supervisor.options import ServerOptions

    monkeypatch.setattr(supervisor, "call", lambda *_, **__: [])

    @fuzz(150)
    @given(st.lists(ARGUMENT | WORD, max_size=3), st.lists(ARGUMENT | WORD, max_size=2), st.integers(1, 3))
    def check(queues, modules, size):
        tried("include files")
        shutil.rmtree("var", ignore_errors=True)
        try:
            group = supervisor.add_group(size, supervisor.consumer_options(queues, modules))
        except ValueError:
            assert not list(Path("var/supervisor.d").glob("*"))
            return
        Path("var/log").mkdir()
        Path("all.conf").write_text("[supervisord]\n[include]\nfiles = var/supervisor.d/*.conf\n")
        options = ServerOptions()
        options.configfile, options.here = str(folder / "all.conf"), str(folder)
        options.read_config("all.conf")
        (made,) = options.configroot.supervisord.process_group_configs
        assert (made.name, len(made.process_configs)) == (group, size)
        asked = [*(word for queue in queues for word in ("--queue", queue))]
        asked += [*(word for module in modules for word in ("--import", module))]
        assert shlex.split(made.process_configs[0].command) == [sys.executable, str(ROOT / "consumer.py"), *asked]

    check()


def test_include_files_of_others_are_neither_read_nor_removed(folder, monkeypatch):
    monkeypatch.setattr(supervisor, "call", lambda *_, **__: [])
    supervisor.INCLUDED.mkdir(parents=True)
    (folder / "precious.conf").write_text("mine")
    for name in ("a\nb.conf", "%(here)s.conf", "..conf", "x\x1b[31m.conf", "notes.txt"):
        (supervisor.INCLUDED / name).write_text("[program:evil]\ncommand = touch evil\n")
    before = sorted(supervisor.INCLUDED.iterdir())

    @fuzz(60)
    @given(ARGUMENT | st.sampled_from(["../precious", "notes", "precious", "../../precious", "/etc/passwd"]))
    def check(group):
        tried("include files")
        _, _, err = run(manager.main, ["--remove=" + group])
        assert err.count("\n") <= 1

    check()
    assert supervisor.add_group() == "consumer2"
    assert sorted({*supervisor.INCLUDED.iterdir()} - {supervisor.INCLUDED / "consumer2.conf"}) == before
    assert (folder / "precious.conf").read_text() == "mine"


def test_operators_who_add_a_group_at_once_get_one_each(folder, monkeypatch):
    both = threading.Barrier(2)

    def call(method, *_, **__):
        if method == "getAllProcessInfo":
            both.wait(PATIENCE_SECONDS)  # so that neither sees the other's
        return []

    monkeypatch.setattr(supervisor, "call", call)
    with ThreadPoolExecutor(2) as threads:
        added = [each.result() for each in [threads.submit(supervisor.add_group) for _ in range(2)]]
    assert sorted(added) == supervisor.added_groups() == ["consumer2", "consumer3"]
    assert len(list(supervisor.INCLUDED.iterdir())) == 2


# Database files

LOOKING = [["list-jobs"], ["list-jobs", "--json"], ["failedjobs"], ["show", "5"], ["show", "5", "--json"], ["why", "5"]]
LOOKING += [["stats"], ["consumers", "--all"], ["metrics"], ["monitor", "--once"], ["list-jobs", "--text", "x"]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a database with several pages of each kind."""
    path = tmp_path_factory.mktemp("sound") / "queue.db"
    with closing(pqueue.PersistentQSQLite(path, durability="normal")) as queue:
        populate(queue, pages=6)
        queue.enqueue("big", "x" * 20_000)
        queue.dequeue("bert")
    return path.read_bytes()


def kind_of_page(page, number):
    kinds = {2: "inner index", 5: "inner table", 10: "index", 13: "table"}
    return "first" if number == 0 else kinds.get(page[0], "overflow or free")


def lay(data):
    shutil.rmtree("var", ignore_errors=True)
    Path("var").mkdir(mode=0o700)
    path = Path("var/queue.db")
    path.write_bytes(data)
    path.chmod(0o600)
    return path


@pytest.fixture
def plainly(monkeypatch):
    """Without Typer, which takes longer than the command."""
    monkeypatch.setitem(sys.modules, "typer", None)


def use(path):
    """Look at it with every command, then work with it: answers in one line, within the time, and no traceback."""
    before = without_mode(path.read_bytes())
    for arguments in LOOKING:
        code, out, err = run(admin.main, arguments)
        assert err.count("\n") <= 1, err
        assert "\x1b" not in out + err
    doctored = run(admin.main, ["doctor"])
    assert without_mode(path.read_bytes()) == before  # looking destroys nothing
    change()
    return doctored


def without_mode(data):
    """Leave out what SQLite writes where a flipped bit has taken WAL from the header, and opening gives it back."""
    return data[:18] + data[20:24] + data[32:92] + data[100:]


def change():
    run(admin.main, ["enqueue", "t"])
    run(admin.main, ["resubmit", "--status", "failed", "--yes"])
    run(consumer.main, ["--drain", "--max-jobs", "5"])
    run(admin.main, ["prune", "--older-than", "0s"])


def test_damaged_database_is_reported_and_left_unchanged(folder, plainly, sound):
    size = int.from_bytes(sound[16:18], "big")
    pages = [sound[at : at + size] for at in range(0, len(sound), size)]
    by_kind = {}
    for number, page in enumerate(pages):
        by_kind.setdefault(kind_of_page(page, number), []).append(number)
    assert set(by_kind) >= {"first", "inner table", "index", "table", "overflow or free"}

    @fuzz(8)
    @given(data=st.data())
    def check(kind, data):
        number = data.draw(st.sampled_from(by_kind[kind]))
        page = bytearray(pages[number])
        dense = [at for at, byte in enumerate(page) if byte] or [0]
        for _ in range(data.draw(st.integers(1, 6))):
            page[data.draw(st.sampled_from(dense) | st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
        tried("damaged databases")
        use(lay(sound[: number * size] + bytes(page) + sound[(number + 1) * size :]))

    for kind in by_kind:
        check(kind)


def test_cut_overwritten_or_scrambled_database_is_reported_and_left_unchanged(folder, plainly, sound):
    @fuzz(25)
    @given(
        st.integers(0, len(sound)), st.binary(max_size=40), st.sampled_from(["cut", "over", "zero", "swap", "twice"])
    )
    def check(at, junk, how):
        tried("damaged databases")
        blank = bytes(min(PAGE_BYTES, len(sound) - at))
        made = {
            "cut": sound[:at],
            "over": sound[:at] + junk + sound[at + len(junk) :],
            "zero": sound[:at] + blank + sound[at + len(blank) :],
            "swap": sound[:PAGE_BYTES]
            + sound[2 * PAGE_BYTES : 3 * PAGE_BYTES]
            + sound[PAGE_BYTES : 2 * PAGE_BYTES]
            + sound[3 * PAGE_BYTES :],
            "twice": sound + sound[at:],
        }
        use(lay(made[how]))

    check()


def test_doctor_says_of_a_broken_page_that_it_is_broken(folder, plainly, sound):
    reported = 0
    for at in range(PAGE_BYTES, len(sound), PAGE_BYTES):
        tried("damaged databases")
        lay(sound[:at] + b"\xa5" * PAGE_BYTES + sound[at + PAGE_BYTES :])
        code, out, err = run(admin.main, ["doctor"])
        reported += code == 1 and bool(out + err)
    assert reported == len(sound) // PAGE_BYTES - 1


HOSTILE = {
    "endless views named like our tables": [
        *(f"DROP TABLE {name}" for name in ("jobs", "queues", "consumers", "history")),
        *(
            f"CREATE VIEW {name} AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id FROM n) SELECT * FROM n"
            for name in ("jobs", "queues", "consumers", "history")
        ),
    ],
    "a missing table": ["DROP TABLE history"],
    "no tables": [f"DROP TABLE {name}" for name in ("jobs", "queues", "consumers", "history")],
    "a trigger that writes": [
        "CREATE TRIGGER spy AFTER INSERT ON jobs BEGIN UPDATE jobs SET task = 'evil' WHERE id = new.id; END"
    ],
    "a trigger that calls": [
        "CREATE TRIGGER spy AFTER UPDATE ON jobs BEGIN SELECT load_extension('/tmp/evil.so'), writefile('evil', 'x'); END"
    ],
    "other columns": ["ALTER TABLE jobs RENAME COLUMN payload TO load", "ALTER TABLE queues RENAME COLUMN paused TO p"],
    "names with escapes": ["UPDATE queues SET name = char(27) || '[31m'", "UPDATE jobs SET queue = char(27) || '[31m', task = char(155)"],
    "a queue that is not listed": ["UPDATE jobs SET queue = 'elsewhere'"],
    "text that is none": ["UPDATE jobs SET task = CAST(x'ff' AS TEXT), error = CAST(x'c328' AS TEXT)", "UPDATE queues SET name = CAST(x'ff' AS TEXT)"],
    "times beyond all dates": ["UPDATE jobs SET run_at = 1e300, created_at = -1e300", "UPDATE consumers SET last_seen_at = 1e300, started_at = -9e18"],
    "endless times": ["UPDATE jobs SET run_at = 9e999, created_at = -9e999"],
    "consumers whose lists are not JSON": ["PRAGMA ignore_check_constraints = 1", "UPDATE consumers SET queues = 'no json', tasks = '{'"],
    "huge numbers": ["UPDATE jobs SET priority = 9223372036854775807, attempts = 1e18, max_attempts = 2e18 WHERE state = 'pending'"],
    "payloads that are not JSON": ["PRAGMA ignore_check_constraints = 1", "UPDATE jobs SET payload = replace(hex(zeroblob(3000)), '00', '[')"],
    "deep payloads": ["UPDATE jobs SET payload = replace(hex(zeroblob(900)), '00', '[') || replace(hex(zeroblob(900)), '00', ']')"],
    "numbers for states": ["PRAGMA ignore_check_constraints = 1", "UPDATE jobs SET state = 7"],
}  # fmt: skip


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_schema_is_borne_and_executes_nothing(folder, plainly, sound, how):
    tried("hostile databases")
    path = lay(sound)
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for statement in HOSTILE[how]:
            db.execute(statement)
    code, out, err = use(path)
    assert not (folder / "evil").exists()
    if "trigger" in how or "table" in how or "column" in how:
        assert code == 1, out
        assert re.search(
            "trigger 'spy' on jobs|expected the tables of a queue|is not as this|no such column", out + err
        )


def test_dashboard_bears_hostile_databases(folder, sound, site):
    for statements in HOSTILE.values():
        tried("hostile databases")
        path = lay(sound)
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            for statement in statements:
                db.execute(statement)
        for page in ("/", "/jobs", "/job/5", "/api/jobs", "/api/jobs/5", "/api/stats", "/metrics", "/healthz"):
            status, text, _ = site.ask(page)
            assert status in (200, 503), page
            assert "\x1b" not in text


@pytest.mark.parametrize("other", ["-wal", "-shm", "-journal"])
def test_foreign_files_next_to_the_database_are_tolerated(folder, plainly, sound, other):
    foreign = Path("foreign.db")
    with closing(sqlite3.connect(foreign, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE t (x)")
        foreign_bytes = {suffix: Path(f"foreign.db{suffix}").read_bytes() for suffix in ("-wal", "-shm")}

    def put(path, how):
        if how == "folder":
            path.mkdir()
        elif how == "fifo":
            os.mkfifo(path)
        elif how in ("link", "dangling link"):
            path.symlink_to(folder / ("precious" if how == "link" else "nowhere"))
        else:
            path.write_bytes(
                {"junk": b"\xa5" * 70_000, "empty": b""}.get(how, foreign_bytes.get(other, b"\xd9\xd5\x05\xf9" * 300))
            )

    for how in ("folder", "fifo", "link", "dangling link", "junk", "empty", "foreign"):
        tried("hostile databases")
        (folder / "precious").write_bytes(b"precious" * 1000)
        path = lay(sound)
        put(Path(f"{path}{other}"), how)
        for arguments in LOOKING:
            _, _, err = run(admin.main, arguments)
            assert err.count("\n") <= 1, err
        run(admin.main, ["doctor"])
        if how != "foreign":  # SQLite takes a log that is whole for its own, whosever it is
            change()
        assert (folder / "precious").read_bytes() == b"precious" * 1000
        assert not (folder / "nowhere").exists()


def test_any_content_of_the_lock_folder_hangs_no_program(folder, plainly, sound):
    for name in ("others", "consumers", "writer", "waiting", "0.lock", "0.wakeup", ""):
        for how in ("folder", "fifo", "link", "dangling link", "junk", "socket"):
            tried("hostile databases")
            (folder / "precious").write_bytes(b"precious" * 1000)
            path = lay(sound)
            place = Path(f"{path}.d") / name
            place.parent.mkdir(mode=0o700, exist_ok=True)
            if how == "folder":
                place.mkdir(exist_ok=True)
            elif how == "fifo":
                os.mkfifo(place)
            elif how in ("link", "dangling link"):
                place.symlink_to(folder / ("precious" if how == "link" else "nowhere"))
            elif how == "junk":
                place.write_bytes(b"\xa5" * 7)
            else:
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.bind(str(place))
            run(admin.main, ["doctor"])
            change()
            assert (folder / "precious").read_bytes() == b"precious" * 1000
            assert not (folder / "nowhere").exists()


def test_waiting_consumer_next_to_any_pipe_does_not_spin(folder):
    with closing(pqueue.open_queue()) as queue:
        pipe = Path("var/queue.db.d/0.wakeup")
        pipe.write_bytes(b"!" * 100)
        assert queue.dequeue("anna") is None
        waits = [queue.wait(0.01, consumer="anna") for _ in range(5)]
        assert waits == [False] * 5
        pipe.unlink()
        pipe.write_bytes(b"")
        ringer = threading.Thread(target=lambda: queue.enqueue("t"))
        ringer.start()
        ringer.join()
        assert queue.dequeue("anna").task == "t"
