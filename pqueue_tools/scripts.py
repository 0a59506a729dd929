"""Entry points of the installed commands; the wheel installs the programs in this package."""

from __future__ import annotations

from pqueue_tools import termination

termination.reset_sigint()

from importlib import import_module  # noqa: E402


def _run(program: str) -> int:
    code: int = import_module(f"pqueue_tools.{program}").main()
    return code


def admin() -> int:
    return _run("admin")


def consumer() -> int:
    return _run("consumer")


def manager() -> int:
    return _run("manager")


def ops() -> int:
    return _run("ops")


def producer() -> int:
    return _run("producer")
