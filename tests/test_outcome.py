"""What a task's exception means for its job, and what is stored and logged of it."""

from __future__ import annotations

import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

import pqueue
from pqueue import DoNotRetry, Retry, Snooze
from pqueue_tools import outcome
from pqueue_tools.worker import Consumer
from pqueue_values import MAX_ERROR_CHARS

TASKS = """
import time
from pqueue import DoNotRetry, Retry, Snooze, current_queue, task

@task
def bare(job): return "done"

@task
def later(job): raise Snooze(1000)

@task(max_attempts=5)
def busy(job): raise Retry(700, "429") from ConnectionError("too many")

@task(retry_on=ConnectionError, backoff=[50, 60])
def refused(job): raise ConnectionResetError("again")

@task(retry_on=(ConnectionError, TimeoutError))
def wrong(job): raise ValueError("no sense in another attempt")

@task(retry_on=ValueError, timeout_seconds=0.2)
def hang(job): time.sleep(30)

@task
def unstorable(job):
    with open("ran", "a") as file: file.write("x")
    return {"at": object()}

@task
def settles(job):
    queue = current_queue()
    if job.payload == "fail": queue.fail(job, "by hand", retry_in_seconds=400)
    if job.payload == "release": queue.release(job, delay_seconds=500)
    if job.payload == "complete": queue.complete(job, "by hand")
    if job.payload == "cancel": queue.cancel(job.id); time.sleep(1)
    if job.payload == "mark_failed": queue.mark_failed(job.id, "by hand")
    if job.payload == "assign": queue.assign(job.id, "another")
    if job.payload == "and raise": queue.fail(job, "by hand"); raise KeyError("afterwards")

class Broken(Exception):
    def __str__(self): return self.args[1]

class Worse(Exception):
    def __str__(self): raise SystemExit("no")

@task(max_attempts=1)
def broken(job): raise (Broken if job.payload else Worse)("one")

@task(max_attempts=1)
def huge(job): raise ValueError("x" * 20_000_000)

@task(max_attempts=1)
def story(job):
    try: find_customer({})
    except KeyError as error: raise RuntimeError("cannot import the order") from error

def find_customer(order): return order["customer_id"]
"""


@pytest.fixture
def tasks(place):
    place.write("my_tasks.py", TASKS)
    return place


def run(place, **jobs):
    """Run these jobs, given by task and payload, and return the jobs by task and what the consumer printed."""
    with closing(place.queue()) as queue:
        ids = {task: queue.enqueue(task, payload) for task, payload in jobs.items()}
        done = place.run("consumer.py", "--import", "my_tasks", "--drain")
        assert "Traceback" not in done.stderr
        return {task: queue.get(job_id) for task, job_id in ids.items()}, done.stdout


def test_consumer_knows_the_built_in_task_only_without_import(tasks):
    jobs, _ = run(tasks, prepend_timestamp={"file": "none"}, bare=None)
    assert (jobs["prepend_timestamp"].attempts, jobs["bare"].state) == (0, "completed")
    with closing(tasks.queue()) as queue:
        queue.enqueue("bare")
        tasks.run("consumer.py", "--drain")
        assert queue.get(jobs["prepend_timestamp"].id).attempts == 1
        assert queue.count_jobs(state="pending", task="bare") == 1


def test_drain_names_the_tasks_that_it_does_not_know(tasks):
    with closing(tasks.queue()) as queue:
        queue.enqueue_many("bear", [1, 2])
        queue.enqueue("bare")
    done = tasks.run("consumer.py", "--drain", "--import", "my_tasks")
    assert done.returncode == 0
    said = re.findall(r"left pending consumer=\S+ (.*)\n", done.stdout)
    assert said == ['tasks=bear reason="no task of this name imported" level=warning']
    assert "left pending" not in tasks.run("consumer.py", "--drain", "--queue", "other").stdout


