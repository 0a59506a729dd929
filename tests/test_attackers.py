"""Attackers: other accounts, files that are not what they seem, payloads that reach out, secrets, terminal escapes."""

# ruff: noqa: E501 - paths of attackers are long

from __future__ import annotations

import grp
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlencode

import pytest
from conftest import PATIENCE_SECONDS, ROOT, wait_until
from test_admin import on_terminal
from test_ops import Site
from test_supervisor import BIN, manage, running, system  # noqa: F401 - a fixture

import admin
import pqueue
from pqueue_tools import file_task, masking, process, report, restoring
from pqueue_tools.worker import Consumer

SECRET = "hunter2"  # never shown
ESCAPES = "\x1b[31m\x1b]0;owned\x07\x9b2J\r\x08\u202e"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("PQUEUE_URL", "PQUEUE_FILES", "PQUEUE_DURABILITY", "PQUEUE_OPS_READONLY", "PQUEUE_OPS_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(file_task, "files_directory", tmp_path / "var/files")
    return tmp_path


@pytest.fixture
def queue(folder):
    with closing(pqueue.open_queue()) as queue:
        yield queue


# Other accounts


def wrongly_open(folder, *but):
    """Return what under this folder another account could read, write or enter, or its own could not use."""

    def is_wrong(path):
        with suppress(FileNotFoundError):  # programs at work make files and take them away
            mode = path.lstat().st_mode
            own = 0o700 if stat.S_ISDIR(mode) else 0o600
            return not stat.S_ISLNK(mode) and (stat.S_IMODE(mode) & 0o077 or mode & own != own)

    found = [Path(at) / name for at, folders, files in os.walk(folder) for name in (*folders, *files)]
    return [path for path in found if path not in but and is_wrong(path)]


@pytest.mark.parametrize("umask", ["0", "0277"])
def test_every_program_creates_files_for_its_account_only(place, umask):
    def carelessly(program, *arguments, **options):
        command = ["sh", "-c", f'umask {umask}; exec "$@"', "sh", *place.command(program, *arguments)]
        return subprocess.Popen(
            command,
            cwd=place.folder,
            env=place.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **options,
        )

    def run(program, *arguments):
        child = carelessly(program, *arguments)
        said, _ = child.communicate(timeout=PATIENCE_SECONDS)
        assert child.returncode == 0, said

    run("producer.py", "--count", "2", "--interval", "0")
    working = carelessly("consumer.py")
    try:
        queue = place.queue()
        wait_until(lambda: queue.stats()["states"]["completed"] == 2)
        assert {"queue.db", "queue.db-wal", "queue.db-shm"} <= {path.name for path in (place.folder / "var").iterdir()}
        assert wrongly_open(place.folder) == []
    finally:
        working.send_signal(signal.SIGTERM)
        working.communicate()
    run("admin.py", "enqueue", "t", "1", "--delay", "1h")
    run("admin.py", "backup", "copies.db")
    run("admin.py", "move", "--to", "elsewhere/moved.db")
    torture = carelessly("admin.py", "torture", "--seconds", "3")
    seen = []
    while torture.poll() is None:
        seen += [path for path in wrongly_open(place.folder) if path.parent == place.folder / "var"]
    torture.communicate()
    assert seen == []
    assert {"copies.db", "moved.db"} <= {path.name for path in place.folder.rglob("*.db")}
    assert wrongly_open(place.folder) == []


def test_supervisor_and_manager_create_files_for_their_account_only(system):  # noqa: F811
    shutil.rmtree(system.folder / "var")  # by a user who starts afresh
    given = {*system.folder.rglob("*")}
    (recipe,) = re.findall(r"^run:.*\n\t@(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    recipe = recipe.replace("$(CURDIR)/$(BIN)", str(BIN)).replace("$(BIN)", str(BIN)).replace("$$", "$")
    system.start_command(["sh", "-c", f"umask 0; {recipe}"], PYTHONWARNINGS="")  # Supervisor and Streamlit warn
    wait_until(lambda: len(running(system)) == 5)
    assert manage(system, "--count", "1", "--size", "1").returncode == 0
    wait_until(lambda: (system.folder / "var/files").exists() and len(running(system)) == 6)
    made = {path.name for path in system.folder.rglob("*")} - {path.name for path in given}
    assert {"supervisor.sock", "supervisord.pid", "supervisord.log", "consumer_00.log", "consumer2.conf"} <= made
    assert wrongly_open(system.folder, *given, system.folder / "out-0") == []


def in_another_account(attempt, user=65534, groups=()):
    """Run it in a child that has given up all rights; return the sentence it raised, or None."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException), os.fdopen(writer, "w") as reported:
            os.setgroups(list(groups))
            os.setgid(user)
            os.setuid(user)
            try:
                attempt()
            except (OSError, pqueue.QueueError) as error:
                reported.write(str(error))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as reported:
        said = reported.read()
    os.waitpid(child, 0)
    return said or None


def test_another_account_can_neither_look_nor_work_nor_hold_a_lock():
    assert os.geteuid() == 0, "only root can become another account"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        with closing(pqueue.PersistentQSQLite(folder / "queue.db")) as queue:
            queue.enqueue("t", SECRET)
            queue.dequeue("w")
            for attempt in (
                lambda: pqueue.PersistentQSQLite(folder / "queue.db"),
                lambda: (folder / "queue.db").read_bytes(),
                lambda: (folder / "queue.db-wal").read_bytes(),
                lambda: os.open(folder / "queue.db.d" / "writer", os.O_RDONLY),
                lambda: os.open(folder / "queue.db.d" / "0.wakeup", os.O_WRONLY | os.O_NONBLOCK),
                lambda: os.listdir(folder / "queue.db.d"),
                lambda: (folder / "queue.db-journal").write_bytes(b""),
            ):
                assert re.search("[Pp]ermission|unable to open", in_another_account(attempt) or "nothing")
            refused = in_another_account(lambda: pqueue.PersistentQSQLite(folder / "queue.db"))
            assert refused.endswith("belongs to root; run this as root, or create the queue with PQUEUE_GROUP=GROUP")


def test_accounts_of_one_group_share_a_queue_that_was_made_for_it():
    assert os.geteuid() == 0, "only root can become another account"
    group = grp.getgrgid(60)

    def work(path, create):
        os.umask(0o077)
        with closing(pqueue.PersistentQSQLite(path, group=group.gr_name if create else None)) as queue:
            queue.enqueue("t")
            queue.complete(queue.dequeue("w"))
            queue.enqueue("t")
            queue.wait(0, consumer="w")

    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        path = Path(name) / "new" / "queue.db"
        for user, create in ((1001, True), (1002, False), (1003, True), (1001, False)):
            assert in_another_account(lambda c=create: work(path, c), user, [group.gr_gid]) is None
        with closing(pqueue.PersistentQSQLite(path)) as queue:
            assert queue.stats()["states"]["completed"] == 4
            assert queue.check()["problems"] == []
        for file in path.parent.rglob("*"):
            kept = file.stat()
            assert kept.st_gid == group.gr_gid, file
            assert stat.S_IMODE(kept.st_mode) == (0o2770 if file.is_dir() else 0o660), file
        refused = in_another_account(lambda: work(path, False), 1004)
        assert re.search("Permission denied: .*run this as", refused)


def test_restored_or_moved_queue_stays_with_its_owner_and_group():
    assert os.geteuid() == 0, "only root can become another account"
    group = grp.getgrgid(60)

    def work(path):
        with closing(pqueue.PersistentQSQLite(path, group=group.gr_name)) as queue:
            queue.enqueue("t")
            queue.complete(queue.dequeue("w"))

    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        path, backup, moved = (Path(name) / each for each in ("var/queue.db", "backup.db", "new/queue.db"))
        assert in_another_account(lambda: work(path), 1001, [group.gr_gid]) is None
        with closing(pqueue.PersistentQSQLite(path)) as queue:
            queue.backup(backup)
        restoring.restore(backup, path)
        assert (path.stat().st_uid, path.stat().st_gid) == (1001, group.gr_gid)
        (path.parent / "queue.db.d").rename(path.parent / "old")  # a restore makes this folder, too
        backup.chmod(0o644)
        restored = in_another_account(lambda: restoring.restore(backup, path), 1002, [group.gr_gid])
        assert restored is None
        assert in_another_account(lambda: work(path), 1003, [group.gr_gid]) is None
        with closing(pqueue.PersistentQSQLite(path)) as queue:
            queue.begin_move(str(moved))
            assert queue.move_to_file(moved)
        assert in_another_account(lambda: work(moved), 1003, [group.gr_gid]) is None
        for user in (1002, 1004):
            assert in_another_account(lambda: work(moved), user) is not None


def test_queue_of_a_group_stays_with_it_when_it_is_moved_to_a_folder_that_is_not_shared(tmp_path):
    group = grp.getgrgid(60)
    path, moved = tmp_path / "var/queue.db", tmp_path / "moved.db"
    with closing(pqueue.PersistentQSQLite(path, group=group.gr_name)) as queue:
        queue.begin_move(str(moved))
        assert queue.move_to_file(moved)
    assert (moved.stat().st_gid, stat.S_IMODE(moved.stat().st_mode)) == (group.gr_gid, 0o660)


def test_private_queue_stays_private_when_it_is_restored_in_a_shared_folder(tmp_path):
    os.chown(tmp_path, -1, 60)
    tmp_path.chmod(0o2770)
    path, backup = tmp_path / "queue.db", tmp_path / "backup.db"
    with closing(pqueue.PersistentQSQLite(path)) as queue:
        queue.backup(backup)
    restoring.restore(backup, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_queue_is_not_shared_by_halves():
    group = grp.getgrgid(60).gr_name
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "queue.db"
        with pytest.raises(pqueue.QueueError, match=f"expected {name} to belong to the group.*chmod 2770 {name}"):
            pqueue.PersistentQSQLite(path, group=group)
        assert list(Path(name).iterdir()) == []
        pqueue.PersistentQSQLite(path).close()
        os.chown(name, -1, 60)
        Path(name).chmod(0o2770)
        with pytest.raises(pqueue.QueueError, match=f"expected {path} to belong to the group, with mode 0660"):
            pqueue.PersistentQSQLite(path, group=group)
        with pytest.raises(ValueError, match="expected a group of this system, got 'no such group'"):
            pqueue.PersistentQSQLite(path, group="no such group")


def test_database_that_every_account_may_read_is_a_finding(tmp_path):
    with closing(pqueue.PersistentQSQLite(tmp_path / "queue.db")) as queue:
        queue.path.chmod(0o644)
        assert queue.check()["problems"] == [f"every account of this machine may use it: run chmod o= {queue.path}"]


# Job files


def stamp(queue, payload, **options):
    """Run one prepend_timestamp in a consumer's way and return the job."""
    job_id = queue.enqueue(file_task.prepend_timestamp, payload, **options)
    runner = Consumer(queue, "w", drain=True, quiet=True)
    before = signal.signal(signal.SIGALRM, runner.interrupt)
    try:
        runner.run()
    finally:
        signal.signal(signal.SIGALRM, before)
    return queue.get(job_id)


def make_device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:  # in a container, perhaps
        make_socket(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


def make_sparse(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_device, "expected it.txt to be a regular file|cannot open it.txt"),
        (make_socket, "cannot open it.txt"),
        (Path.mkdir, "expected it.txt to be a regular file"),
        (make_sparse, "expected it.txt to be a regular file of at most 1073741824 bytes"),
    ],
    ids=["device", "socket", "folder", "huge"],
)
def test_file_that_is_none_or_huge_is_refused_for_good(queue, folder, make, message):
    (folder / "var/files").mkdir(parents=True)
    make(folder / "var/files/it.txt")
    job = stamp(queue, {"file": "it.txt"})
    assert (job.state, job.attempts) == ("failed", 1)
    assert re.match(f"DoNotRetry: ({message})", job.error)
    assert [path.name for path in (folder / "var/files").iterdir()] == ["it.txt"]


def test_hard_link_to_a_file_keeps_the_old_content(queue, folder):
    (folder / "var/files").mkdir(parents=True)
    (folder / "precious").write_text("mine\n")
    os.link(folder / "precious", folder / "var/files/job.txt")
    assert stamp(queue, {"file": "job.txt"}).state == "completed"
    assert (folder / "precious").read_text() == "mine\n"
    assert (folder / "var/files/job.txt").read_text().endswith("Z mine\n")


def test_file_that_changes_while_it_is_read_is_left_as_it_is(queue, folder, monkeypatch):
    (folder / "var/files").mkdir(parents=True)
    file = folder / "var/files/job.txt"
    file.write_text("one\n")
    digest = file_task._sha256

    def then_it_changes(source):
        found = digest(source)
        file.write_text("another\nand more\n")
        return found

    monkeypatch.setattr(file_task, "_sha256", then_it_changes)
    job = stamp(queue, {"file": "job.txt"})
    assert job.state == "scheduled"
    assert "job.txt changed while it was read" in job.error
    assert file.read_text() == "another\nand more\n"
    monkeypatch.setattr(file_task, "_sha256", digest)
    with closing(pqueue.open_queue()) as other:
        retry = other.dequeue("v", now=job.run_at + 3600) or other.dequeue("v", now=job.run_at + 7200)
        with pytest.raises(pqueue.DoNotRetry, match="changed since its timestamp was chosen"):
            pqueue.run_task(other, retry)
    assert file.read_text() == "another\nand more\n"


def test_long_line_is_stamped_and_checked_in_parts(queue, folder, monkeypatch):
    (folder / "var/files").mkdir(parents=True)
    (folder / "var/files/job.txt").write_bytes(b"x" * 300_000 + b"\ny")
    job = stamp(queue, {"file": "job.txt"})
    text = (folder / "var/files/job.txt").read_bytes()
    assert [len(line) for line in text.split(b"\n")] == [300_025, 26]
    again = queue.enqueue(file_task.prepend_timestamp, {"file": "job.txt"})
    taken = queue.dequeue("w")
    queue.update(taken, result=job.result)
    assert pqueue.run_task(queue, taken._replace(result=job.result)) == job.result
    assert (again, (folder / "var/files/job.txt").read_bytes()) == (taken.id, text)


OUTSIDE = [
    "../secret.txt", "..//secret.txt", "./../secret.txt", "../files/../secret.txt", "//etc/hostname", "/etc/hostname/",
    "a/../../secret.txt", "job.txt/../../secret.txt", ".", "./", "../", "../files", "..\\secret.txt", "\uff0e\uff0e/secret.txt",
    "..\u2215secret.txt", "%2e%2e/secret.txt", "..%2fsecret.txt", "..;/secret.txt", "~/x", "$HOME/x", "file:///etc/hostname",
    "x" * 300, "/" * 300, "../" * 50 + "etc/hostname", "job.txt\0.png", "\0../secret.txt", " ../secret.txt", "link/../../secret.txt",
    ["job.txt"], {"file": "job.txt"}, 0, True, None,
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=range(len(OUTSIDE)))
def test_payload_reaches_no_file_elsewhere(queue, folder, name):
    files = folder / "var/files"
    files.mkdir(parents=True)
    (files / "job.txt").write_text("in its place\n")
    (folder / "var/secret.txt").write_text(SECRET)
    (files / "link").symlink_to("/etc")
    before = {path: path.read_text() for path in folder.rglob("*.txt")}
    job = stamp(queue, {"file": name}, max_attempts=1)
    assert job.state == "failed"
    assert re.match("(DoNotRetry|FileNotFoundError): ", job.error)
    assert {path: path.read_text() for path in folder.rglob("*.txt")} == before
    site = Site()
    try:
        for path in (f"/job/{job.id}", f"/api/jobs/{job.id}"):
            assert SECRET not in site.ask(path)[1]
    finally:
        site.close()


# Secrets

KEYS = [
    "password",
    "Passwd",
    "PWD",
    "secret",
    "client_secret",
    "api_key",
    "api-key",
    "apiKey",
    "X-Api-Key",
    "access_token",
]
KEYS += [
    "Authorization",
    "private_key",
    "passphrase",
    "db_password",
    "credentials",
    "Set-Cookie",
    "bearer",
    "access_key",
]
KEYS += [
    "pass",
    "auth",
    "dsn",
    "pw",
    "PIN",
    "dbPass",
    "DB_PASS",
    "user_pw",
    "smtpAuth",
    "authHeader",
    "Passwort",
    "jwt",
]
PLAIN = ["key", "name", "n", "passage", "compass", "author", "monkey", "passenger", "authority", "passed", "bypass"]
PLAIN += ["pass_count", "auth_method", "pinned", "shopping", "power", "opinion", "underpass"]


def test_secrets_are_known_by_the_names_of_their_keys():
    value = dict.fromkeys(KEYS, SECRET) | {key: f"shown {key}" for key in PLAIN}
    text = json.dumps(report.masked([{"deep": [value, {"deeper": value}]}]))
    assert SECRET not in text
    assert all(text.count(f'"shown {key}"') == 2 for key in PLAIN)
    assert report.masked({"token": {"a": [SECRET]}, "x": "token"}) == {"token": "…", "x": "token"}


TEXTS = [
    ("postgres://user:hunter2@host/db", "postgres://user:…@host/db"),
    ("cannot reach redis://:hunter2@h:6379/0, nor amqp://a:b@h1,amqp://c:d@h2", "cannot reach redis://:…@h:6379/0, nor amqp://a:…@h1,amqp://c:…@h2"),
    ("mysql+pymysql://u:p@ss@h/d mysql://u:pa/ss@h", "mysql+pymysql://u:…@h/d mysql://u:…@h"),
    ("host=h user=u password=hunter2 dbname=d", "host=h user=u password=… dbname=d"),
    ("https://h/x?access_token=abc&n=1", "https://h/x?access_token=…&n=1"),
    ("postgres://user:hun…", "postgres://user:…"),
    *((text, text) for text in ("http://h:8080/a@b", "http://h:8080", "http://[::1]:80/x@y", "https://u@h/x",
      "['http://h:8080','a@b']", "12:30 x@y", "http://h:8080/cut…", "")),
]  # fmt: skip


def test_passwords_in_urls_are_hidden_and_nothing_else():
    for text, shown in TEXTS:
        assert masking.masked_text(text) == shown
        assert report.masked([{"n": text}]) == [{"n": shown}]
    for hostile in ("://a:" * 200_000, "://u:" + "x" * 10**6, "password='" * 100_000, "://[:" * 200_000):
        masking.masked_text(hostile)


def test_beginning_of_any_json_is_json_again_and_holds_no_more_than_it():
    value = {
        'a"}{': [1.5, -2, "x\\\n\u0001ü😀", [], {}, {"b": None}],
        "": True,
        "password": "hunter2",
        "url": "db://u:hunter2@h",
    }
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), json.dumps(value, separators=(",", ":"))):
        for length in range(1, len(text)):
            found = json.dumps(report.masked(pqueue.Excerpt(text[:length])))
            assert "hun" not in found, found
        assert report.masked(pqueue.Excerpt(text)) == report.masked(value)
    assert report.masked(pqueue.Excerpt('{"a":[1,{"b":"xy')) == {"a": [1, {"b": "xy…"}]}
    assert report.masked(pqueue.Excerpt("no JSON db://u:hunter2")) == "no JSON db://u:…"


