"""The operator's command line, through both of its front ends."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pty
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import ModuleType

import pytest
from conftest import PATIENCE_SECONDS, ROOT, wait_until

import admin
import pqueue
import pqueue_operating
import pqueue_sqlite
import pqueue_values
from pqueue_tools import commands, output, report, supervisor, tables
from pqueue_tools.commands import OneOf


@pytest.fixture(params=["argparse", "typer"])
def front(request, monkeypatch):
    if request.param == "argparse":
        monkeypatch.setitem(sys.modules, "typer", None)
    return request.param


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PQUEUE_URL", raising=False)
    return tmp_path


@pytest.fixture
def queue(folder, monkeypatch):
    for name in list(pqueue.TASKS):  # those of other tests' modules are not known here
        monkeypatch.delitem(pqueue.TASKS, name)
    queue = pqueue.open_queue()
    yield queue
    queue.close()


@pytest.fixture
def run(capsys):
    """Run the program in this process and return its exit code, output and error text."""

    def run(*arguments):
        capsys.readouterr()
        code = admin.main(list(map(str, arguments)))
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert err.count("\n") <= 1, err
        return code, out, err

    return run


def populate(queue):
    """Make one job of each state; return their numbers by state."""
    ids = {}
    for state in ("completed", "failed", "processing"):
        ids[state] = queue.enqueue("work", {"n": state}, max_attempts=1)
        job = queue.dequeue("anna")
        if state == "completed":
            queue.complete(job, {"ok": True})
        if state == "failed":
            queue.fail(job, "ValueError: <b>no</b>\n  in line 1")
    ids["cancelled"] = queue.enqueue("work", {"n": "cancelled"})
    queue.cancel(ids["cancelled"])
    ids["pending"] = queue.enqueue("work", {"password": "hunter2", "n": "pending"}, queue="slow")
    ids["scheduled"] = queue.enqueue("work", {"n": "scheduled"}, delay_seconds=3600)
    return ids


READING = [
    ["list-jobs"],
    ["list-jobs", "--json"],
    ["list-jobs", "--status", "failed", "--queue", "default", "--task", "work", "--consumer", "anna", "--json"],
    ["list-jobs", "--status", "failed,pending", "--payload", "a=b", "--limit", "3"],
    ["list-jobs", "--group", "a", "--json"],
    ["list-jobs", "--text", "value", "--since", "1h", "--until", "2100-01-01", "--limit", "3", "--before-id", "90"],
    ["failedjobs"],
    ["failedjobs", "--all"],
    ["failedjobs", "--json"],
    ["list-jobs", "--key", "k"],
    ["show", "2", "--json"],
    ["why", "1", "--json"],
    ["stats", "--json"],
    ["stats"],
    ["stats", "--by", "task"],
    ["stats", "--by", "task", "--since", "1h", "--json"],
    ["stats", "--since", "1h"],
    ["consumers", "--json"],
    ["consumers", "--all"],
    ["pause", "slow"],
    ["resume", "slow", "--json"],
    ["limit", "slow", "5"],
    [
        "enqueue",
        "other",
        "[1]",
        "--queue",
        "q",
        "--priority",
        "-2",
        "--delay",
        "1h",
        "--max-attempts",
        "2",
        "--key",
        "k",
    ],
    ["change", "5", "--priority", "3", "--json"],
    ["run-now", "6"],
    ["replay", "2"],
    ["schedule", "nightly", "work", "[1]", "--cron", "@daily", "--zone", "Asia/Tokyo", "--on-missed", "all"],
    ["schedule", "pulse", "work", "--every", "5m", "--overlap", "--group", "a", "--json"],
    ["schedule", "wrong", "work", "--cron", "* * *"],
    ["weigh", "default", "a", "2"],
    ["schedules"],
    ["schedules", "-o", "json"],
    ["pause-schedule", "pulse"],
    ["resume-schedule", "pulse"],
    ["unschedule", "pulse", "--json"],
    ["unschedule", "pulse"],
    ["resubmit", "2"],
    ["retry", "3", "--delay", "5m", "--rate", "10/1s"],
    ["resubmit", "--status", "failed", "--yes"],
    ["mark-failed", "5", "--error", "by hand"],
    ["cancel", "6", "--json"],
    ["assign-job", "5", "anna"],
    ["assign-job", "5", "--any"],
    ["keep", "slow", "--completed", "1h", "--failed", "forever"],
    ["retention"],
    ["retention", "-o", "json"],
    ["on-failed"],
    ["on-failed", "slow", "mail"],
    ["on-failed", "-o", "json"],
    ["on-failed", "slow", "--none", "--json"],
    ["expect", "slow", "--max-wait", "5m"],
    ["expect", "slow", "--max-failed", "50%"],
    ["expect"],
    ["expect", "slow", "--default", "--json"],
    ["prune", "--older-than", "7d"],
    ["compact"],
    ["backup", "copy.db"],
    ["restore", "copy.db"],
    ["restore", "copy.db", "--yes"],
    ["delete-job-files", "--directory", ".", "--dry-run"],
    ["delete-db-jobs", "--yes", "--force"],
    ["metrics"],
    ["logs", "2"],
    ["completion"],
    ["jobs", "--state", "failed", "--columns", "id,state"],
    ["failed", "-o", "json"],
    ["list-jobs", "--status", "bad"],
    ["show", "x"],
    ["show", "99"],
    ["prune"],
]


def test_typer_that_is_too_old_is_not_used(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", ModuleType("typer"))
    assert admin.main(["stats", "--no-such-option"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert admin.main(["stats", "--help"]) == 0


def test_both_front_ends_do_the_same_with_every_command(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PQUEUE_URL", raising=False)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    reported = []
    for front in ("argparse", "typer"):
        (tmp_path / front).mkdir()
        monkeypatch.chdir(tmp_path / front)
        monkeypatch.setattr(os, "urandom", lambda n: b"\1" * n)
        with monkeypatch.context() as patch:
            if front == "argparse":
                patch.setitem(sys.modules, "typer", None)
            queue = pqueue.open_queue()
            populate(queue)
            answers = []
            for arguments in READING:
                code = admin.main(arguments)
                out, err = capsys.readouterr()
                answers.append((arguments, code, re.sub(r"\S+_bytes \S+", "", out), err.replace(front, "front")))
            queue.close()
            reported.append(answers)
    assert reported[0] == reported[1]
    assert {arguments[0] for arguments in READING} >= set(admin.COMMANDS) - {"monitor", "doctor", "torture", "move"}


def test_each_command_explains_itself(front, capsys):
    for arguments in [["--help"], *([name, "--help"] for name in admin.COMMANDS)]:
        try:
            code = admin.main(arguments)
        except SystemExit as end:
            code = end.code
        assert code == 0
        out = capsys.readouterr().out
        for entry in admin.COMMANDS.values() if arguments == ["--help"] else [admin.COMMANDS[arguments[0]]]:
            assert " ".join(entry.help.split()[:3]) in " ".join(out.split())
        if arguments != ["--help"]:
            for parameter in entry.parameters:
                assert (parameter.name if parameter.is_option else parameter.metavar) in out


def test_overview_groups_the_commands_and_fits_the_terminal(front, capsys, monkeypatch):
    for columns in (200, 80, 40):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert admin.main(["--help"]) == 0
        out = capsys.readouterr().out
        assert columns < 80 or max(map(len, out.split("\n"))) <= columns
        headings = re.findall(r"^(\w+):$", out, re.MULTILINE)
        assert headings == ["Inspect", "Jobs", "Queues", "Data", "System", "Examples"]
    assert admin.main([]) == 2
    assert capsys.readouterr().out == out
    assert admin.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pqueue {pqueue.__version__}\n"


def test_examples_of_each_command_are_valid_and_shown(front, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(admin, "run", lambda entry, options: ran.append((entry.name, vars(options))) or 0)
    for entry in admin.COMMANDS.values():
        with suppress(SystemExit):
            admin.main([entry.name, "--help"])
        out = capsys.readouterr().out
        for example in entry.examples:
            assert f"  admin.py {example}\n" in out
            assert admin.main([word for word in shlex.split(example) if not word.startswith(">>")]) == 0
            assert ran[-1][0] == entry.name
    assert len(ran) > 20


def test_operator_sees_when_a_job_failed_and_that_a_new_database_has_no_queues(front, queue, run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(admin, "wants_rows", lambda _: False)
        assert run("stats")[1].startswith("no queues\n\nsince ")
    queue.enqueue("t", max_attempts=1, now=time.time() - 3600)
    queue.fail(queue.dequeue("w"), "no")
    header, row = run("failed", "--all")[1].splitlines()
    assert header.split("\t")[5] == "finished_at"
    assert row.split("\t")[5] > time.strftime("%Y-%m-%dT%H:%M", time.gmtime(time.time() - 60))


def test_program_gets_the_payloads_as_they_are_and_times_in_iso_8601(front, queue, run):
    payload = {"sent_at": "noon", "at": 5, "rows": [{"read_at": None}]}
    queue.enqueue("t", payload)
    queue.complete(queue.dequeue("w"), payload)
    for command in (["show", "1"], ["list-jobs"]):
        row = json.loads(run(*command, "-o", "json")[1])
        assert (row["payload"], row["result"], row["created_at"][-1]) == (payload, payload, "Z")
    seen = json.loads(run("monitor", "--once", "-o", "json")[1])
    assert [each["last_seen_at"][-1] for each in seen["consumers"]] == ["Z"]


def test_operator_sees_which_task_fails_however_its_jobs_were_deleted(front, queue, run):
    for number in range(4):
        queue.enqueue("well", queue="a")
        queue.complete(queue.dequeue("w", tasks=["well"]))
        queue.enqueue("badly", max_attempts=2)
        queue.fail(queue.dequeue("w", tasks=["badly"]), "no", retry=number > 0)
    queue.delete_jobs()
    rows = [json.loads(line) for line in run("stats", "--by", "task", "-o", "json")[1].splitlines()]
    assert [list(row.values())[:7] for row in rows] == [
        ["default", "badly", 4, 0, 1, 3, 1.0],
        ["a", "well", 4, 4, 0, 0, 0],
    ]
    assert (rows[0]["p50_seconds"], rows[1]["p95_seconds"] < 60) == (None, True)
    assert run("stats", "--by", "task", "--since", "2100-01-01")[1] == ""
    assert "expected one of queue, task" in run("stats", "--by", "day")[2]
    header, *rows = (line.split("\t") for line in run("stats", "--by", "queue", "--since", "4m")[1].splitlines())
    assert (header[0], header[-1]) == ("queue", "completed_per_minute")
    assert [row[:5] for row in rows] == [["default", "4", "0", "1", "3"], ["a", "4", "4", "0", "0"]]
    assert 1 <= float(rows[1][-1]) <= 1.4


def test_operator_reads_what_was_logged_about_a_job(front, folder, run):
    logs = folder / "var/log"
    logs.mkdir(parents=True)
    lines = [f"2026-11-26T0{n}:00:00.000Z completed consumer=w job={job}" for n, job in enumerate((7, 17, 7, 71, 7))]
    (logs / "consumer_00.log.1").write_text("\n".join([lines[0], lines[1], ""]))
    (logs / "consumer_01.log").write_text(f"{lines[2]} task=a\njob=77\n{lines[3]}\n")
    (logs / "consumer_00.log").write_bytes(f"{lines[4]} error=".encode() + b"\xff\x1b[31m\n")
    code, out, _ = run("logs", "7")
    assert (code, out) == (0, f"{lines[0]}\n{lines[2]} task=a\n{lines[4]} error=\ufffd\\x1b[31m\n")
    assert [json.loads(line)["file"] for line in run("logs", "7", "--json")[1].splitlines()] == [
        "consumer_00.log.1",
        "consumer_01.log",
        "consumer_00.log",
    ]
    assert run("logs", "8")[::2] == (1, "admin.py: no line about job 8 in var/log\n")
    (logs / "consumer_02.log").write_text('{"event": "completed", "job": 91}\n{"event": "completed", "job": 9}\n')
    assert run("logs", "9")[:2] == (0, '{"event": "completed", "job": 9}\n')


def test_operator_whose_folder_has_no_queue_creates_none(front, folder, run):
    values = {
        "job_id": "1",
        "task": "t",
        "queue": "default",
        "max_pending": "5",
        "group": "a",
        "weight": "2",
        "consumer": "c",
        "file": "x.db",
    }
    values["schedule"] = "nightly"
    for name in sorted(set(admin.COMMANDS) - {"torture", "monitor", "restore", "logs", "completion"}):
        required = [each for each in admin.COMMANDS[name].parameters if not each.is_option]
        code, _, err = run(name, *[values[each.key] for each in required if each.key in values])
        assert code == 1
        assert f"no queue at {folder}/var/queue.db" in err
    assert list(folder.iterdir()) == []


def test_command_that_may_not_use_a_file_says_so_in_one_line(front, run, monkeypatch):
    monkeypatch.setenv("PQUEUE_URL", "/proc/queue.db")  # where nobody may create a folder
    code, out, error = run("torture", "--seconds", "1")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"admin\.py: cannot use /proc/torture-\w+: No such file or directory\n", error)


NUMBERS = [
    "9" * 20,
    "9" * 5000,
    "-" + "9" * 20,
    str(2**31),
    str(2**63),
    "0",
    "-1",
    "1e400",
    "nan",
    "inf",
    "0.5",
    "9" * 400 + "w",
]
NUMBERS += [f"{'9' * 30}/1s", f"1/{'9' * 30}w", "1/1000000w", "9" * 400 + "%", "1e308%", "٣", "1_000"]


@pytest.mark.parametrize("name", sorted(set(admin.COMMANDS) - {"torture", "completion"}))
def test_operator_whose_number_is_impossible_is_told_in_one_line(queue, run, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.setattr(admin.live, "run", lambda *_: None)
    populate(queue)
    queue.schedule("nightly", "work", every_seconds=60)
    known = {"job_id": "6", "job_ids": "6", "queue": "slow", "schedule": "nightly", "task": "work", "group": "a"}
    parameters = admin.COMMANDS[name].parameters
    for each in parameters:
        if each.flag or each.parse in (str, commands.path) or isinstance(each.parse, OneOf) or each in output.OPTIONS:
            continue
        for number in NUMBERS:
            option = [f"{each.name}={number}"] * each.is_option
            given = [number if other is each else known.get(other.key) for other in parameters if not other.is_option]
            code, _, err = run(name, *option, *["--", *filter(None, given)] * any(given))
            assert code in (0, 1, 2)
            assert len(err) < 400, err
            assert "expected" in err or code != 2, err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["show", "99"], 1, "no job 99"),
        (["why", "99"], 1, "no job 99"),
        (["cancel", "99"], 1, "no such job"),
        (["resubmit", "5"], 1, "cannot resubmit job 5: it is pending"),
        (["resubmit", "2", "5"], 1, "cannot resubmit job 5: it is pending"),
        (["show", "nine"], 2, "job_id: expected a whole number of at least 0, got 'nine'"),
        (["show", "9" * 20], 2, "job_id: expected a whole number from 0 to 9223372036854775807, got '99999"),
        (["show", str(2**63)], 2, "job_id: expected a whole number from 0 to 9223372036854775807, got '92233"),
        (["show", "0" * 30 + "99"], 1, "no job 99"),
        (["show", "-3"], 2, ""),
        (["show"], 2, ""),
        (["bogus"], 2, "expected a command, got 'bogus'; see admin.py --help"),
        (["list"], 2, "expected a command, got 'list'; did you mean list-jobs? See admin.py --help"),
        (["resubmti"], 2, "did you mean resubmit"),
        (["--nosuch"], 2, "expected a command, got '--nosuch'"),
        (["logs", "5"], 1, "no folder var/log: expected the logs that Supervisor writes"),
        (["replay", "99"], 1, "no job 99"),
        (["replay", "5"], 1, "cannot replay job 5: expected one of completed, failed, cancelled, it is pending"),
        (["replay", "2", "--save", "job.py"], 2, "expected a file such as test_job.py"),
        (["completion"], 1, "cannot complete admin.py: install the package"),
        ([], 2, ""),
        (["list-jobs", "--colour", "red"], 2, "--colour"),
        (["list-jobs", "--status", "done"], 2, "expected one of waiting, scheduled, pending"),
        (["cancel"], 2, "cancel: expected job ids or a filter such as --status failed"),
        (["limit", "default", "many"], 2, "max_pending: expected a whole number of at least 1, or none, got 'many'"),
        (["limit", "default", "--rate", "10"], 2, "expected JOBS/DURATION, such as 10/1s, or none, got '10'"),
        (["keep", "default", "--failed", "ever"], 2, "12h, 7d or 2w, or forever, got 'ever'"),
        (["list-jobs", "--since", "soon"], 2, "expected a duration such as 15m, or a time"),
        (["list-jobs", "--limit", "0"], 2, "expected a whole number of at least 1"),
        (["enqueue", "t", "{bad"], 2, "expected JSON, got '{bad'"),
        (["enqueue", "t", "NaN"], 2, "expected a payload that JSON can hold"),
        (["enqueue", "t", "--delay", "5"], 2, "expected a duration such as 90s"),
        (["enqueue", ""], 2, "expected a task name"),
        (["prune"], 2, "--older-than"),
        (["enqueue", "t", "--expire", "5"], 2, "expected a duration such as 90s"),
        (["keep", "slow"], 2, "expected --completed, --failed or --cancelled, such as --completed 7d"),
        (["keep", "slow", "--failed", "7y"], 2, "expected a duration such as 90s"),
        (["keep", "nosuch", "--failed", "7d"], 1, "no queue 'nosuch'; there are: default, slow"),
        (["on-failed", "slow"], 2, "expected QUEUE TASK, QUEUE --none, or no arguments"),
        (["on-failed", "--none"], 2, "expected QUEUE TASK, QUEUE --none, or no arguments"),
        (["on-failed", "slow", "mail", "--none"], 2, "expected QUEUE TASK, QUEUE --none, or no arguments"),
        (["on-failed", "slow", "x\ny"], 2, "expected a task name"),
        (["on-failed", "nosuch", "mail"], 1, "no queue 'nosuch'; there are: default, slow"),
        (["expect", "slow"], 2, "expected QUEUE with --max-wait and --max-failed, or --default"),
        (["expect", "--max-wait", "5m"], 2, "expected QUEUE with --max-wait and --max-failed, or --default"),
        (["expect", "slow", "--default", "--max-wait", "5m"], 2, "expected QUEUE with --max-wait"),
        (["expect", "slow", "--max-wait", "0s"], 2, "expected --max-wait above 0"),
        (["expect", "slow", "--max-failed", "half"], 2, "expected a share such as 0.2 or 20%"),
        (["expect", "slow", "--max-failed", "120%"], 2, "expected --max-failed between 0 and 1"),
        (["expect", "slow", "--max-failed", "nan"], 2, "expected --max-failed"),
        (["expect", "nosuch", "--default"], 1, "no queue 'nosuch'; there are: default, slow"),
        (["prune", "--older-than", "7y"], 2, "expected a duration"),
        (["resubmit"], 2, "expected job ids or a filter such as --status failed, got neither"),
        (["backup", ""], 2, "file: expected a text that is not blank, got ''"),
        (["restore", " ", "--yes"], 2, "file: expected a text that is not blank, got ' '"),
        (["jobs", "--columns", ""], 2, "--columns: expected a text that is not blank"),
        (["mark-failed", "1", "--error", ""], 2, "--error: expected a text that is not blank"),
        (["resubmit", "--text", "", "--yes"], 2, "--text: expected a text that is not blank, got ''"),
        (["enqueue", "t", "--priority", "3" * 10], 2, "whole number from -2147483648 to 2147483647, got '3333333333'"),
        (
            ["enqueue", "t", "--max-attempts", "1" * 20],
            2,
            "whole number from 1 to 2147483647, got '11111111111111111111'",
        ),
        (["show", "1" * 20], 2, "whole number from 0 to 9223372036854775807, got '11111111111111111111'"),
        (["schedule", "a", "b"], 2, "expected --cron or --every, got neither"),
        (["schedule", "a", "b", "--cron", "or every_seconds"], 2, "got 'or every_seconds'"),
        (["enqueue", "t", "--priority", "x"], 2, "a whole number from -2147483648 to 2147483647, got 'x'"),
        (["enqueue", "t", "--key-for", "1s"], 2, "expected a key together with --key-until, --key-for or --replace"),
        (["resubmit", "2", "--rate", "10"], 2, "--rate: expected JOBS/DURATION, such as 10/1s, got '10'"),
        (["resubmit", "--status", "failed", "--rate", "1/2s"], 2, "expected --yes to resubmit 1 job at 1/2s without"),
        (["jobs", "--status", "failed,nosuch"], 2, "expected one of"),
        (["jobs", "--payload", "customer"], 2, "expected a path in the payload and a value, such as customer=7"),
        (["resubmit", "2", "--status", "failed"], 2, "expected job ids or a filter such as --status failed, got both"),
        (["resubmit", "--status", "failed"], 2, "expected --yes to resubmit 1 job without a terminal"),
        (["delete-db-jobs"], 2, "expected --yes to delete all"),
        (["delete-db-jobs", "--yes"], 1, "1 of them are processing"),
        (["assign-job", "5"], 2, "expected a CONSUMER_ID, or --any, got neither"),
        (["pause", "nosuch"], 1, "no queue 'nosuch'; there are: default, slow"),
        (["limit", "slow", "few"], 2, "expected a whole number of at least 1, or none, got 'few'"),
        (["backup", "/nosuch/copy.db"], 1, "cannot back up to /nosuch/copy.db"),
        (["delete-job-files"], 2, "expected --directory DIR"),
        (["delete-job-files", "--directory", "/nosuch"], 1, "cannot read /nosuch"),
        (["monitor", "--interval", "0s"], 2, "expected a duration from 0.1s to 1d, got '0s'"),
        (
            ["resubmit", "2", "--delay", "-5m"],
            2,
            "--delay: expected a duration such as 90s, 15m, 12h, 7d or 2w, got '-5m'",
        ),
        (["keep", "slow", "--failed", "-.5d"], 2, "--failed: expected a duration such as 90s, 15m, 12h, 7d or 2w"),
        (["limit", "slow", "--rate", "-1/1s"], 2, "--rate: expected a whole number of at least 1, or none, got '-1'"),
        (["monitor", "--interval", "2d"], 2, "expected a duration from 0.1s to 1d"),
        (["monitor", "--interval", f"{10**30}w"], 2, "expected a duration to be a finite number of seconds"),
    ],
)
def test_operator_mistake_is_reported_in_one_line(front, queue, run, arguments, code, message):
    populate(queue)
    before = queue.list_jobs()
    assert run(*arguments)[0] == code
    assert message in run(*arguments)[2]
    assert queue.list_jobs() == before


def test_operator_cannot_open_a_file_that_is_no_queue(front, folder, run, monkeypatch):
    other = folder / "other.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE mine (x)")
    db.close()
    newer = folder / "newer.db"
    pqueue.open_queue(str(newer)).close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 999")
    db.close()
    for url, message in [
        (str(other), "another program's database"),
        (str(newer), "expected schema"),
        (str(folder), "got a folder"),
        ("mysql://u:secret@h/d", "for a server, got mysql://…; check PQUEUE_URL"),
    ]:
        monkeypatch.setenv("PQUEUE_URL", url)
        code, _, err = run("stats")
        assert code in (1, 2)
        assert message in err
        assert "secret" not in err


def test_operator_may_name_a_job_twice(queue, run):
    job_id = str(populate(queue)["failed"])
    assert run("resubmit", job_id, job_id, "--json")[1].count("resubmitted") == 1
    assert run("cancel", job_id, job_id, "--yes")[0] == 0
    assert queue.get(int(job_id)).state == "cancelled"


def test_operator_resubmits_all_that_match_in_batches(front, queue, run, monkeypatch):
    monkeypatch.setattr(pqueue_operating, "BATCH", 7)
    for number in range(20):
        queue.enqueue("even" if number % 2 == 0 else "odd", max_attempts=1)
        queue.fail(queue.dequeue("w"), "no")
    code, out, _ = run("resubmit", "--status", "failed", "--task", "even", "--yes")
    assert (code, out) == (0, "resubmitted 10 jobs\n")
    assert {job.task for job in queue.list_jobs(state="pending")} == {"even"}
    assert queue.stats()["states"]["failed"] == 10
    assert queue.history(1)[-1]["event"] == "resubmitted"


def test_operator_whose_filter_matches_nothing_is_told(front, queue, run):
    queue.enqueue("work")
    assert run("cancel", "--task", "wrok")[:2] == (0, "no job matches\n")
    assert run("resubmit", "--task", "work", "--yes")[:2] == (
        1,
        "resubmitted 0 jobs; 1 not changed because of its state\n",
    )


def test_operator_limits_the_groups_of_failed_jobs(queue, run):
    for task in ("a", "b", "c"):
        queue.mark_failed(queue.enqueue(task), "no")
    assert len(run("failedjobs")[1].splitlines()) == 1 + 3
    assert len(run("failedjobs", "--limit", "2")[1].splitlines()) == 1 + 2


def test_operator_sees_no_secret_of_a_payload(queue, run):
    ids = populate(queue)
    for arguments in (["list-jobs"], ["list-jobs", "--json"], ["show", ids["pending"]]):
        out = run(*arguments)[1]
        assert "hunter2" not in out
        assert "password" in out


def test_operator_takes_a_running_job_over(queue, run):
    ids = populate(queue)
    (running,) = queue.list_jobs(state="processing")
    code, _, err = run("assign-job", ids["processing"], "berta")
    assert (code, "take job 3 from anna" in err) == (2, True)
    code, out, err = run("assign-job", ids["processing"], "berta", "--yes")
    assert (code, out) == (0, "job 3 assigned to berta\n")
    assert "no consumer named 'berta' has connected yet" in err
    with pytest.raises(pqueue.LeaseLost):
        queue.complete(running)
    assert queue.dequeue("anna", queues=["default"]) is None
    assert queue.dequeue("berta").id == ids["processing"]


def test_operator_deletes_only_the_files_that_no_job_needs(queue, run, folder):
    files = folder / "files"
    files.mkdir()
    # a producer has written the last of these, and is about to enqueue it
    for name in ("job_done.txt", "job_waiting.txt", "job_stray.txt", "notes.txt", "job_next.txt", ".job_next.txt.new"):
        (files / name).write_text(name)
    (files / "job_folder.txt").mkdir()
    (folder / "precious").write_text("mine")
    (files / "job_link.txt").symlink_to(folder / "precious")
    queue.enqueue("prepend_timestamp", {"file": "job_done.txt"})
    queue.complete(queue.dequeue("w"))
    queue.enqueue("prepend_timestamp", {"file": "job_waiting.txt"})
    code, out, _ = run("delete-job-files", "--directory", files, "--dry-run")
    assert (code, out) == (0, "file\njob_done.txt\njob_stray.txt\n")
    assert run("delete-job-files", "--directory", files)[0] == 2
    assert (files / "job_done.txt").exists()
    code, out, _ = run("delete-job-files", "--directory", files, "--yes")
    assert (code, out) == (0, "deleted 2 files, 1 file kept for unfinished jobs\n")
    left = {"job_waiting.txt", "notes.txt", "job_folder.txt", "job_link.txt", "job_next.txt", ".job_next.txt.new"}
    assert {path.name for path in files.iterdir()} == left
    run("delete-job-files", "--directory", files, "--yes", "--force")
    assert {path.name for path in files.iterdir()} == left - {"job_waiting.txt"}
    assert (folder / "precious").read_text() == "mine"


@pytest.fixture
def files(folder):
    (folder / "files").mkdir()
    return folder / "files"


def test_operator_keeps_the_files_of_jobs_that_change_their_state_meanwhile(queue, run, files, monkeypatch):
    """Whichever queries the command makes, some jobs are in another state at each."""
    names = [f"job_{number}.txt" for number in range(30)]
    for name in names:
        (files / name).write_text(name)
        queue.enqueue("prepend_timestamp", {"file": name})
    read, turns = type(queue)._read, iter(range(10**6))

    def change_then_read(self, *arguments):
        if self is not queue and not self.in_transaction:
            turn = next(turns)
            for job in queue.list_jobs(limit=len(names))[turn % 2 :: 2]:
                queue.fail(job, "again", retry_in_seconds=1e6) if job.state == "processing" else None
                queue.assign(job.id, f"w{job.id}") if job.state == "pending" else None
                queue.dequeue(f"w{job.id}", queues=["none"], now=2e9) if job.state == "pending" and turn % 3 else None
                if job.state == "scheduled":
                    queue.cancel(job.id)
                    queue.resubmit(job.id)
        return read(self, *arguments)

    monkeypatch.setattr(type(queue), "_read", change_then_read)
    for _ in range(3):
        assert (
            run("delete-job-files", "--directory", files, "--yes")[1]
            == "nothing to delete, 30 files kept for unfinished jobs\n"
        )
    assert {path.name for path in files.iterdir()} == set(names)


@pytest.mark.parametrize("act", ["resubmit", "enqueue"])
def test_operator_keeps_the_file_of_a_job_that_is_resubmitted_meanwhile(queue, run, files, monkeypatch, act):
    for name in ("job_again.txt", "job_done.txt"):
        (files / name).write_text(name)
        queue.enqueue("prepend_timestamp", {"file": name})
        queue.complete(queue.dequeue("w"))

    def answer(*_):
        queue.resubmit(1) if act == "resubmit" else queue.enqueue("prepend_timestamp", {"file": "job_again.txt"})
        return True

    monkeypatch.setattr(admin, "agreed", answer)
    code, out, _ = run("delete-job-files", "--directory", files)
    assert (code, out) == (0, "deleted 1 file, 1 file kept for unfinished jobs\n")
    assert [path.name for path in files.iterdir()] == ["job_again.txt"]


FAILING = """
import os, sys, pqueue
queue = pqueue.open_queue(durability="normal")
print("ready", flush=True)
while True:
    for job in queue.dequeue_many(sys.argv[1], 8):
        if not os.path.exists("files/" + job.payload["file"]):
            print("no file", job.payload["file"], flush=True)
        queue.fail(job, "again", retry_in_seconds=0.002)
