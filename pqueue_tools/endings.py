"""How the programs end when TERM, INT or HUP tells them to: at any moment, and without a traceback.

A program imports this first and calls `end_at_once`, so that an INT while it imports the rest is no KeyboardInterrupt.
This module itself imports only what is built in: `signal` alone would take milliseconds.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

ENDINGS: list[int] = [getattr(_signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(_signal, name)]


def end_at_once() -> None:
    """Let INT end the process as TERM does, unless it is ignored, as in a shell's background."""
    if _signal.getsignal(_signal.SIGINT) == _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


class Undoing:
    """A block in which these signals raise SystemExit, so that what was begun is undone; a second one ends at once."""

    def __enter__(self) -> None:
        self._before = {number: _signal.getsignal(number) for number in ENDINGS}
        for number, handler in self._before.items():
            if handler != _signal.SIG_IGN:
                _signal.signal(number, self._end)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            _signal.signal(number, handler)

    def _end(self, number: int, _: Any) -> NoReturn:
        for each, handler in self._before.items():
            if handler != _signal.SIG_IGN:
                _signal.signal(each, _signal.SIG_DFL)
        raise SystemExit(128 + number)  # what a shell says of a process that the signal has ended
