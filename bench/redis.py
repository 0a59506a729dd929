"""Queues on Redis, for --redis: no-op jobs, and one worker process of each queue with its defaults.

Redis is started here on loopback, with its append-only file synced once a second: jobs are not synced individually.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

URL = "BENCH_REDIS"  # names the server to the workers, which import this module
ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 60.0


class Celery:
    module, key, jobs = "celery", "celery", 4000
    worker = ("-m", "celery", "-A", "bench.redis:celery_app", "worker", "--concurrency=1", "--loglevel=ERROR")

    def __init__(self) -> None:
        import celery  # noqa: PLC0415

        self.app = celery.Celery("bench", broker=os.environ[URL])
        self.app.conf.task_ignore_result = True
        self.put: Callable[[], Any] = self.app.task(noop, name="noop").delay


class RQ:
    module, key, jobs = "rq", "rq:queue:default", 200
    worker = ("-m", "rq.cli", "worker", "--quiet", "--url")

    def __init__(self) -> None:
        import redis  # noqa: PLC0415
        import rq  # noqa: PLC0415

        queue = rq.Queue(connection=redis.Redis.from_url(os.environ[URL]))
        self.put: Callable[[], Any] = lambda: queue.enqueue("bench.redis.noop")


class Dramatiq:
    module, key, jobs = "dramatiq", "dramatiq:default", 8000
    worker = ("-m", "dramatiq", "bench.redis:dramatiq_broker", "--processes=1")

    def __init__(self) -> None:
        import dramatiq  # noqa: PLC0415
        from dramatiq.brokers.redis import RedisBroker  # noqa: PLC0415

        self.broker = RedisBroker(url=os.environ[URL])
        dramatiq.set_broker(self.broker)
        self.put: Callable[[], Any] = dramatiq.actor(noop, actor_name="noop").send


CONTESTANTS: dict[str, Any] = {"Celery": Celery, "RQ": RQ, "Dramatiq": Dramatiq}


def noop() -> None:
    """Do nothing."""


def __getattr__(name: str) -> Any:
    """Create what a worker's command names, only in the worker, which needs its package."""
    if name == "celery_app":
        return Celery().app
    if name == "dramatiq_broker":
        return Dramatiq().broker
    raise AttributeError(name)


def run(rounds: int, tell: Callable[[str], None]) -> dict[str, dict[str, list[float]]]:
    """Return {contestant: {"put jobs/s", "process jobs/s": a figure per round}} for the installed ones."""
    if not shutil.which("redis-server") or not importlib.util.find_spec("redis"):
        sys.exit("bench: --redis needs redis-server (apt install redis-server) and pip install redis")
    results: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds):
        for name, contestant in CONTESTANTS.items():
            if not importlib.util.find_spec(contestant.module):
                tell(f"{name} is left out: pip install {contestant.module}\n")
                continue
            tell(f"round {number + 1} of {rounds}: {name}")
            for figure, value in measure(contestant).items():
                results.setdefault(name, {}).setdefault(figure, []).append(value)
    return results


def measure(kind: Any) -> dict[str, float]:
    with server():
        contestant = kind()
        began = time.perf_counter()
        for _ in range(kind.jobs):
            contestant.put()
        put = kind.jobs / (time.perf_counter() - began)
        return {"put jobs/s": put, "process jobs/s": drained(kind)}


def drained(kind: Any) -> float:
    """Start a worker; return jobs per second from when the list begins to shrink until it is empty."""
    import redis  # noqa: PLC0415

    waiting = redis.Redis.from_url(os.environ[URL]).llen
    command = [sys.executable, *kind.worker, *([os.environ[URL]] if kind is RQ else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    worker = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + START_SECONDS
        while (first := waiting(kind.key)) == kind.jobs:
            if worker.poll() is not None or time.monotonic() > until:
                sys.exit(f"bench: the worker of {kind.module} did not start")
            time.sleep(0.005)
        began = time.perf_counter()
        while waiting(kind.key):
            time.sleep(0.005)
        return float(first / (time.perf_counter() - began))
    finally:
        worker.terminate()
        worker.wait()


@contextlib.contextmanager
def server() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--appendonly", "yes", "--save", ""]
        redis = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        os.environ[URL] = f"redis://127.0.0.1:{port}"
        try:
            answer(port)
            yield
        finally:
            redis.terminate()
            redis.wait()


def answer(port: int) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if time.monotonic() > until:
            sys.exit("bench: redis-server did not start")
        time.sleep(0.01)
