"""The dashboard's HTTP server, on the standard library: pages, JSON, metrics and actions.

By default it listens on loopback. Any other address requires a password, PQUEUE_OPS_PASSWORD, and should be behind a
proxy with TLS. The proxy's Host header must be the server's address, nginx's default, or a name in PQUEUE_OPS_HOSTS.
"""

from __future__ import annotations

import base64
import errno
import gzip
import hashlib
import hmac
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from pqueue import JobNotFound, QueueError
from pqueue_tools import dashboard, dashboard_actions, dashboard_html, report, tables, termination
from pqueue_tools.masking import is_cut
from pqueue_tools.process import print_error, utc_now

MAX_BODY_BYTES = 100_000
MAX_CONNECTIONS = 256  # beyond this, the connection whose request has been incomplete longest is closed
IDLE_SECONDS = 10.0
REQUEST_SECONDS = 30.0  # maximum time to receive a request
FIGURES_WAIT_SECONDS = 10.0  # for requests of programs; a page waits for PAGE_WAIT_SECONDS
WRONG_PASSWORD_SECONDS = 1.0  # delay after a wrong password
MAX_MESSAGES = 100
RENDER_WAIT_SECONDS = 10.0  # how long a response waits for earlier ones to be rendered
LARGE_ANSWER_BYTES = 100_000
MAX_LARGE_ANSWERS = 8  # at a time: each stays in memory until its client has read it
RETRY_SECONDS = 2
GZIP_BYTES = 1000  # shorter answers are not compressed
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
PROBES = ("/livez", "/readyz")
HTML, JSON, TEXT = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"
STATIC = {**dashboard_html.FILES, "/livez": (TEXT, "alive\n")}
METRICS = "text/plain; version=0.0.4; charset=utf-8"
TIMES = re.compile(rb"(?<=>)[^<]*(?=</time>)")


Answer = tuple[HTTPStatus, str, bytes]  # status, type and body


