"""The dashboard's server on the standard library: pages, fragments for the live parts, JSON, metrics, actions.

It listens on loopback. On another address it wants a password, PQUEUE_OPS_PASSWORD; put a proxy with TLS before it, one
that asks for it by its address, as nginx does unless told to pass the Host on.
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import json
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import endings
import ops
import pages
import report
from pqueue import JobNotFound, QueueError

MOST_BODY_BYTES = 100_000
MOST_CONNECTIONS = 256  # beyond, the one that has been sending its request for longest is closed
IDLE_SECONDS = 10.0
REQUEST_SECONDS = 30.0  # in which a request must have come, however it trickles
MOST_SECONDS = 10.0  # that a program waits for the figures; a page does not
WRONG_SECONDS = 1.0  # that a wrong password costs
MOST_NOTES = 100
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
HTML, JSON, TEXT = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"
METRICS = "text/plain; version=0.0.4; charset=utf-8"


class Refused(Exception):
    """The request is answered with this status and sentence."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, password: str | None) -> None:
        self.board = ops.Board()
        self.password = password
        self.token = secrets.token_urlsafe()
        self._notes: dict[str, str] = {}
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._sending: dict[socket.socket, float] = {}  # connections whose request has not come whole, and since when
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.local = _is_loopback(host)
        super().__init__((host, port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self._hang_up(1)
            if not self._places.acquire(timeout=1):
                self.shutdown_request(request)
                return
        self._sending[request] = time.monotonic()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.has_come(request)
            self._places.release()

    def has_come(self, request: Any) -> None:
        self._sending.pop(request, None)

    def service_actions(self) -> None:
        late = time.monotonic() - REQUEST_SECONDS
        self._hang_up(sum(1 for since in list(self._sending.values()) if since < late))

    def _hang_up(self, number: int) -> None:
        for request in list(self._sending)[:number]:
            self.has_come(request)
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def note(self, sentence: str) -> str:
        """Keep a sentence for the next page, and return the number to ask for it by: a link can say nothing itself."""
        number = secrets.token_urlsafe(8)
        self._notes[number] = sentence
        for old in list(self._notes)[:-MOST_NOTES]:
            self._notes.pop(old, None)
        return number

    def noted(self, number: str) -> str:
        """Return that sentence, once."""
        return self._notes.pop(number, "")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def knows(self, host: str) -> bool:
        """Whether this Host header names us; a name of somebody else's would be DNS rebinding."""
        name = urlsplit(f"//{host}").hostname or ""
        if self.local:
            return _is_loopback(name)
        return _is_address(name) or name in ("localhost", socket.gethostname().lower(), socket.getfqdn().lower())


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version = "pqueue"
    sys_version = ""
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, respond: Any) -> None:
        try:
            self._check()
            respond()
        except Refused as refused:
            self._send(refused.status, TEXT, f"{refused}\n")
        except JobNotFound as error:
            self._send(HTTPStatus.NOT_FOUND, TEXT, f"{error}\n")
        except ValueError as error:  # of the queue, of urlsplit and parse_qs
            self._send(HTTPStatus.BAD_REQUEST, TEXT, f"{error}\n")

    def _check(self) -> None:
        try:
            known = self.server.knows(self.headers.get("Host", ""))
        except ValueError:
            known = False
        if not known:
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, "refused: this is not a host name of the dashboard")
        if self.server.password is not None and not self._has_password(self.server.password):
            if "Authorization" in self.headers:
                time.sleep(WRONG_SECONDS)
            raise Refused(HTTPStatus.UNAUTHORIZED, "expected the password, with any user name")

    def _has_password(self, password: str) -> bool:
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        try:
            text = base64.b64decode(given, validate=True).partition(b":")[2] if scheme.lower() == "basic" else b""
        except ValueError:
            return False
        return hmac.compare_digest(text, os.fsencode(password))

    # Reading

    def _get(self) -> None:
        self.server.has_come(self.connection)
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if url.path in pages.FILES:
            return self._send(HTTPStatus.OK, *pages.FILES[url.path])
        kind = JSON if url.path.startswith(("/api/", "/live")) else HTML
        try:
            status, content = self._content(url.path, query)
        except JobNotFound:
            raise
        except (QueueError, TypeError) as error:  # TypeError: in a damaged row
            status, content = HTTPStatus.SERVICE_UNAVAILABLE, self._trouble(url.path, str(error))
        if isinstance(content, tuple):
            kind, content = content
        return self._send(status, kind, content)

    def _content(self, path: str, query: dict[str, str]) -> tuple[HTTPStatus, Any]:
        board = self.server.board
        if path == "/":
            parts = pages.sections(board, query, self._token())
            return HTTPStatus.OK, pages.index(parts, query, self._said(query))
        if path == "/live":
            return HTTPStatus.OK, json.dumps(pages.sections(board, query, self._token()))
        if path == "/metrics":
            return HTTPStatus.OK, (
                METRICS,
                report.metrics(board.queue(), stats=board.figures(MOST_SECONDS)["overview"]),
            )
        if path == "/healthz":
            problems = board.figures(MOST_SECONDS)["overview"]["problems"]
            status = HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK
            return status, (TEXT, "\n".join(problems or ["healthy"]) + "\n")
        return HTTPStatus.OK, self._jobs(path, query)

    def _jobs(self, path: str, query: dict[str, str]) -> str:
        board = self.server.board
        parent, _, number = path.rpartition("/")
        if path == "/api/stats":
            figures = board.figures(MOST_SECONDS)
            return json.dumps({**figures["overview"], "minutes": figures["minutes"]})
        if path == "/api/jobs":
            jobs, before = board.jobs(query)
            return json.dumps({"jobs": [report.job_object(job) for job in jobs], "before_id": before})
        if number.isascii() and number.isdigit() and len(number) < 19:
            if parent == "/job":
                return pages.job(board.job(int(number)), self._said(query), self._token())
            if parent == "/api/jobs":
                found = board.job(int(number))
                return json.dumps({**found, "job": report.job_object(found["job"])})
        raise Refused(HTTPStatus.NOT_FOUND, "no such page")

    def _said(self, query: dict[str, str]) -> str:
        return self.server.noted(query.get("said", ""))

    def _trouble(self, path: str, sentence: str) -> Any:
        if path in ("/metrics", "/healthz"):
            return TEXT, sentence + "\n"
        if path.startswith("/api/"):
            return json.dumps({"error": sentence})
        return json.dumps({"health": pages.trouble(sentence)}) if path == "/live" else pages.without_queue(sentence)

    # Acting

    def _post(self) -> None:
        if not self._is_ours():
            raise Refused(HTTPStatus.FORBIDDEN, "refused: the request comes from another site")
        form = parse_qs(self._body(), keep_blank_values=True, max_num_fields=2000)
        if not hmac.compare_digest((form.pop("token", None) or [""])[0].encode(), self.server.token.encode()):
            raise Refused(HTTPStatus.FORBIDDEN, "refused: the page is from before a restart; load it again")
        name = urlsplit(self.path).path.removeprefix("/act/")
        name = (form.pop("action", None) or [name])[0] if name == "jobs" else name
        if name not in ops.ACTIONS:
            raise Refused(HTTPStatus.NOT_FOUND, "no such action")
        done, sentence = ops.act(self.server.board, name, form)
        if not done:
            raise Refused(HTTPStatus.CONFLICT, sentence)
        self._redirect((form.get("back") or ["/"])[0], sentence)

    def _is_ours(self) -> bool:
        """Whether a page of ours asks: as the browser says, which sees it through a proxy, or by its origin."""
        if site := self.headers.get("Sec-Fetch-Site"):
            return site in ("same-origin", "none")
        origin = self.headers.get("Origin")
        return origin is None or urlsplit(origin).netloc == self.headers.get("Host")

    def _body(self) -> str:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if len(length) > 9 or int(length) > MOST_BODY_BYTES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {MOST_BODY_BYTES} bytes")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            raise Refused(HTTPStatus.REQUEST_TIMEOUT, "expected the rest of the request") from None
        if len(body) < int(length):
            raise Refused(HTTPStatus.BAD_REQUEST, "expected the rest of the request")
        self.server.has_come(self.connection)
        return body.decode("utf-8", "replace")

    def _redirect(self, back: str, sentence: str) -> None:
        """Go back to a page of ours, which shows the sentence."""
        url = urlsplit(back if back.startswith(("/?", "/job/")) else "/")
        page = url.path if url.path.startswith("/job/") else "/"
        query = {name: values[0] for name, values in parse_qs(url.query).items() if name in ops.FILTERS}
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", f"{quote(page)}?{urlencode({**query, 'said': self.server.note(sentence)})}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _token(self) -> str:
        return "" if ops.read_only() else self.server.token

    def _send(self, status: HTTPStatus, kind: str, content: str) -> None:
        body = content.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS}.items():
            self.send_header(name, value)
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", 'Basic realm="pqueue"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing: a page that is open asks every two seconds."""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


def serve(host: str, port: int) -> int:
    """Serve until TERM, INT or HUP; return the exit code."""
    password = os.environ.get("PQUEUE_OPS_PASSWORD") or None
    if password is None and not _is_loopback(host):
        print(f"ops.py: expected a password in PQUEUE_OPS_PASSWORD to serve on {host}", file=sys.stderr)
        return 2
    try:
        server = Server(host, port, password)
    except (OSError, OverflowError, ValueError) as error:
        print(f"ops.py: cannot serve on {host}:{port}: {error}", file=sys.stderr)
        return 1
    address = f"[{host}]" if ":" in host else host
    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} dashboard at http://{address}:{server.server_port}", flush=True)
    with suppress(QueueError, ValueError):
        server.board.figures(0)  # so that they are there when the first reader comes
    try:
        with endings.Undoing():
            server.serve_forever()
    except SystemExit:  # as it was told
        return 0
    finally:
        server.server_close()
        server.board.close()
    return 0
