"""python -m bench"""

from __future__ import annotations

from pqueue_tools import endings

endings.end_at_once()

import sys

from bench.run import main

with endings.Undoing():
    sys.exit(main())
