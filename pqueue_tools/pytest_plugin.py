"""Fixtures for pytest, which finds them if pqueue is installed.

In a checkout, write pytest_plugins = ["pqueue_tools.pytest_plugin"] in conftest.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pqueue import PersistentQInterface


@pytest.fixture
def pqueue_queue() -> Iterator[PersistentQInterface]:
    """A queue in a temporary folder, which is the default queue during the test."""
    from pqueue_tools.testing import temporary_queue  # here: pytest imports this module for every test run

    with temporary_queue() as queue:
        yield queue


@pytest.fixture
def pqueue_inline(pqueue_queue: PersistentQInterface) -> Iterator[PersistentQInterface]:
    """The same, and each job runs as soon as it is enqueued."""
    from pqueue_tools.testing import inline

    with inline(pqueue_queue):
        yield pqueue_queue