def test_drain_says_which_jobs_it_leaves_in_paused_queues_and_beyond_limits(tasks):
    with closing(tasks.queue()) as queue:
        queue.enqueue_many("bare", [1, 2], queue="mail")
        queue.pause("mail")
        queue.enqueue_many("bare", [1, 2, 3], group="ada")
        queue.limit("default", running=1)
        queue.dequeue("other")
        queue.enqueue("bare", queue="else")
        done = tasks.run("consumer.py", "--drain", "--import", "my_tasks")
        assert done.returncode == 0
        said = re.findall(r'left pending consumer=\S+ queue=(\w+) jobs=(\d+) reason="([^":]+)', done.stdout)
        assert said == [("default", "2", "group ada has 1 of 1 job running"), ("mail", "2", "its queue mail is paused")]
        done = tasks.run("consumer.py", "--drain", "--import", "my_tasks", "--queue", "else")
        assert "left pending" not in done.stdout


def test_task_without_parentheses_runs(tasks):
    jobs, _ = run(tasks, bare=None)
    assert jobs["bare"].result == "done"


def test_task_chooses_when_its_job_runs_again(tasks):
    began = time.time()
    jobs, log = run(tasks, later=1, busy=1, refused=1, wrong=1)
    found = {task: (job.state, job.attempts) for task, job in jobs.items()}
    assert found == {
        "later": ("scheduled", 0),
        "busy": ("scheduled", 1),
        "refused": ("scheduled", 1),
        "wrong": ("failed", 1),
    }
    for task, seconds in (("later", 1000), ("busy", 700), ("refused", 50)):
        assert began + seconds <= jobs[task].run_at <= time.time() + seconds
    assert jobs["busy"].error.startswith("Retry: 429\n")
    assert "ConnectionError: too many" in jobs["busy"].error
    assert " snoozed " in log


def test_limit_that_a_task_exceeds_is_no_error_of_the_task(tasks):
    jobs, _ = run(tasks, hang=None)
    assert (jobs["hang"].state, jobs["hang"].error.splitlines()[0]) == (
        "scheduled",
        "TimeoutError: timed out after 0.2 s",
    )


def test_result_that_cannot_be_stored_fails_the_job_at_once(tasks):
    jobs, _ = run(tasks, unstorable=None)
    assert (jobs["unstorable"].state, jobs["unstorable"].attempts) == ("failed", 1)
    assert jobs["unstorable"].error.startswith("expected a result that JSON can hold, got dict")
    assert (tasks.folder / "ran").read_text() == "x"


@pytest.mark.parametrize(
    ("verb", "state"),
    [
        *(("complete", "completed"), ("fail", "scheduled"), ("release", "scheduled"), ("and raise", "scheduled")),
        *(("cancel", "cancelled"), ("mark_failed", "failed"), ("assign", "pending")),
    ],
)
def test_job_that_its_task_settles_is_not_called_lost(tasks, verb, state):
    jobs, log = run(tasks, settles=verb)
    assert jobs["settles"].state == state
    assert " lost " not in log
    assert ("completed consumer" in log) == (verb == "complete")
    assert ("settled by the task" in log) == (verb != "complete")
    assert f"completed={int(verb == 'complete')} failed={int(verb == 'fail')}" in log.splitlines()[-1]


@pytest.mark.parametrize("payload", [True, False])
def test_exception_that_cannot_be_printed_fails_its_job_only(tasks, payload):
    jobs, log = run(tasks, broken=payload, bare=None)
    name, cause = ("Broken", "IndexError") if payload else ("Worse", "SystemExit")
    first = f"{name}: (its message cannot be shown: __str__ raised {cause})"
    assert jobs["broken"].error.splitlines()[0] == first
    assert "in broken" in jobs["broken"].error
    assert jobs["bare"].state == "completed"
    assert first in log


def test_huge_exception_is_cut_in_the_database_and_in_the_log(tasks):
    jobs, log = run(tasks, huge=None)
    assert len(jobs["huge"].error) <= MAX_ERROR_CHARS
    assert jobs["huge"].error.startswith("ValueError: xxx")
    assert "in huge" in jobs["huge"].error
    assert len(log) < 2 * MAX_ERROR_CHARS


def test_error_has_its_cause_and_no_frames_of_pqueue(tasks):
    jobs, _ = run(tasks, story=None)
    error = jobs["story"].error
    assert error.splitlines()[0] == "RuntimeError: cannot import the order"
    for part in ("KeyError: 'customer_id'", "in find_customer", 'order["customer_id"]', "direct cause", "in story"):
        assert part in error, part
    assert "worker.py" not in error
    assert "pqueue_tasks.py" not in error


