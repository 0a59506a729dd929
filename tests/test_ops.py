"""The dashboard's server on the standard library, and the page in Streamlit: what they show, refuse and survive."""

from __future__ import annotations

import base64
import difflib
import getpass
import gzip
import http.client
import json
import os
import re
import select
import socket
import sqlite3
import threading
import time
from contextlib import closing, suppress
from html import escape, unescape
from importlib.metadata import PackageNotFoundError
from itertools import pairwise
from pathlib import Path
from unittest import mock
from urllib.parse import urlencode

import pytest
from conftest import PATIENCE_SECONDS, ROOT, wait_until
from populate import populate

import ops
import pqueue
import pqueue_outcomes
import pqueue_search
from pqueue_tools import (
    dashboard,
    dashboard_actions,
    dashboard_http,
    dashboard_streamlit,
    dashboard_summary,
    report,
    supervisor,
    tables,
)
from pqueue_tools.masking import restored

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)>" & \x00\x1b[31m\u202e😀' + "x" * 5000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("PQUEUE_URL", "PQUEUE_OPS_READONLY", "PQUEUE_OPS_PASSWORD", "PQUEUE_OPS_HOSTS", "PQUEUE_OPS_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dashboard, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(dashboard, "MAX_BUSY_SHARE", 1e9)  # whatever is asked is computed,
    monkeypatch.setattr(dashboard, "PAGE_WAIT_SECONDS", 60.0)  # and waited for
    return tmp_path


@pytest.fixture(autouse=True)
def caches(monkeypatch):
    """Close every cache that a test has made, Streamlit's too."""
    make, made = dashboard.FigureCache, []
    monkeypatch.setattr(dashboard, "FigureCache", lambda: made.append(make()) or made[-1])
    monkeypatch.setattr(dashboard_streamlit, "_refusal", lambda: None)  # AppTest has no server
    yield
    for cache in made:
        cache.close()
    dashboard_streamlit.cache.clear()


@pytest.fixture
def queue(folder):
    queue = pqueue.open_queue()
    yield queue
    queue.close()