def test_secrets_are_not_found_letter_by_letter(queue, folder, capsys):
    secret = "tr0ub4dor"
    queue.enqueue("work", {"name": "ada", "password": secret}, max_attempts=1)
    queue.mark_failed(1, f"cannot reach postgres://u:{secret}@h")
    queue.enqueue("work", {"url": f"postgres://u:{secret}@h"})
    site = Site()
    try:
        for text in (secret, secret[:1] + secret[1], f'"password": "{secret[0]}', f"u:{secret[0]}", secret[1:4]):
            query = urlencode({"text": text})
            assert json.loads(site.ask(f"/api/jobs?{query}")[1])["jobs"] == []
            assert "no job matches" in site.ask(f"/jobs?{query}")[1]
            for confirmed in ({}, {"confirmed": "1"}):
                assert site.act("jobs", action="cancel", scope="matching", text=text, **confirmed)[0] == 409
            for arguments in (["list-jobs"], ["failedjobs"], ["failedjobs", "--json"], ["cancel", "--yes"]):
                assert admin.main([*arguments, "--text", text]) == 0
                assert "ada" not in capsys.readouterr().out
        assert queue.get(2).state == "pending"
        for text in ("ada", '"password": "…"', "POSTGRES://U:…@H"):
            assert json.loads(site.ask(f"/api/jobs?{urlencode({'text': text})}")[1])["jobs"]
        for arguments in (["failedjobs"], ["failedjobs", "--json"], ["why", "1"], ["show", "1"]):
            admin.main(arguments)
            out = capsys.readouterr().out
            assert secret not in out
            assert "postgres://u:…@h" in out
        assert secret not in site.ask("/api/jobs/1")[1] + site.ask("/failed")[1]
        group = queue.failures()[0]
        site.act("resubmit", scope="matching", task=group["task"], fingerprint=group["error"])
        assert queue.get(1).state == "pending"
    finally:
        site.close()