BACKOFF = """
import sys
from pqueue import task

@task(backoff=lambda attempts: sys.exit("no"))
def leaving(job): raise ConnectionError("down")

@task(backoff=lambda attempts: attempts / 0)
def broken(job): raise ConnectionError("down")

@task(backoff=lambda attempts: "soon", max_backoff_seconds=4)
async def wrong(job): raise ConnectionError("down")
"""


@pytest.mark.parametrize("concurrency", [1, 2])
def test_backoff_of_a_user_that_fails_is_logged_and_the_default_delay_applies(tasks, concurrency):
    tasks.write("more.py", BACKOFF)
    with closing(tasks.queue()) as queue:
        ids = [*queue.enqueue_many("broken", [None] * 3), queue.enqueue("wrong"), queue.enqueue("leaving")]
        done = tasks.run("consumer.py", "--import", "more", "--drain", "--name", "w", "--concurrency", concurrency)
        jobs = list(map(queue.get, ids))
    assert (done.returncode, {(job.state, job.error.splitlines()[0]) for job in jobs}) == (
        0,
        {("scheduled", "ConnectionError: down")},
    )
    assert all(job.run_at - job.created_at >= 2 for job in jobs)
    expected = "ValueError: expected backoff to be a finite number of seconds"
    assert len(re.findall('log .*"backoff of task broken raised ZeroDivisionError: .*level=warning', done.stdout)) == 1
    assert re.search(f'log .*"backoff of task wrong raised {expected}, .*level=warning', done.stdout)
    assert re.search('log .*"backoff of task leaving raised SystemExit: no; .*level=warning', done.stdout)


def test_failing_backoff_is_logged_once_by_two_threads(monkeypatch):
    def warn(*said):
        time.sleep(0.1)
        warnings.append(said)

    warnings = []
    monkeypatch.setattr(outcome.log, "warning", warn)
    task = pqueue.Task("halved", lambda: None, backoff=lambda _: 1 / 0)
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(lambda _: outcome.delay_after(task, 1), range(2)))) == 2
    assert len(warnings) == 1


# Draining


@pytest.mark.parametrize(("task", "code"), [("bare", 0), ("busy", 0), ("later", 0), ("wrong", 1), ("unstorable", 1)])
def test_drain_says_by_its_exit_code_whether_jobs_failed(tasks, task, code):
    with closing(tasks.queue()) as queue:
        queue.enqueue(task)
        queue.enqueue("bare")
        assert tasks.run("consumer.py", "--import", "my_tasks", "--drain", "--name", "w").returncode == code
        assert tasks.run("consumer.py", "--import", "my_tasks", "--drain", "--name", "w").returncode == 0  # that run


def test_delay_that_a_task_declares_also_applies_if_it_ends_its_process(tasks):
    tasks.write(
        "more.py",
        "import os\nfrom pqueue import task\n"
        "@task(backoff=0)\ndef at_once(job): os._exit(3)\n"
        "@task(max_backoff_seconds=0.001)\ndef soon(job): os._exit(3)\n",
    )
    with closing(tasks.queue()) as queue:
        ids = [queue.enqueue("at_once"), queue.enqueue("soon")]
        tasks.run("consumer.py", "--import", "more", "--drain")
        assert [(queue.get(job_id).state, queue.get(job_id).attempts) for job_id in ids] == [("failed", 3)] * 2


