"""Serve the ops dashboard, which shows the queue live and offers the actions of an operator.

    python3 ops.py                            # http://127.0.0.1:8501, standard library only
    python3 ops.py --streamlit                # with Streamlit, if it is installed

PQUEUE_OPS_PORT is the port (default: 8501).
PQUEUE_OPS_READONLY=1 disables all actions.
PQUEUE_OPS_NAME is the name of this system in headings and titles, such as shop (staging).
PQUEUE_OPS_PREFIX is the path under which a proxy offers the dashboard, such as /queue.
PQUEUE_OPS_USER_HEADER names the header in which a trusted proxy passes on the name of the user.
PQUEUE_OPS_HOSTS lists the host names and addresses that are accepted in addition to loopback.
"""

from __future__ import annotations

from pqueue_tools import termination

if __name__ == "__main__":
    termination.reset_sigint()

import argparse
import os
import socket
import sys

from pqueue import QueueError
from pqueue_tools.dashboard import allowed_hosts, expect_url, has_streamlit, password_for, prefix, user_header
from pqueue_tools.dashboard_http import address, listen_error, serve
from pqueue_tools.process import OneLineParser, not_blank, print_error, report, whole_number, writes_to_stdout
from pqueue_values import program_name

# python -m streamlit would prefer modules of the current folder to those of the standard library.
STREAMLIT = "import sys; sys.path[:] = filter(None, sys.path); from streamlit.web.cli import main; main()"


@writes_to_stdout("ops")
def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    uses_streamlit = options.streamlit and has_streamlit()
    try:
        path = prefix()
        allowed_hosts()
        user_header()
        expect_url()
        password = None if uses_streamlit else password_for(options.host)
    except (QueueError, ValueError) as error:
        return report("ops", error)
    if options.check or uses_streamlit:
        # Streamlit binds the port in a new process, and --check before the dashboard starts: so see whether it is free.
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        try:
            socket.create_server((options.host, options.port), family=family).close()
        except (OSError, TypeError, ValueError) as error:
            print_error("ops", listen_error(error, options.host, options.port))
            return 1
    if options.check:
        print(f"dashboard at {address(options.host, options.port)}", flush=True)
        return 0
    if uses_streamlit:
        command = [sys.executable, "-c", STREAMLIT, "run", os.path.abspath(__file__)]
        command += [f"--server.address={options.host}", f"--server.port={options.port}", f"--server.baseUrlPath={path}"]
        os.execv(sys.executable, command)
    if options.streamlit:
        print_error(
            "ops", "no Streamlit 1.55 or newer is installed, so this is the page without it: pip install -U streamlit"
        )
    return serve(options.host, options.port, password)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog=program_name("ops"), description=__doc__)
    add, port = parser.add_argument, os.environ.get("PQUEUE_OPS_PORT") or "8501"
    try:
        whole_number(0, 65535)(port)
    except ValueError as error:
        parser.error(f"PQUEUE_OPS_PORT: {error}")
    add("--host", type=not_blank, default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", type=whole_number(0, 65535), default=port, help="port (default: PQUEUE_OPS_PORT, or 8501)")
    add("--streamlit", action="store_true", help="use Streamlit, if it is installed")
    add("--check", action="store_true", help="check the settings and the port, print the address, and exit")
    return parser


if __name__ == "__main__":
    if "streamlit.runtime" in sys.modules and sys.modules["streamlit.runtime"].exists():
        from pqueue_tools.dashboard_streamlit import page

        page()
    else:
        sys.exit(main())
