"""Attackers of the Streamlit page over its raw websocket: what `streamlit run ops.py` shows, and to whom."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import urllib.request
from contextlib import suppress

import pytest
from conftest import PATIENCE_SECONDS, ROOT, free_port, wait_until
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

WORD = "payload-7c1f"
PYTHON = os.environ.get("PQUEUE_STREAMLIT_PYTHON", sys.executable)  # to try another version of Streamlit


class Streamlit:
    """`streamlit run ops.py`, of a copy without the folder .streamlit, and a client that says what it likes to it."""

    def __init__(self, place, *arguments, **variables):
        self.port = free_port()
        for path in ROOT.glob("*.py"):
            shutil.copy(path, place.folder)
        shutil.copytree(ROOT / "pqueue_tools", place.folder / "pqueue_tools", dirs_exist_ok=True)
        command = [PYTHON, "-m", "streamlit", "run", "ops.py", f"--server.port={self.port}", *arguments]
        command += ["--server.headless=true", "--browser.gatherUsageStats=false"]
        self.child = place.start_command(command, PYTHONWARNINGS="", **variables)
        wait_until(self._is_up)

    def _is_up(self):
        with suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/_stcore/health", timeout=5).status == 200
        return False

    def visit(self, host, origin=None, press=None, page="jobs"):
        """Return all messages of a run of the page, none where the handshake is refused; press a widget, if one is
        given by its id, in a second run."""
        host = host.replace("PORT", str(self.port))
        origin = None if origin is None else origin.replace("PORT", str(self.port))
        messages = []
        with suppress(InvalidHandshake, ConnectionClosed):
            wire = socket.create_connection(("127.0.0.1", self.port))
            with connect(f"ws://{host}/_stcore/stream", sock=wire, origin=origin, subprotocols=["streamlit"]) as server:
                for pressed in [None] if press is None else [None, press]:
                    request = BackMsg()
                    request.rerun_script.query_string = f"page={page}"
                    if pressed is not None:
                        state = request.rerun_script.widget_states.widgets.add()
                        state.id, state.trigger_value = pressed, True
                    server.send(request.SerializeToString())
                    messages += self._answers(server)
        return messages

    def _answers(self, server):
        messages = []
        while not (messages and messages[-1].WhichOneof("type") == "script_finished"):
            message = ForwardMsg()
            message.ParseFromString(server.recv(timeout=PATIENCE_SECONDS))
            messages.append(message)
        return messages


def text_of(messages):
    return b"".join(each.SerializeToString() for each in messages).decode("utf-8", "replace")


def buttons(messages):
    """Return the ids of the page's buttons by their labels."""
    elements = [each.delta.new_element for each in messages if each.WhichOneof("type") == "delta"]
    return {each.button.label: each.button.id for each in elements if each.WhichOneof("type") == "button"}


@pytest.fixture
def queue(place):
    queue = place.queue()
    queue.enqueue("work", {"word": WORD})
    return queue


def is_paused(queue):
    return queue.stats()["queues"]["default"]["paused"]


FOREIGN = [
    ("evil.example:PORT", "http://evil.example:PORT"),
    ("evil.example", "http://evil.example"),
    ("evil.example:PORT", None),
    ("localhost.evil.example:PORT", "http://localhost.evil.example:PORT"),
    ("10.1.2.3:PORT", "http://10.1.2.3:PORT"),
    ("evil.example:PORT", "http://localhost:PORT"),
    ("localhost:PORT", "http://evil.example:PORT"),
    ("localhost:PORT", "http://localhost:3000"),
    ("localhost:PORT", "null"),
]
OURS = [
    ("localhost:PORT", "http://localhost:PORT"),
    ("127.0.0.1:PORT", "http://127.0.0.1:PORT"),
    ("localhost:PORT", None),
    ("LOCALHOST.:PORT", "http://localhost.:PORT"),
]


def test_attacker_at_the_websocket_reads_and_presses_nothing(place, queue):
    server = Streamlit(place, "--server.address=127.0.0.1")
    for host, origin in OURS:
        assert WORD in text_of(server.visit(host, origin)), (host, origin)
    pause = buttons(server.visit("localhost:PORT", "http://localhost:PORT", page="queues"))["yes, pause"]
    for host, origin in FOREIGN:
        messages = server.visit(host, origin) + server.visit(host, origin, press=pause, page="queues")
        assert WORD not in text_of(messages), (host, origin)
        assert not buttons(messages)
        assert not is_paused(queue), (host, origin)
    server.visit("localhost:PORT", "http://localhost:PORT", press=pause, page="queues")
    assert is_paused(queue)


def test_page_that_listens_everywhere_serves_only_the_configured_host_names(place, queue):
    server = Streamlit(place)
    for host in ("localhost:PORT", "127.0.0.1:PORT", "evil.example:PORT"):
        messages = server.visit(host, f"http://{host}")
        assert WORD not in text_of(messages)
        assert not buttons(messages)
    assert "PQUEUE_OPS_HOSTS" in text_of(server.visit("localhost:PORT"))
    server.child.kill()
    server.child.wait()
    server = Streamlit(place, PQUEUE_OPS_HOSTS="queue.example, 10.1.2.3")
    for host in ("queue.example:PORT", "10.1.2.3:PORT", "queue.example."):
        assert WORD in text_of(server.visit(host, f"http://{host}")), host
    for host in ("evil.example:PORT", "10.1.2.4:PORT"):
        assert WORD not in text_of(server.visit(host, f"http://{host}")), host


def test_page_is_served_under_its_prefix_beside_a_module_with_the_name_of_a_standard_one(place, queue):
    place.write("calendar.py", "raise ImportError('this is a module of the project')\n")
    port = free_port()
    place.start("ops.py", "--streamlit", "--port", str(port), PQUEUE_OPS_PREFIX="/queue/", PYTHONWARNINGS="")

    def is_up():
        with suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/queue/_stcore/health", timeout=5).status == 200
        return False

    wait_until(is_up)
    done = place.run("ops.py", "--streamlit", "--port", str(free_port()), PQUEUE_OPS_PREFIX="queue")
    assert done.returncode == 2
    assert "expected a path such as /queue in PQUEUE_OPS_PREFIX, got 'queue'" in done.stderr
