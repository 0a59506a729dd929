"""A TCP proxy that delays what it passes on, as a network between client and server does.

python -m bench.delaying_proxy HOST PORT SECONDS      # prints its port, and runs until its standard input ends
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any


class DelayingProxy:
    """Passes on each piece `seconds` after it arrived, in both directions, between its `port` and a PostgreSQL server.

    host: its name, or the folder of its socket.
    """

    def __init__(self, host: str, port: int, seconds: float) -> None:
        self._host, self._server_port, self._seconds = host, port, seconds
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._sockets: list[socket.socket] = [self._listening]
        self._threads = [self._start(self._accept)]

    def _start(self, target: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        thread.start()
        return thread

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client = self._listening.accept()[0]
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                server = self._connect()
                self._sockets += [client, server]
                for source, sink in ((client, server), (server, client)):
                    pieces: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
                    self._threads += [self._start(self._read, source, pieces), self._start(self._write, sink, pieces)]

    def _connect(self) -> socket.socket:
        if not self._host.startswith("/"):
            server = socket.create_connection((self._host, self._server_port))
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return server
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{self._host}/.s.PGSQL.{self._server_port}")
        return server

    def _read(self, source: socket.socket, pieces: SimpleQueue[tuple[float, bytes]]) -> None:
        data = b"-"
        while data:
            data = b""
            with suppress(OSError):
                data = source.recv(65536)
            pieces.put((time.monotonic() + self._seconds, data))

    def _write(self, sink: socket.socket, pieces: SimpleQueue[tuple[float, bytes]]) -> None:
        with suppress(OSError):
            while True:
                due, data = pieces.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)

    def close(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(5)


if __name__ == "__main__":
    proxy = DelayingProxy(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    print(proxy.port, flush=True)
    sys.stdin.read()
    proxy.close()
