"""The examples of the documentation for Sentry, OpenTelemetry and Django, with the real packages."""

from __future__ import annotations

import re
import sqlite3
import sys
from unittest import mock

import pytest
import sentry_sdk
from conftest import PATIENCE_SECONDS, ROOT
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sentry_sdk.transport import Transport

import pqueue
import pqueue_tasks


def example(document, first_line):
    """Return the code of the block of a document that begins with this line."""
    (code,) = re.findall(
        rf"^```python[^\n]*\n({re.escape(first_line)}\n.*?)^```$", document.read_text(), re.DOTALL | re.MULTILINE
    )
    return code


@pytest.fixture
def queue(place):
    tables = (pqueue.TASKS, pqueue_tasks._HOOKS, pqueue_tasks._METADATA)
    with mock.patch.dict(tables[0], clear=True), mock.patch.dict(tables[1]), mock.patch.dict(tables[2]):
        yield place.queue()


def run_next(queue, **options):
    """Run the next job as a consumer does."""
    job = queue.dequeue("worker", **options)
    try:
        queue.complete(job, pqueue.run_task(queue, job))
    except ValueError as error:
        queue.fail(job, str(error), retry_in_seconds=0)


class Events(Transport):
    def __init__(self):
        super().__init__()
        self.found = []

    def capture_envelope(self, envelope):
        self.found.append(envelope.get_event())


def test_sentry_learns_which_job_failed_and_why(queue):
    exec(example(ROOT / "docs/tasks.md", "import sentry_sdk"), {})  # noqa: S102
    events = Events()
    sentry_sdk.init("https://key@localhost/1", transport=events, default_integrations=False)
    try:

        @pqueue.task
        def divide(by: int):
            if by == 0:
                raise ValueError("by zero")

        divide.on(queue).enqueue(1)
        failing = divide.on(queue).enqueue(0)
        run_next(queue)
        run_next(queue)
    finally:
        sentry_sdk.init()
    (event,) = events.found
    assert event["tags"] == {"task": "divide"}
    assert event["contexts"]["job"] == {"id": failing, "queue": "default", "attempt": 1}
    assert event["exception"]["values"][0]["value"] == "by zero"


def test_trace_continues_from_the_producer_and_links_later_attempts(queue):
    exec(example(ROOT / "docs/tasks.md", "from opentelemetry import context, propagate, trace"), {})  # noqa: S102
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with mock.patch.object(trace, "get_tracer", provider.get_tracer):

        @pqueue.task
        def parent(job: pqueue.Job):
            if job.attempts == 1:
                raise ValueError("again")
            child.enqueue()

        @pqueue.task
        def child(): ...

        with provider.get_tracer("test").start_as_current_span("request"):
            parent.on(queue).enqueue()
        for _ in range(3):
            run_next(queue)
    found = {span.name: span for span in spans.get_finished_spans()}
    request, *attempts = (span for span in spans.get_finished_spans() if span.name in ("request", "parent"))
    first, second = attempts
    assert first.parent.span_id == request.context.span_id
    assert first.context.trace_id == request.context.trace_id
    assert [event.name for event in first.events] == ["exception"]
    assert second.context.trace_id != request.context.trace_id
    assert [link.context.span_id for link in second.links] == [request.context.span_id]
    assert found["child"].parent.span_id == second.context.span_id


DJANGO = """
import sys
import django
from django.conf import settings
from django.db import connection, models

settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": sys.argv[1],
                           "OPTIONS": {"init_command": "PRAGMA synchronous = FULL"}}}
)
django.setup()

from pqueue import task

class Order(models.Model):
    customer = models.TextField()
    class Meta: app_label = "shop"

@task
def send_receipt(order: int): ...

with connection.schema_editor() as editor:
    editor.create_model(Order)

class Request: user = "Ada"
"""

ORDERS = """
place_order(Request)
assert [job.payload for job in queue.list_jobs()] == [{"order": 1}]
assert Order.objects.count() == 1
try:
    with transaction.atomic():
        place_order(Request)
        raise ZeroDivisionError
except ZeroDivisionError:
    pass
assert (Order.objects.count(), queue.count_jobs()) == (1, 1)
"""


def test_django_view_enqueues_in_its_transaction(place):
    view = example(ROOT / "docs/deployment.md", "from django.db import connection, transaction")
    path = place.folder / "shop.db"
    pqueue.open_queue(path).close()
    imports = "from shop.models import Order\nfrom shop.tasks import send_receipt\n"
    assert imports in view
    place.write("view.py", DJANGO + view.replace(imports, "") + ORDERS)
    child = place.start_command([sys.executable, "view.py", str(path)], PYTHONPATH=str(ROOT), PQUEUE_URL=str(path))
    assert child.wait(PATIENCE_SECONDS) == 0, child.out.read_text()
    assert sqlite3.connect(path).execute("SELECT count(*) FROM shop_order").fetchone() == (1,)
