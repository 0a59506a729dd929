"""Bulk actions, for the command line and the dashboard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pqueue import InvalidTransition, JobNotFound, PersistentQInterface
from pqueue_tools.masking import masked_job

BATCH = 500  # jobs changed in one transaction


def act_on_matching(
    queue: PersistentQInterface, filters: dict[str, Any], act: Callable[[int], None]
) -> tuple[int, int]:
    """Act on all jobs whose masked form matches the filters, in batches of one transaction each. Return how many were
    changed, and how many were not because of their state."""
    changed = refused = 0
    before = None
    while jobs := queue.list_jobs(**filters, before_id=before, limit=BATCH, excerpt=0, shown=masked_job):
        ids = [job.id for job in jobs]
        with queue.exclusive(ids):
            now = queue.list_jobs(**filters, ids=ids, limit=BATCH, excerpt=0, shown=masked_job)
            for job in reversed(now):  # a job may no longer match
                try:
                    act(job.id)
                    changed += 1
                except (InvalidTransition, JobNotFound):
                    refused += 1
        before = jobs[-1].id
    return changed, refused