def test_password_that_an_error_names_stays_out_of_the_log(place):
    place.write(
        "my_tasks.py",
        "from pqueue import task\n@task(max_attempts=1)\n"
        f"def odd(job): raise ConnectionError('cannot reach postgres://u:{SECRET}@h, password={SECRET}')\n",
    )
    with closing(place.queue()) as queue:
        queue.enqueue("odd", max_attempts=1)
        done = place.run("consumer.py", "--import", "my_tasks", "--drain")
        assert queue.stats()["states"]["failed"] == 1
    assert "postgres://u:" in done.stdout
    assert SECRET not in done.stdout + done.stderr


def test_failures_whose_long_errors_differ_in_a_password_are_one_group(queue):
    for number in range(3):
        queue.enqueue("t", max_attempts=1)
        queue.fail(queue.dequeue("w"), "ConnectionError: " + "x" * 45 + f" db://user:password-{number}@host")
    (group,) = queue.failures()
    assert (group["jobs"], group["error"]) == (3, "ConnectionError: " + "x" * 45 + " …")


def test_secrets_of_payloads_and_results_are_shown_nowhere(queue, folder, capsys):
    secret = {"user": "ada", "nested": [{"api_key": SECRET}], "password": SECRET}
    for end in ("complete", "fail", "pending", "running"):
        job_id = queue.enqueue("work", secret, max_attempts=1)
        if end != "pending":
            job = queue.dequeue("anna")
            assert job.id == job_id or end == "running"
            queue.update(job, result=secret)
        if end == "complete":
            queue.complete(job, secret)
        elif end == "fail":
            queue.fail(job, "ValueError: no")
    commands = [
        ["list-jobs"],
        ["list-jobs", "--json"],
        ["failedjobs", "--all"],
        ["monitor", "--once"],
        ["monitor", "--json"],
    ]
    commands += [[name, str(n), *more] for name in ("show", "why") for n in (1, 2, 3) for more in ([], ["--json"])]
    for arguments in commands:
        assert admin.main(arguments) == 0
        out = capsys.readouterr().out
        assert SECRET not in out, arguments
    assert admin.main(["show", "1"]) == 0
    assert '"user": "ada"' in capsys.readouterr().out
    site = Site()
    try:
        for path in ("/", "/jobs", "/job/1", "/job/2", "/api/jobs", "/api/jobs/1", "/api/stats", "/metrics"):
            assert SECRET not in site.ask(path)[1], path
    finally:
        site.close()


