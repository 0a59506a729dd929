"""python -m bench"""

from __future__ import annotations

from pqueue_tools import termination

termination.reset_sigint()

import sys

from bench.run import main

with termination.ExitOnSignal():
    sys.exit(main())