def test_drain_that_waits_runs_retries_and_what_falls_due(tasks):
    tasks.write(
        "more.py",
        "from pqueue import task\n"
        "@task(backoff=1)\n"
        "def third_time(job):\n"
        "    if job.attempts < 3: raise OSError('not yet')\n",
    )
    options = ("consumer.py", "--import", "more", "--drain")
    with closing(tasks.queue()) as queue:
        ids = [queue.enqueue("third_time"), queue.enqueue("third_time", delay_seconds=1)]
        queue.enqueue("of another task", delay_seconds=1)
        queue.enqueue("third_time", queue="paused", delay_seconds=1)
        queue.pause("paused")
        late = queue.enqueue("third_time", delay_seconds=1000)
        assert tasks.run(*options).returncode == 0
        assert queue.get(ids[0]).state == "scheduled"
        assert tasks.run(*options, "--wait", 60).returncode == 0
        assert [queue.get(job_id).state for job_id in (*ids, late)] == ["completed", "completed", "scheduled"]
        queue.cancel(late)
        assert tasks.run(*options, "--wait").returncode == 0
    done = tasks.run("consumer.py", "--wait")
    assert (done.returncode, done.stderr) == (2, "consumer.py: expected --drain with --wait; see consumer.py --help\n")


@pytest.mark.parametrize("ahead", [-3600, 3600])
def test_drain_waits_by_the_clock_of_the_queue(tasks, monkeypatch, ahead):
    with closing(tasks.queue()) as queue:
        monkeypatch.setattr(queue, "_time", lambda now: time.time() + ahead if now is None else now)
        consumer = Consumer(queue, "anna", tasks=["later"], drain=True, wait=60)
        assert consumer.run()  # nothing is there; now the time to wait has begun
        job_id = queue.enqueue("later", delay_seconds=90)
        assert not consumer._may_fall_due()
        queue.change(job_id, delay_seconds=30)
        assert consumer._may_fall_due()


# The log

LOGGING = """
import logging
from pqueue import task
logging.getLogger("import").warning("imported")

@task(max_attempts=1)
def talk(job):
    log = logging.getLogger("shop.mail")
    log.debug("too fine")
    log.info("sent %s", job.payload)
    try: raise KeyError("customer")
    except KeyError: log.exception("with a traceback\\nand two lines")
    raise ValueError("at last")
"""


def lines_of(place, *options):
    place.write("talking.py", LOGGING)
    with closing(place.queue()) as queue:
        queue.enqueue("talk", 7)
        return place.run("consumer.py", "--import", "talking", "--drain", "--name", "w", *options).stdout.splitlines()


def test_first_line_names_the_database_and_the_tasks(tasks):
    started = next(line for line in lines_of(tasks) if " started " in line)
    assert f"database={tasks.folder / 'var/queue.db'} queues=all tasks=talk" in started


def test_log_of_a_task_names_job_task_and_consumer(tasks):
    lines = lines_of(tasks)
    assert any(" log consumer=w logger=import message=imported level=warning" in line for line in lines)
    said = [line.split(" ", 1)[1] for line in lines if "shop.mail" in line]
    assert said[0] == 'log consumer=w job=1 task=talk logger=shop.mail message="sent 7"'
    assert said[1].startswith('log consumer=w job=1 task=talk logger=shop.mail message="with a traceback\\nand two')
    assert "KeyError: 'customer'" in said[1]
    assert len(said) == 2
    failed = next(line for line in lines if " failed " in line and "error=" in line)
    assert 'error="ValueError: at last" traceback="Traceback' in failed
    assert failed.endswith("level=error")
    assert all(line[:2] == "20" for line in lines)  # one line per event


def test_log_as_json_has_one_object_per_event_with_its_level(tasks):
    events = [json.loads(line) for line in lines_of(tasks, "--log-format", "json", "--log-level", "debug")]
    found = [(each["event"], each["level"]) for each in events if each.get("logger") != "asyncio"]
    assert found == [
        ("log", "warning"),
        ("started", "info"),
        ("log", "debug"),
        ("log", "info"),
        ("log", "error"),
        ("failed", "error"),
        *[(each["event"], each["level"]) for each in events[6:]],
    ]
    assert (events[5]["job"], events[5]["task"], events[5]["error"]) == (1, "talk", "ValueError: at last")
    assert "\nValueError: at last" in events[5]["traceback"]


def test_log_level_and_quiet_leave_out_what_is_less(tasks):
    with closing(tasks.queue()) as queue:
        for options, expected in (((), 1), (("--quiet",), 0), (("--log-level", "warning"), 0)):
            queue.enqueue("bare")
            out = tasks.run("consumer.py", "--import", "my_tasks", "--drain", *options).stdout
            assert out.count(" completed consumer=") == expected
            assert (" started " in out) == ("warning" not in options)