def test_secrets_of_payloads_stay_out_of_errors_and_logs(place):
    place.write(
        "my_tasks.py",
        "from pqueue import task\n@task()\ndef odd(job): return {'password': {job.payload['password']}}\n",
    )
    with closing(place.queue()) as queue:
        queue.enqueue("prepend_timestamp", {"password": SECRET}, max_attempts=1)
        queue.enqueue("odd", {"password": SECRET}, max_attempts=1)
        done = place.run("consumer.py", "--import", "my_tasks", "--import", "pqueue_tools.file_task", "--drain")
        assert queue.stats()["states"]["failed"] == 2
        assert not any(SECRET in job.error for job in queue.list_jobs())
    assert SECRET not in done.stdout + done.stderr
    with closing(place.queue()) as queue, pytest.raises(ValueError) as reported:
        queue.enqueue("t", {"password": SECRET, "x": {1}})
    assert SECRET not in str(reported.value)


# Terminals


def is_harmless(text):
    return all(mark.isprintable() or mark in "\t\r\n" for mark in text)


@pytest.fixture
def hostile(queue):
    """A queue with escapes wherever text is allowed, past the interface where that refuses them."""
    job_id = queue.enqueue("work", {"text": ESCAPES, ESCAPES: 1}, max_attempts=1)
    queue.fail(queue.dequeue("anna"), f"ValueError: {ESCAPES}\n  in {ESCAPES}")
    queue.enqueue("work", ESCAPES)
    for refused in ({"task": ESCAPES}, {"queue": ESCAPES}, {"key": ESCAPES}, {"assigned_to": ESCAPES}):
        with pytest.raises(ValueError, match="printable characters"):
            queue.enqueue(**{"task": "t", **refused})
    with queue.transaction() as db:
        db.execute("UPDATE queues SET name = ?", [f"q{ESCAPES}"])
        db.execute("UPDATE jobs SET queue = ?, task = ?, key = 'k' || id || ?", [f"q{ESCAPES}", f"t{ESCAPES}", ESCAPES])
        db.execute("UPDATE jobs SET assigned_to = ? WHERE state = 'pending'", [ESCAPES])
        db.execute("UPDATE consumers SET name = ?, host = ?, queues = ?", [ESCAPES, ESCAPES, json.dumps([ESCAPES])])
        db.execute("UPDATE history SET event = ?, actor = ?", [ESCAPES, ESCAPES])
    return job_id