class Refused(Exception):
    """The request is answered with this status and message."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, password: str | None) -> None:
        self.cache = dashboard.FigureCache()
        self.password = password
        self.token = secrets.token_urlsafe()
        self.messages: dict[str, str] = {}
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        # Render one response at a time, because it may hold several copies of a large payload; and in one thread,
        # because each thread would keep its own database connection and cache.
        self._renderer = ThreadPoolExecutor(1, "pqueue-renderer")
        self._large = threading.BoundedSemaphore(MAX_LARGE_ANSWERS)
        self._sending: dict[socket.socket, float] = {}  # connections with an incomplete request, and since when
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.local = dashboard.is_loopback(host)
        super().__init__((host, port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._connections.acquire(blocking=False):
            self._close_oldest(1)
            if not self._connections.acquire(timeout=1):
                self.shutdown_request(request)
                return
        self._sending[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system has no more threads
            self._end(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._end(request)

    def _end(self, request: Any) -> None:
        self.request_complete(request)
        self._connections.release()

    def request_complete(self, request: Any) -> None:
        self._sending.pop(request, None)

    def service_actions(self) -> None:
        late = time.monotonic() - REQUEST_SECONDS
        self._close_oldest(sum(1 for since in list(self._sending.values()) if since < late))

    def _close_oldest(self, number: int) -> None:
        for request in list(self._sending)[:number]:
            self.request_complete(request)
            with suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)

    def keep_message(self, sentence: str) -> str:
        """Store a message for the next page and return its key: the URL must not contain the text."""
        number = secrets.token_urlsafe(8)
        self.messages[number] = sentence
        for old in list(self.messages)[:-MAX_MESSAGES]:
            self.messages.pop(old, None)
        return number

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do not report clients that disconnected."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def is_own_host(self, host: str) -> bool:
        """Return whether this Host header names this server, to prevent DNS rebinding."""
        name = dashboard.host_name(host)
        return dashboard.is_ours(host) or (not self.local and bool(dashboard.address_of(name) or name in _own_names()))

    @contextmanager
    def rendered(self, draw: Callable[..., Answer], *arguments: Any) -> Iterator[Answer]:
        """Render a response and yield it until it is sent, limiting the memory of all responses. Raises Refused."""
        try:
            rendering = self._renderer.submit(draw, *arguments)
        except RuntimeError:  # after `server_close`
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the dashboard is being stopped") from None
        wait([rendering], RENDER_WAIT_SECONDS)
        if rendering.cancel():  # it has not begun
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "the dashboard is busy: try again")
        answer = rendering.result()
        large = len(answer[2]) > LARGE_ANSWER_BYTES
        if large and not self._large.acquire(blocking=False):
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many large responses are being sent: try again")
        try:
            yield answer
        finally:
            if large:
                self._large.release()

    def server_close(self) -> None:
        super().server_close()
        self._renderer.shutdown()


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version = "pqueue"
    sys_version = ""
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET  # noqa: N815 - a name of http.server

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, respond: Any) -> None:
        self._back = "?" + self.path.partition("?")[2]  # nowhere to go back to, but with a query
        try:
            self._check()
            respond()
        except Refused as refused:
            self._refuse(*refused.args)
        except JobNotFound as error:
            self._refuse(HTTPStatus.NOT_FOUND, str(error))
        except ValueError as error:  # from the queue, urlsplit or parse_qs
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))

    def _refuse(self, status: HTTPStatus, sentence: str) -> None:
        """Answer a browser with a page, and a program with a line."""
        if "text/html" in self.headers.get("Accept", ""):
            self._send(status, HTML, dashboard_html.refusal(status.phrase.lower(), sentence, self._back))
        else:
            self._send(status, TEXT, f"{sentence}\n")

    def _check(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not self.server.is_own_host(hosts[0]):
            raise Refused(HTTPStatus.MISDIRECTED_REQUEST, dashboard.OTHER_HOST)
        # A probe of liveness or readiness needs no password, and shows no details
        is_probe = dashboard.without_prefix(urlsplit(self.path).path) in PROBES
        if is_probe or self.server.password is None:
            return
        if not hmac.compare_digest(self._login()[1], os.fsencode(self.server.password)):
            if "Authorization" in self.headers:
                time.sleep(WRONG_PASSWORD_SECONDS)
            raise Refused(
                HTTPStatus.UNAUTHORIZED,
                "expected the password; the user name may be any, and is recorded with your actions",
            )

    def _login(self) -> tuple[bytes, bytes]:
        """Return the user name and the password that were given, or empty ones."""
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        try:
            name, _, password = base64.b64decode(given, validate=True).partition(b":")
        except ValueError:
            name = password = b""
        return (name, password) if scheme.lower() == "basic" else (b"", b"")

    # Reading

    def _get(self) -> None:
        self.server.request_complete(self.connection)
        url = urlsplit(self.path)
        url = url._replace(path=dashboard.without_prefix(url.path))
        query = parse_qs(url.query)
        if url.path.startswith("/api/"):
            names = (*dashboard.FILTERS, "before_id") if url.path == "/api/jobs" else ()
            dashboard.expect_query(parse_qs(url.query, keep_blank_values=True), names)
        if url.path in STATIC:
            self._send(HTTPStatus.OK, *STATIC[url.path])
            return
        self._expect_no_other_site(url.path)
        try:
            figures = self._figures(url.path, query)  # may wait, so not under the lock of rendering
            with self.server.rendered(self._render, url.path, query, figures) as answer:
                self._send(*answer, age=figures.get("age", 0.0))
        except JobNotFound:
            raise
        except QueueError as error:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, *self._trouble(url.path, query, error))

    def _expect_no_other_site(self, path: str) -> None:
        """Allow links from other sites to a page, but no other cross-site requests."""
        fetch = self.headers.get("Sec-Fetch-Mode"), self.headers.get("Sec-Fetch-Dest")
        if not self._is_ours() and (_is_data(path) or fetch != ("navigate", "document")):
            raise Refused(HTTPStatus.FORBIDDEN, dashboard.OTHER_SITE)

    def _figures(self, path: str, query: dashboard.Query) -> dict[str, Any]:
        if _page(path) or path.startswith("/job/"):
            return self.server.cache.figures(days=tables.needs_days(_page(path), query))
        return self.server.cache.figures(FIGURES_WAIT_SECONDS) if path in ("/metrics", "/healthz", "/api/stats") else {}

    def _render(self, path: str, query: dashboard.Query, figures: dict[str, Any]) -> Answer:
        cache = self.server.cache
        if page := _page(path):
            jobs = cache.jobs(tables.query_of(page, query)) if "search" in page.parts else None
            figures = cache.of_task(figures, query) if page.name == "task" else figures
            shown = dashboard_html.page(page, figures, jobs, query, self._message(query), self._token())
            return HTTPStatus.OK, HTML, _encoded(shown)
        if path == "/metrics":
            seen = figures["overview"]
            return HTTPStatus.OK, METRICS, _encoded(report.metrics(cache.queue(), seen["findings"], stats=seen))
        if path in ("/readyz", "/healthz"):
            cache.queue().list_jobs(limit=1, excerpt=0)
            return self._health(figures["overview"]["findings"]) if figures else (HTTPStatus.OK, TEXT, b"ready\n")
        if path == "/api/stats":
            listed = [each._asdict() for each in figures["overview"]["findings"]]
            stats = {**figures["overview"], "findings": listed, "minutes": figures["minutes"]}
            return HTTPStatus.OK, JSON, _json(stats)
        return HTTPStatus.OK, JSON if _is_data(path) else HTML, self._jobs(path, query, figures)

    @staticmethod
    def _health(found: list[report.Finding]) -> Answer:
        status = HTTPStatus.SERVICE_UNAVAILABLE if report.problems(found) else HTTPStatus.OK
        return status, TEXT, _encoded("\n".join(report.verdict(found)) + "\n")

    def _jobs(self, path: str, query: dashboard.Query, figures: dict[str, Any]) -> bytes:
        cache = self.server.cache
        parent, _, number = path.rpartition("/")
        if path == "/api/jobs":
            jobs, before = cache.jobs(query)
            listed = [{**report.job_object(job), "truncated": is_cut(job)} for job in jobs]
            return _json({"jobs": listed, "before_id": before})
        if number.isascii() and number.isdigit() and len(number) < 19:
            if parent == "/job":
                seen, found = figures["overview"], cache.job(int(number))
                return _encoded(dashboard_html.job(found, query, self._message(query), self._token(), seen))
            if parent == "/api/jobs":
                found = cache.job(int(number))
                return _json({**found, "job": {**found["job"]._asdict(), "lease_token": None}})
        raise Refused(HTTPStatus.NOT_FOUND, "no such page")

    def _message(self, query: dashboard.Query) -> str:
        """Return and delete the message that a page with this query shows."""
        return self.server.messages.pop(dashboard.one(query, "said"), "")

    def _trouble(self, path: str, query: dashboard.Query, error: QueueError) -> tuple[str, bytes]:
        if path in PROBES:
            return TEXT, b"not ready\n"
        if path in ("/metrics", "/healthz"):
            return TEXT, _encoded(f"{error}\n")
        if path.startswith("/api/"):
            return JSON, _json({"error": str(error)})
        return HTML, _encoded(dashboard_html.without_queue(error, query))

    # Acting

    def _post(self) -> None:
        if not self._is_ours():
            raise Refused(HTTPStatus.FORBIDDEN, dashboard.OTHER_SITE)
        form = parse_qs(self._body(), keep_blank_values=True, max_num_fields=2000)
        if not hmac.compare_digest((form.pop("token", None) or [""])[0].encode(), self.server.token.encode()):
            raise Refused(HTTPStatus.FORBIDDEN, "refused: the dashboard was restarted; reload the page")
        self._back = dashboard.one(form, "back")
        name = dashboard.without_prefix(urlsplit(self.path).path).removeprefix("/act/")
        is_bulk = name == "jobs"
        name = (form.pop("action", None) or [name])[0] if is_bulk else name
        if name not in dashboard_actions.ACTIONS:
            raise Refused(HTTPStatus.NOT_FOUND, "no such action")
        if is_bulk and "confirmed" not in form:
            self._ask(name, form)
            return
        by = dashboard.operator(self.headers, self._login()[0].decode("utf-8", "replace"))
        done, sentence = dashboard_actions.act(self.server.cache, name, form, by)
        if not done:
            raise Refused(HTTPStatus.CONFLICT, sentence)
        self._redirect((form.get("back") or ["/"])[0], sentence)

    def _ask(self, name: str, form: dashboard.Form) -> None:
        """Ask for confirmation of an action on many jobs."""
        try:
            question = dashboard_actions.question(self.server.cache, name, form)
        except (QueueError, ValueError) as error:
            raise Refused(HTTPStatus.CONFLICT, str(error)) from None
        self._send(HTTPStatus.OK, HTML, dashboard_html.question(question, name, form, self._token()))

    def _is_ours(self) -> bool:
        """Return whether the request is same-origin, by Sec-Fetch-Site (also behind a proxy) or by Origin."""
        if site := self.headers.get("Sec-Fetch-Site"):
            return site in ("same-origin", "none")
        origins = self.headers.get_all("Origin", [])
        return all(dashboard.is_same_origin(each, self.headers["Host"]) for each in origins)

    def _body(self) -> str:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if len(length) > 9 or int(length) > MAX_BODY_BYTES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {MAX_BODY_BYTES} bytes")
        try:
            body = self.rfile.read(int(length))
        except TimeoutError:
            raise Refused(HTTPStatus.REQUEST_TIMEOUT, "expected the rest of the request") from None
        if len(body) < int(length):
            raise Refused(HTTPStatus.BAD_REQUEST, "expected the rest of the request")
        self.server.request_complete(self.connection)
        return body.decode("utf-8", "replace")

    def _redirect(self, back: str, sentence: str) -> None:
        """Redirect to a page of the dashboard that shows the message."""
        url = urlsplit(back if dashboard_html.is_back(back) else "/")
        query = {**dashboard.kept(parse_qs(url.query)), "said": self.server.keep_message(sentence)}
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", f"{dashboard.prefix()}{quote(url.path)}?{urlencode(query, doseq=True)}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _token(self) -> str:
        return "" if dashboard.read_only() else self.server.token

    def _send(self, status: HTTPStatus, kind: str, content: str | bytes, age: float = 0.0) -> None:
        """Send an answer; `age` is that of the figures in it, in seconds. A page that the reader has is not sent."""
        body = _encoded(content) if isinstance(content, str) else content
        headers = {"Content-Type": kind, **HEADERS, "X-Age": f"{age:.1f}", "X-Now": f"{report.now_shown():.3f}"}
        if kind == HTML and status == HTTPStatus.OK:
            # Ages are left out: the page's script computes them.
            headers["ETag"] = f'W/"{hashlib.sha256(TIMES.sub(b"", body)).hexdigest()[:32]}"'
            if self.headers.get("If-None-Match") == headers["ETag"]:
                status, body = HTTPStatus.NOT_MODIFIED, b""
        # The size of a compressed page could tell another site, which chooses what it searches for, something about it.
        if len(body) >= GZIP_BYTES and "gzip" in self.headers.get("Accept-Encoding", "") and self._is_ours():
            headers["Content-Encoding"] = "gzip"
            body = gzip.compress(body, 5)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", 'Basic realm="pqueue"')
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", str(RETRY_SECONDS))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing: each open page sends a request every two seconds."""