def test_log_level_leaves_out_a_lost_lease(tasks):
    cancel = "import pqueue\n@pqueue.task\ndef leave(job): pqueue.current_queue().cancel(job.id, by='ops')\n"
    tasks.write("leaving.py", cancel)
    with closing(tasks.queue()) as queue:
        for level, expected in (("warning", 1), ("error", 0)):
            queue.enqueue("leave")
            out = tasks.run("consumer.py", "--import", "leaving", "--drain", "--log-level", level).stdout
            assert out.count(" lost consumer=") == expected


# The text of an error


def raised(error):
    try:
        raise error
    except BaseException as caught:
        return caught


def deep(levels):
    if levels:
        deep(levels - 1) if levels % 2 else deep_too(levels - 1)
    raise KeyError("the innermost")


def deep_too(levels):
    deep(levels)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="ExceptionGroup and notes are new in Python 3.11")
def test_error_has_the_members_of_a_group_and_notes():
    member = ValueError("member 7")
    member.add_note("a note on it")
    inner = ExceptionGroup("inner", [raised(member), OSError("member 8")])  # noqa: F821
    text = outcome.error_text(raised(ExceptionGroup("outer", [inner, KeyError("member 9")])))  # noqa: F821
    assert text.splitlines()[0] == "ExceptionGroup: outer (2 sub-exceptions)"
    for part in ("member 7", "a note on it", "member 8", "member 9"):
        assert part in text


def test_error_of_a_deep_call_keeps_its_innermost_frames():
    with pytest.raises(KeyError) as caught:
        deep(400)
    text = outcome.error_text(caught.value)
    assert len(text) <= MAX_ERROR_CHARS
    assert text.startswith("KeyError: 'the innermost'\n")
    assert "more characters" in text
    assert text.endswith("KeyError: 'the innermost'")
    assert 'raise KeyError("the innermost")' in text


def test_error_of_a_deep_recursion_shows_its_innermost_frames():
    def deeper(number):
        if number == 0:
            raise ValueError("the reason")
        deeper(number - 1)

    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    try:
        deeper(5000)
    except ValueError as error:
        text = outcome.error_text(error)
    finally:
        sys.setrecursionlimit(before)
    assert text.startswith("ValueError: the reason\n")
    assert text.endswith("ValueError: the reason")
    assert "deeper(number - 1)" in text
    assert f"Previous line repeated {outcome.MAX_FRAMES - 4} more times" in text


def test_error_of_endless_causes_is_bounded():
    error = ValueError("first")
    for number in range(3000):
        try:
            raise ValueError(f"number {number} " + "y" * 100) from error
        except ValueError as caught:
            error = caught
    error.__cause__.__cause__.__cause__ = error  # a circle
    assert len(outcome.error_text(error)) <= MAX_ERROR_CHARS


@pytest.mark.parametrize("most", [100, 1000, 10_000])
def test_text_that_is_cut_has_the_length_allowed(most):
    for text in ("x" * 50_000, "line\n" * 10_000, "line\n" + "x" * 50_000):
        assert len(outcome.cut(text, most)) <= most
        assert outcome.cut(text[:most], most) == text[:most]


def test_outcome_names_verb_and_delay(monkeypatch):
    monkeypatch.setattr(pqueue, "TASKS", pqueue.TASKS)
    monkeypatch.setitem(pqueue.TASKS, "t", pqueue.Task("t", print, backoff=lambda attempts: 10.0 * attempts))
    job = pqueue.Job(**{**dict.fromkeys(pqueue.Job._fields), "id": 1, "task": "t", "attempts": 2, "max_attempts": 3})
    for error, expected in (
        (Snooze(5), ("release", True, 5.0)),
        (Retry(7), ("fail", True, 7.0)),
        (Retry(), ("fail", True, 20.0)),
        (DoNotRetry("x"), ("fail", False, 20.0)),
        (outcome.Unstorable("x"), ("fail", False, 20.0)),
        (SystemExit(1), ("fail", True, 20.0)),
    ):
        found = outcome.outcome_of(error, job)
        assert (found.verb, found.retry, found.delay_seconds) == expected
