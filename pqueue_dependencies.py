"""Dependencies: jobs that run after other jobs, their parents.

A job with unfinished parents is `waiting`, and `waits_for` counts them. Whatever finishes a parent counts down in the
same commit; at 0 the job becomes `pending` or `scheduled`. If a parent failed or was cancelled, the job fails with it,
and so do those that wait for it, unless it was enqueued with after_failed="run". Jobs are locked in the order of their
ids, in which parents come first.
"""

from __future__ import annotations

from collections.abc import Iterable

from pqueue_backend import Session
from pqueue_handlers import Handling
from pqueue_outcomes import count_events
from pqueue_schema import CHILDREN, FOR_EACH, HOLDS_KEY, KEY_IS_FREE, STATE, STATES_OF, THESE, UNFINISHED
from pqueue_search import Reading, excerpt_columns
from pqueue_values import Job, JobNotFound, short, to_excerpt, to_json, valid_id, valid_int, valid_list

# Statements. :ids is a JSON array of jobs. How jobs are chosen `among` others differs on PostgreSQL.

UNSUCCESSFUL = "IN ('failed', 'cancelled')"
_PARENT = "(SELECT state FROM jobs p WHERE p.id = d.parent_id)"

# Make the completion of these jobs look for dependents.
MARK_PARENTS = f"UPDATE jobs SET has_dependents = 1 WHERE has_dependents = 0 AND id {THESE}"

# Make new jobs wait for :waits_for others.
MAKE_WAIT = f"UPDATE jobs SET state = 'waiting', waits_for = :waits_for WHERE finished_at IS NULL AND id {THESE}"

# Return the jobs that wait for one of these; on PostgreSQL, lock them.
DEPENDENTS = f"SELECT id FROM jobs WHERE {STATE} = 'waiting' AND id {CHILDREN}"


# guard: a job fails with the job that it waits for
# guard: a job that asked for it runs after a failed one
def fail_dependents(among: str = "IN ({})") -> str:
    failed = f"SELECT id FROM jobs p WHERE state {UNSUCCESSFUL} AND id {THESE}"
    which = f"d.after_failed = 'fail' AND d.parent_id {among.format(failed)}"
    return f"""
UPDATE jobs SET state = 'failed', finished_at = :now, error =
    (SELECT 'job ' || id || CASE p.state WHEN 'failed' THEN ' failed' ELSE ' was cancelled' END FROM jobs p
     WHERE id = (SELECT min(parent_id) FROM dependencies d WHERE job_id = jobs.id AND {which}))
WHERE {STATE} = 'waiting' AND id {among.format(f"SELECT job_id FROM dependencies d WHERE {which}")} RETURNING id"""


# Make the jobs failed that wait for one of these, which failed; return their ids.
FAIL_DEPENDENTS = fail_dependents()

# Promote the jobs that wait for no others than these, which finished; return the new states.
# guard: a job waits for all its parents
# guard: a job that waited is scheduled if it is not due
COUNT_DOWN = f"""
UPDATE jobs SET waits_for = waits_for - finished.number, state = CASE WHEN waits_for > finished.number THEN 'waiting'
    WHEN run_at > :now THEN 'scheduled' ELSE 'pending' END
FROM (SELECT job_id, count(*) AS number FROM dependencies WHERE parent_id {THESE} GROUP BY job_id) finished
WHERE jobs.id = finished.job_id AND state = 'waiting' RETURNING state"""

# Record that these jobs failed with a parent.
RECORD_FAILURES = f"""
INSERT INTO history (job_id, at, event, actor, attempt, error)
SELECT id, :now, 'failed', 'dependency', attempts, error FROM jobs WHERE id {THESE} ORDER BY id"""

# Return the dependents of these jobs, and all parents of those.
FAMILY = f"""
SELECT job_id FROM dependencies WHERE parent_id {THESE} UNION
SELECT parent_id FROM dependencies WHERE job_id {CHILDREN}"""


def free_keys(among: str = "IN ({})") -> str:
    holder = f"SELECT id FROM jobs o WHERE (o.queue, o.task, o.key) = (c.queue, c.task, c.key) AND {HOLDS_KEY}"
    holders = f"SELECT ({holder} AND key_expires_at <= :now) FROM jobs c WHERE c.id {THESE}"
    return f"UPDATE jobs SET key_expires_at = NULL WHERE id {among.format(holders)}"


# Take the keys of these jobs from others, whose time is over.
FREE_KEYS = free_keys()

# Let the jobs wait again that failed with these, which were resubmitted; return their ids.
# guard: a job that failed with its parent is restored with it
# guard: a job is restored when no parent of it is failed
# guard: restoring a job respects its key
RESTORE = f"""
UPDATE jobs SET state = 'waiting', finished_at = NULL, error = NULL
WHERE {STATE} = 'failed' AND id {CHILDREN} AND waits_for > 0
    AND NOT EXISTS (SELECT 1 FROM dependencies d
        WHERE d.job_id = jobs.id AND {_PARENT} {UNSUCCESSFUL} {FOR_EACH})
    AND {KEY_IS_FREE} RETURNING id"""

