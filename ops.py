"""The ops dashboard: what happens in the queue, live, and the means to mend it.

    streamlit run ops.py                     # http://localhost:8501
    python ops.py                            # the same with the standard library alone

PQUEUE_OPS_READONLY=1 hides and refuses every action.
PQUEUE_OPS_HOSTS lists the names and addresses by which they may be reached besides loopback.
"""

from __future__ import annotations

from pqueue_tools import endings

if __name__ == "__main__":
    endings.end_at_once()

import sys

from pqueue_tools.process import OneLineParser


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1", help="address to serve (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8501, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    from pqueue_tools.dashboard_http import serve

    return serve(options.host, options.port)


def _under_streamlit() -> bool:
    return "streamlit.runtime" in sys.modules and sys.modules["streamlit.runtime"].exists()


if __name__ == "__main__":
    if _under_streamlit():
        from pqueue_tools.dashboard_streamlit import page

        page()
    else:
        sys.exit(main())