SHOWING = [["list-jobs"], ["failedjobs"], ["failedjobs", "--all"], ["show", "1"], ["why", "1"], ["why", "2"], ["stats"]]
SHOWING += [
    ["consumers", "--all"],
    ["doctor"],
    ["metrics"],
    ["monitor", "--once"],
    ["pause", "nosuch"],
    ["cancel", "99"],
]


@pytest.mark.parametrize("arguments", SHOWING, ids=" ".join)
def test_no_escape_of_a_job_reaches_the_terminal(hostile, arguments, capsys):
    shown = on_terminal(arguments, columns=200, NO_COLOR="1")
    assert is_harmless(shown), shown
    admin.main([*arguments, "--json"])
    admin.main(arguments)
    out, err = capsys.readouterr()
    assert is_harmless(out + err)
    assert "\r" not in out


def test_no_escape_of_a_job_reaches_a_log(place):
    place.write(
        "my_tasks.py", f"from pqueue import task\n@task(max_attempts=1)\ndef odd(job): raise ValueError({ESCAPES!r})\n"
    )
    with closing(place.queue()) as queue:
        queue.enqueue("odd", {"file": ESCAPES}, max_attempts=1)
        queue.enqueue("prepend_timestamp", {"file": f"x{ESCAPES}"}, max_attempts=1)
        with queue.transaction() as db:
            columns = "queue, payload, state, priority, run_at, max_attempts, created_at"
            row = f"INSERT INTO jobs (id, task, {columns}) SELECT 9, ?, {columns} FROM jobs WHERE id = 1"
            db.execute(row, [ESCAPES])
        done = place.run("consumer.py", "--import", "my_tasks", "--import", "pqueue_tools.file_task", "--drain")
        assert queue.stats()["states"]["failed"] == 2
    assert (done.returncode, is_harmless(done.stdout + done.stderr)) == (1, True)
    assert done.stdout.count("\n") == done.stdout.count("Z ")


def test_log_escapes_control_characters_quotes_and_backslashes_but_no_letters():
    assert process.quoted('größer als "项目"\n\x1b[31m \\d\u202e') == r'"größer als \"项目\"\n\x1b[31m \\d\u202e"'


def test_no_escape_of_a_broken_schema_reaches_the_terminal(place):
    with closing(place.queue()) as queue:
        path = queue.path
        with queue.transaction() as db:
            db.execute('CREATE TABLE "\x1b[31mred" (x)')
            db.execute("PRAGMA writable_schema = 1")
            db.execute("UPDATE sqlite_master SET sql = 'CREATE TABLE nonsense' WHERE name = char(27) || '[31mred'")
    assert path.exists()
    for program, *arguments in (("admin.py", "stats"), ("consumer.py", "--drain"), ("producer.py", "--count", "1")):
        done = place.run(program, *arguments)
        assert done.returncode == 1
        assert is_harmless(done.stdout + done.stderr)
        assert done.stderr.count("\n") == 1
