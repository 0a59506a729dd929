"""What tasks leave behind in their process: found after each, and undone where that is possible."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class ProcessState:
    """The state of the process that tasks must not change, as it was before the first one."""

    def __init__(self) -> None:
        self.must_end = False  # the process cannot be restored

    def left_behind(self, task: str, seconds: float) -> list[str]:  # noqa: ARG002
        """Undo what a task has changed, and return what that was. seconds: how long the task ran."""
        return []


def resident_mb() -> float:
    """Return the resident memory of this process; 0 where the system does not show it."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return 0.0