def _is_data(path: str) -> bool:
    return path.startswith(("/api/", "/metrics", "/healthz", "/readyz"))


def _page(path: str) -> tables.Page | None:
    return tables.PAGES.get(path[1:]) if path.startswith("/") else None


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _json(value: Any) -> bytes:
    return _encoded(json.dumps(value, ensure_ascii=False))


@lru_cache
def _own_names() -> set[str]:
    return {socket.gethostname().lower(), socket.getfqdn().lower()}


def address(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{dashboard.prefix()}"


def listen_error(error: Exception, host: str, port: int) -> str:
    if getattr(error, "errno", None) == errno.EADDRINUSE:
        return f"port {port} is in use: set PQUEUE_OPS_PORT to another port"
    return f"cannot serve on {host}:{port}: {error}"


def serve(host: str, port: int, password: str | None) -> int:
    """Serve until TERM, INT or HUP; return the exit code."""
    try:
        server = Server(host, port, password)
    except (OSError, TypeError, ValueError) as error:
        print_error("ops", listen_error(error, host, port))
        return 1
    print(f"{utc_now()} dashboard at {address(host, server.server_port)}", flush=True)
    with suppress(QueueError, ValueError):
        server.cache.figures(0)  # start computing before the first request
    try:
        with suppress(SystemExit), termination.ExitOnSignal():
            server.serve_forever()
    finally:
        server.server_close()
        server.cache.close()
    return 0
