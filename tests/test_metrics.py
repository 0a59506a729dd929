"""Metrics, alert rules and the Grafana dashboard, judged by a real Prometheus; and that all figures agree."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

import admin
import pqueue
from pqueue_outcomes import EVENTS, total
from pqueue_tools import dashboard, report
from test_pqueue import random_work, wait_until

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture
def queue(tmp_path, monkeypatch):
    monkeypatch.setenv("PQUEUE_URL", str(tmp_path / "queue.db"))
    with closing(pqueue.open_queue()) as opened:
        yield opened


def work(queue):
    """Let something of everything happen."""
    for name in ("good", "bad", 'odd "name\\'):
        queue.enqueue_many(name, range(4), max_attempts=2)
    while job := queue.dequeue("w"):
        if job.task == "bad":
            queue.fail(job, "no", retry_in_seconds=0)
        else:
            queue.complete(job)
    queue.cancel(queue.enqueue("good"))
    queue.enqueue("good", queue="other")
    queue.release(queue.dequeue("w", queues=["other"]))
    queue.schedule("nightly", "good", cron="@daily")
    queue.limit("limited", max_pending=9999, running=1, rate=(5, 1.0))
    queue.enqueue("good", queue="limited", group="customer-7")


def promtool(*arguments, **options):
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False, **options)
    return done.returncode, done.stdout + done.stderr


def test_prometheus_has_no_complaint_about_the_metrics(queue):
    assert promtool("check", "metrics", input=report.metrics(queue, [])) == (0, "")
    work(queue)
    assert promtool("check", "metrics", input=report.metrics(queue, report.findings(queue))) == (0, "")


def test_metrics_count_the_groups_that_are_at_a_limit(queue):
    queue.limit("q", running=1, rate=(9, 60), max_pending=99)
    for group in "abc":
        queue.enqueue_many("t", range(2), queue="q", group=group)
    while queue.dequeue("w", queues=["q"]):
        pass
    queue.enqueue("t")
    text = report.metrics(queue, [])
    for name, value in {
        "limit_pending_jobs": 99,
        "limit_running_jobs": 1,
        "limit_rate_jobs_per_second": 0.15,
        "groups_pending": 3,
        "groups_at_max_running": 3,
        "groups_at_rate": 0,
    }.items():
        assert re.findall(rf"^pqueue_{name}\{{.*", text, re.MULTILINE) == [f'pqueue_{name}{{queue="q"}} {value}']


def test_metrics_and_findings_count_the_jobs_that_there_are_whatever_happened_to_them(queue, monkeypatch):
    """As test_figures_agree_with_the_jobs_whatever_happens_to_them; with consumers, without, and with few."""
    kinds = Counter()
    for now in random_work(queue):
        jobs = queue.list_jobs(limit=10_000, excerpt=0)
        samples = dict(re.findall(r"^pqueue_(\w+\{.*\}) (\S+)$", report.metrics(queue, [], now), re.MULTILINE))
        pending = [job for job in jobs if job.state == "pending"]
        expired = [job for job in jobs if job.state == "processing" and job.lease_expires_at < now]
        for name in queue.stats()["queues"]:
            due = min((job.run_at for job in pending if job.queue == name), default=now)
            assert float(samples[f'oldest_pending_age_seconds{{queue="{name}"}}']) == pytest.approx(now - due)
            for state in pqueue.STATES:
                number = sum((job.queue, job.state) == (name, state) for job in jobs)
                assert samples[f'jobs{{queue="{name}",state="{state}"}}'] == str(number)
        known = queue.consumers()
        for fleet in (known, [], [{**each, "queues": ["a"], "tasks": ["t"]} for each in known]):
            with monkeypatch.context() as patch:
                patch.setattr(queue, "consumers", lambda fleet=fleet, **_: fleet)
                findings = report.findings(queue, now)
            for each in findings:
                in_a = [job for job in pending if job.queue == "a" and job.assigned_to is None]
                for kind, expected in {
                    r"^(\d+) jobs? pending and no consumer is alive": len(pending),
                    r"^queue 'b': (\d+) jobs? pending and no live": sum(job.queue == "b" for job in pending),
                    r"^task 'u': (\d+) jobs? pending and no running": sum(job.task == "u" for job in in_a),
                    r"^(\d+) leases? ran out": len(expired),
                }.items():
                    if found := re.search(kind, each.text):
                        assert int(found[1]) == expected, each.text
                        kinds[kind] += 1
    assert len(kinds) == 4, kinds


def test_task_whose_attempts_fail_is_reported_as_is_expected_of_its_queue(queue):
    def severities():
        return [each.severity for each in report.findings(queue) if "attempts failed" in each.text]

    queue.enqueue_many("t", range(24), max_attempts=2)
    jobs = queue.dequeue_many("w", 12)
    for job in jobs[:10]:
        queue.fail(job, "no")
    assert severities() == []
    queue.fail(jobs[10], "no")
    assert severities() == ["critical"]
    for job in [jobs[11], *queue.dequeue_many("w", 2)]:
        queue.complete(job)
    assert severities() == ["warning"]
    queue.expect("default", max_failed_share=0.8)
    assert severities() == []


def test_task_that_runs_rarely_and_failed_each_time_is_reported(queue):
    def found(at):
        return [(each.severity, each.text) for each in report.findings(queue, at) if "failed" in each.text]

    now = time.time()
    job_id = queue.enqueue("nightly", max_attempts=2, now=now)
    for _ in range(2):
        assert found(now) == []
        queue.fail(queue.dequeue("w", now=now), "no", retry_in_seconds=0, now=now)
    expected = [("warning", "task 'nightly' in queue 'default': 2 of 2 attempts failed in the last day")]
    assert (found(now), found(now + 80_000), found(now + 90_000)) == (expected, expected, [])
    queue.resubmit(job_id, now=now)
    assert found(now) == []
    queue.fail(queue.dequeue("w", now=now), "no", retry=False, now=now)
    assert len(found(now)) == 1
    queue.expect("default", max_failed_share=1)
    assert found(now) == []
    queue.expect("default")
    queue.enqueue("nightly", now=now)
    queue.complete(queue.dequeue("w", now=now), now=now)
    assert found(now) == []


def test_remedy_for_a_failing_task_finds_its_attempts_also_those_repeated(queue):
    def found():
        (each,) = [each for each in report.findings(queue) if "attempts failed" in each.text]
        return each.remedy.partition("admin.py ")[2], each.part

    jobs = [queue.dequeue("w") for _ in queue.enqueue_many("t", range(12), max_attempts=2)]
    for job in jobs[:11]:
        queue.fail(job, "no")
    assert found() == ("list-jobs --status scheduled --task t", "tasks")
    queue.fail(jobs[11], "no", retry=False)
    assert found() == ("failedjobs --task t", "failed")


def test_consumer_that_stopped_sending_heartbeats_is_reported(queue):
    now = time.time()
    for name, at in (("a", now), ("b", now + 5), ("never", None)):
        queue.dequeue(name)
        if at:
            queue.heartbeat(name, now=at + 10)
    sentences = [each.text for each in report.findings(queue, now + 130) if "heartbeat" in each.text]
    assert sentences == ["2 consumers sent no heartbeat for a while (b, a), the last 2 min ago"]
    assert "heartbeat" not in str(report.findings(queue, now + 60))


def test_job_that_waits_is_reported_as_is_expected_of_its_queue(queue):
    queue.enqueue("t")
    queue.dequeue("w")  # it is busy
    queue.enqueue("t", now=(now := time.time()))
    waits = "the oldest pending job has waited for"
    assert waits not in str(report.findings(queue, now + 590))
    assert waits in str(report.findings(queue, now + 610))
    queue.expect("default", max_wait_seconds=3600)
    assert waits not in str(report.findings(queue, now + 3500))


def series(name, values, **labels):
    quoted = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return {"series": f"{name}{{{quoted}}}", "values": values}


PLACE = {"queue": "q", "task": "t"}
ALERTS = {  # series of one value a minute that make the alert fire, and others with which it stays silent
    "PqueueCritical": (
        [series("pqueue_findings", "2x30", severity="critical")],
        [series("pqueue_findings", "2x30", severity="warning"), series("pqueue_findings", "0x30", severity="critical")],
    ),
    "PqueueDown": ([series("up", "0x30", job="pqueue")], [series("up", "1x30", job="pqueue")]),
    "PqueueNoConsumer": (
        [series("pqueue_consumers", "0x30", state="running"), series("pqueue_jobs", "3x30", state="pending")],
        [series("pqueue_consumers", "0x30", state="running"), series("pqueue_jobs", "3x30", state="completed")],
    ),
    "PqueueAttemptsFail": (
        [
            series("pqueue_failed_total", "0+1x30", **PLACE),
            series("pqueue_retried_total", "0+2x30", **PLACE),
            series("pqueue_completed_total", "0+9x30", **PLACE),
        ],
        [
            series("pqueue_failed_total", "50+0x30", **PLACE),
            series("pqueue_retried_total", "0+1x30", **PLACE),
            series("pqueue_completed_total", "0+9x30", **PLACE),
        ],
    ),
    "PqueueJobsWait": (
        [series("pqueue_oldest_pending_age_seconds", "700x30", queue="q"), series("pqueue_paused", "0x30", queue="q")],
        [series("pqueue_oldest_pending_age_seconds", "700x30", queue="q"), series("pqueue_paused", "1x30", queue="q")],
    ),
    "PqueueQueueFull": (
        [
            series("pqueue_jobs", "9x30", queue="q", state="pending"),
            series("pqueue_limit_pending_jobs", "9x30", queue="q"),
        ],
        [
            series("pqueue_jobs", "8x30", queue="q", state="pending"),
            series("pqueue_jobs", "9x30", queue="q", state="completed"),
            series("pqueue_jobs", "9x30", queue="other", state="pending"),
            series("pqueue_limit_pending_jobs", "9x30", queue="q"),
        ],
    ),
    "PqueueScheduleLate": (
        [series("pqueue_schedule_delay_seconds", "400x30", schedule="s")],
        [series("pqueue_schedule_delay_seconds", "20x30", schedule="s")],
    ),
    "PqueueDiskFull": (
        [series("pqueue_disk_free_bytes", "900000000x30")],
        [series("pqueue_disk_free_bytes", "9000000000x30")],
    ),
}


def test_alert_fires_when_it_should_and_is_silent_otherwise(tmp_path):
    """What fires is found by asking for ALERTS, which Prometheus keeps for each."""
    tests = [
        {
            "interval": "1m",
            "input_series": given,
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}})',
                    "eval_time": "25m",
                    "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                }
            ],
        }
        for name, cases in ALERTS.items()
        for given, fires in zip(cases, (True, False), strict=True)
    ]
    rules = tmp_path / "tests.yml"  # JSON is YAML
    rules.write_text(
        json.dumps({"rule_files": [str(DOCS / "alerts.yml")], "evaluation_interval": "1m", "tests": tests})
    )
    assert set(re.findall(r"alert: (\w+)", (DOCS / "alerts.yml").read_text())) == ALERTS.keys()
    code, said = promtool("test", "rules", rules)
    assert code == 0, said


@contextmanager
def prometheus(queue, folder):
    """Run Prometheus, which reads the queue's metrics every second; yield its address."""

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(report.metrics(queue, []).encode())

        def log_message(self, *_):
            """Be quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = {"static_configs": [{"targets": [f"127.0.0.1:{server.server_port}"]}], "job_name": "pqueue"}
        scrape = {"global": {"scrape_interval": "1s"}, "scrape_configs": [config]}
        (folder / "prometheus.yml").write_text(json.dumps(scrape))
        with (folder / "log").open("w") as log:
            options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
            program = subprocess.Popen(
                ["prometheus", *options, "--web.listen-address=127.0.0.1:0"], stderr=log, stdout=log
            )
            try:
                pattern = re.compile(r'Listening on"? address=(\S+)|msg="?Listening on"?.*address=(\S+)')
                found = wait_until(lambda: pattern.search((folder / "log").read_text()))
                address = f"http://{found[1] or found[2]}"
                wait_until(lambda: is_ready(address))
                yield address
            finally:
                program.terminate()
                program.wait()
                server.shutdown()


def is_ready(address):
    """Return whether Prometheus, which listens before that, answers queries."""
    with suppress(OSError), urlopen(f"{address}/-/ready") as answer:
        return answer.status == 200
    return False


def test_grafana_shows_each_expression_over_a_scraped_run(queue, tmp_path):
    panels = json.loads((DOCS / "grafana.json").read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    queries = [
        each.replace("$__rate_interval", "1m").replace("$queue", ".*").replace("$task", ".*") for each in queries
    ]
    with prometheus(queue, tmp_path) as address:

        def is_shown(query):
            work(queue)
            with urlopen(f"{address}/api/v1/query?{urlencode({'query': query})}") as answer:
                found = json.loads(answer.read())
            assert found["status"] == "success"
            return any(sample["value"][1] != "NaN" for sample in found["data"]["result"])

        for query in queries:
            wait_until(lambda query=query: is_shown(query) or time.sleep(0.3))


def test_figures_agree_after_resubmits_prunes_and_restarts(queue, capsys, monkeypatch):
    compute_days = dashboard._Days()  # reads only the last periods in the second turn
    monkeypatch.setattr(admin, "wants_rows", lambda _: False)  # as on a terminal
    for turn in (1, 2):
        work(queue)
        queue.resubmit_where(state="failed")
        queue.resubmit_where(state="completed", task="good")
        while job := queue.dequeue("w", queues=["default"]):
            queue.complete(job)
        queue.prune(0, now=time.time() + 1)
        with closing(pqueue.open_queue()) as restarted:
            whole = Counter({name: getattr(total(restarted.outcomes()), name) for name in EVENTS})
            for name, number in {"enqueued": 15, "failed": 4, "retried": 4, "cancelled": 1}.items():
                assert whole[name] == number * turn
            samples = re.findall(r"^pqueue_(\w+)_total\{.*\} (\d+)$", report.metrics(restarted, []), re.MULTILINE)
        metrics: Counter[str] = Counter()
        for name, number in samples:
            metrics[name] += int(number)
        assert dict(metrics) == dict(whole)
        days = compute_days(queue)
        for periods in (dashboard._hour(queue)["minutes"], *(days[name] for name in dashboard.DAYS)):
            assert {name: sum(each[name] for each in periods) for name in report.COUNTED} == {
                name: whole[name] for name in report.COUNTED
            }
        for name in EVENTS:
            assert sum(getattr(each["row"], name) for each in days["tasks"]) == whole[name]
        trends = [numbers for each in days["tasks"] for numbers in each["trend"]]
        assert [sum(each) for each in zip(*trends, strict=True)] == [
            whole["completed"],
            whole["failed"] + whole["retried"],
        ]
        recent = report.recent(queue, time.time())
        admin.main(["stats"])
        line = capsys.readouterr().out.splitlines()[-1]
        shown = {name: int(number) for number, name in re.findall(r"(\d+) (\w+)", line.partition(": ")[2])}
        assert shown == {name: getattr(recent, name) for name in EVENTS if getattr(recent, name)}
        admin.main(["stats", "--by", "task", "-o", "json"])
        rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
        for name in ("enqueued", "completed", "failed", "retried"):
            assert sum(row[name] for row in rows) == whole[name]
        queue.heartbeat("w", now=time.time() + 300)  # adds the minute to the total


@pytest.mark.parametrize("after", [0, 20, 59, 1800, 4319])  # seconds after the beginning of all periods
def test_command_line_counts_in_the_ranges_of_the_dashboard(queue, capsys, monkeypatch, after):
    now = 4320 * 410_000 + after + 0.5
    monkeypatch.setattr(report, "now_shown", lambda: now)
    steps = {"1h": 60, "24h": 1440, "72h": 4320}
    for step in steps.values():
        for ago in range(58 * step, 62 * step, step // 12):
            queue.enqueue("t", now=now - ago)
    found = {
        "1h": dashboard._hour(queue)["minutes"],
        **{k.replace(" ", ""): v for k, v in dashboard._Days()(queue).items()},
    }
    for since in steps:
        assert admin.main(["stats", "--since", since, "-o", "json"]) == 0
        (row,) = map(json.loads, capsys.readouterr().out.splitlines())
        assert row["enqueued"] == sum(each["enqueued"] for each in found[since]), since
    assert report.range_start(60, now) == now // 60 * 60 - 60
    assert report.range_start(5400, now) == now // 60 * 60 - 89 * 60
