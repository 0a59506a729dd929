"""Entry points of the installed commands; the wheel installs the programs in this package."""

from __future__ import annotations

from pqueue_tools import termination

termination.reset_sigint()

from functools import partial  # noqa: E402
from importlib import import_module  # noqa: E402


def _run(program: str) -> int:
    code: int = import_module(f"pqueue_tools.{program}").main()
    return code


admin = partial(_run, "admin")
consumer = partial(_run, "consumer")
manager = partial(_run, "manager")
ops = partial(_run, "ops")
producer = partial(_run, "producer")