# Count again how many jobs each dependent of these jobs waits for.
# guard: a job that waits for others also waits for a resubmitted parent
RECOUNT_PARENTS = f"""
UPDATE jobs SET waits_for =
    (SELECT count(*) FROM dependencies d WHERE d.job_id = jobs.id AND {_PARENT} IN {UNFINISHED})
WHERE {STATE} = 'waiting' AND id {CHILDREN}"""

# Return these jobs that unfinished others run after, each with one of those.
NEEDED = f"""
SELECT d.parent_id, min(d.job_id) FROM dependencies d WHERE d.parent_id {THESE} AND NOT d.job_id {THESE}
    AND (SELECT state FROM jobs c WHERE c.id = d.job_id) IN {UNFINISHED} GROUP BY d.parent_id ORDER BY d.parent_id"""

# Let each of the jobs :ids run after each of :parents.
ADD_DEPENDENCIES = """
INSERT INTO dependencies (job_id, parent_id, after_failed)
SELECT c.value, p.value, :after_failed FROM json_each(:ids) c CROSS JOIN json_each(:parents) p"""


class Depending(Handling, Reading):
    """What follows when a job finishes or is resubmitted."""

    def dependencies(self, job_id: int, *, excerpt: int | None = None) -> list[Job]:
        """Return the jobs that this one runs after, ordered by id, without deleted ones.

        excerpt: as for `list_jobs`.
        """
        most = None if excerpt is None else valid_int("excerpt", 0, excerpt)
        parents = "SELECT parent_id FROM dependencies WHERE job_id = :id"
        sql = f"SELECT {excerpt_columns(most)} FROM jobs WHERE id {self._AMONG.format(parents)} ORDER BY id"
        return [to_excerpt(row, most) for row in self._read(sql, {"id": valid_id(job_id)})]

    def _attach(self, session: Session, job_ids: list[int], parents: list[int], after_failed: str, now: float) -> None:
        """Let new jobs run after others. Raises JobNotFound."""
        these = {"ids": to_json(parents)}
        # On PostgreSQL, none of them finishes until this transaction ends.
        self._lock_jobs(session, parents)
        states = dict(session.run(STATES_OF, these))
        if missing := [each for each in parents if each not in states]:
            raise JobNotFound(f"cannot enqueue after job {missing[0]}: no such job")
        session.change(MARK_PARENTS, these)
        new = {"ids": to_json(job_ids), "parents": to_json(parents), "after_failed": after_failed}
        session.change(ADD_DEPENDENCIES, new)
        lost = [each for each in parents if states[each] in ("failed", "cancelled") and after_failed == "fail"]
        waits_for = len(lost) + sum(state in UNFINISHED for state in states.values())
        if waits_for:
            session.change(MAKE_WAIT, {"ids": new["ids"], "waits_for": waits_for})
        # guard: a job after a failed one fails at once
        if lost:  # others that wait for them have counted them
            self._fail_dependents(session, lost, now)

    def _job_ended(self, session: Session, job_id: int, now: float) -> None:
        """Do in the same commit what follows when a job has become failed or cancelled."""
        session.finished.append(job_id)
        self._follow_up(session, [job_id], now)
        # guard: a failed job is handled
        self._handle_failures(session, [job_id], now)

    def _follow_up(self, session: Session, job_ids: list[int], now: float, *, completed: bool = False) -> None:
        """Do in the same commit what follows when these jobs finish: promote or fail those that wait for them."""
        while job_ids:
            params = {"ids": to_json(job_ids), "now": now}
            if not session.run(DEPENDENTS, params):
                return
            job_ids = [] if completed else self._fail_dependents(session, job_ids, now)
            states = [state for (state,) in session.run(COUNT_DOWN, params)]
            session.wakes = session.wakes or states.count("waiting") < len(states)

    def _fail_dependents(self, session: Session, job_ids: list[int], now: float) -> list[int]:
        """Make the jobs failed that wait for one of these, which failed; return their ids."""
        lost = [each for (each,) in session.run(FAIL_DEPENDENTS, {"ids": to_json(job_ids), "now": now})]
        if not lost:
            return []
        session.change(RECORD_FAILURES, {"ids": to_json(lost), "now": now})
        # guard: a job that fails with a parent is counted
        count_events(session, lost, "failed", now)
        session.finished += lost
        # guard: a job that failed with another one is handled
        self._handle_failures(session, lost, now)
        return lost

    def _restore(self, session: Session, job_id: int, now: float) -> None:
        """Let the jobs that failed with this one, which was resubmitted, wait for it again."""
        job_ids = [job_id]
        while job_ids:
            params = {"ids": to_json(job_ids), "now": now}
            related = [each for (each,) in session.run(FAMILY, params)]
            if not related:
                return
            self._lock_jobs(session, sorted(related))
            session.change(FREE_KEYS, {"ids": to_json(related), "now": now})
            job_ids = [each for (each,) in session.run(RESTORE, params)]
            session.change(RECOUNT_PARENTS, params)


def parents_of(after: Iterable[int], after_failed: str) -> list[int]:
    """Return the ids of `after`, in order. Raises ValueError."""
    if after_failed not in ("fail", "run"):
        raise ValueError(f"expected after_failed to be 'fail' or 'run', got {short(after_failed)}")
    return sorted({int(valid_id(job_id)) for job_id in valid_list("job ids as after", after)})