"""


def test_operator_keeps_the_files_of_jobs_that_consumers_work_on(queue, run, files):
    names = [f"job_{number}.txt" for number in range(40)]
    for name in names:
        (files / name).write_text(name)
        queue.enqueue("prepend_timestamp", {"file": name}, max_attempts=10**9)
    queue.enqueue_many("t", [{"n": number} for number in range(3000)], queue="other")
    queue.pause("other")
    children = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING, f"w{number}"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for number in range(5):
            (files / f"job_stray{number}.txt").write_text("x")
            code, out, err = run("delete-job-files", "--directory", files, "--yes")
            assert (code, out) == (0, "deleted 1 file, 40 files kept for unfinished jobs\n"), err
    finally:
        for child in children:
            child.kill()
    assert [child.communicate()[0] for child in children] == ["", ""]
    assert {path.name for path in files.iterdir()} == set(names)


def test_resubmit_of_failed_jobs_skips_those_completed_meanwhile(queue, run, monkeypatch):
    ids = [queue.enqueue("t") for _ in range(3)]
    for job_id in ids:
        queue.mark_failed(job_id)
    search, other = type(queue).search_jobs, pqueue.open_queue()

    def found_then_run(self, filters, **options):
        found = search(self, filters, **options)
        if self is not queue and self is not other and not self.in_transaction and other.get(ids[1]).state == "failed":
            other.resubmit(ids[1])
            other.complete(other.dequeue("w"))
        return found

    monkeypatch.setattr(type(queue), "search_jobs", found_then_run)
    assert run("resubmit", "--status", "failed", "--yes")[1] == "resubmitted 2 jobs\n"
    assert [queue.get(job_id).state for job_id in ids] == ["pending", "completed", "pending"]
    other.close()


def test_operator_resubmits_a_job_together_with_one_that_failed_with_it(queue, run):
    parent = queue.enqueue("t")
    child = queue.enqueue("t", after=[parent])
    queue.mark_failed(parent)
    assert run("resubmit", child, parent)[:2] == (0, f"resubmitted jobs {child}, {parent}\n")
    assert [queue.get(job_id).state for job_id in (parent, child)] == ["pending", "waiting"]


def test_operator_takes_no_running_job_over_unasked(queue, run, monkeypatch):
    job_id = queue.enqueue("t")
    look = type(queue).consumers

    def taken_meanwhile(self, **options):
        queue.dequeue("anna")
        return look(self, **options)

    monkeypatch.setattr(type(queue), "consumers", taken_meanwhile)
    code, _, err = run("assign-job", job_id, "anna")
    assert (code, err) == (1, "admin.py: cannot assign job 1: anna has just taken it; repeat the command\n")
    assert queue.get(job_id).consumer == "anna"


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ("completed", "it was completed by anna"),
        ("failed", "after 1 of 1 attempt: ValueError: <b>no</b>; resubmit it"),
        ("cancelled", "it was cancelled"),
        ("processing", "it has been running on anna for"),
        ("scheduled", "it is due in 1 h"),
        ("pending", "it is waiting: 1 job pending in queue slow, 1 of 1 consumer busy"),
    ],
)
def test_operator_sees_why_a_job_does_not_run(queue, state, sentence):
    ids = populate(queue)
    found = report.why(queue, ids[state])
    assert sentence in found
    assert not re.search(r"\d\d:\d\d", found)  # by the clock of a server whose time zone is not the reader's


def test_operator_is_not_told_to_resubmit_a_job_without_the_one_that_it_runs_after(queue):
    parent = queue.enqueue("t")
    child = queue.enqueue("t", after=[parent])
    queue.cancel(parent)
    found = report.why(queue, child)
    assert found.endswith(": job 1 was cancelled; it waits again when its parents are resubmitted"), found


def test_operator_enqueues_after_other_jobs_and_sees_for_which_a_job_waits(front, queue, run):
    parents = [int(run("enqueue", "work", number)[1]) for number in range(7)]
    child = int(run("enqueue", "album", "--after", ",".join(map(str, parents)), "--after-failed", "run")[1])
    queue.complete(queue.dequeue("anna"))
    queue.dequeue("anna")
    names = [f"{parents[1]} (work, processing)", *(f"{job_id} (work, pending)" for job_id in parents[2:6])]
    sentence = f"it runs after jobs {', '.join(names)} and 1 more"
    assert report.why(queue, child) == sentence
    _, out, _ = run("show", child)
    assert sentence in out
    assert "after" in out
    assert "waits_for         6" in out
    assert json.loads(run("show", child, "--json")[1])["after"] == parents
    assert f"\n{child}\twaiting\t" in run("list-jobs", "--status", "waiting", "-o", "tsv")[1]
    assert run("run-now", child)[0] == 0
    assert queue.get(child).state == "pending"
    assert "after" not in run("show", parents[0])[1]
    assert run("enqueue", "album", "--after", "12345")[::2] == (
        1,
        "admin.py: cannot enqueue after job 12345: no such job\n",
    )
    assert run("enqueue", "album", "--after", "1,x")[0] == run("enqueue", "a", "--after-failed", "skip")[0] == 2


def test_operator_is_told_to_import_tasks_except_the_built_in_one(queue):
    start = "no consumer is alive: run python3 consumer.py"
    job_id = queue.enqueue("prepend_timestamp", {"file": "job_1.txt"})
    assert report.why(queue, job_id) == start
    assert [str(each) for each in report.findings(queue)] == [f"1 job pending and {start}"]
    queue.enqueue("mail")
    assert [str(each) for each in report.findings(queue)] == [f"2 jobs pending and {start} --import MODULE"]


def test_operator_sees_what_delays_a_pending_job(queue):
    job_id = queue.enqueue("mail", queue="post")
    assert report.why(queue, job_id) == "no consumer is alive: run python3 consumer.py --import MODULE"
    queue.dequeue("anna", queues=["default"], tasks=["known"])
    assert report.why(queue, job_id) == "no live consumer serves its queue post"
    queue.assign(job_id, "berta")
    assert report.why(queue, job_id).startswith("it is assigned to berta, which is not alive")
    queue.assign(job_id, "anna")
    assert report.why(queue, job_id).startswith("it is assigned to anna, which does not know its task mail")
    queue.pause("post")
    assert report.why(queue, job_id) == "its queue post is paused: python3 admin.py resume post"


def test_hints_of_an_installed_copy_name_its_commands(queue, tmp_path, monkeypatch):
    for program in ("admin", "consumer"):
        (tmp_path / f"{program}.py").touch()
    monkeypatch.setattr(pqueue_values, "__file__", str(tmp_path / "pqueue_values.py"))
    job_id = queue.enqueue("mail")
    assert report.why(queue, job_id) == "no consumer is alive: run pqueue-consumer --import MODULE"
    queue.pause("default")
    assert report.why(queue, job_id) == "its queue default is paused: pqueue resume default"


def test_hints_of_a_checkout_name_its_programs_from_any_folder(queue, tmp_path):
    (tmp_path / "consumer.py").touch()  # a project's own
    command = [sys.executable, str(ROOT / "admin.py"), "why", str(queue.enqueue("mail"))]
    for folder, shown in ((tmp_path, f"{ROOT}/consumer.py"), (ROOT, "consumer.py")):
        done = subprocess.run(
            command,
            cwd=folder,
            env={"PQUEUE_URL": queue.name, **os.environ},
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert done.stdout.endswith(f"no consumer is alive: run python3 {shown} --import MODULE\n"), done.stderr


def test_suggested_command_quotes_names_for_the_shell(queue):
    name = "a; touch evil"
    job_id = queue.enqueue("mail", queue=name, now=1)
    queue.pause(name)
    for sentence in (report.why(queue, job_id), *map(str, report.findings(queue))):
        assert sentence.endswith("python3 admin.py resume 'a; touch evil'") or "resume" not in sentence


def test_doctor_is_content_with_a_healthy_queue(front, queue, run):
    queue.complete(queue.dequeue("w")) if queue.enqueue("t") else None
    code, out, _ = run("doctor")
    assert (code, out.splitlines()[0]) == (0, "no problem found")


def test_doctor_reports_each_problem(queue, run, monkeypatch, folder):
    def found():
        code, out, _ = run("doctor", "--json")
        found = json.loads(out)["findings"]
        assert code == int(any(each["severity"] != "info" for each in found))
        return " | ".join("{severity}: {text}: {remedy}".format(**each) for each in found)

    now = time.time()
    queue.enqueue("t", now=now - 3600)
    alone = "critical: 1 job pending and no consumer is alive; the oldest has waited for 1 h: "
    assert found() == alone + "run python3 consumer.py --import MODULE"  # which is why the job waits
    job = queue.dequeue("anna", lease_seconds=1, now=now - 60)
    assert "1 lease ran out and no consumer took the jobs back" in found()
    queue.complete(job)
    queue.enqueue("t", run_at=now, now=now + 7200)
    assert "the newest job was enqueued in 2 h: some clock is wrong" in found()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 5 * 10**6, 5 * 10**6))
    assert "the disk has only 5 MB left: free some" in found()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(pqueue.PersistentQSQLite, "_transaction", _written_carelessly)
    assert "expected synchronous full, got off" in found()


def test_pause_is_information_however_long_jobs_wait(front, queue, run):
    queue.enqueue("t", now=time.time() - 7200)
    queue.pause("default")
    queue.dequeue("w")
    code, out, _ = run("doctor")
    assert code == 0
    assert out.splitlines()[0] == (
        "info: queue 'default' is paused, with 1 job pending: run python3 admin.py resume default"
    )
    queue.enqueue("t", queue="other", now=time.time() - 7200)
    code, out, _ = run("doctor")
    assert code == 1
    assert "critical: queue 'other' makes no progress: 1 job due, none begun or ended for 1 min; the oldest has" in out
    assert out.count("the oldest") == 1


def test_doctor_finds_a_queue_that_makes_no_progress_though_a_consumer_is_idle(queue):
    now = time.time()
    queue.dequeue("w", tasks=["t"])
    queue.enqueue_many("t", range(2), queue="mail", now=now - 120)
    queue.enqueue("u", now=now - 120)
    found = [str(each) for each in report.findings(queue) if "makes no progress" in str(each)]
    text = "queue 'mail' makes no progress: 2 jobs due, none begun or ended for 1 min; the oldest has waited for 2 min"
    assert found == [f"{text}: read the log of w, which is idle, and restart it"]
    for change in (lambda: queue.pause("mail"), lambda: queue.resume("mail") or queue.dequeue("w", tasks=["t"])):
        change()
        assert "makes no progress" not in str(report.findings(queue))
    assert "makes no progress" not in str(report.findings(queue, now + 90))  # it is busy


def test_doctor_reports_a_cause_without_what_follows_from_it(queue):
    def found():
        return [each.text for each in report.findings(queue)]

    now = time.time()
    queue.schedule("late", "t", every_seconds=60, now=now - 7200)
    for name in ("a", "b"):
        queue.enqueue_many("t", range(2), queue=name, now=now - 3600)
    assert found() == ["4 jobs pending and no consumer is alive; the oldest has waited for 1 h"]
    queue.unschedule("late")
    queue.dequeue("w", queues=["b"], tasks=["u"])
    assert found() == [
        "queue 'a': 2 jobs pending and no live consumer serves it; the oldest has waited for 1 h",
        "task 't': 2 jobs pending and no running consumer of the queue knows this task",
    ]
    for each in queue.list_jobs(queue="a"):
        queue.cancel(each.id)
    queue.pause("b")
    queue.dequeue("v", queues=["b"], tasks=["t"])
    queue.resume("b")
    assert [each.partition(":")[0] for each in found()] == ["queue 'b' makes no progress"]


def test_doctor_finds_a_queue_that_no_consumer_serves(queue):
    queue.enqueue_many("t", range(2), queue="mail")
    queue.dequeue("w", queues=["images"])
    (found,) = report.findings(queue)
    assert str(found) == (
        "queue 'mail': 2 jobs pending and no live consumer serves it: "
        "run python3 consumer.py --queue mail --import MODULE"
    )
    assert found.severity == "critical"
    queue.dequeue("any")
    assert report.findings(queue) == []


def test_doctor_finds_that_all_consumers_have_died(queue):
    script = "import os, pqueue; pqueue.open_queue().dequeue('anna'); os._exit(0)"
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    found = r"no consumer is alive: 1 died, the last was seen \S+ s ago: run python3 consumer.py"
    wait_until(lambda: re.fullmatch(found, "; ".join(map(str, report.findings(queue)))))  # PostgreSQL sees it later
    queue.dequeue("w")
    assert report.findings(queue) == []


def test_doctor_takes_as_many_steps_among_many_processing_jobs(queue):
    """To find those of one consumer, all are read."""
    queue.dequeue("w")
    steps = []
    for number in (1, 4_000):
        queue.enqueue_many("t", range(number))
        while queue.dequeue_many("w", 128):
            pass
        stats, facts = queue.stats(), queue.check(thorough=False)
        counted = itertools.count()
        with queue.transaction() as db:
            db.set_progress_handler(lambda counted=counted: next(counted) and 0, 10)
            assert report.findings(queue, stats=stats, facts=facts) == []
            db.set_progress_handler(None, 0)
        steps.append(next(counted))
    assert steps[1] < 1.2 * steps[0] + 10


def test_doctor_combines_consumers_that_ended_with_jobs(queue, monkeypatch):
    each = {"state": "dead", "job_ids": [1, 2], "last_seen_at": time.time(), "queues": None, "tasks": None}
    monkeypatch.setattr(queue, "consumers", lambda **_: [{**each, "name": name} for name in "abcde"])
    texts = [each.text for each in report.findings(queue)]
    assert "5 consumers ended and hold 10 jobs (a, b, c …)" in texts
    assert len(texts) == 2


def test_doctor_finds_a_program_that_supervisor_gave_up_on(queue, run, monkeypatch):
    process = {"group": "consumer", "name": "consumer_00", "pid": 0, "uptime_seconds": 0}
    states = [{**process, "state": "FATAL"}, {**process, "name": "consumer_01", "state": "BACKOFF"}]
    monkeypatch.setattr(supervisor, "known_processes", lambda: states)
    code, out, _ = run("doctor")
    assert code == 1
    assert out.splitlines()[:2] == [
        "critical: Supervisor gave up on consumer_00, which keeps ending: read its log, then run python3 manager.py "
        "--start consumer_00",
        "warning: consumer_01 ended soon after its start; Supervisor tries again: read its log",
    ]
    states[:] = [{**process, "state": "RUNNING"}, {**process, "state": "STOPPED"}]
    assert run("doctor")[0] == 0


def _written_carelessly(self, *, durable=True, in_batch=False):
    session = self._session()
    session.in_batch, session.wanted = in_batch, "OFF"
    return session


def test_doctor_finds_a_log_that_a_reader_keeps_from_shrinking(queue, monkeypatch):
    monkeypatch.setattr(pqueue_sqlite, "WAL_BYTES", 500_000)
    reader = sqlite3.connect(queue.path)
    reader.execute("BEGIN")
    queue.enqueue("t")
    reader.execute("SELECT * FROM jobs").fetchone()
    for _ in range(20):
        queue.enqueue("t", "x" * 100_000)
    assert any("write-ahead log has grown" in each.text for each in report.findings(queue))
    reader.close()


def test_operator_sees_when_a_job_expires_and_that_it_did(queue, run):
    code, out, _ = run("enqueue", "t", "--expire", "1h")
    job_id = int(out)
    due, now = queue.get(job_id).run_at, time.time()
    assert queue.get(job_id).expires_at == due + 3600
    assert re.search(r"; it is cancelled unless it starts within 1 h$", report.why(queue, job_id, now))
    expired = "it expired 2 min ago: the next consumer that takes jobs cancels it"
    assert report.why(queue, job_id, due + 3720) == expired
    assert run("change", str(job_id), "--expire", "2h")[0] == 0
    assert queue.get(job_id).expires_at == due + 7200
    queue.dequeue("w", now=due + 7200)
    found = report.why(queue, job_id, due + 7260)
    assert re.match(
        r"it was cancelled \S+ \w+ ago: expired: it was to start before 20\S+; resubmit it to run it$", found
    )
    assert run("schedule", "tick", "t", "--every", "1h", "--expire", "5m")[0] == 0
    assert queue.schedules()[0].expire_seconds == 300


@pytest.mark.parametrize(
    ("form", "shown"), [("wide", "2 in 10 s"), ("tsv", "[2, 10.0]"), ("json", '{"rate": [2, 10.0]}')]
)
def test_stats_show_the_rate_of_a_queue(queue, run, form, shown):
    queue.limit("default", rate=(2, 10))
    assert run("stats", "--columns", "rate", "-o", form)[1].splitlines()[-1] == shown


def test_figures_leave_out_what_is_yet_to_come_since_a_clock_was_set_back(queue, run):
    then = time.time() + 7200
    for _ in range(12):
        queue.enqueue("t", now=then)
        queue.fail(queue.dequeue("w", now=then), "E", retry=False, now=then)
    assert "attempts failed" not in run("doctor")[1]
    assert "per minute: 0 enqueued, 0 completed, 0 failed" in run("monitor", "--once")[1]
    assert run("stats", "--by", "task", "--since", "1h")[1] == ""
    queue.enqueue("t", now=then)
    queue.dequeue("w", now=then)
    assert "running on w for 0.0 s;" in run("why", "13")[1]


def test_doctor_finds_a_schedule_that_waits_because_a_clock_was_set_back(queue, run):
    now = time.time()
    for name, times in (("tick", {"every_seconds": 30}), ("daily", {"cron": "@daily"}), ("gone", {"cron": "@daily"})):
        queue.schedule(name, "t", **times, now=now + 300_000)
    queue.schedule("later", "t", every_seconds=86400)
    queue.pause_schedule("gone")
    status, output, _ = run("doctor")
    assert "schedule 'daily' waits for" in output
    assert "schedule 'tick' waits for 3 d, as a clock was set back" in output
    assert (status, "'later'" in output, "'gone' waits" in output) == (1, False, False)
    for name in ("tick", "daily"):
        assert run("resume-schedule", name)[0] == 0
    assert "waits for" not in run("doctor")[1]


def test_operator_uses_groups_of_schedules_and_lists_their_jobs(queue, run):
    assert run("schedule", "tick", "t", "--every", "1h", "--group", "customer-7")[0] == 0
    assert json.loads(run("schedules", "-o", "json")[1])["group"] == "customer-7"
    assert "customer-7" in run("schedules")[1]
    job_id = queue.enqueue("t", group="customer-7")
    queue.enqueue("t", group="customer-8")
    assert json.loads(run("list-jobs", "--group", "customer-7", "-o", "json")[1])["id"] == job_id
    assert run("cancel", "--group", "customer-8", "--yes")[0] == 0
    assert [job.group for job in queue.list_jobs(state="cancelled")] == ["customer-8"]


def test_doctor_finds_jobs_that_are_kept_for_ever_or_too_long(queue, run, monkeypatch):
    monkeypatch.setattr(report, "MANY_KEPT", 2)
    now = time.time()
    for at in (now - 9000, now - 9000, now):
        queue.cancel(queue.enqueue("t", queue="mail", now=at), now=at)
    queue.dequeue("w")
    assert run("doctor")[0] == 0
    queue.keep("mail", cancelled=None)
    (found,) = report.findings(queue)
    text = "queue 'mail' keeps its 3 cancelled jobs for ever; 1 added in the last hour"
    assert (found.severity, str(found)) == ("info", f"{text}: run python3 admin.py keep mail --cancelled 7d")
    queue.keep("mail", cancelled=60)
    (found,) = report.findings(queue)
    text = "queue 'mail': cancelled jobs were to be deleted 2 h ago"
    assert (found.severity, str(found)) == ("warning", f"{text}: run python3 consumer.py, which deletes them")
    code, out, _ = run("doctor")
    assert code == 1
    assert re.search(r"finished jobs +3\nadded in last hour +1\ndeleted in next hour +3\n", out)
    assert not queue.prune_kept()
    assert report.findings(queue) == []


def test_doctor_says_when_jobs_that_are_kept_for_ever_fill_the_disk(queue, monkeypatch):
    monkeypatch.setattr(report, "MANY_KEPT", 2)
    queue.keep("default", cancelled=None)
    now = time.time()
    for number in range(30):
        at = now - 4000 * (number > 0)
        queue.cancel(queue.enqueue("t", now=at), now=at)
    facts = queue.check(thorough=False)
    job_bytes = facts["used_bytes"] / 30

    def found(free):
        (each,) = report.findings(queue, facts={**facts, "disk_free_bytes": free, "problems": []})
        return each.severity, each.text.partition("; ")[2]

    assert found(1000 * job_bytes) == ("info", "1 added in the last hour")
    assert found(100 * job_bytes) == ("warning", "1 added in the last hour, and so fast the disk is full in 4 d")
    for _ in range(9):  # these are more than a day's: something deletes them
        queue.cancel(queue.enqueue("t"))
    assert found(100 * job_bytes) == ("info", "10 added in the last hour")


def test_doctor_says_how_to_shrink_a_file_that_is_mostly_free(queue, run, monkeypatch):
    monkeypatch.setattr(report, "MANY_FREE_BYTES", 100_000)
    queue.enqueue_many("t", ["x" * 5000] * 300)
    assert run("doctor")[0] == 1  # no consumer
    queue.delete_jobs(force=True)
    (found,) = report.findings(queue)
    assert found.severity == "info"
    assert re.match(
        r"1.\d MB of the database file are free, and used for new jobs; its jobs need \d+ kB: "
        "to give them back to the disk, run python3 admin.py compact$",
        str(found),
    )
    assert run("compact")[0] == 0
    assert report.findings(queue) == []


def test_doctor_says_that_a_queue_is_full(queue, run):
    queue.limit("default", 1)
    queue.dequeue("w")
    queue.enqueue("t")
    (found,) = report.findings(queue)
    assert (found.severity, found.text) == ("info", "queue 'default' is full, with 1 job pending, and refuses more")
    assert run("limit", "default", "2")[0] == 0
    assert report.findings(queue) == []


def test_doctor_finds_a_dead_consumer_that_holds_jobs(queue):
    queue.enqueue("t")
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pqueue, time; print(pqueue.open_queue().dequeue('anna').id, flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout.readline() == b"1\n"
    assert report.findings(queue) == []
    child.kill()
    child.communicate()
    found = report.findings(queue, queue.consumers()[0]["last_seen_at"])
    assert [(each.severity, each.text) for each in found] == [
        ("warning", "consumer anna is dead and holds 1 job"),
        ("warning", "no consumer is alive: 1 died, the last was seen 0.0 s ago"),
    ]
    assert "its consumer anna is not alive" in report.why(queue, 1)


def test_metrics_are_in_the_format_of_prometheus(front, queue, run):
    from prometheus_client.parser import text_string_to_metric_families

    populate(queue)
    queue.enqueue("t", queue='a"b\\c')
    code, out, _ = run("metrics")
    families = {family.name: family for family in text_string_to_metric_families(out)}
    jobs = {(s.labels["queue"], s.labels["state"]): s.value for s in families["pqueue_jobs"].samples}
    assert jobs[("default", "failed")] == 1
    assert jobs[('a"b\\c', "pending")] == 1
    assert families["pqueue_consumers"].samples[0].value == 1
    assert all(family.documentation for family in families.values())


def test_list_fits_the_terminal_and_has_colours_only_there(queue, folder, monkeypatch):
    ids = populate(queue)
    queue.enqueue("work", {"text": "long " * 100 + "\x1b[31m"})
    text = on_terminal(["list-jobs"], columns=90)
    assert "\x1b[31mfailed\x1b[0m" in text
    plain = re.sub(r"\x1b\[\d+m", "", text).split("\r\n")
    assert max(map(len, plain)) <= 90
    assert len(plain) == len(ids) + 3
    assert "\x1b" not in on_terminal(["list-jobs"], columns=90, NO_COLOR="1")


def on_terminal(arguments, columns, **variables):
    """Run the program on a terminal of this width and return what it showed."""
    leader, follower = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, str(ROOT / "admin.py"), *arguments],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "COLUMNS": str(columns), **variables},
    )
    os.close(follower)
    chunks = []
    reader = threading.Thread(target=lambda: chunks.extend(_read_all(leader)))
    reader.start()
    done.wait()
    reader.join()
    os.close(leader)
    return b"".join(chunks).decode()


def _read_all(leader):
    try:
        while chunk := os.read(leader, 65536):
            yield chunk
    except OSError:
        return


def test_operator_at_a_terminal_is_asked_first(queue):
    ids = populate(queue)
    leader, follower = pty.openpty()
    command = [sys.executable, str(ROOT / "admin.py"), "cancel", "--status", "pending"]
    for answer, state in ((b"n\n", "pending"), (b"y\n", "cancelled")):
        asked = subprocess.Popen(command, stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        os.write(leader, answer)
        _, err = asked.communicate()
        assert b"cancel 1 job? [y/N]" in err
        assert queue.get(ids["pending"]).state == state
    os.close(leader)
    os.close(follower)


def test_closed_pipe_is_no_error(queue):
    queue.enqueue_many("t", range(5000))
    command = [sys.executable, str(ROOT / "admin.py"), "list-jobs", "--limit", "5000"]
    done = subprocess.run(["sh", "-c", '"$@" | head -1', "sh", *command], capture_output=True, text=True)
    assert (done.stderr, done.stdout.count("\n")) == ("", 1)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command",
    [
        *(f"{program}.py --help" for program in ("admin", "consumer", "producer", "manager", "ops")),
        *("admin.py --version", "admin.py jobs --help", "admin.py stats", "admin.py show 1", "ops.py --check --port 0"),
        "admin.py metrics",
    ],
)
def test_program_says_in_one_line_that_its_output_has_no_room_and_nothing_if_nobody_reads_it(
    queue, command, unbuffered
):
    queue.enqueue("t")
    program, *arguments = shlex.split(command)
    variables = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full, open(writer, "w") as pipe:
        for stdout, code, said in ((full, 1, "cannot write to stdout: No space left on device"), (pipe, 0, "")):
            run = [sys.executable, ROOT / program, *arguments]
            done = subprocess.run(run, stdout=stdout, stderr=subprocess.PIPE, env=variables, text=True)
            assert (done.returncode, done.stderr.partition(";")[0].strip()) == (code, f"{program}: {said}" * bool(said))


def test_operator_whose_output_has_no_room_is_told_that_the_command_was_carried_out(queue):
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, ROOT / "admin.py", "enqueue", "t"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    expected = "admin.py: cannot write to stdout: No space left on device; the command has been carried out\n"
    assert (ended.returncode, ended.stderr, queue.count_jobs()) == (1, expected, 1)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("form", ["json", "tsv"])
def test_program_gets_valid_json_whatever_the_encoding_of_the_output(queue, encoding, form):
    payload = {"text": "\xe9 \u0142 \U0001f680 \u202e"}
    queue.enqueue("t", payload)
    command = [sys.executable, ROOT / "admin.py", "list-jobs", "-o", form, "--columns", "payload"]
    ended = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=True)
    line = ended.stdout.decode(encoding).splitlines()[-1]
    assert json.loads(line) == ({"payload": payload} if form == "json" else payload)


def test_monitor_reports_a_missing_database_and_recovers(folder, run):
    code, out, _ = run("monitor", "--once")
    assert code == 1
    assert "supervisord is not running here" in out
    assert out.startswith("queue not available ")
    assert "warning: no queue at" in out
    queue = pqueue.open_queue()
    populate(queue)
    out = run("monitor", "--once")[1]
    assert "ValueError: <b>no</b>" in out
    assert "anna" in out
    queue.close()


def test_monitor_redraws_a_terminal_until_it_is_stopped(queue):
    populate(queue)
    leader, follower = pty.openpty()
    shown = []
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "admin.py"), "monitor", "--interval", "0.1s"],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "60"},
    )
    os.close(follower)
    reader = threading.Thread(target=lambda: shown.extend(_read_all(leader)))
    reader.start()
    wait_until(lambda: b"".join(shown).count(b"pqueue monitor") >= 3)
    child.send_signal(2)
    assert child.wait() == 130
    reader.join()
    os.close(leader)
    assert b"Traceback" not in b"".join(shown)
    assert b"".join(shown).endswith(b"\x1b[?25h\x1b[?1049l")


@pytest.mark.parametrize("durability", ["full", "normal"])
def test_torture_proves_that_nothing_is_lost(folder, run, durability):
    pqueue.open_queue().close()
    code, out, _ = run("torture", "--seconds", "5", "--durability", durability, "--json")
    found = json.loads(out)
    assert (code, found["problems"]) == (0, [])
    assert [name for name in found if not name.isidentifier()] == []
    assert found["acknowledged"] > 0
    assert found["killed"] > 0
    assert [path.name for path in (folder / "var").glob("torture-*")] == []


def test_torture_ignores_the_modules_of_the_folder_where_it_runs(place):
    place.queue().close()
    for name in ("queue", "random", "select", "types"):
        place.write(f"{name}.py", "raise RuntimeError")
    done = place.run("admin.py", "torture", "--seconds", "2")
    assert done.stderr == ""
    assert "jobs have" not in done.stdout


def test_torture_finds_a_queue_without_its_token_guard(tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "pqueue_tools", tmp_path / "pqueue_tools")
    (tmp_path / "var").mkdir()
    source = (tmp_path / "pqueue_schema.py").read_text()
    broken = source.replace('"id = :id AND lease_token = :token"', "\"id = :id AND state = 'processing'\"")
    assert broken != source
    (tmp_path / "pqueue_schema.py").write_text(broken)
    command = [sys.executable, "admin.py", "torture", "--seconds", "20"]
    for _ in range(3):  # few completions come late where others keep the processors busy
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        if done.returncode:
            break
    assert done.returncode == 1
    assert "committed under a stale token" in done.stdout


def test_operator_runs_a_scheduled_job_now_and_changes_a_waiting_one(front, queue, run):
    first, second = queue.enqueue("work", {"n": 1}, delay_seconds=500), queue.enqueue("work", delay_seconds=500)
    assert run("run-now", first)[:2] == (0, f"made job {first} pending\n")
    assert run("run-now", "--task", "work", "--yes")[:2] == (
        0,
        "made 1 job pending; 1 not changed because of its state\n",
    )
    code, out, _ = run("change", first, "--payload", '{"n": 2}', "--priority", 7, "--to-queue", "slow", "--delay", "1h")
    assert (code, out) == (0, f"changed job {first}\n")
    job = queue.get(first)
    assert (job.payload, job.priority, job.queue, job.state) == ({"n": 2}, 7, "slow", "scheduled")
    assert queue.history(first)[-1]["event"] == "changed payload, priority, time, queue"
    assert run("change", first, "--payload", "null")[0] == 0
    assert queue.get(first).payload is None
    assert run("change", first, "--payload", "{")[0] == 2
    assert run("change", second)[0] == 2
    assert run("change", second, "--max-attempts", 0)[0] == 2
    queue.cancel(second)
    code, _, err = run("change", second, "--priority", 1)
    assert (code, f"cannot change job {second}: it is cancelled; with --resubmit, it runs again" in err) == (1, True)


def test_operator_changes_the_payload_that_is_shown_and_runs_a_failed_job_again(front, queue, run):
    stored = {"amount": "EUR 7", "password": "hunter2", "at": "https://ada:hunter2@shop/"}
    job_id = queue.enqueue("charge", stored)
    queue.mark_failed(job_id)
    shown = json.loads(run("list-jobs", "--json", "--columns", "payload")[1])["payload"]
    assert shown == {"amount": "EUR 7", "password": "…", "at": "https://ada:…@shop/"}
    for wrong in ({"token": "…"}, {"password": ["…"], "user": {"password": "…"}}, {"at": "https://eva:…@shop/"}):
        code, _, err = run("change", job_id, "--resubmit", "--payload", json.dumps(wrong))
        assert (code, "…, which stands for a hidden one" in err) == (2, True), err
        assert run("enqueue", "charge", json.dumps(wrong))[0] == 2
    assert queue.get(job_id).state == "failed"
    changed = {**shown, "amount": "7 …", "password": "…"}
    assert run("change", job_id, "--resubmit", "--payload", json.dumps(changed))[0] == 0
    assert (queue.get(job_id).state, queue.get(job_id).payload) == ("pending", {**stored, "amount": "7 …"})
    assert queue.operations()[0]["event"] == "changed payload, resubmitted"


def test_operator_enqueues_with_a_key_for_a_while(front, queue, run):
    first = run("enqueue", "work", "1", "--key", "k", "--key-for", "1h")[1]
    queue.cancel(int(first))
    assert run("enqueue", "work", "2", "--key", "k", "--replace")[1] == first
    assert queue.get(int(first)).payload == 1
    second = run("enqueue", "work", "1", "--key", "l", "--key-until", "started")[1]
    assert run("enqueue", "work", "2", "--key", "l", "--replace")[1] == second
    assert (queue.get(int(second)).payload, queue.get(int(second)).key_until) == (2, "started")
    assert run("enqueue", "work", "--key-for", "1h")[0] == 2


def test_durations_that_were_set_are_shown_as_they_were_given(queue, run):
    queue.enqueue("t")
    for arguments, shown in (
        (["keep", "default", "--completed", "36h"], "keeps completed jobs for 36 h"),
        (["expect", "default", "--max-wait", "90s", "--max-failed", "12.5%"], "waited for 90 s, or 12.5% of attempts"),
        (["limit", "default", "--rate", "10/90s"], "limited to 10 jobs of each group in 90 s"),
        (["limit", "default", "--rate", "10/1s"], "limited to 10 jobs of each group in 1 s"),
        (["keep", "default", "--failed", "2w"], "keeps failed jobs for 14 d"),
    ):
        assert shown in run(*arguments)[1]
    assert [report.interval(each) for each in (0.001, 0.1, 59, 60, 100, 3600, 5400, 86400, 1e12)] == [
        *("0.001 s", "0.1 s", "59 s", "1 min", "100 s", "1 h", "90 min", "1 d", "1000000000000 s")
    ]
    assert [tables._kept({"keeps": [129600, None]}), tables._expected({"expects": (90, 0.125)})] == [
        *("36 h / for ever", "90 s / 12.5%")
    ]


@pytest.mark.parametrize("program", ["admin", "consumer", "manager", "ops", "producer"])
def test_help_of_each_program_and_command_fits_80_columns(front, monkeypatch, capsys, program):
    monkeypatch.setenv("COLUMNS", "80")
    commands = list(admin.COMMANDS) if program == "admin" else []
    for arguments in [["--help"], *([name, "--help"] for name in commands)]:
        with suppress(SystemExit):
            importlib.import_module(program).main(arguments)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) > 3
        assert [line for line in lines if output.cells(line) > 80] == []


@pytest.mark.parametrize("number", [1, 2])
def test_command_says_what_it_will_do_and_what_it_did_in_plain_words(queue, run, monkeypatch, number):
    asked = []
    monkeypatch.setattr(admin, "agreed", lambda _, what: asked.append(what) or True)
    jobs = ("1 job", "2 jobs")[number - 1]
    queue.enqueue_many("t", range(number), delay_seconds=900)
    for arguments, what, done in [
        (["run-now", "--task", "t"], f"run {jobs} now", f"made {jobs} pending"),
        (["mark-failed", "--task", "t"], f"mark {jobs} as failed", f"marked {jobs} as failed"),
        (["resubmit", "--task", "t", "--rate", "1/60s"], f"resubmit {jobs} at 1/60s", f"resubmitted {jobs}"),
        (["cancel", "--task", "t"], f"cancel {jobs}", f"cancelled {jobs}"),
    ]:
        assert run(*arguments)[:2] == (0, f"{done}\n")
        assert asked.pop() == what
    ids = [job.id for job in queue.list_jobs()][::-1]
    named = f"job {ids[0]}" if number == 1 else f"jobs {ids[0]}, {ids[1]}"
    assert run("resubmit", *ids, "--delay", "1h")[1] == f"resubmitted {named}\n"
    assert run("run-now", *ids)[1] == f"made {named} pending\n"
    assert json.loads(run("mark-failed", ids[0], "--json")[1]) == {"job": ids[0], "done": "marked as failed"}
