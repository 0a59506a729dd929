"""Serve the ops dashboard, which shows the queue live and offers the actions of an operator.

    python ops.py                            # http://127.0.0.1:8501, standard library only
    python ops.py --streamlit                # with Streamlit, if it is installed

PQUEUE_OPS_PORT is the port (default: 8501).
PQUEUE_OPS_READONLY=1 disables all actions.
PQUEUE_OPS_PREFIX is the path under which a proxy offers the dashboard, such as /queue.
PQUEUE_OPS_HOSTS lists the host names and addresses that are accepted in addition to loopback.
"""

from __future__ import annotations

from pqueue_tools import termination

if __name__ == "__main__":
    termination.reset_sigint()

import argparse
import errno
import os
import socket
import sys
from importlib.util import find_spec

from pqueue_tools.dashboard import prefix
from pqueue_tools.process import OneLineParser, print_error, whole_number
from pqueue_tools.report import program_name


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if error := _listen_error(options):
        print_error("ops", error)
        return 1
    if options.check:
        address = f"[{options.host}]" if ":" in options.host else options.host
        print(f"dashboard at http://{address}:{options.port}", flush=True)
        return 0
    if options.streamlit and not find_spec("streamlit"):
        print_error("ops", "Streamlit is not installed, so this is the page without it: pip install streamlit")
    elif options.streamlit:
        command = [sys.executable, "-m", "streamlit", "run", os.path.abspath(__file__)]
        command += [f"--server.address={options.host}", f"--server.port={options.port}"]
        try:
            command.append(f"--server.baseUrlPath={prefix()}")
        except ValueError as error:
            print_error("ops", error)
            return 2
        os.execv(sys.executable, command)
    from pqueue_tools.dashboard_http import serve

    return serve(options.host, options.port)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog=program_name("ops"), description=(__doc__ or "").splitlines()[0])
    add, port = parser.add_argument, os.environ.get("PQUEUE_OPS_PORT") or "8501"
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=whole_number(0, 65535), default=port, help="(default: PQUEUE_OPS_PORT, or 8501)")
    add("--streamlit", action="store_true", help="use Streamlit, if it is installed")
    add("--check", action="store_true", help="print the address and exit; fail if the port is in use")
    return parser


def _listen_error(options: argparse.Namespace) -> str | None:
    """Return why the dashboard cannot listen on the address, or None if it can."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            if os.name == "posix":  # as the servers do: ignore closed connections
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((options.host, options.port))
    except (OSError, TypeError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            return f"port {options.port} is in use: set PQUEUE_OPS_PORT to another port"
        return f"cannot serve on {options.host}:{options.port}: {error}"
    return None


def _under_streamlit() -> bool:
    return "streamlit.runtime" in sys.modules and sys.modules["streamlit.runtime"].exists()


if __name__ == "__main__":
    if _under_streamlit():
        from pqueue_tools.dashboard_streamlit import page

        page()
    else:
        sys.exit(main())
