"""The webhook that posts failures, against a server of this process."""

from __future__ import annotations

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from unittest import mock

import pytest

import pqueue
from pqueue import DoNotRetry
from pqueue_tools import testing, webhook


@pytest.fixture
def receiver(monkeypatch):
    """A server that answers with `status`, and notes what it receives."""
    received = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append((self.headers, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(server.status)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_):
            """Print nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.status, server.received = 204, received
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("PQUEUE_WEBHOOK_URL", f"http://127.0.0.1:{server.server_port}/hook")
    monkeypatch.setenv("PQUEUE_WEBHOOK_SECRET", "s3cret")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_failure_is_posted_once_signed_and_with_secrets_masked(receiver):
    with mock.patch.dict(pqueue.TASKS, {"webhook": webhook.webhook}, clear=True), testing.temporary_queue() as queue:
        queue.on_failed("orders", webhook.webhook)
        job_id = queue.enqueue("charge", queue="orders")
        queue.fail(queue.dequeue("w"), "cannot reach postgresql://me:hidden@host/db", retry=False)
        (job,) = testing.drain(queue)
    assert (job.state, job.result) == ("completed", 204)
    ((headers, body),) = receiver.received
    found = json.loads(body)
    assert (found["id"], found["task"], found["queue"], found["attempts"]) == (job_id, "charge", "orders", 1)
    assert "hidden" not in found["error"]
    assert headers["Content-Type"] == "application/json"
    assert headers["Pqueue-Signature"] == f"sha256={webhook.sign('s3cret', headers['Pqueue-Timestamp'], body)}"


@pytest.mark.parametrize(("status", "is_final"), [(500, False), (429, False), (404, True), (302, True)])
def test_webhook_is_tried_again_while_the_receiver_may_recover(receiver, status, is_final):
    receiver.status = status
    with pytest.raises(DoNotRetry if is_final else OSError, match=str(status)):
        webhook.webhook({"id": 1})
    assert len(receiver.received) == 1


@pytest.mark.parametrize("answer", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"x" * 70_000, b""])
def test_webhook_is_tried_again_after_an_answer_that_was_garbled(monkeypatch, answer):
    with socket.create_server(("127.0.0.1", 0)) as server, testing.temporary_queue() as queue:
        monkeypatch.setenv("PQUEUE_WEBHOOK_URL", f"http://127.0.0.1:{server.getsockname()[1]}/")

        def reply():
            with server.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        with mock.patch.dict(pqueue.TASKS, {"webhook": webhook.webhook}, clear=True):
            queue.enqueue("webhook", {"failed": {"id": 1}})
            (job,) = testing.drain(queue)
        thread.join()
    assert (job.state, job.attempts) == ("scheduled", 1), job.error


@pytest.mark.parametrize("url", ["", "file:///etc/passwd", "ftp://host/"])
def test_webhook_without_a_url_fails_at_once(monkeypatch, url):
    monkeypatch.setenv("PQUEUE_WEBHOOK_URL", url)
    with pytest.raises(DoNotRetry, match="expected PQUEUE_WEBHOOK_URL"):
        webhook.webhook({})


def test_webhook_gives_up_on_a_receiver_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(webhook, "TIMEOUT_SECONDS", 0.2)
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # which accepts, and reads nothing
        monkeypatch.setenv("PQUEUE_WEBHOOK_URL", f"http://127.0.0.1:{server.server_port}/")
        with pytest.raises(OSError, match="timed out"):
            webhook.webhook({"id": 1})