class Site:
    """A server on a free port, and a client of it."""

    def __init__(self, host="127.0.0.1", password=None):
        self.server = dashboard_http.Server(host, 0, password)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def ask(self, path, form=None, method=None, body=None, **headers):
        """Return the status, the text and the headers of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        if form is not None:
            body = urlencode(form, doseq=True)
        headers = {"Host": f"127.0.0.1:{self.port}", **{name.replace("_", "-"): v for name, v in headers.items()}}
        try:
            with suppress(ConnectionError):  # it may have answered, and gone, before it has read all
                connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), dict(answer.getheaders())
        finally:
            connection.close()

    def act(self, where, /, **form):
        return self.ask(f"/act/{where}", {"token": self.server.token, **form})

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        for _ in range(dashboard_http.MAX_CONNECTIONS):  # until all requests are done with
            self.server._connections.acquire()
        self.server.cache.close()
        self.thread.join()


@pytest.fixture
def site(folder):
    site = Site()
    yield site
    site.close()


def test_request_during_shutdown_is_refused(folder, capsys):
    site = Site()
    site.server._renderer.shutdown()  # by `server_close`, while a request is being read
    try:
        status, text, _ = site.ask("/api/jobs/1")
    finally:
        site.close()
    assert (status, capsys.readouterr().err) == (503, ""), text
    assert "the dashboard is being stopped" in text


def failed(on, /, error="ValueError: no", task="work", **options):
    job_id = on.enqueue(task, options.pop("payload", None), max_attempts=1, **options)
    on.mark_failed(job_id, error)
    return job_id


# What it shows


def test_figures_on_the_page_are_the_databases(queue, site):
    populate(queue, jobs=400)
    text = site.ask("/")[1]
    states = queue.stats()["states"]
    for state in ("pending", "scheduled", "processing", "completed", "failed"):
        assert f'<span>{state}</span><b class="{state}">{states[state]:,}</b>' in text
    shown = json.loads(site.ask("/api/stats")[1])
    assert shown["states"] == states
    hour = pqueue_outcomes.total(queue.outcomes(shown["minutes"][0]["at"]))
    of_the_hour = {name: getattr(hour, name) for name in report.COUNTED}
    assert {name: sum(each[name] for each in shown["minutes"]) for name in of_the_hour} == of_the_hour
    assert of_the_hour["completed"] > 300
    with sqlite3.connect(queue.path) as db:
        assert states == {
            **dict.fromkeys(states, 0),
            **dict(db.execute("SELECT state, count(*) FROM jobs GROUP BY state")),
        }
    db.close()


def test_queue_that_is_replaced_while_it_is_opened_is_opened_again(folder, monkeypatch):
    path, cache = folder / "replaced.db", dashboard.FigureCache()
    monkeypatch.setenv("PQUEUE_URL", str(path))
    path.touch()

    def opened():
        (folder / "new.db").touch()
        (folder / "new.db").replace(path)
        return mock.Mock()

    with closing(cache):
        with monkeypatch.context() as patched:
            patched.setattr(cache, "_opened", opened)
            first = cache.queue()
        monkeypatch.setattr(cache, "_opened", mock.Mock)
        second = cache.queue()
        assert first is not second
        assert cache.queue() is second


@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_dashboard_opens_a_queue_again_whose_log_was_deleted(queue, suffix):
    queue.enqueue("t")
    with closing(dashboard.FigureCache()) as cache:
        first = cache.queue()
        cache.figures(PATIENCE_SECONDS)
        assert cache.queue() is first
        queue.close()
        Path(f"{queue.path}{suffix}").unlink()
        assert cache.queue() is not first
        assert "restart" not in str(cache.figures(PATIENCE_SECONDS)["overview"]["findings"])


def test_connection_for_which_the_system_has_no_thread_is_closed_and_forgotten(queue, site, monkeypatch, capfd):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    start = threading.Thread.start
    for _ in range(3):
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(OSError):  # noqa: PT011 - refused or closed
            site.ask("/livez")
        monkeypatch.setattr(threading.Thread, "start", start)
    assert site.ask("/livez")[0] == 200
    wait_until(lambda: site.server._connections._value == dashboard_http.MAX_CONNECTIONS)
    assert site.server._sending == {}


def test_reader_filters_and_pages(queue, site):
    ids = queue.enqueue_many("many", range(120))
    failed(queue, queue="rare", task="odd", priority=1)

    def found(query):
        return json.loads(site.ask(f"/api/jobs?{query}")[1])

    assert [job["task"] for job in found("state=failed")["jobs"]] == ["odd"]
    assert [job["task"] for job in found("queue=rare&text=VALUE")["jobs"]] == ["odd"]
    first = found("task=many")
    assert [job["id"] for job in first["jobs"]] == ids[::-1][: dashboard.JOBS_PER_PAGE]
    assert found(f"task=many&before_id={ids[3]}") == {"jobs": found("task=many&before_id=4")["jobs"], "before_id": None}
    page = site.ask("/jobs?task=many")[1]
    older = re.search(r'href="(/jobs\?[^"]*before_id=\d+)"', page)[1].replace("&amp;", "&")
    assert older.endswith(f"before_id={first['before_id']}")
    assert f'href="/job/{ids[::-1][dashboard.JOBS_PER_PAGE]}"' in site.ask(older)[1]
    assert "no job matches" in site.ask("/jobs?task=nosuch")[1]


def test_search_that_takes_too_long_says_how_far_it_came(queue, site, monkeypatch):
    monkeypatch.setattr(dashboard, "SEARCH_SECONDS", 0.0)
    monkeypatch.setattr(pqueue_search, "WALK_IDS", 10)
    old = queue.enqueue("rare")
    ids = queue.enqueue_many("many", range(15))
    text = site.ask("/jobs?task=rare")[1]
    assert "no job found so far" in text
    assert f"searched back to job {ids[5]}: continue" in text
    text = site.ask(f"/jobs?task=rare&before_id={ids[5]}")[1]
    assert f'href="/job/{old}"' in text
    assert "newest jobs" in text


def test_page_does_not_wait_for_figures_that_take_long(queue, site, monkeypatch):
    go_on = threading.Event()
    slow = queue.enqueue("slow")
    site.ask("/")
    stats = pqueue.PersistentQInterface.stats

    def slowly(self):
        go_on.wait(PATIENCE_SECONDS)
        return stats(self)

    monkeypatch.setattr(pqueue.PersistentQInterface, "stats", slowly)
    monkeypatch.setattr(dashboard, "PAGE_WAIT_SECONDS", 0.01)
    queue.cancel(slow)
    assert '<span>pending</span><b class="pending">1</b>' in site.ask("/")[1]
    site.server.cache.forget()
    status, text, _ = site.ask("/")
    assert (status, "counting the jobs" in text) == (503, True)
    go_on.set()
    wait_until(lambda: '<span>pending</span><b class="pending">0</b>' in site.ask("/")[1])


def test_page_comes_back_after_figures_could_not_be_computed(queue, site, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(pqueue.PersistentQSQLite, "check", lambda *_, **__: os.stat("nosuch"))
        text = site.ask("/")[1]
        assert ("cannot count the jobs</p>" in text, "<p>[Errno 2] No such file" in text) == (True, True)
    assert site.ask("/")[0] == 200


def test_page_does_not_wait_for_a_supervisord_that_hangs(queue, site, monkeypatch):
    monkeypatch.setattr(supervisor, "STATUS_SECONDS", 0.2)
    assert "supervisord is not running here" in site.ask("/consumers")[1]
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(supervisor.SOCKET))
        silent.listen()
        assert "no supervisord answers at" in site.ask("/consumers")[1]


def test_empty_dashboard_says_what_to_do(queue, site):
    assert tables.JOBS.empty in site.ask("/jobs")[1]
    for page in tables.MENU:
        text = site.ask(f"/{page.name}")[1]
        assert all(
            part.empty in unescape(text)
            for part in page.parts
            if isinstance(part, tables.Table) and part.empty != "no process"
        )
    assert "run python3 consumer.py" in site.ask("/")[1]


def test_page_of_tasks_says_how_often_each_fails_and_leads_to_its_jobs(queue, site):
    for number in range(4):
        queue.enqueue("mail", number, queue="out", max_attempts=2)
    for act in (queue.complete, queue.fail, queue.complete, queue.complete):
        act(queue.dequeue("w", queues=["out"]), "no")
    queue.enqueue("report")
    long_ago = time.time() - 30 * 3600
    queue.enqueue("old", now=long_ago)
    queue.complete(queue.dequeue("w", tasks=["old"], now=long_ago), now=long_ago + 5)
    text = site.ask("/tasks")[1]
    first, second = re.findall(r"<tr data-key=\"(.*?)\".*?</tr>", text, re.DOTALL)
    assert (first, second) == ("out mail", "default report")
    row = text[text.index('data-key="out mail"') : text.index('data-key="default report"')]
    assert [unescaped(each) for each in re.findall(r"<td[^>]*>(.*?)</td>", row)][:7] == [
        *("mail", "out", "4", "3", "0", "1", "25.0%")
    ]
    assert 'aria-label="3 completed, 1 failed"' in row
    assert 'href="/task?task=mail&amp;last=24+h"' in row
    assert 'href="/jobs?queue=out&amp;task=mail"' in row
    assert 'href="/failed?queue=out&amp;task=mail"' in row


def test_page_of_a_task_shows_its_counts_failures_and_schedule_within_the_range(queue, site):
    now = time.time()
    for ago, task in ((30, "mail"), (7200, "mail"), (30, "other")):
        queue.mark_failed(queue.enqueue(task, now=now - ago), f"{task} no {ago}", now=now - ago)
    queue.enqueue("mail", queue="out")
    queue.complete(queue.dequeue("w", queues=["out"]))
    queue.enqueue("other", queue="apart")
    queue.schedule("nightly", "mail", cron="@daily", queue="quiet")
    with queue.transaction() as db:
        db.execute("INSERT INTO handlers (name, task) VALUES ('task:mail', 'tell')")
    for last, completed, failures in (("", 1, "1 (50.0%)"), ("24 h", 1, "2 (66.7%)")):
        text = site.ask(f"/task?{urlencode({'task': 'mail', 'last': last})}")[1]
        assert f'<span>completed</span><b class="completed">{completed}</b>' in text
        assert f'<span>failed attempts</span><b class="">{failures}</b>' in text
        assert re.findall(r'<tr data-key="([^"]*)"', text) == [
            *("mail: mail no …", "1", "2", "nightly", "default", "out")
        ]
        chosen = "&amp;last=24+h" if last else ""
        assert f'href="/jobs?task=mail&amp;state=failed{chosen}"' in text
        assert 'href="/task?task=mail&amp;last=72+h"' in text
        assert "each failed job is handled by the task tell" in text
        assert f'<a href="/tasks{chosen.replace("&amp;", "?")}" aria-current="page">' in text
    text = site.ask("/task?task=unheard+of")[1]
    assert "no job has failed" in text
    assert "Schedules" not in text[text.index("<main") :]
    assert site.ask("/task")[::2][0] == 400


def test_charts_show_the_last_hour_day_or_three_days(queue, site, monkeypatch):
    now = 1_800_000_000.0
    monkeypatch.setattr(dashboard.report, "now_shown", lambda: now)
    for hours in (0.5, 2, 23, 25, 71, 73):
        queue.enqueue("t", now=now - 3600 * hours)
        queue.complete(queue.dequeue("w", now=now - 3600 * hours), now=now - 3600 * hours)
    for last, period, number in (("", "minute", 1), ("24 h", "24 minutes", 3), ("72 h", "72 minutes", 5)):
        text = site.ask(f"/?{urlencode({'last': last})}")[1]
        assert f"<b>Jobs per {period}</b>" in text
        assert f"completed {number}</span>" in text
        assert f'aria-current="true">{last or "1 h"}</a>' in text


def test_charts_are_described_in_words(queue, site):
    queue.enqueue("t")
    jobs, times = re.findall('role="img"\\s+aria-label="([^"]*)"', site.ask("/")[1])
    assert jobs == "Jobs per minute completed 0 failed attempts 0 enqueued 1"
    assert times == "Wait and run time wait run solid p50, dashed p95"


def test_figures_of_days_are_computed_only_for_a_page_that_shows_them(queue, site):
    asked = []
    site.server.cache._parts["days"] = lambda queue: asked.append(1) or dashboard._Days()(queue)
    for path in ("/", "/jobs", "/queues", "/healthz", "/?last=1+h"):
        site.ask(path)
    assert not asked
    for path in ("/tasks", "/?last=24+h"):
        site.server.cache.expire()
        site.ask(path)
    assert len(asked) == 2


def test_figures_of_days_read_again_only_what_may_have_changed(queue, monkeypatch):
    now, compute, asked = [1_800_000_000.0], dashboard._Days(), []
    monkeypatch.setattr(dashboard.report, "now_shown", lambda: now[0])
    read = queue.outcomes
    monkeypatch.setattr(queue, "outcomes", lambda *span, **step: asked.append(span) or read(*span, **step))

    def completed(*, ago):
        queue.enqueue("t", now=now[0] - ago)
        queue.complete(queue.dequeue("w", now=now[0] - ago), now=now[0] - ago)
        return sum(each["completed"] for each in compute(queue)["72 h"])

    assert [completed(ago=each) for each in (7200, 60, 1440)] == [1, 2, 3]
    assert [len(span) for span in asked] == [2, 1, 1, 1]
    assert all(span[0] > now[0] - 3 * 1440 for span in asked[1:])
    now[0] += 3601
    assert completed(ago=7200) == 4, "the past is read again after an hour"
    now[0] -= 86400
    assert completed(ago=0) == 1, "and after the clock was set back, from which on the rest is yet to come"
    with closing(pqueue.open_queue("other.db")) as other:
        assert not any(each["completed"] for each in compute(other)["72 h"])


def test_title_and_icon_name_the_system_and_show_whether_it_has_a_problem(queue, site, monkeypatch):
    def seen():
        text = site.ask("/")[1]
        return re.search("<title>(.*)</title>", text)[1], re.search('id="icon" href="/([^"]*)"', text)[1]

    assert seen() == ("Overview · pqueue", "icon.svg")
    queue.enqueue("t", now=time.time() - 3600)
    assert seen() == ("(1) Overview · pqueue", "icon-problem.svg")
    assert site.ask("/icon-problem.svg")[2]["Content-Type"] == "image/svg+xml"
    monkeypatch.setenv("PQUEUE_OPS_NAME", "shop <staging>")
    assert seen()[0] == "(1) Overview · shop &lt;staging&gt;"
    assert "<b>shop &lt;staging&gt;</b>" in "".join(each.proto.body for each in streamlit().get("html"))


def test_running_job_shows_when_it_will_end_if_it_goes_on_like_this(queue):
    job = queue.enqueue("t") and queue.dequeue("w")
    (left,) = [each.cell for each in tables.PROCESSING.columns if each.heading == "left, estimated"]
    for progress in (None, 0.0):
        assert left(job._replace(progress=progress)) is None
    begun = left(job._replace(progress=0.25, started_at=report.now_shown() - 10))
    assert tables.left(*begun) == pytest.approx(30, abs=1)


def test_page_of_queues_shows_every_limit_and_the_groups_that_it_stops(queue, site):
    queue.enqueue_many("t", range(3), queue="mail", group="a")
    queue.limit("mail", 1000, running=1, rate=(10, 60))
    queue.dequeue("w", queues=["mail"])
    row = re.search('<tr data-key="mail">.*?</tr>', site.ask("/queues")[1], re.DOTALL)[0]
    assert '<td class="fold less">1,000&nbsp;pending, 1&nbsp;running, 10&nbsp;in&nbsp;1&nbsp;min</td>' in row
    assert '<td class="fold less">1&nbsp;pending, 1&nbsp;at&nbsp;a&nbsp;limit</td>' in row


def test_overview_shows_the_worst_findings_and_unfolds_the_others(queue, site):
    for name in ("שלום", *"abcdefg"):
        queue.enqueue("t", queue=name)
    queue.dequeue("w", queues=["other"])
    text = site.ask("/")[1]
    shown, _, rest = text[text.index('id="findings"') : text.index("<h2>Failures")].partition("<details>")
    number = shown.count('class="finding"') + rest.count('class="finding"')
    assert f"<summary>and {number - 6} more findings</summary>" in rest
    assert "&#x27;<bdi>שלום</bdi>&#x27;" in text


def test_age_of_a_page_is_that_of_the_figures_it_shows(queue, site):
    site.ask("/tasks")
    site.server.cache._began["days"] -= 20
    assert float(site.ask("/")[2]["X-Age"]) < 15


def test_job_page_names_the_group_and_leads_to_the_jobs_it_runs_after(queue, site):
    parents = queue.enqueue_many("part", range(2))
    job_id = queue.enqueue("total", after=parents, group="customer-7")
    text = site.ask(f"/job/{job_id}")[1]
    assert "<dt>group</dt><dd>customer-7</dd>" in text
    assert '<dt>runs after</dt><dd><a href="/job/1">1</a> <a href="/job/2">2</a></dd>' in text
    assert "runs after" not in site.ask("/job/1")[1]
    queue.complete(queue.dequeue("w"), {"rows": 12, "password": "hunter2"})
    queue.fail(queue.dequeue("w"), "ValueError: no\n  trace", retry=False)
    text = site.ask(f"/job/{job_id}")[1]
    table = text[text.index("<h2>Runs after") : text.index("<h2>Timeline")]
    assert [unescaped(each) for each in re.findall(r"<td[^>]*>(.*?)</td>", table)] == [
        *("1", "completed", "part", '{"rows": 12, "password": "…"}'),
        *("2", "failed", "part", "ValueError: no"),
    ]
    assert json.loads(site.ask(f"/api/jobs/{job_id}")[1])["after"] == parents


def test_job_page_tells_a_short_attempt_from_a_long_one(queue, site):
    now = time.time()
    for number, seconds in enumerate((0.25, 2.0, 3000.0)):
        queue.enqueue("work", max_attempts=1, now=now - 7200 + number)
        queue.complete(queue.dequeue("c", now=now - 7000, lease_seconds=5000), now=now - 7000 + seconds)
    for job_id, took in ((1, "250 ms"), (2, "2.0 s"), (3, "50 min")):
        assert f'<td class="number">{took}</td>' in site.ask(f"/job/{job_id}")[1]


def test_job_page_tells_its_story(queue, site, folder, monkeypatch):
    monkeypatch.setattr("pqueue_tools.file_task.files_directory", folder / "files")
    (folder / "files").mkdir()
    (folder / "files/job_1.txt").write_text("first line\nsecond line\n")
    job_id = failed(queue, "ValueError: <b>\n  in a traceback", payload={"file": "job_1.txt", "secret": "hunter2"})
    text = site.ask(f"/job/{job_id}")[1]
    for part in ("ValueError: &lt;b&gt;", "in a traceback", "second line", "resubmit it to try again", "<dd>0</dd>"):
        assert part in text
    assert "hunter2" not in text
    assert "hunter2" not in site.ask(f"/api/jobs/{job_id}")[1]
    assert site.ask("/job/99")[0] == 404


@pytest.mark.parametrize("file", ["../precious", "/etc/passwd", "link.txt", "nosuch.txt", "a\0b", ".."])
def test_job_page_shows_no_file_from_elsewhere(queue, site, folder, monkeypatch, file):
    monkeypatch.setattr("pqueue_tools.file_task.files_directory", folder / "files")
    (folder / "files").mkdir()
    (folder / "precious").write_text("CONTENT")
    (folder / "files/link.txt").symlink_to(folder / "precious")
    job_id = queue.enqueue("prepend_timestamp", {"file": file})
    status, text, _ = site.ask(f"/job/{job_id}")
    assert status == 200
    assert "CONTENT" not in text
    assert "root:" not in text


def test_hostile_text_is_shown_as_text(queue, site):
    printable = "".join(mark for mark in HOSTILE[:60] if mark.isprintable())
    failed(queue, HOSTILE, task=printable, queue="q" + printable, payload={HOSTILE: HOSTILE})
    queue.enqueue("t", {"file": HOSTILE}, key="k" + printable)
    queue.dequeue("c" + printable)
    pages = [
        site.ask(path)[1]
        for path in (
            *(f"/{name}" for name in tables.PAGES),
            "/job/1",
            "/job/2",
            "/jobs?" + urlencode({"text": '"><script>', "task": "<b>"}),
        )
    ]
    for text in pages:
        bare = re.sub(r'<script src="/script.js"></script>', "", text)
        assert not re.search(
            r"<script|<img|<b>(?!\w)|onerror=alert\(2\)>\"",
            re.sub('<b class="|<b>(Jobs|Wait)', "", bare),
            re.IGNORECASE,
        )
        assert "\x1b" not in text
        assert "\0" not in text
        assert "\u202e" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in pages[0]


def test_hostile_names_of_fields_are_shown_as_text(queue, site):
    queue.enqueue("t")
    status, text, _ = site.act("jobs", action="cancel", id=1, **{'"><b>': "x"})
    assert (status, "<b>" in text, 'name="&quot;&gt;&lt;b&gt;"' in text) == (200, False, True)


# What it does


def test_operator_mends_jobs_and_queues(queue, site):
    one, two = failed(queue), failed(queue)
    pending = queue.enqueue("work", queue="slow")
    status, _, headers = site.act("resubmit", id=one, back=f"/job/{one}")
    assert (status, headers["Location"].partition("?said=")[0]) == (303, f"/job/{one}")
    assert "resubmitted 1 job" in site.ask(headers["Location"])[1]
    assert queue.get(one).state == "pending"
    assert site.act("resubmit", scope="matching", state="failed", task="work", fingerprint="ValueError: no")[0] == 303
    assert queue.get(two).state == "pending"
    site.act("mark_failed", id=two)
    assert queue.get(two).state == "failed"
    site.act("assign", id=pending, consumer="berta")
    assert queue.get(pending).assigned_to == "berta"
    site.act("cancel", id=pending)
    assert queue.get(pending).state == "cancelled"
    site.act("pause", queue="slow")
    assert queue.stats()["queues"]["slow"]["paused"]
    site.act("resume", queue="slow")
    site.act("limit", queue="slow", max_pending="7")
    assert queue.stats()["queues"]["slow"] | {"paused": False, "max_pending": 7} == queue.stats()["queues"]["slow"]
    assert queue.history(one)[-1]["event"] == "resubmitted"


def test_operator_acts_on_the_ticked_or_on_all_that_match(queue, site):
    for task in ("a", "a", "b"):
        failed(queue, task=task)
    confirmed(site, "resubmit 2 jobs", "task a", action="resubmit", scope="matching", task="a", state="failed")
    assert [job.state for job in queue.list_jobs()] == ["failed", "pending", "pending"]
    confirmed(site, "cancel 3 jobs", "jobs 1, 2, 3", action="cancel", scope="ticked", id=[1, 2, 3])
    assert [job.state for job in queue.list_jobs()] == ["failed", "cancelled", "cancelled"]
    for job_id in queue.enqueue_many("c", range(600)):
        queue.cancel(job_id)
    confirmed(site, "resubmit 600 jobs", "task c", action="resubmit", scope="matching", task="c")
    assert queue.stats()["states"]["pending"] == 600


def confirmed(site, question, which, /, **form):
    """Perform an action on many jobs as the page does: it asks first, and names their number."""
    before = json.loads(site.ask("/api/jobs")[1])
    status, text, _ = site.act("jobs", back="/jobs?task=a", **form)
    assert status == 200
    assert f"{question}?" in text
    assert which in text
    assert json.loads(site.ask("/api/jobs")[1]) == before
    fields = [tuple(map(unescape, each)) for each in re.findall(r'name="([^"]*)" value="([^"]*)"', text)]
    status, _, headers = site.ask("/act/jobs", fields)
    assert (status, headers["Location"].partition("&said=")[0]) == (303, "/jobs?task=a")


ERRORS = [
    *("E" * length for length in (79, 80, 81, 500)),
    "é" * 80 + "z",
    "😀" * 81,
    "tab\there",
    "\x1b[31mred",
    "nul\0after",
]
ERRORS += [
    "trail  ",
    "  lead",
    "\r\nfirst",
    "",
    "a\rb",
    "a\u2028b",
    "\udc80",
    "<b> &amp; \"quoted'",
    "password=hunter2 no",
]
ERRORS += ["x" * 70 + " postgres://user:secret@host/db"]


@pytest.mark.parametrize("error", ERRORS, ids=ascii)
def test_operator_resubmits_all_jobs_of_a_group_whatever_its_error_is(queue, site, error):
    ids = [failed(queue, error), failed(queue, error)]
    other = failed(queue, "another")
    (form,) = [each for each in site.ask("/")[1].split("<form") if "yes, resubmit 2 jobs" in each]
    fields = [tuple(map(unescape, each)) for each in re.findall(r'name="([^"]*)" value="([^"]*)"', form)]
    assert site.ask("/act/resubmit", fields)[0] == 303
    assert [queue.get(job_id).state for job_id in (*ids, other)] == ["pending", "pending", "failed"]


def test_action_that_changes_nothing_is_no_success(queue, site):
    job_id = failed(queue)
    queue.resubmit(job_id)
    for action, form in (
        ("resubmit", {"scope": "matching", "state": "failed", "task": "work", "fingerprint": "ValueError: no"}),
        ("resubmit", {"scope": "matching", "task": "work"}),
        ("resubmit", {"id": [job_id, 99]}),
        ("cancel", {"scope": "matching", "task": "nosuch"}),
        ("jobs", {"action": "cancel", "scope": "matching", "task": "nosuch"}),
        ("jobs", {"action": "cancel", "scope": "matching", "task": "work", "kye": "x"}),
    ):
        status, text, _ = site.act(action, **form)
        assert status == 409, (action, text)
        sentences = ["resubmitted 0 jobs; 1 not changed because of its state", "cannot resubmit job 1: it is pending"]
        sentences += ["no job matches the filter", "expected the filters"]
        assert text.startswith(tuple(sentences)), text
    assert queue.get(job_id).state == "pending"


@pytest.mark.parametrize(
    "path",
    [
        "/api/jobs?kye=x",
        "/api/jobs?created_from=0",
        "/api/jobs?State=failed",
        "/api/jobs?state=",
        "/api/jobs?task",
        "/api/jobs?task=a&task=b",
        "/api/jobs?state=failed&state=nosuch",
        "/api/jobs?since=never",
        "/api/jobs?state=nosuch",
        "/api/jobs?before_id=x",
        "/api/jobs/1?state=failed",
        "/api/stats?queue=default",
    ],
)
def test_program_whose_filter_is_unknown_is_told(queue, site, path):
    queue.enqueue("t")
    status, text, _ = site.ask(path)
    assert (status, text.startswith("expected")) == (400, True)


@pytest.mark.parametrize(
    ("action", "form", "message"),
    [
        ("cancel", {}, "expected at least one selected job"),
        ("cancel", {"id": "x"}, "expected a whole number"),
        ("cancel", {"id": ["1", "x"]}, "expected a whole number"),
        ("cancel", {"id": "99"}, "no such job"),
        ("resubmit", {"id": "1"}, "it is pending"),
        ("cancel", {"scope": "matching"}, "expected a filter"),
        ("limit", {"queue": "default", "max_pending": "-1"}, "expected a whole number"),
        ("remove_group", {"group": "../x"}, "expected an added group"),
        ("nosuch", {}, "no such action"),
    ],
)
def test_operator_mistake_is_reported(queue, site, action, form, message):
    queue.enqueue("t")
    before = queue.list_jobs()
    status, text, _ = site.act(action, **form)
    assert status in (404, 409)
    assert message in text
    assert queue.list_jobs() == before


@pytest.mark.parametrize(
    ("action", "file"), [("add_group", "var/supervisor.d"), ("remove_group", "var/supervisor.d/consumer2.conf")]
)
def test_action_that_cannot_write_a_file_is_reported(queue, site, monkeypatch, action, file):
    monkeypatch.setattr(supervisor, "call", lambda *_, **__: [])
    path = Path(file)
    path.mkdir(parents=True) if action == "remove_group" else path.touch()  # not what it expects
    status, text, _ = site.act(action, group="consumer2")
    assert (status, text.startswith(f"cannot use {file}")) == (409, True), text


def test_read_only_dashboard_offers_and_does_nothing(queue, site, monkeypatch):
    job_id = failed(queue)
    monkeypatch.setenv("PQUEUE_OPS_READONLY", "1")
    for path in ("/", f"/job/{job_id}"):
        assert 'method="post"' not in site.ask(path)[1]
        assert site.server.token not in site.ask(path)[1]
        assert ">read-only</span>" in site.ask(path)[1]
    status, text, _ = site.act("resubmit", id=job_id)
    assert (status, "read-only" in text) == (409, True)
    assert queue.get(job_id).state == "failed"


def test_operator_changes_one_job_in_every_way(queue, site):
    job_id = failed(queue, payload={"to": "ada"}, group="g")
    text = site.ask(f"/job/{job_id}")[1]
    for label in ("resubmit", "edit and resubmit", "retry later", "clone", "delete"):
        assert f"<summary>{label} …</summary>" in text
    site.act("edit", id=job_id, payload='{"to": "grace"}')
    assert (queue.get(job_id).state, queue.get(job_id).payload) == ("pending", {"to": "grace"})
    site.act("retry", id=job_id, when="2h")
    assert queue.get(job_id).state == "scheduled"
    assert abs(queue.get(job_id).run_at - time.time() - 7200) < 60
    assert "<summary>run now …</summary>" in site.ask(f"/job/{job_id}")[1]
    site.act("run_now", id=job_id)
    location = site.act("clone", id=job_id)[2]["Location"]
    assert "a copy of job 1" in site.ask(location)[1]
    assert queue.get(2)._replace(id=1, created_at=0.0, run_at=0.0) == queue.get(1)._replace(
        created_at=0.0, run_at=0.0, max_attempts=1
    )
    site.act("delete", id=job_id, back="/jobs")
    assert queue.count_jobs() == 1
    assert queue.operations()[0]["event"] == "deleted 1 job"
    for action, form, message in (
        ("edit", {"id": 2, "payload": "{"}, "expected JSON"),
        ("retry", {"id": 2, "when": "soon"}, "expected a duration"),
        ("retry", {"id": 2, "when": "1m", "rate": "10"}, "expected JOBS/DURATION, such as 10/1s, got '10'"),
        ("retry", {"id": 2, "when": "1m", "rate": "0/1s"}, "expected a whole number"),
        ("clone", {"id": 99}, "no job 99"),
        ("delete", {"id": 99}, "no job 99"),
    ):
        status, text, _ = site.act(action, **form)
        assert (status, message in text) == (409, True), (action, text)
    while queue.dequeue("w", tasks=["work"]):
        pass
    text = site.ask("/job/2")[1]
    assert "edit payload" not in text
    assert re.search(r'class="state running">running</span>', text)


def test_operator_edits_a_payload_and_its_hidden_values_stay_as_they_are(queue, site):
    stored = {"amount": "EUR 7", "card": {"token": "s3cret"}, "to": ["postgresql://ada:hunter2@db/shop", 1]}
    job_id = failed(queue, payload=stored)
    text = site.ask(f"/job/{job_id}")[1]
    shown = json.loads(unescape(re.search(r'aria-label="payload" spellcheck="false">\n([^<]*)<', text)[1]))
    assert shown == {**stored, "card": {"token": "…"}, "to": ["postgresql://ada:…@db/shop", 1]}
    status, text, _ = site.act("edit", id=job_id, payload=json.dumps({**shown, "token": "…"}))
    assert (status, "expected the value of 'token', got …" in text) == (409, True), text
    assert (queue.get(job_id).state, queue.get(job_id).payload) == ("failed", stored)
    site.act("edit", id=job_id, payload=json.dumps({**shown, "amount": "7"}))
    assert (queue.get(job_id).state, queue.get(job_id).payload) == ("pending", {**stored, "amount": "7"})
    status, text, _ = site.act("enqueue", task="charge", payload=json.dumps(shown))
    assert (status, "expected the value of 'token', got …" in text) == (409, True), text


@pytest.mark.parametrize(
    ("edited", "expected"),
    [
        ([{"to": "ann", "token": "…"}, {"to": "bob", "token": "…"}, 8], ["one", "two"]),
        ([{"to": "ann", "token": "…"}, {"to": "bob", "token": "new"}, 7], ["one", "new"]),
        ([{"to": "bob", "token": "…"}, {"to": "ann", "token": "…"}, 7], None),
        ([{"to": "eve", "token": "…"}, {"to": "bob", "token": "…"}, 7], None),
        ([{"to": "bob", "token": "…"}, 7], None),
    ],
)
def test_hidden_value_never_moves_to_another_item_of_a_list(edited, expected):
    stored = [{"to": "ann", "token": "one"}, {"to": "bob", "token": "two"}, 7]
    if expected:
        assert [each["token"] for each in restored(edited, stored)[:2]] == expected
    else:
        with pytest.raises(ValueError, match="expected the value of 'token', got …"):
            restored(edited, stored)
    assert restored([{"to": "eve", "token": "…"}, 8], [stored[0], 7]) == [{"to": "eve", "token": "one"}, 8]


def test_link_of_a_group_shows_the_jobs_that_its_action_changes(queue, site):
    ids = [failed(queue, f"KeyError: {number}") for number in range(3)]
    failed(queue, "ValueError: 7")
    failed(queue, "KeyError: 7", task="other")
    (link,) = set(re.findall(r'href="(/failed\?[^"]*task=work[^"]*KeyError[^"]*)"', site.ask("/")[1]))
    text = site.ask(unescape(link))[1]
    assert re.findall(r'name="id" value="(\d+)"', text) == [str(each) for each in ids[::-1]]
    assert "all 3 that match" in text


def test_operator_sees_the_whole_last_error_of_each_group(queue, site):
    for number in (7, 8):
        failed(queue, f"KeyError: 'currency' in order {number}\n  File x")
    failed(queue, "ValueError: login failed, password=hunter2")
    shown = re.findall(r'<td class="wrap"><a [^>]*>([^<]*)</a>', site.ask("/")[1])
    assert sorted(map(unescape, shown)) == ["KeyError: 'currency' in order 8", "ValueError: login failed, password=…"]


def test_finding_about_a_schedule_leads_to_the_schedules(queue, site):
    queue.schedule("late", "t", every_seconds=60, now=time.time() - 7200)
    queue.schedule("idle", "t", every_seconds=60)
    queue.pause_schedule("idle")
    links = re.findall(r'<a href="/schedules">schedule [^<]*<bdi>(\w+)', site.ask("/")[1])
    assert links == ["late", "idle"]


@pytest.mark.parametrize(
    ("pair", "shown"),
    [
        ((0.7, 128.6), "700 ms / 129 s"),
        ((2.0, 99.94), "2.0 / 99.9 s"),
        ((99.96, 599.0), "100 / 599 s"),
        ((1724.0, 4321.0), "29 / 72 min"),
        ((600.0, 90_000.0), "10 min / 25 h"),
    ],
)
def test_long_times_are_short_so_that_they_fit_their_tile(pair, shown):
    assert dashboard.times(pair) == shown


@pytest.mark.filterwarnings("ignore")
def test_search_takes_a_path_in_the_payload_and_suggests_tasks(queue, site):
    ids = [queue.enqueue("mail", {"customer": number, "password": "hunter2"}) for number in (7, 8)]
    for path in ("/jobs?payload=customer%3D7", "/jobs?payload=customer%3D7&text=MAI&state=pending&state=failed"):
        text = site.ask(path)[1]
        assert re.findall(r'name="id" value="(\d+)"', text) == [str(ids[0])]
        assert 'value="customer=7"' in text
        assert "<option>mail</option>" in text
    listed = json.loads(site.ask("/api/jobs?payload=customer%3D7")[1])["jobs"]
    assert [each["id"] for each in listed] == ids[:1]
    assert json.loads(site.ask("/api/jobs?payload=password%3Dhunter2")[1])["jobs"] == []
    for path in ("/jobs", "/api/jobs"):
        status, text, _ = site.ask(f"{path}?payload=customer")
        assert status == 400
        assert "expected a path in the payload and a value, such as customer=7, got 'customer'" in text
    page = streamlit(page="jobs", payload="customer=8", task="mail")
    assert [list(each.value["job"]) for each in page.dataframe] == [[f"?job={ids[1]}"]]
    assert page.selectbox(key="filter-task").options == ["mail"]
    page.text_input(key="filter-payload").input("customer").run(timeout=PATIENCE_SECONDS)
    assert "expected a path in the payload" in "".join(each.proto.body for each in page.get("html"))


def test_search_takes_several_states_a_key_and_a_time(queue, site):
    queue.enqueue("old", key="k", now=time.time() - 7200)
    queue.cancel(queue.enqueue("new"))
    failed(queue)

    def found(query):
        return [each["id"] for each in json.loads(site.ask(f"/api/jobs?{query}")[1])["jobs"]]

    assert found("state=failed&state=cancelled") == [3, 2]
    assert found("key=k") == [1]
    assert found("since=1h") == [3, 2]
    assert found("until=1h") == [1]
    assert found("since=2020-01-01&until=2020-01-02T12:00Z") == []
    page = site.ask("/jobs?state=failed&state=cancelled")[1]
    assert len(re.findall(r' name="state" value="(?:failed|cancelled)" checked', page)) == 2
    confirmed(
        site,
        "delete 2 jobs",
        "state failed or cancelled",
        action="delete",
        scope="matching",
        state=["failed", "cancelled"],
    )
    assert found("") == [1]


def test_page_that_has_not_changed_is_not_sent_again_and_a_large_one_is_compressed(queue, site):
    populate(queue, jobs=400)
    for path in ("/", "/jobs", "/failed", "/consumers"):
        status, text, headers = site.ask(path)
        assert float(headers["X-Now"]) == pytest.approx(time.time(), abs=60)
        status, body, again = site.ask(path, If_None_Match=headers["ETag"])
        assert (status, body) == (304, "") or again["ETag"] != headers["ETag"]  # the next minute has begun
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=PATIENCE_SECONDS)
        connection.request("GET", path, headers={"Accept-Encoding": "gzip"})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        assert answer.headers["Content-Encoding"] == "gzip"
        assert len(body) < 10_000
        assert b"</html>" in gzip.decompress(body)
    assert "Content-Encoding" not in site.ask("/", Accept_Encoding="gzip", Origin="null")[2]


def difference(before, after):
    parts = [re.split("(?=<)", dashboard_http.TIMES.sub(b"", text.encode()).decode()) for text in (before, after)]
    return difflib.unified_diff(*parts, n=0, lineterm="")


def test_page_is_not_sent_again_because_time_has_passed(queue, site, monkeypatch):
    at = (time.time() // 60 + 1) * 60 + 5
    monkeypatch.setattr(report, "now_shown", lambda: at)
    populate(queue, jobs=400)  # with jobs that run, and have run for a while
    queue.enqueue("mail", queue="late", now=at - 1200.3)
    queue.schedule("late", "t", every_seconds=60, now=at - 7200)
    with queue.transaction() as db:
        db.execute("UPDATE consumers SET last_seen_at = last_seen_at - 100")
        db.execute("UPDATE jobs SET lease_expires_at = lease_expires_at + 900 WHERE state = 'processing'")
    pages = [f"/{name}" for name in tables.PAGES if name != "task"] + ["/task?task=send_mail", "/?last=24+h"]
    first = {path: site.ask(path)[1:] for path in pages}
    tags = {path: headers["ETag"] for path, (_, headers) in first.items()}
    for later in (1, 20, 53):
        now = at + later
        monkeypatch.setattr(report, "now_shown", lambda now=now: now)
        for path, tag in tags.items():
            status, text, _ = site.ask(path, If_None_Match=tag)
            assert status == 304, "\n".join(difference(first[path][0], text))
    queue.enqueue("mail")
    assert site.ask("/", If_None_Match=tags["/"])[0] == 200


def test_times_in_findings_and_tiles_are_for_the_script_and_for_readers(queue, site):
    queue.enqueue("mail", now=time.time() - 1200)
    text = site.ask("/")[1]
    (finding,) = re.findall(r"the oldest has waited for (<time .*?</time>)", text)
    (tile,) = re.findall(r"oldest pending</span><b class=\"\">(<time .*?</time>)", text)
    assert finding == tile
    assert re.fullmatch(r'<time datetime="[0-9TZ:.-]+" data-kind="since">20 min</time>', tile)
    queue.pause("default")  # it waits because an operator wants it to
    assert 'oldest pending</span><b class="">none</b>' in site.ask("/")[1]


@pytest.mark.filterwarnings("ignore")
def test_long_names_are_cut_in_findings_and_their_tooltip_is_the_whole(queue, site):
    name = "n'" * 127
    for each in (name, "q" * 255):
        queue.enqueue("t", queue=each)
        queue.limit(each, 1)
        queue.pause(each)
    queue.close()
    for text in (site.ask("/")[1], "".join(each.proto.body for each in streamlit().get("html"))):
        found = re.findall(r'<p class="finding">(.*?)</p>', text)
        assert len(found) > 2
        assert max(len(word) for each in found for word in re.split(r"[\s']", unescaped(each))) <= 61
        for whole in (name, "q" * 255):
            assert any(f'title="{escape(whole)}"' in each for each in found)


def test_number_of_pending_jobs_is_the_same_in_the_finding_and_in_the_tile(queue, site):
    queue.enqueue_many("t", range(3))
    queue.enqueue("t", queue="off")
    queue.pause("off")
    text = site.ask("/")[1]
    assert "4 jobs pending and no consumer is alive" in text
    assert '<span>pending</span><b class="pending">4</b>' in text
    assert "queue <" not in text


def test_action_returns_to_the_same_range_and_page(queue, site):
    failed(queue, task="mail")
    queue.enqueue_many("many", range(60))
    for path in ("/task?task=mail&last=24+h", "/?last=72+h", "/jobs?task=many&before_id=31"):
        page = site.ask(path)[1]
        (back,) = set(re.findall(r'name="back" value="([^"]*)"', page))
        location = site.act("pause", queue="default", back=unescape(back))[2]["Location"]
        assert location.partition("&said=")[0] == path


def test_each_link_keeps_the_range_that_the_reader_chose(queue, site, monkeypatch):
    job_id = failed(queue, task="mail")
    queue.enqueue_many("many", range(60), now=time.time() - 1200)
    queue.dequeue("w")
    monkeypatch.setattr(tables, "OVERVIEW_ROWS", 0)
    to_see, seen = ["/?last=72+h", "/jobs?last=72+h&text=m&before_id=50", f"/job/{job_id}?last=72+h"], set()
    while to_see:
        seen.add(path := to_see.pop())
        text = site.ask(path)[1]
        links = {unescape(each) for each in re.findall(r'<a[^>]* href="([^"]*)"', text)} - {"#main"}
        ranges = {unescape(each) for each in re.findall(r'<a class="range" href="([^"]*)"', text)}
        lost = {each for each in links - ranges if "last=72+h" not in each and not each.startswith("/api/")}
        assert lost == set(), path
        assert text.count('<input type="hidden" name="last" value="72 h">') == text.count('<form class="filter"'), path
        one_of_a_kind = {re.sub(r"[?].*|\d+", "", each): each for each in sorted(links - ranges)}
        known = {re.sub(r"[?].*|\d+", "", each) for each in seen}
        to_see += [each for kind, each in one_of_a_kind.items() if kind not in known and not kind.startswith("/api/")]
    assert {path.split("?")[0] for path in seen} >= {f"/{name}" for name in tables.PAGES}
    assert "last=" not in site.ask("/jobs?last=72%26x=y")[1]
    queue.close()
    for path in queue.path.parent.glob("queue.db*"):
        if path.is_file():
            path.unlink()
    assert '<a href="/jobs?last=24+h"' in site.ask("/?last=24+h")[1]


def test_page_of_queues_shows_the_throughput_of_each_within_an_hour(queue, site):
    now = time.time() // 60 * 60 - 30  # in the last full minute
    for ago, to in ((0, "mail"), (1, "mail"), (600, "mail"), (0, "slow"), (7200, "old")):
        queue.enqueue("t", queue=to, max_attempts=1, now=now - ago)
    for done in (queue.complete, queue.complete, queue.fail):
        done(queue.dequeue("w", queues=["mail"], now=now), "no", now=now + 1)
    text = site.ask("/queues")[1]
    table = text[text.index("<h2>Throughput") :].partition("</table>")[0].split("<tr ")[1:]
    rows = [[unescaped(each) for each in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in table]
    assert [row[:6] for row in rows] == [["mail", "3", "2", "33.3%", "2", "2"], ["slow", "1", "0", "0.0%", "1", "0"]]
    assert 'aria-label="2 completed, 1 failed"' in text


@pytest.mark.filterwarnings("ignore")
def test_job_page_shows_what_was_logged_about_the_job(queue, site, folder, monkeypatch):
    monkeypatch.setattr(dashboard, "LOG_BYTES_READ", 1000)
    job_id = queue.enqueue("t")
    for page in (site.ask("/job/1")[1], streamlit_texts(job_id)):
        assert "<h2>Log" not in page
    logs = folder / "var/log"
    logs.mkdir()
    line = f"2026-11-26T00:00:00.000Z completed consumer=<w> job={job_id}"
    (logs / "a.log").write_text(f"{line} lost\n" + "x" * 900 + f"\n{line}\n{line}1\n")
    (logs / "a.log.1").mkdir()  # cannot be read
    assert "<h2>Log" not in site.ask("/job/1")[1]
    (logs / "a.log.1").rmdir()
    assert f'<h2>Log</h2><pre tabindex="0">{escape(line)}</pre>' in site.ask("/job/1")[1]
    assert line in streamlit_texts(job_id)


def streamlit_texts(job_id):
    return [each.value for each in streamlit(job=str(job_id)).code]


@pytest.mark.filterwarnings("ignore")
def test_operator_enqueues_a_job(queue, site, monkeypatch):
    assert "/act/enqueue" in site.ask("/jobs?state=pending")[1]
    status, _, headers = site.act("enqueue", task="mail", queue="", payload=' {"to": "ada"} ', back="/jobs?task=mail")
    assert (status, headers["Location"].partition("&said=")[0]) == (303, "/jobs?task=mail")
    assert "enqueued job 1" in site.ask(headers["Location"])[1]
    assert site.act("enqueue", task="mail", queue="slow", payload="")[0] == 303
    page = streamlit(page="jobs")
    page.text_input(key="enqueue-task").set_value("report")
    page.text_area(key="enqueue-payload").set_value("[1]")
    next(each for each in page.button if each.label == "yes, enqueue").click()
    page.run(timeout=PATIENCE_SECONDS)
    found = [(job.task, job.queue, job.payload) for job in queue.list_jobs()]
    assert found == [("report", "default", [1]), ("mail", "slow", None), ("mail", "default", {"to": "ada"})]
    assert queue.operations(limit=1)[0]["event"] == "enqueued job 3"
    for form, message in (
        ({"task": ""}, "expected a task name of 1 to 255 printable characters, not only spaces, got ''"),
        ({"task": "t", "payload": "{"}, "expected JSON, got '{'"),
        ({"task": "t", "payload": "1e400"}, "expected a payload that JSON can hold"),
        ({"task": "t", "queue": "q" * 256}, "expected a queue name"),
    ):
        status, text, _ = site.act("enqueue", **form)
        assert (status, text.count("\n"), message in text) == (409, 1, True), text
    monkeypatch.setenv("PQUEUE_OPS_READONLY", "1")
    assert "/act/enqueue" not in site.ask("/jobs")[1]
    assert site.act("enqueue", task="t")[0] == 409


URLS = (":memory:", "mysql://h/d", "sqlite:///a?b=c", "postgresql+psycopg2://h/d", "host=h password=hunter2", "~/q.db")
PREFIXES = ("queue", "/a b", "//evil.example", '/"><script>', "http://evil.example")


@pytest.mark.parametrize("arguments", [["--port", "0"], ["--check", "--port", "0"], ["--streamlit", "--port", "0"]])
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(("PQUEUE_URL", url) for url in URLS),
        *(("PQUEUE_OPS_PREFIX", prefix) for prefix in PREFIXES),
        ("PQUEUE_OPS_HOSTS", "http://h"),
        *(("PQUEUE_OPS_USER_HEADER", header) for header in ("X-Remote-User:", "Remote User", " ", "Bénutzer")),
    ],
)
def test_dashboard_whose_settings_are_invalid_does_not_start(folder, monkeypatch, capsys, variable, value, arguments):
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(ops, "serve", mock.Mock())
    monkeypatch.setattr(os, "execv", mock.Mock())
    assert ops.main(arguments) == 2
    assert re.fullmatch(r"ops\.py: expected .*, got .*\n", capsys.readouterr().err)
    assert not ops.serve.called
    assert not os.execv.called


@pytest.mark.parametrize(
    ("installed", "is_used"), [("1.54.9", False), ("0.99", False), ("1.55.0", True), ("2.0rc1", True)]
)
def test_dashboard_uses_no_streamlit_that_is_too_old(folder, monkeypatch, capsys, installed, is_used):
    monkeypatch.setattr(dashboard, "version", lambda _: installed)
    monkeypatch.setattr(ops, "serve", mock.Mock(return_value=0))
    monkeypatch.setattr(os, "execv", mock.Mock(side_effect=SystemExit))
    with suppress(SystemExit):
        assert ops.main(["--streamlit", "--port", "0"]) == 0
    assert (os.execv.called, ops.serve.called) == (is_used, not is_used)
    assert ("no Streamlit 1.55 or newer is installed" in capsys.readouterr().err) == (not is_used)


def test_folder_named_streamlit_is_not_taken_for_it(monkeypatch):
    monkeypatch.setattr(dashboard, "find_spec", mock.Mock())
    monkeypatch.setattr(dashboard, "version", mock.Mock(side_effect=PackageNotFoundError))
    assert not dashboard.has_streamlit()


def test_browser_is_refused_with_a_page_that_leads_back(queue, site):
    for path in ("/nosuch", "/job/99", "/jobs?state=nosuch"):
        status, text, headers = site.ask(path, Accept="text/html")
        assert (status in (400, 404), headers["Content-Type"]) == (True, dashboard_http.HTML)
        assert '<a href="/">to the overview</a>' in text
        assert f"<title>{'bad request' if status == 400 else 'not found'} ·" in text


def test_page_that_refuses_or_asks_keeps_the_range_and_the_filters(queue, site):
    queue.enqueue("t")
    back = "/jobs?state=pending&task=t&last=72+h"
    headers = {"Accept": "text/html"}
    form = {"token": site.server.token, "back": back}
    refused = site.ask("/act/jobs", {**form, "action": "cancel"}, **headers)
    failing = site.ask("/act/resubmit", {**form, "id": "1"}, **headers)
    missing = site.ask("/job/99?last=72+h", **headers)
    wrong = site.ask("/jobs?state=nosuch&last=72+h", **headers)
    asked = site.ask("/act/jobs", {**form, "action": "cancel", "scope": "matching", "task": "t"}, **headers)
    assert [each[0] for each in (refused, failing, missing, wrong, asked)] == [409, 409, 404, 400, 200]
    for _, text, _ in (refused, failing, missing, wrong, asked):
        links = [unescape(each) for each in re.findall(r'<a[^>]* href="(/[^"]*)"', text)]
        assert len(links) > len(tables.MENU)
        assert [each for each in links if "last=72+h" not in each] == []
    for _, text, _ in (refused, failing, asked):
        assert f'href="{escape(back)}"' in text
    foreign = site.ask("/act/jobs", {**form, "back": "//evil.example/?last=1", "action": "cancel"}, **headers)[1]
    assert "evil" not in foreign
    assert site.ask("/nosuch?last=%5B", **headers)[0] == 404


# Who did it


def test_action_is_recorded_under_the_name_given_at_the_password_prompt(queue, folder):
    queue.enqueue("t")
    site = Site(password="secret")
    try:
        for name, recorded in (("anna", "anna"), ("", getpass.getuser())):
            login = {"Authorization": "Basic " + base64.b64encode(f"{name}:secret".encode()).decode()}
            form = {"token": site.server.token, "queue": "default"}
            assert site.ask("/act/pause", form, **login)[0] == 303
            assert queue.operations(limit=1)[0]["actor"] == f"{recorded} (dashboard)"
            assert f'<td class="name">{recorded} (dashboard)</td>' in site.ask("/activity", **login)[1]
        login = {"Authorization": "Basic " + base64.b64encode(b"an\x00na:secret").decode()}
        assert site.ask("/act/resume", form, **login)[0] == 400
        assert is_paused(queue)
    finally:
        site.close()


def is_paused(queue):
    return queue.stats()["queues"]["default"]["paused"]


def test_name_of_the_user_comes_from_a_header_only_if_that_is_configured(queue, site, monkeypatch):
    queue.enqueue("t")
    form = {"token": site.server.token, "queue": "default"}
    site.ask("/act/pause", form, X_Remote_User="eve")
    assert "eve" not in queue.operations()[0]["actor"]
    monkeypatch.setenv("PQUEUE_OPS_USER_HEADER", "X-Remote-User")
    site.ask("/act/pause", form, X_Remote_User="bob", Authorization="Basic " + base64.b64encode(b"eve:x").decode())
    assert queue.operations()[0]["actor"] == "bob (dashboard)"


def test_one_action_on_many_jobs_is_one_line_of_the_activity(queue, site):
    ids = queue.enqueue_many("t", range(700))
    confirmed(site, "cancel 700 jobs", "task t", action="cancel", scope="matching", task="t")
    (operation,) = queue.operations()
    assert (operation["event"], operation["jobs"], operation["job_id"]) == ("cancelled", 700, ids[0])


@pytest.mark.filterwarnings("ignore")
def test_jobs_are_retried_at_a_rate(queue, site):
    ids = [failed(queue) for _ in range(4)]
    ids.append(queue.enqueue("work", delay_seconds=3600))
    form = {"action": "retry", "scope": "matching", "task": "work", "when": "10m", "rate": "2/1m"}
    now = time.time()
    confirmed(site, "retry 5 jobs in 10m, 2 jobs in 1 min, within 2 min", "task work", **form)
    due = [round((queue.get(job_id).run_at - now - 600) / 30) for job_id in ids]
    assert (due, queue.stats()["states"]["scheduled"]) == ([0, 1, 2, 3, 4], 5)
    assert [(each["event"], each["jobs"], each["job_id"]) for each in queue.operations(limit=1)] == [
        ("changed time, resubmitted", 5, ids[0])
    ]
    status, text, _ = site.act("jobs", **{**form, "rate": "fast"})
    assert (status, "expected JOBS/DURATION, such as 10/1s, got 'fast'" in text) == (409, True)
    page = streamlit(page="jobs", task="work")
    page.text_input(key="bulk-rate").input("1/1s").run(timeout=PATIENCE_SECONDS)
    page.button(key="bulk-retry").click().run(timeout=PATIENCE_SECONDS)
    assert page.warning[0].value.startswith("retry 5 jobs in 10m, 1 job in 1 s, within 5.0 s?")


# What it refuses


def test_request_of_another_site_changes_nothing(queue, site):
    job_id = failed(queue)
    path, good = "/act/resubmit", {"token": site.server.token, "id": job_id}
    here = f"http://127.0.0.1:{site.port}"
    assert site.ask(path, {"id": job_id})[0] == 403
    assert site.ask(path, {**good, "token": "guess"})[0] == 403
    assert site.ask(path, {**good, "token": "ü"})[0] == 403
    assert site.ask(path, good, Origin="http://evil.example")[0] == 403
    assert site.ask(path, good, Origin="null")[0] == 403
    for other in ("cross-site", "same-site"):
        assert site.ask(path, good, Origin=here, Sec_Fetch_Site=other)[0] == 403
    assert site.ask(path, good, Host="evil.example")[0] == 421
    assert site.ask(path, good, Host=f"127.0.0.1.evil.example:{site.port}")[0] == 421
    assert site.ask(path + "?" + urlencode(good))[0] == 404
    assert site.ask(path, method="PUT", body="x")[0] == 501
    assert queue.get(job_id).state == "failed"
    assert site.ask(path, good, Origin=here)[0] == 303


def test_operator_behind_a_proxy_acts(queue, site):
    form = {"token": site.server.token, "id": failed(queue)}
    asked = site.ask("/act/resubmit", form, Origin="https://queue.example", Sec_Fetch_Site="same-origin")
    assert asked[0] == 303


ELSEWHERE = [
    "",
    "evil.example",
    "127.0.0.1@evil",
    "[::1",
    "localhost.evil",
    "0x7f.1",
    "10.0.0.1",
    "[::2]",
    "[localhost]",
]
ELSEWHERE += [
    "localhost:80:80",
    "localhost:x",
    "localhost..",
    "localhost, evil.example",
    "evil.example#localhost",
    "127.1",
]


@pytest.mark.parametrize("host", ELSEWHERE)
def test_page_is_not_served_under_another_name(queue, site, host):
    assert site.ask("/", Host=host)[0] == 421


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:8501", "localhost.:8501", "127.0.0.1.", "[::1]:80", "127.9.9.9"]
)
def test_page_is_served_under_each_name_of_loopback(queue, site, host):
    assert site.ask("/", Host=host)[0] == 200


def test_request_without_a_host_or_with_several_is_refused(queue, site):
    for hosts in ("", "Host: localhost\r\nHost: localhost\r\n", "Host: localhost\r\nHost: evil.example\r\n"):
        with socket.create_connection(("127.0.0.1", site.port)) as client:
            client.sendall(f"GET /api/jobs HTTP/1.1\r\n{hosts}\r\n".encode())
            assert b" 421 " in client.makefile("rb").readline()


def test_operator_reaches_it_by_the_names_that_are_allowed(queue, folder, monkeypatch, capsys):
    monkeypatch.setenv("PQUEUE_OPS_HOSTS", "pqueue, Queue.Example:443 10.1.2.3,fd00::0001,[fd00::2]")
    password = {"Authorization": "Basic " + base64.b64encode(b"ops:open sesame").decode()}
    for address in ("127.0.0.1", "0.0.0.0"):
        site = Site(address, "open sesame")
        try:
            for host in (
                "pqueue:8501",
                "PQUEUE",
                "queue.example.",
                "10.1.2.3:8501",
                "[fd00::1]:80",
                "[FD00:0::2]",
                "localhost",
            ):
                assert site.ask("/", Host=host, **password)[0] == 200, host
            for host in ("queue", "evil.pqueue", "pqueue.evil", "fd00::1"):
                assert site.ask("/", Host=host, **password)[0] == 421, host
            for host in ("10.1.2.4", "[fd00::3]", socket.gethostname()):
                assert site.ask("/", Host=host, **password)[0] == (421 if address == "127.0.0.1" else 200), host
        finally:
            site.close()
    for wrong in ("http://pqueue", "a/b", "[pqueue]", "*@x"):
        monkeypatch.setenv("PQUEUE_OPS_HOSTS", wrong)
        assert ops.main(["--port", "0"]) == 2
        assert "expected names or addresses in PQUEUE_OPS_HOSTS" in capsys.readouterr().err


def test_page_elsewhere_loads_nothing_but_a_link_to_a_page_works(queue, site):
    job_id = queue.enqueue("t")
    data, shown = (
        ("/api/jobs", f"/api/jobs/{job_id}", "/api/stats", "/metrics", "/healthz"),
        ("/", "/jobs", f"/job/{job_id}"),
    )
    for other in ("cross-site", "same-site", "anything"):
        for path in (*data, *shown):
            for mode, kind in (
                ("no-cors", "image"),
                ("cors", "empty"),
                ("navigate", "iframe"),
                ("navigate", "document"),
            ):
                status = site.ask(path, Sec_Fetch_Site=other, Sec_Fetch_Mode=mode, Sec_Fetch_Dest=kind)[0]
                follows = path in shown and (mode, kind) == ("navigate", "document")
                assert status == (200 if follows else 403), (other, path, mode, kind)
    for path in (*data, *shown):
        assert site.ask(path, Origin="http://evil.example")[0] == 403
        for ours in ("same-origin", "none"):
            assert site.ask(path, Sec_Fetch_Site=ours, Sec_Fetch_Mode="cors", Sec_Fetch_Dest="empty")[0] in (200, 503)


LARGE = {"name": "ada", "password": "hunter2", "text": "x" * 1_000_000, "url": "db://u:hunter2@h"}


def test_lists_show_beginnings_and_say_so_and_a_job_is_whole(queue, site):
    job_id = queue.enqueue("t", LARGE)
    queue.enqueue("t", {"n": 1})
    job = queue.dequeue("w")
    queue.update(job, result={"rows": list(range(100_000))})
    queue.fail(job, "ValueError: " + "e" * 9000, retry=False)
    small, large = json.loads(site.ask("/api/jobs")[1])["jobs"]
    assert (small["truncated"], small["payload"]) == (False, {"n": 1})
    assert large["truncated"] is True
    assert (large["payload"]["name"], large["payload"]["password"]) == ("ada", "…")
    assert re.fullmatch("x+…", large["payload"]["text"])
    assert large["result"]["rows"][:200] == list(range(200))
    assert large["error"].endswith("e…")
    assert len(json.dumps(large)) < 5000
    whole = json.loads(site.ask(f"/api/jobs/{job_id}")[1])["job"]
    assert whole["payload"] == {**LARGE, "password": "…", "url": "db://u:…@h"}
    assert (len(whole["result"]["rows"]), len(whole["error"])) == (100_000, 9012)
    page = site.ask(f"/job/{job_id}")[1]
    assert len(page) < 300_000
    assert f'the first 65,536 characters: <a href="/api/jobs/{job_id}">the whole job as JSON</a>' in page
    assert len(site.ask("/")[1]) < 100_000
    assert json.loads(site.ask("/api/jobs?text=hunter2")[1])["jobs"] == []
    assert [each["id"] for each in json.loads(site.ask("/api/jobs?text=ADA")[1])["jobs"]] == [job_id]


def test_deep_payload_does_not_grow_with_its_indents(queue, site):
    job_id = queue.enqueue("t", [json.loads("[" * 90 + "]" * 90)] * 5000)
    assert len(site.ask(f"/job/{job_id}")[1]) < 200_000


def test_large_answers_are_sent_a_few_at_a_time(queue, site, monkeypatch):
    job_id = queue.enqueue("t", LARGE)
    for _ in range(dashboard_http.MAX_LARGE_ANSWERS):
        site.server._large.acquire()
    status, text, headers = site.ask(f"/api/jobs/{job_id}")
    assert (status, headers["Retry-After"]) == (503, "2")
    assert "try again" in text
    assert site.ask("/")[0] == site.ask("/api/jobs")[0] == 200
    for _ in range(dashboard_http.MAX_LARGE_ANSWERS):
        site.server._large.release()
    assert site.ask(f"/api/jobs/{job_id}")[0] == 200
    monkeypatch.setattr(dashboard_http, "RENDER_WAIT_SECONDS", 0.01)
    rendered = threading.Event()
    site.server._renderer.submit(rendered.wait)
    assert (site.ask("/")[0], site.ask("/style.css")[0]) == (503, 200)
    rendered.set()
    assert site.ask("/")[0] == 200


def test_dashboard_stays_small_with_any_payloads_and_without_readers(place):
    queue = place.queue(durability="normal")
    queue.enqueue_many("t", [{"text": "x" * 1_048_000}] * 50, max_attempts=1)
    while job := queue.dequeue("w"):
        queue.update(job, result=["y" * 1_048_000])
        queue.fail(job, "<&>" * 3000, retry=False)
    address = place.dashboard()
    port, pid = int(address.rpartition(":")[2]), place.children[-1].pid
    paths = ("/api/jobs", "/api/jobs/1", "/job/2", "/", "/jobs", "/api/jobs?text=xyz", "/jobs?text=yy")
    deaf = []
    for number in range(300):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", port))
        path = paths[number % len(paths)]
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
        deaf.append(connection)
    wait_until(lambda: sum(bool(select.select([each], [], [], 0)[0]) for each in deaf) > 200)
    page = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
    page.request("GET", "/")
    assert page.getresponse().status == 200
    page.close()
    for connection in deaf:
        connection.close()
    most = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert int(most[1]) < 150 * 1024


def test_filter_that_is_too_long_is_refused(queue, site):
    queue.enqueue("t")
    for name, most in (("text", "1,000"), ("task", "255"), ("queue", "255"), ("consumer", "255")):
        for path in ("/jobs", "/failed", "/api/jobs"):
            status, text, _ = site.ask(f"{path}?{name}=" + "x" * 60_000)
            assert (status, text) == (400, f"expected {name} to be at most {most} characters, got 60,000\n")
        status, text, _ = site.act("jobs", action="cancel", scope="matching", **{name: "x" * 60_000})
        assert (status, "got 60,000" in text) == (409, True)
    assert site.ask("/jobs?state=" + "x" * 60_000)[0] == site.ask("/jobs?before_id=" + "1" * 60_000)[0] == 400
    assert queue.count_jobs(state="pending") == 1


def test_malformed_request_is_refused_and_changes_nothing(queue, site):
    job_id = failed(queue)
    good = {"token": site.server.token, "id": job_id}
    assert site.ask("/jobs?state=nosuch")[:2] == (
        400,
        f"expected a state of {', '.join(pqueue.STATES)}, got 'nosuch'\n",
    )
    assert site.ask("/api/jobs?before_id=x")[:2] == (400, "expected a whole number of at least 0, got 'x'\n")
    assert site.ask("http://[/")[0] == 400
    assert site.ask("/act/resubmit", good, Origin="http://[")[0] == 400
    assert site.ask("/act/resubmit", {**good, "x": list(range(3000))})[0] == 400
    assert site.ask("/act/resubmit", good, Transfer_Encoding="chunked", Content_Length="")[0] == 411
    assert queue.get(job_id).state == "failed"
    status, _, headers = site.ask("/act/resubmit", {**good, "back": "http://["})
    assert (status, headers["Location"].partition("said=")[0]) == (303, "/?")


def test_only_the_dashboard_itself_tells_of_an_action_and_once(queue, site):
    location = site.act("resubmit", id=failed(queue), task="work", back="/jobs?task=work")[2]["Location"]
    assert ">resubmitted 1 job<" in site.ask(location)[1]
    for link in (location, "/?said=all+is+lost", "/jobs?said=all+is+lost", "/job/1?said=all+is+lost"):
        status, page, _ = site.ask(link)
        assert status == 200
        assert 'role="status"></p>' in page
        assert "all is lost" not in page


def test_sentence_of_an_action_waits_for_a_page_that_can_show_it(queue, site, monkeypatch):
    location = site.act("resubmit", id=failed(queue), back="/jobs?task=work")[2]["Location"]
    with monkeypatch.context() as broken:
        broken.setattr(pqueue.PersistentQSQLite, "check", lambda *_, **__: os.stat("nosuch"))
        assert site.ask(location)[0] == 503
    assert ">resubmitted 1 job<" in site.ask(location)[1]


@pytest.mark.parametrize("header", ["Host", "Origin", "Cookie", "X"])
def test_header_cannot_be_injected(queue, site, header):
    with socket.create_connection(("127.0.0.1", site.port)) as client:
        text = "x%0d%0aSet-Cookie:%20a=b"
        client.sendall(f"GET /?text={text} HTTP/1.1\r\nHost: 127.0.0.1\r\n{header}: a\rX: b\r\n\r\n".encode())
        answer = client.makefile("rb").read().decode()
    assert "\r\nSet-Cookie" not in answer
    assert not re.search("\r(?!\n)", answer)


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "//etc/passwd",
        "/job/../x",
        "/job/-1",
        "/job/" + "9" * 19,
        "/job/9" * 20,
        "/%00",
        "/job/1%2f",
        "/static",
    ],
)
def test_paths_lead_nowhere(queue, site, path):
    status, text, _ = site.ask(path)
    assert status == 404
    assert "root:" not in text


def test_back_leads_to_no_other_site(queue, site):
    for back in ("http://evil.example/", "//evil.example/job/1", "/\\evil", "javascript:alert(1)", "/job/1\r\nX: y"):
        failed(queue)
        location = site.act("resubmit", id=len(queue.list_jobs()), back=back)[2]["Location"]
        assert re.fullmatch(r"/(job/1[^?]*)?\?said=[^\r\n]*", location), location


def test_answers_forbid_scripts_frames_and_sniffing(queue, site):
    headers = site.ask("/")[2]
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "style=" not in site.ask("/")[1]


def test_oversized_and_half_sent_requests_are_refused(queue, site, monkeypatch):
    post = dashboard_http.Handler._post

    def impatiently(handler):  # once the head has come
        handler.connection.settimeout(0.3)
        post(handler)

    monkeypatch.setattr(dashboard_http.Handler, "_post", impatiently)
    assert site.ask("/act/cancel", body="x" * (dashboard_http.MAX_BODY_BYTES + 1))[0] == 413
    assert site.ask("/act/cancel", body="x", Content_Length="999999999999")[0] == 413
    assert site.ask("/act/cancel", body="x", Content_Length="-1")[0] == 411
    assert site.ask("/" + "x" * 70_000)[0] == 414
    with socket.create_connection(("127.0.0.1", site.port)) as half:
        half.sendall(f"POST /act/cancel HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\n".encode())
        half.sendall(b"Content-Length: 50\r\n\r\nid=")
        assert b" 408 " in half.recv(100)
    with socket.create_connection(("127.0.0.1", site.port)) as garbage:
        garbage.sendall(b"\x16\x03\x01\x00garbage\r\n\r\n")
        assert b"400" in garbage.recv(1000)
    assert site.ask("/healthz")[0] == 200


def test_idle_connections_do_not_stall_it(queue, site):
    idle = [socket.create_connection(("127.0.0.1", site.port)) for _ in range(dashboard_http.MAX_CONNECTIONS + 100)]
    assert site.ask("/healthz")[1] == "no problem found\n"
    for connection in idle:
        connection.close()


def test_request_that_trickles_is_cut_off(queue, site, monkeypatch):
    usual = dashboard_http.REQUEST_SECONDS
    monkeypatch.setattr(dashboard_http, "REQUEST_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", site.port)) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\n")

        def is_cut_off():
            try:
                slow.sendall(b"X: y\r\n")
                return False
            except OSError:
                return True

        wait_until(is_cut_off)
    monkeypatch.setattr(dashboard_http, "REQUEST_SECONDS", usual)
    assert site.ask("/healthz")[0] == 200


def test_reader_who_never_reads_delays_no_other(queue, site):
    queue.enqueue_many("t", ["x" * 1000] * 60)
    deaf = []
    for _ in range(20):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", site.port))
        connection.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\n\r\n".encode())
        deaf.append(connection)
    assert site.ask("/api/jobs")[0] == 200
    for connection in deaf:
        connection.close()


def test_other_addresses_need_a_password_and_a_wrong_one_costs_time(queue, folder, monkeypatch, capsys):
    monkeypatch.setattr(dashboard_http, "WRONG_PASSWORD_SECONDS", 0.2)
    for arguments in ([], ["--check"]):
        assert ops.main(["--host", "0.0.0.0", "--port", "0", *arguments]) == 2
        assert "expected a password in PQUEUE_OPS_PASSWORD" in capsys.readouterr().err
    site = Site("0.0.0.0", "open sesame")
    try:
        assert site.ask("/")[0] == 401
        assert site.ask("/metrics", Authorization="Basic !")[0] == 401
        for password, status in (("wrong", 401), ("open sesame", 200)):
            given = base64.b64encode(f"ops:{password}".encode()).decode()
            began = time.monotonic()
            assert site.ask("/", Authorization=f"Basic {given}")[0] == status
            assert status == 200 or time.monotonic() - began >= 0.2
    finally:
        site.close()


def test_port_in_use_is_reported(site, capsys):
    assert ops.main(["--port", str(site.port)]) == 1
    assert f": port {site.port} is in use: set PQUEUE_OPS_PORT to another port\n" in capsys.readouterr().err


# What it survives


def test_missing_database_is_reported_and_found_when_it_returns(folder, site):
    status, text, _ = site.ask("/")
    assert (status, 'class="health warning">no queue at' in text) == (503, True)  # which is not an error
    assert "<p>start a producer or a consumer, or check the path or PQUEUE_URL</p>" in text
    assert site.ask("/healthz")[0] == 503
    assert "no queue at" in json.loads(site.ask("/api/stats")[1])["error"]
    queue = pqueue.open_queue()
    queue.enqueue("first")
    assert "first" in site.ask("/jobs")[1]
    queue.close()
    for path in (folder / "var").glob("queue.db*"):
        if path.is_file():
            path.unlink()
    other = pqueue.open_queue()
    other.enqueue("second")
    text = site.ask("/jobs")[1]
    assert "second" in text
    assert "first" not in text
    with other.transaction() as db:
        db.execute("CREATE TABLE x (y)")
    other.close()
    with sqlite3.connect(other.path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    assert "got 99" in site.ask("/")[1]


def test_locked_database_is_reported_and_read_when_it_is_free(queue, site, monkeypatch):
    monkeypatch.setattr(
        pqueue.PersistentQSQLite.__init__,
        "__kwdefaults__",
        {**pqueue.PersistentQSQLite.__init__.__kwdefaults__, "busy_seconds": 0.1},
    )
    queue.enqueue("t")
    queue.close()
    with sqlite3.connect(queue.path, isolation_level=None) as db:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("BEGIN EXCLUSIVE")
        status, text, _ = site.ask("/")
        assert (status, "another writer held it" in text, "end the program" in text) == (503, True, True)
        assert "another writer held it" in json.loads(site.ask("/api/stats")[1])["error"]
        db.execute("ROLLBACK")
    db.close()
    assert site.ask("/")[0] == 200


def test_page_is_drawn_while_a_writer_holds_the_database(queue, site):
    job_id = queue.enqueue("t")
    with sqlite3.connect(queue.path, isolation_level=None) as db:
        db.execute("BEGIN IMMEDIATE")
        assert site.ask("/")[0] == 200
        db.execute("ROLLBACK")
    db.close()
    assert site.act("cancel", id=job_id)[0] == 303


def test_health_and_metrics_are_for_machines(queue, site):
    from prometheus_client.parser import text_string_to_metric_families

    queue.enqueue("t")
    status, text, _ = site.ask("/healthz")
    assert (status, text) == (
        503,
        "critical: 1 job pending and no consumer is alive: run python3 consumer.py --import MODULE\n",
    )
    names = {family.name for family in text_string_to_metric_families(site.ask("/metrics")[1])}
    assert {"pqueue_jobs", "pqueue_consumers", "pqueue_findings"} <= names


def test_paused_queue_is_shown_and_leaves_the_dashboard_healthy(queue, site):
    queue.enqueue("t", now=time.time() - 7200)
    queue.pause("default")
    paused = "info: queue &#x27;default&#x27; is paused, with 1 job pending"
    status, text, _ = site.ask("/healthz")
    assert (status, text) == (200, f"{unescape(paused)}: run python3 admin.py resume default\n")
    assert re.search(r'<b class="info">info</b> <a href="/queues">queue .* is paused', site.ask("/")[1])
    assert f'<a class="health completed" href="/">{report.NO_FINDINGS}</a>' in site.ask("/jobs")[1]
    assert 'pqueue_findings{severity="info"} 1\n' in site.ask("/metrics")[1]


@pytest.mark.parametrize(("action", "fields"), [("pause", {}), ("resume", {}), ("limit", {"max_pending": "7"})])
def test_dashboard_creates_no_queue_by_changing_an_unknown_one(queue, site, action, fields):
    queue.enqueue("t")
    assert site.act(action, queue="slwo", **fields)[:2] == (409, "no queue 'slwo'\n")
    assert [*queue.stats()["queues"]] == ["default"]


def test_health_includes_the_programs_that_supervisor_gave_up_on(queue, site, monkeypatch):
    dead = {"group": "ops", "name": "ops", "state": "FATAL", "pid": 0, "uptime_seconds": 0}
    monkeypatch.setattr(supervisor, "known_processes", lambda: [dead])
    assert site.ask("/healthz")[0] == 503
    assert "Supervisor gave up on ops" in site.ask("/healthz")[1]
    assert json.loads(site.ask("/api/stats")[1])["findings"][0]["severity"] == "critical"


def test_health_has_three_depths(queue, folder, monkeypatch):
    site = Site(password="secret")
    password = {"Authorization": "Basic " + base64.b64encode(b"anna:secret").decode()}
    try:
        assert site.ask("/livez")[:2] == (200, "alive\n")
        assert site.ask("/readyz")[:2] == (200, "ready\n")
        assert site.ask("/healthz")[0] == 401
        queue.enqueue("t")
        assert site.ask("/healthz", **password)[0] == 503
        assert site.ask("/readyz")[0] == 200
        monkeypatch.setenv("PQUEUE_URL", str(folder / "nosuch.db"))
        site.server.cache.forget()
        assert site.ask("/livez")[:2] == (200, "alive\n")
        assert site.ask("/readyz")[:2] == (503, "not ready\n")
        assert "nosuch.db" in site.ask("/healthz", **password)[1]
        assert site.ask("/livez", Host="evil.example")[0] == 421
    finally:
        site.close()


@pytest.mark.parametrize("removed", [True, False], ids=["removed by the proxy", "passed on by the proxy"])
def test_page_under_a_prefix_leads_only_there(queue, site, monkeypatch, removed):
    monkeypatch.setenv("PQUEUE_OPS_PREFIX", "/a/queue/")

    def ask(path, form=None):
        assert path.startswith("/a/queue/"), path
        return site.ask(path.removeprefix("/a/queue") if removed else path, form)

    ids = [failed(queue) for _ in range(dashboard.JOBS_PER_PAGE + 1)]
    pages = [ask("/a/queue/jobs?state=failed")[1], ask(f"/a/queue/job/{ids[0]}")[1]]
    links = {unescape(each) for page in pages for each in re.findall(r'(?:href|src|action)="([^"#]+)', page)}
    assert {"/a/queue/style.css", "/a/queue/script.js", "/a/queue/act/jobs", f"/a/queue/job/{ids[1]}"} <= links
    for link in links:
        assert ask(link)[0] == (404 if "/act/" in link else 200), link
    form = {"token": site.server.token, "back": f"/job/{ids[0]}", "id": ids[0]}
    status, text, _ = ask("/a/queue/act/jobs", {**form, "action": "resubmit"})
    assert (status, f'href="/a/queue/job/{ids[0]}">no</a>' in text) == (200, True)
    status, _, headers = ask("/a/queue/act/jobs", {**form, "action": "resubmit", "confirmed": "1"})
    assert (status, queue.get(ids[0]).state) == (303, "pending")
    assert "resubmitted 1 job" in ask(headers["Location"])[1]
    assert site.ask("/a/queue")[0] == 200
    assert site.ask("/a/queues/")[0] == 404


# Streamlit


def streamlit(**query):
    from streamlit.testing.v1 import AppTest

    page = AppTest.from_string(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pqueue_tools import dashboard_streamlit as o; o.page()"
    )
    for name, value in query.items():
        page.query_params[name] = value
    return page.run(timeout=PATIENCE_SECONDS)


def test_streamlit_page_says_that_streamlit_is_too_old(queue, monkeypatch):
    monkeypatch.setattr(dashboard, "version", lambda _: "1.54.0")
    page = streamlit()
    assert not page.exception
    assert "pip install -U streamlit" in "".join(each.proto.body for each in page.get("html"))


@pytest.mark.filterwarnings("ignore")
def test_streamlit_page_shows_the_same_figures(queue):
    populate(queue, jobs=400)
    page = streamlit()
    assert not page.exception
    text = "".join(each.proto.body for each in page.get("html"))
    states = queue.stats()["states"]
    for state in dashboard.STATES_SHOWN:
        assert f'<span>{state}</span><b class="{state}">{states[state]:,}</b>' in text
    for label, _, _ in dashboard.tiles(dashboard.FigureCache().figures(PATIENCE_SECONDS)["overview"]):
        assert f"<span>{label}</span>" in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", tables.PAGES, ids=lambda name: name or "overview")
def test_both_front_ends_show_the_same_tables(queue, site, monkeypatch, name):
    populate(queue, jobs=400)
    queue.schedule("nightly", "build_report", cron="@daily")
    queue.pause("mail", by="ada")
    names = ["consumer_00", "consumer_01", "dashboard"]
    running = [{"group": name.partition("_")[0], "name": name, "state": "RUNNING"} for name in names]
    monkeypatch.setattr(supervisor, "processes", lambda: running)
    monkeypatch.setattr(supervisor, "added_groups", lambda: ["consumer"])
    supervisor.SOCKET.touch()
    query = {"task": "send_mail"} if name == "task" else {}
    html, page = site.ask(f"/{name}?{urlencode(query)}")[1], streamlit(page=name, **query)
    assert not page.exception
    frames = [each.value.fillna("").astype(str).to_dict("split") for each in page.dataframe]
    shown = [tables.JOBS if part == "search" else part for part in tables.PAGES[name].parts]
    shown = [part for part in shown if isinstance(part, tables.Table) and not (query and part is tables.SCHEDULES)]
    for table, frame in zip(shown, frames, strict=True):
        title = "Failed jobs" if name == "failed" and table is tables.JOBS else table.title
        part = html[html.index(f"<h2>{title}") :].partition("</table>")[0]
        cells = re.findall(r"<td[^>]*>(.*?)</td>", part)
        assert frame["data"]
        heads = re.findall(r"<th[^>]*>(.*?)</th>", part)
        drawn = [each for each in table.columns if not each.optional or each.heading in heads]
        kinds = [each.kind for each in dashboard_streamlit._drawn(drawn)]
        assert frame["columns"] == [each.heading for each in dashboard_streamlit._drawn(drawn)]
        for kind, value in zip(kinds * len(frame["data"]), sum(frame["data"], []), strict=True):
            if kind not in (
                "time",
                "since",
                "until",
                "left",
                "progress",
                "trend",
                "failures",
            ):  # as of now, or a drawing
                value = (
                    value.removeprefix("?job=") if kind == "job" else value.strip("[']") if kind == "state" else value
                )
                value = f"{int(value):,}" if value.isdigit() and kind != "job" else value
                assert value in map(unescaped, cells), table.title
    if name == "consumers":
        for label in ("remove consumer", "add 3 consumers"):
            assert f"<summary>{label} …</summary>" in html
            assert f"yes, {label}" in [button.label for button in page.button]


@pytest.mark.filterwarnings("ignore")
def test_streamlit_page_has_the_buttons_of_a_queue_and_of_its_schedule_of_the_same_name(queue):
    queue.enqueue("report", queue="report")
    queue.schedule("report", "report", queue="report", cron="@daily")
    page = streamlit(page="task", task="report")
    assert not page.exception
    assert {"yes, pause", "yes, pause report"} <= {each.label for each in page.button}


@pytest.mark.filterwarnings("ignore")
def test_streamlit_page_shows_older_jobs(queue):
    ids = queue.enqueue_many("t", range(dashboard.JOBS_PER_PAGE + 2))
    page = streamlit(page="jobs")
    (older,) = (each for each in page.button if "older" in each.label)
    older.click().run(timeout=PATIENCE_SECONDS)
    assert not page.exception
    assert [each["job"] for each in page.dataframe[0].value.to_dict("records")] == [f"?job={n}" for n in ids[1::-1]]


@pytest.mark.filterwarnings("ignore")
def test_page_leaves_out_columns_that_are_empty(queue, site):
    queue.enqueue("t")
    queue.schedule("tick", "t", every_seconds=60)
    assert "limits" not in site.ask("/queues")[1] + _frames(streamlit(page="queues"))
    assert "group</th>" not in site.ask("/schedules")[1]
    queue.limit("default", 5)
    queue.schedule("tick", "t", every_seconds=60, group="a")
    dashboard_streamlit.cache().expire()
    for text in (site.ask("/queues")[1], _frames(streamlit(page="queues"))):
        assert ("limits" in text, "5 pending" in text) == (True, True)
    assert "group</th>" in site.ask("/schedules")[1]


@pytest.mark.filterwarnings("ignore")
def test_page_shows_how_the_number_of_stored_jobs_changes_next_to_how_long_they_are_kept(queue, site):
    now = time.time()
    queue.keep("default", completed="1d")
    for at in (now - 86400 + 600, now, now, now):  # the first is deleted within the hour
        queue.enqueue("t", now=at)
        queue.complete(queue.dequeue("w", now=at), now=at)
    queue.enqueue("t")  # a backlog, which is not meant
    assert "+2" not in site.ask("/queues")[1].partition('id="settings"')[0]
    assert ">+2<" in site.ask("/queues")[1].partition('id="settings"')[2]
    assert "'stored jobs per hour': {0: '+2'}" in _frames(streamlit(page="queues"))


@pytest.mark.filterwarnings("ignore")
def test_page_of_a_task_begins_with_the_job_that_failed_last_however_long_ago_it_was_enqueued(queue, site):
    now = time.time()
    old, *others = queue.enqueue_many("t", range(dashboard.JOBS_PER_PAGE + 2), now=now - 3600)
    for job_id in (*others, old):
        queue.mark_failed(job_id, "E", now=now - 60 if job_id in others else now)
    shown = site.ask("/task?task=t")[1].partition('id="newest"')[2]
    assert re.findall("/job/([0-9]+)", shown)[0] == str(old)
    assert f"job={old}" in str(streamlit(page="task", task="t").dataframe[1].value)


def test_page_of_a_job_leads_to_every_page(queue, site):
    queue.enqueue("t")
    text, page = site.ask("/job/1")[1], streamlit(job="1")
    shown = "".join(each.proto.body for each in page.get("html"))
    for each in tables.MENU:
        assert f">{each.title}</a>" in text
        assert f'<a href="?page={each.name}">{each.title}</a>' in shown
    assert '<a href="/jobs" aria-current="page">' in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [1, 3])
def test_dashboard_says_what_it_will_do_and_what_it_did_in_plain_words(queue, site, number):
    jobs = "1 job" if number == 1 else "3 jobs"
    ids = queue.enqueue_many("t", range(number), delay_seconds=900)
    for action, what, done in [
        ("run_now", f"run {jobs} now", f"made {jobs} pending"),
        ("mark_failed", f"mark {jobs} as failed", f"marked {jobs} as failed"),
        ("resubmit", f"resubmit {jobs}", f"resubmitted {jobs}"),
        ("retry", f"retry {jobs} in 10m", f"scheduled {jobs}"),
        ("cancel", f"cancel {jobs}", f"cancelled {jobs}"),
        ("delete", f"delete {jobs}", f"deleted {jobs}"),
    ]:
        form = {"scope": ["matching"], "task": ["t"], "when": ["10m"]}
        assert dashboard_actions.question(site.server.cache, action, form) == what
        assert dashboard_actions.act(site.server.cache, action, form) == (True, done)
    assert queue.count_jobs() == 0 < len(ids)
    job_id = queue.enqueue("t")
    assert (
        dashboard_actions.act(site.server.cache, "assign", {"id": [str(job_id)]})[1]
        == f"job {job_id} assigned to any consumer"
    )


@pytest.mark.filterwarnings("ignore")
def test_activity_shows_durations_in_their_units(queue, site):
    queue.keep("default", completed="36h")
    queue.limit("default", rate=(5, 90))
    queue.expect("default", max_wait_seconds=7200)
    text = site.ask("/activity")[1]
    for event in ("completed 36 h", "5 in 90 s", "wait 2 h, failed attempts default"):
        assert f"{event}</td>" in text


def test_figures_of_nothing_are_inconspicuous(queue, site):
    text = site.ask("/")[1]
    assert text.count("none</b></div>") == 3
    assert text.count('<div class="tile zero"') == 6
    queue.enqueue("t", max_attempts=3)
    assert ">+0<" not in site.ask("/queues")[1]
    assert "0 of 3" not in site.ask("/jobs")[1]


def unescaped(cell):
    return unescape(re.sub(r"<[^>]*>", "", cell))


@pytest.mark.filterwarnings("ignore")
def test_streamlit_page_reports_a_missing_database(folder):
    page = streamlit()
    assert not page.exception
    assert "<b>pqueue</b></div>" in "".join(each.proto.body for each in page.get("html"))
    assert 'class="health warning">no queue at' in "".join(each.proto.body for each in page.get("html"))
    assert "check the path or PQUEUE_URL" in "".join(each.proto.body for each in page.get("html"))
    assert "reloads automatically" not in "".join(each.value for each in page.caption)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ({"job": "abc"}, "expected a whole number"),
        ({"job": "1" * 30}, "expected a whole number"),
        ({"job": "99"}, "no job 99"),
        ({"page": "task"}, "expected a task"),
        ({"page": "jobs", "since": "soon"}, "expected a duration"),
        ({"page": "failed", "payload": "7"}, "expected a path"),
    ],
)
def test_streamlit_page_says_what_is_wrong_with_its_address(queue, query, sentence):
    queue.enqueue("t")
    page = streamlit(**query)
    assert not page.exception
    assert f'<p class="health critical">{sentence}' in "".join(each.proto.body for each in page.get("html"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("query", [{"page": "tasks"}, {"page": "task", "task": "t", "last": "24 h"}])
def test_streamlit_page_waits_for_figures_that_take_long(queue, monkeypatch, query):
    queue.enqueue("t")
    compute, may_compute = dashboard._Days.__call__, threading.Event()
    monkeypatch.setattr(dashboard._Days, "__call__", lambda *given: may_compute.wait() and compute(*given))
    monkeypatch.setattr(dashboard, "FIRST_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(dashboard, "PAGE_WAIT_SECONDS", 0.1)
    try:
        page = streamlit(**query)
        assert (list(page.exception), [each.value for each in page.caption]) == ([], ["counting the jobs …"])
    finally:
        may_compute.set()
    wait_until(lambda: [each.value for each in page.run(timeout=PATIENCE_SECONDS).caption] != ["counting the jobs …"])
    assert not page.exception


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "shown"), [("Asia/Tokyo", "Asia/Tokyo"), ("Mars/Olympus", "UTC"), ("../zone", "UTC")])
def test_streamlit_page_shows_times_in_the_zone_of_the_reader_if_it_is_known(queue, monkeypatch, name, shown):
    failed(queue)
    monkeypatch.setattr(type(dashboard_streamlit.st.context), "timezone", name)
    page = streamlit(job="1")
    assert not page.exception
    assert f"times in {shown}</span>" in "".join(each.proto.body for each in page.get("html"))


@pytest.mark.filterwarnings("ignore")
def test_streamlit_page_shows_a_phone_the_same_columns_as_the_other_page(queue, monkeypatch):
    populate(queue, jobs=400)
    monkeypatch.setattr(dashboard_streamlit, "_is_phone", lambda: True)
    shown = [list(each.value.columns) for each in streamlit().dataframe]
    expected = [tables.FAILED, tables.QUEUES, tables.PROCESSING, tables.CONSUMERS]
    assert shown == [[each.heading for each in table.columns if each.on_phone] for table in expected]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["tasks", "queues"])
def test_streamlit_page_draws_failures_apart_from_what_was_completed(queue, name):
    queue.enqueue_many("t", range(3))
    first, *others = queue.dequeue_many("anna", 3)
    queue.complete(first)
    for job in others:
        queue.fail(job, "ValueError: no", retry=False)
    (row,) = [each.value.to_dict("records")[0] for each in streamlit(page=name).dataframe if "trend" in each.value]
    assert (sum(row["trend"]), sum(row["trend of failures"])) == (1, 2)


def test_lease_that_ran_out_has_no_time_left_in_streamlit(queue):
    now = time.time()
    queue.enqueue("t")
    job = queue.dequeue("anna", lease_seconds=10, now=now - 300)
    left = next(each for each in tables.PROCESSING.columns if each.kind == "until")
    assert dashboard_streamlit._cell(left, job) == "0.0 s"
    assert dashboard_streamlit._cell(left, job._replace(lease_expires_at=now + 29.9)) == "30 s"


@pytest.mark.filterwarnings("ignore")
def test_streamlit_page_keeps_and_dims_what_it_showed_while_the_queue_is_away(queue):
    queue.enqueue("t", queue="first")
    page = streamlit()
    queue.path.rename(away := queue.path.with_name("away.db"))
    page.run(timeout=PATIENCE_SECONDS)
    shown = "".join(each.proto.body for each in page.get("html"))
    assert ("no queue at" in shown, dashboard_streamlit.DIMMED in shown) == (True, True)
    assert "first" in _frames(page)
    away.rename(queue.path)
    page.run(timeout=PATIENCE_SECONDS)
    assert dashboard_streamlit.DIMMED not in "".join(each.proto.body for each in page.get("html"))


@pytest.mark.filterwarnings("ignore")
def test_streamlit_page_follows_a_queue_that_is_replaced(queue):
    queue.enqueue("t", queue="first")
    assert "first" in _frames(streamlit())
    queue.close()
    for path in queue.path.parent.glob("queue.db*"):
        if path.is_file():
            path.unlink()
    other = pqueue.open_queue()
    other.enqueue("t", queue="second")
    assert "second" in _frames(streamlit())
    assert "first" not in _frames(streamlit())
    with other.transaction() as db:
        db.execute("PRAGMA user_version = 99")
    other.close()
    dashboard_streamlit.cache().forget()
    page = streamlit()
    assert not page.exception
    assert "got 99" in "".join(each.proto.body for each in page.get("html"))


def _frames(page):
    assert not page.exception
    return " ".join(str(each.value.to_dict()) for each in page.dataframe)


@pytest.mark.filterwarnings("ignore")
def test_streamlit_page_pauses_a_queue(queue):
    queue.enqueue("t")
    page = streamlit()
    (button,) = [each for each in page.button if each.label == "yes, pause"]
    button.click().run(timeout=PATIENCE_SECONDS)
    assert queue.stats()["queues"]["default"]["paused"]


@pytest.mark.filterwarnings("ignore")
def test_streamlit_page_names_the_number_and_asks_before_it_changes_many_jobs(queue):
    ids = queue.enqueue_many("many", range(70))
    page = streamlit(page="jobs")
    page.selectbox(key="filter-task").select("many").run(timeout=PATIENCE_SECONDS)
    page.button(key="bulk-cancel").click().run(timeout=PATIENCE_SECONDS)
    assert not page.exception
    assert page.warning[0].value.startswith("cancel 70 jobs?")
    assert queue.stats()["states"]["pending"] == 70
    page.button(key="bulk-confirmed").click().run(timeout=PATIENCE_SECONDS)
    assert not page.exception
    assert queue.stats()["states"]["cancelled"] == len(ids)


@pytest.mark.parametrize("wait", [0.0, -1.0, 1e-9, 1e9])
def test_chart_of_times_draws_a_wait_of_zero(wait):
    minute = {
        "at": 0.0,
        "enqueued": 0,
        "completed": 0,
        "failed": 0,
        "retried": 0,
        "wait": (wait, wait),
        "run": (0.001, 0.2),
    }
    minutes = [{**minute, "at": n * 60.0} for n in range(60)]
    for shown in (minutes, [{**each, "wait": None, "run": None} for each in minutes]):
        lines = re.findall(r'<path d="([^"]*)"', dashboard_summary.charts(shown))
        heights = [float(y) for line in lines for y in re.findall(r"[ML][\d.]+ (\S+?)(?=[MLH]|$)", line)]
        assert all(0 <= y <= dashboard_summary.HEIGHT for y in heights), heights
        assert (
            len(heights) == (0 if shown is not minutes else 4 * 60) + 59
        )  # no jobs are enqueued in a part of a minute


@pytest.mark.parametrize("enqueued", [1, 6000, 1_000_000])
def test_each_failed_attempt_is_seen_in_the_chart_beside_many_enqueued_jobs(enqueued):
    minute = {"completed": 0, "retried": 0, "wait": None, "run": None}
    minutes = [{**minute, "at": n * 60.0, "enqueued": enqueued, "failed": (0, 1, 400)[n % 3]} for n in range(60)]
    bars = [float(each) for each in re.findall(r'height="([\d.]+)" fill="#', dashboard_summary.charts(minutes))]
    assert len(bars) == 40
    assert min(bars) >= 2.5  # of 100, which are 120 pixels
    assert max(bars) >= 20
    assert max(bars) <= 100


@pytest.mark.parametrize(("completed", "failed"), [(0, 0), (1, 0), (0, 1), (0, 150), (150, 1), (10_000, 9)])
def test_labels_of_the_chart_of_jobs_do_not_overlap(completed, failed):
    minute = {"enqueued": 0, "completed": completed, "failed": failed, "retried": 0, "wait": None, "run": None}
    chart = dashboard_summary.charts([{**minute, "at": n * 60.0} for n in range(60)]).split("</figure>")[0]
    places = [int(y) for y in re.findall(r'<svg y="(\d+)%">', chart)]
    assert all(below - above >= 10 for above, below in pairwise(places)), places  # of 120 pixels; a label has 11.5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("query", "found"), [({}, True), ({"page": "queues"}, False), ({"job": "1"}, False)])
def test_streamlit_page_lists_the_findings_on_the_overview_only(queue, query, found):
    queue.enqueue("t")
    shown = "".join(each.proto.body for each in streamlit(**query).get("html"))
    assert ("and no consumer is alive" in shown, '">1 problem</a>' in shown) == (found, True)


@pytest.mark.filterwarnings("ignore")
def test_streamlit_page_filters(queue):
    queue.enqueue_many("many", range(3))
    failed(queue, task="odd", priority=1)
    page = streamlit(page="jobs")
    page.multiselect(key="filter-state").select("failed").run(timeout=PATIENCE_SECONDS)
    assert not page.exception
    assert [list(each.value["task"]) for each in page.dataframe if "detail" in each.value] == [["odd"]]


@pytest.mark.filterwarnings("ignore")
def test_streamlit_page_resubmits_the_group_that_was_chosen_whatever_fails_meanwhile(queue):
    for task in ("b", "c"):
        failed(queue, task=task)
    page = streamlit()
    page.selectbox(key="row of Failures").select("c: ValueError: no").run(timeout=PATIENCE_SECONDS)
    for _ in range(3):
        failed(queue, task="a")
    page.run(timeout=PATIENCE_SECONDS)
    assert page.selectbox(key="row of Failures").value == "c: ValueError: no"
    page.button(key="yes, resubmit matching failed c ValueError: no").click().run(timeout=PATIENCE_SECONDS)
    assert [job.task for job in queue.list_jobs(state="pending")] == ["c"]


@pytest.mark.filterwarnings("ignore")
def test_streamlit_page_keeps_the_range_that_the_reader_chose(queue):
    failed(queue, task="mail")
    queue.enqueue("t", now=time.time() - 1200)
    for query in ({}, {"page": "jobs"}, {"page": "task", "task": "mail"}, {"job": "1"}):
        page = streamlit(last="72 h", **query)
        assert not page.exception
        html = "".join(each.proto.body for each in page.get("html"))
        links = {unescape(each) for each in re.findall(r'<a[^>]* href="([^"]*)"', html)}
        links |= {each.proto.url for each in page.get("link_button")}
        assert links
        assert {each for each in links if "last=72+h" not in each} == set()
    page = streamlit(page="failed", last="72 h")
    page.button(key="show failed").click().run(timeout=PATIENCE_SECONDS)
    assert "".join(page.query_params["last"]) == "72 h"
    assert "".join(page.query_params["fingerprint"]) == "ValueError: no"


def test_each_column_of_a_table_in_streamlit_has_one_type(queue):
    failed(queue, task="mail")
    queue.pause("default")
    for table in (tables.ACTIVITY, tables.FAILED):
        rows = queue.operations() if table is tables.ACTIVITY else report.failures(queue, 1, 100)
        cells = dashboard_streamlit._cells(table, rows)
        assert {name: len({type(row[name]) for row in cells}) for name in cells[0]} == dict.fromkeys(cells[0], 1)
    assert sorted(cells[0]["24 hours"]) == [0] * 23 + [1]


def test_failures_of_each_hour_are_drawn(queue, site):
    now = time.time() // 3600 * 3600
    for ago, number in ((0, 1), (2, 4)):
        for _ in range(number):
            queue.mark_failed(queue.enqueue("t", now=now - 9e4), "no", now=now - 3600 * ago)
    (drawn,) = re.findall('aria-label="5 failed">.*?<path d="(.*?)" stroke-width', site.ask("/failed")[1], re.DOTALL)
    assert drawn in ("M537.5 100V0M587.5 100V75", "M512.5 100V0M562.5 100V75")  # if an hour has just ended
