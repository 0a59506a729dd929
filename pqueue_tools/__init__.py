"""What the programs of pqueue share."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - in a checkout, no installer looks at it
    raise SystemExit(f"pqueue: expected Python 3.10 or newer, got {sys.version.split()[0]}")
