"""Fill a queue with what a busy system leaves behind, for screenshots and for the browser's tests."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pqueue

TASKS = {"prepend_timestamp": 0.05, "send_mail": 0.2, "resize_image": 1.5, "build_report": 6.0}
QUEUES = {"prepend_timestamp": "default", "send_mail": "mail", "resize_image": "images", "build_report": "reports"}
ERRORS = ["ConnectionRefusedError: [Errno 111] Connection refused", "TimeoutError: timed out after 30 s"]
TRACE = '\n  File "tasks.py", line 41, in send_mail\n    server.connect(job.payload["host"])\n'


def populate(queue: pqueue.PersistentQInterface, jobs: int = 3000, seed: int = 1) -> None:
    """Enqueue and settle jobs over the last hour, with a spell in which no mail goes out, and some left to do."""
    chance = random.Random(seed)
    now = time.time()
    consumers = [f"consumer_{number:02d}" for number in range(3)] + ["images_00", "images_01"]
    queue.enqueue_many(
        "build_report",
        [{"month": f"2026-{month:02d}"} for month in range(1, 13)],
        queue="reports",
        delay_seconds=5400,
        now=now - 3600,
    )
    moments = sorted(now - 3500 * chance.random() ** chance.choice((1, 1, 1.6)) for _ in range(jobs))
    with queue.transaction():
        for number, at in enumerate(moments):
            task = chance.choices(list(TASKS), weights=[6, 3, 2, 1])[0]
            queue.enqueue(task, payload(task, number), queue=QUEUES[task], now=at)
    for number, at in enumerate(moments[: jobs - 23]):
        consumer = chance.choice(consumers)
        begun = at + chance.random() * 0.3
        job = queue.dequeue(consumer, now=begun, lease_seconds=7200)
        ended = min(now, begun + chance.expovariate(1.0) * TASKS[job.task])
        outage = now - 1500 < at < now - 1200
        if job.task == "send_mail" and chance.random() < (0.5 if outage else 0.01):
            queue.fail(job, ERRORS[chance.random() < 0.2] + TRACE, retry=False, now=ended)
        elif job.task == "resize_image" and chance.random() < 0.01:
            queue.fail(job, "ValueError: not an image: photos/cover.heic", retry=False, now=ended)
        elif number % 500 == 499:
            queue.cancel(job.id, by="ada", now=ended)
        else:
            queue.complete(job, {"ok": True}, now=ended)
    for consumer, progress in zip(consumers, (0.2, None, 0.75, 0.4, None), strict=True):
        job = queue.dequeue(consumer, now=now - chance.random() * 20)
        if progress is not None:
            queue.update(job, progress=progress)
        queue.heartbeat(consumer, completed=jobs // 5, failed=jobs // 200)


def payload(task: str, number: int) -> dict[str, object]:
    return {
        "prepend_timestamp": {"file": f"job_{number:06d}.txt"},
        "send_mail": {"to": f"customer{number}@example.org", "template": "invoice", "password": "hidden"},
        "resize_image": {"path": f"photos/{number}.jpg", "width": 1200},
        "build_report": {"month": "2026-11", "format": "pdf"},
    }[task]


if __name__ == "__main__":
    populate(pqueue.open_queue(sys.argv[1]))
