"""How the programs respond to TERM, INT and HUP: they exit at any moment without a traceback.

A program imports this module first and calls `reset_sigint`, so that Ctrl-C during the other imports does not raise
KeyboardInterrupt. To load quickly, this module imports only the built-in `_signal`: `signal` takes milliseconds.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

SIGNALS: list[int] = [getattr(_signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(_signal, name)]


def reset_sigint() -> None:
    """Let INT end the process as TERM does, unless it is ignored, as in a background job of a shell."""
    if _signal.getsignal(_signal.SIGINT) == _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


class ExitOnSignal:
    """A context in which these signals raise SystemExit, so that cleanup runs. A second signal ends the process."""

    def __enter__(self) -> None:
        self._before = {number: _signal.getsignal(number) for number in SIGNALS}
        for number, handler in self._before.items():
            if handler != _signal.SIG_IGN:
                _signal.signal(number, self._exit)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            _signal.signal(number, handler)

    def _exit(self, number: int, _: Any) -> NoReturn:
        for each, handler in self._before.items():
            if handler != _signal.SIG_IGN:
                _signal.signal(each, _signal.SIG_DFL)
        raise SystemExit(128 + number)  # the exit code that a shell reports for a process ended by this signal
