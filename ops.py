"""The ops dashboard: what happens in the queue, live, and the actions of an operator.

    python ops.py                            # http://127.0.0.1:8501, with the standard library alone
    python ops.py --streamlit                # the same with Streamlit, if it is installed

PQUEUE_OPS_PORT is the port, by default 8501.
PQUEUE_OPS_READONLY=1 hides and refuses every action.
PQUEUE_OPS_HOSTS lists the names and addresses by which they may be reached besides loopback.
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

from pqueue_tools.process import OneLineParser, print_error, whole_number
from pqueue_tools.report import program_name


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if wrong := _cannot_serve(options):
        print_error("ops", wrong)
        return 1
    if options.check:
        address = f"[{options.host}]" if ":" in options.host else options.host
        print(f"dashboard at http://{address}:{options.port}", flush=True)
        return 0
    if options.streamlit and find_spec("streamlit"):
        words = ["-m", "streamlit", "run", os.path.abspath(__file__)]
        words += [f"--server.address={options.host}", f"--server.port={options.port}"]
        os.execv(sys.executable, [sys.executable, *words])
    from pqueue_tools.dashboard_http import serve

    return serve(options.host, options.port)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog=program_name("ops"), description=(__doc__ or "").splitlines()[0])
    add, port = parser.add_argument, os.environ.get("PQUEUE_OPS_PORT") or "8501"
    add("--host", default="127.0.0.1", help="address to serve (default: %(default)s)")
    add("--port", type=whole_number(0, 65535), default=port, help="(default: PQUEUE_OPS_PORT, or 8501)")
    add("--streamlit", action="store_true", help="use Streamlit, if it is installed")
    add("--check", action="store_true", help="print the address, if its port is free, and exit")
    return parser


def _cannot_serve(options: argparse.Namespace) -> str | None:
    """Return why the dashboard cannot be served there, as far as that is known beforehand."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            if os.name == "posix":  # as the servers do, so that connections which have ended are not in the way
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((options.host, options.port))
    except (OSError, TypeError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            return f"port {options.port} is in use: choose another with PQUEUE_OPS_PORT"
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
