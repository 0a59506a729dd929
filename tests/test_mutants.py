"""Remove each guard of pqueue.py, and some of the programs, in turn, in a copy, and see that some check notices.

`python tests/test_mutants.py` lists the mutants and what kills each.
"""

# ruff: noqa: E501 - a mutant is one line

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HISTORIES = 12
TESTS = (
    "conftest.py",
    "test_commit_points.py",
    "test_histories.py",
    "test_feature_histories.py",
    "test_power_loss.py",
    "test_move.py",
    "test_outcome.py",
    "test_processes.py",
    "test_consumer.py",
    "test_fields.py",
    "test_misbehaviour.py",
    "test_task_output.py",
    "test_supervisor.py",
    "test_concurrency.py",
    "test_restore.py",
    "record_writes.c",
)


HISTORY = "history"
POWER = "test_power_loss.py: nothing_that_returned"
FILES = "test_power_loss.py: each_file_with_its_job and full"


@dataclass(frozen=True)
class Mutant:
    """Replaces `old` in the statement below the mark `# guard: NAME`, in whichever module that is.

    Without `old` it deletes the statement; of an `if`, only its condition, which is then false.
    """

    guard: str
    killer: str  # HISTORY, or "contract: part of a test's name", or a file of tests and part of a test's name
    old: str = ""
    new: str = ""


# fmt: off
MUTANTS = [
    # who may settle
    Mutant("a verb under a lease needs the current token", HISTORY, " AND lease_token = :token", ""),
    Mutant("complete needs a held lease", HISTORY, "and self._complete_all(session, [(job, encoded)], at)", "and self._complete_all(session, [(job, encoded)], at) is None"),
    Mutant("complete_and_dequeue reports a lost lease", HISTORY),
    Mutant("a batch completes under its token only", "contract: reclaimed_job_of_its_batch", " AND lease_token = :token", ""),
    Mutant("complete_and_dequeue reports a lost lease in a batch", "contract: reclaimed_job_of_its_batch"),
    Mutant("fail, release, extend, update need a held lease", HISTORY, "not session.change(sql, params)", "session.change(sql, params) < 0"),
    Mutant("a job that waits until it can run alone keeps its lease", "test_concurrency.py: waits_until_it_can_run_alone", "None if self.record.fields[fields.WAITING] else [run.job_id for run in runs]", "[run.job_id for run in runs]"),
    Mutant("extend_all renews the leases of one consumer", "contract: extend_all", "{HELD_BY_CONSUMER}", "state = 'processing'"),
    Mutant("each claim has its own number", HISTORY, "{next(me.claims)}", "0"),
    Mutant("a lost lease dooms its transaction", "contract: lost_lease_undoes_the_transaction", " and self.lost is None", ""),
    # counts
    Mutant("a completed job is counted", "contract: completion_is_counted_once"),
    Mutant("completions are counted", "contract: completion_is_counted_once"),
    Mutant("a completion is counted although later ones were", "contract: completion_is_counted_once", " AND :now > {LAST_COMPLETION}", ""),
    Mutant("a completion that is counted later is not counted now", "contract: completion_is_counted_once", "now <= session.run(COUNTED_UNTIL)[0][0]", "True"),
    Mutant("a few completions are counted although later ones were", "contract: completion_is_counted_once"),
    Mutant("many completions are counted once", "contract: completion_is_counted_once"),
    Mutant("a job that is completed no longer was counted", "contract: completion_is_counted_once"),
    Mutant("a failed attempt is counted", "contract: outcome_is_counted_in", "if event:", "if not event:"),
    Mutant("a released attempt is counted", "contract: end_of_an_attempt"),
    Mutant("a lost delivery is counted", "contract: end_of_an_attempt", '(event, "failed" if is_last else "retried")', "(event,)"),
    Mutant("a job that an operator ends is counted", "contract: end_of_an_attempt", "sql is pqueue_schema.END", "False"),
    Mutant("a job that is deleted was counted", "contract: prune_delete_and_rollback"),
    Mutant("a job that fails with a parent is counted", "contract: end_of_an_attempt"),
    Mutant("an expected share is one", "contract: expected_of_a_queue", 'valid_number("max_failed_share", 0, max_failed_share, 1)', "max_failed_share"),
    Mutant("new jobs are counted", "contract: prune_delete_and_rollback"),
    Mutant("a job is counted once", "contract: counts_are_added_up"),
    Mutant("recent counts stay as they are", "contract: counts_are_added_up", " - KEPT_SECONDS[period]", ""),
    # results
    Mutant("a finished job wakes up those that wait for it", "contract: waiter_is_woken"),
    Mutant("a wait inside a transaction is refused", "contract: nothing_to_wait_for"),
    Mutant("only a completed job has a result", "contract: waiter_is_woken"),
    # joined transactions
    Mutant("a connection to another file is not joined", "contract: sqlite_connection_that_would"),
    Mutant("a joined enqueue is synced", "contract: sqlite_connection_that_would"),
    Mutant("a job is not committed before its transaction", "contract: sqlite_connection_that_would"),
    Mutant("consumers look for the jobs of a joined transaction", "contract: consumer_sees_a_joined"),
    # attempts
    Mutant("an attempt counts when it is claimed", HISTORY, '"attempts": "attempts + 1"', '"attempts": "attempts"'),
    Mutant("no attempt after the last", HISTORY, " and attempts < (job.max_attempts or 0)", ""),
    Mutant("the task of the consumer limits the attempts", "contract: has_the_attempts_of_its_task", "CASE WHEN :known_attempts IS NOT NULL", "CASE WHEN FALSE"),
    Mutant("no delivery after the last attempt was lost", HISTORY, " AND attempts < max_attempts", ""),
    Mutant("a released attempt does not count", HISTORY, " attempts = attempts - 1,", ""),
    Mutant("an attempt that an operator ended does not count", HISTORY, "CASE state WHEN 'processing' THEN 1 ELSE 0 END", "0"),
    Mutant("a resubmitted job waits for its time", "contract: waits_for_its_time", "CASE WHEN CAST(:run_at AS double precision) > :now THEN 'scheduled' ELSE 'pending' END", "'pending'"),
    Mutant("a resubmitted job has all its attempts", HISTORY, " attempts = 0,", ""),
    Mutant("a redelivered job is claimed alone", "contract: kills_costs_no_other", "next(alone, len(attempts))", "len(attempts)"),
    Mutant("a job with one attempt is claimed alone", "contract: one_attempt_is_claimed_alone", " or (most == 1 and not prefetches)", ""),
    Mutant("an attempt counts when the job begins", "contract: jobs_not_begun"),
    Mutant("an attempt that had begun counts", "contract: jobs_not_begun", "job_id in", "job_id not in"),
    Mutant("records of begun jobs are void after a reboot", "contract: after_a_reboot", "words[0] == boot_id() != 0 and ", ""),
    Mutant("a job whose lease has expired does not begin", "contract: not_begun_when_its_lease", "self._time(now) >= job.lease_expires_at", "False"),
    Mutant("a job is recorded as begun only during its lease", "contract: not_begun_when_its_lease"),
    Mutant("a consumer that takes a dead consumer's slot reclaims its jobs first", "contract: reused_slot"),
    Mutant("a consumer that closes returns its jobs", "contract: closes_returns"),
    Mutant("a child leaves its consumer registered", "contract: shared_consumer", " if not me.is_adopted", ""),
    Mutant("a child has the lock of a shared consumer", "contract: shared_consumer", "not me.is_shared", "True"),
    Mutant("a stopped worker loses its lease", "test_consumer.py: stopped_past", "is_stopped(self.pid)", "False"),
    Mutant("a task that runs too long is ended", "test_misbehaviour.py: true_reason and run_on-sleep"),
    Mutant("jobs of a later claim are not taken back", "test_misbehaviour.py: later_claim", " if claim in (None, key[1])", ""),
    Mutant("no process of a task is left", "test_misbehaviour.py: killed_with_its_consumer"),
    Mutant("what a task has set on its connection is gone with it", "test_misbehaviour.py: leaves_on_its_connection and 1"),
    Mutant("a task that has lost its lease is ended while others write", "test_misbehaviour.py: database_is_locked and all-overrun-1"),
    Mutant("a worker that is stuck does not keep others from writing", "test_concurrency.py: stopped_while_it_holds and 1"),
    Mutant("what is read of a run is of one run", "test_misbehaviour.py: as_a_whole"),
    Mutant("jobs that were taken from a worker are settled, although the slow one has ended", "test_misbehaviour.py: taken_from_a_worker"),
    Mutant(
        "a drain takes the jobs that were taken back when its worker found no more",
        "test_misbehaviour.py: drain_runs_the_jobs",
        " and not self.leases.has_released_late",
        "",
    ),
    Mutant(
        "a task that writes into the shared memory does not end the keeper",
        "test_misbehaviour.py: overwrites_the_shared and 1",
        "self._distrusting()",
        "suppress()",
    ),
    Mutant("code that a task has left behind does not stop its consumer", "test_misbehaviour.py: left_behind_is"),
    Mutant("a watchdog that a task has killed is started again", "test_misbehaviour.py: watchdog_that_a_task"),
    Mutant("a consumer that is never idle finds what tasks leave behind", "test_concurrency.py: never_idle", " or self._pauses()", ""),
    Mutant("jobs run at the same time in threads of the operating system", "test_concurrency.py: greenlets_have", "package in GREENLETS", "False"),
    Mutant("a thread that has no memory to begin does not stop its consumer", "test_concurrency.py: no_memory_to_begin"),
    Mutant("a consumer that ends before it takes jobs is not reported as started", "test_supervisor.py: starts_a_consumer"),
    Mutant("the worker of a stopped keeper ends before its leases", "test_misbehaviour.py: stopped_keeper and patient"),
    Mutant(
        "nothing is written in a transaction that a task has left open",
        "test_misbehaviour.py: leaves_open and begin_and_raise and not 3",
    ),
    Mutant("a task that makes the database unusable costs its process only", "test_misbehaviour.py: database_unusable"),
    Mutant("a job that kills its worker loses an attempt", "test_misbehaviour.py: true_reason and end-kill"),
    Mutant("a job that another one took down loses no attempt", "test_concurrency.py: only_its_own_job_an_attempt and hang_in_c"),
    Mutant("the last attempt of a job that may have ended its process is made alone", "test_concurrency.py: last_attempt", "bool(is_last)", "False"),
    Mutant("the database is not written through another file's descriptor", "test_misbehaviour.py: process_only and tables"),
    Mutant("a job that had not begun loses no attempt by what another one has overwritten", "test_misbehaviour.py: had_not_begun_when"),
    Mutant("garbage of a task that disabled its collection is freed within the limits of the task", "test_misbehaviour.py: frees_its_objects and cycle and 1"),
    Mutant("a descriptor that a task has left behind ends no other job by SIGIO", "test_misbehaviour.py: asks_for_signals"),
    Mutant("a connection that cannot be renewed is kept", "test_consumer.py: log_is_deleted"),
    Mutant("what a task has changed in a connection costs its worker only", "test_misbehaviour.py: unusable and async", "not self.taken", "self.taken"),
    Mutant("async tasks find the thread of the event loop as the first one did", "test_concurrency.py: spoils and (trace_loop or block_signals)"),
    Mutant("no transaction is open across an await", "test_concurrency.py: awaits_inside and a_tasks"),
    # who may claim, and what
    Mutant("a paused queue delivers nothing", HISTORY, "q.paused = 0", "1 = 1"),
    Mutant("a paused queue delivers no assigned job", "contract: paused_queue", "paused <> 0 OR ", ""),
    Mutant("a job assigned to a consumer is not for others", HISTORY, " AND assigned_to IS NULL", ""),
    Mutant("a consumer gets only its own assigned jobs", HISTORY, "assigned_to = :consumer", "assigned_to IS NOT NULL"),
    Mutant("a consumer gets jobs of its queues only", HISTORY, '{AMONG_QUEUES.format(queue="q.name")}', "1 = 1"),
    Mutant("a consumer gets jobs of its tasks only", HISTORY, ' AND {KNOWN.format(task="t.task")}', ""),
    Mutant("a consumer gets only assigned jobs of its tasks", "contract: assigned_job_only_of_a_task", '{KNOWN.format(task="task")}', "1 = 1"),
    Mutant("a batch has all of the first jobs, although they are of few tasks", "contract: batch_has_the_first_jobs", "(share, limit)", "(share,)"),
    Mutant("the built-in task is known only without --import", "test_outcome.py: knows_the_built_in"),
    Mutant("an event below the level is not logged", "test_outcome.py: leave_out_what_is_less", "LEVELS.index(level) >= LEVELS.index(_log[\"level\"])", "True"),
    Mutant("what a task wrote comes before its end in the log", "test_task_output.py: event_waits"),
    Mutant("a drain whose jobs failed says so", "test_outcome.py: exit_code", "self._count_failed() > failed", "0"),
    Mutant("an error that retry_on does not name is final", "test_outcome.py: chooses_when", "not issubclass(kind, entry.retry_on)", "False"),
    Mutant("a result that cannot be stored is final", "test_outcome.py: cannot_be_stored", "(DoNotRetry, Unstorable)", "DoNotRetry"),
    Mutant("order: priority first", HISTORY, "priority DESC, ", ""),
    Mutant("order: then the due time", HISTORY, "run_at, ", ""),
    Mutant("times and progress are floats", "contract: although_they_are_whole", " + 0.0", ""),
    Mutant("order: then the id", "contract: by_priority_then_due", "id", "-id"),
    # groups
    Mutant("the groups of a queue take turns", "contract: groups_take_turns", "self.turn + 1 / group.weight", "self.turn"),
    Mutant("a group that had no jobs does not catch up", "contract: does_not_catch_up", "max(turn, self.turn)", "turn"),
    Mutant("a claim takes no job of a group before one that it has not read", "contract: order_holds_within"),
    Mutant("a claim looks behind the groups that are at a limit", "contract: looks_behind", "rest and", "False and"),
    Mutant("a queue with a pending job of a group has its groups take turns", "contract: no_jobs_any_more", "next_at = 0)", "next_at = 5)"),
    Mutant("a job of a group that has fallen due is delivered at once", "contract: no_jobs_any_more"),
    Mutant("a queue whose groups have no jobs any more is claimed from without turns", "contract: no_jobs_any_more"),
    Mutant("a queue with a group has its groups take turns", "contract: without_a_group_are_one", "(:group = '' OR grouped = 1)", "1 = 1"),
    Mutant("a job that gets a group is delivered", "contract: from_its_new_group"),
    Mutant("a group with a new job is looked at", "contract: groups_take_turns", '("added", "INSERT", BECOMES_PENDING, _WAKE_TASK),', ""),
    Mutant("a group with a job that is pending again is looked at", "contract: order_holds_within", '("pending", \'UPDATE OF state, assigned_to, queue, "group"\', BECOMES_PENDING, _WAKE_TASK),', ""),
    Mutant("a group of which a job ended is looked at", "contract: running_than_the_limit", '("ended", "UPDATE OF state", f"{WAS_RUNNING} AND NEW.state <> \'processing\'", _WAKE_GROUP),', ""),
    Mutant("a group never has more jobs running than its limit", "contract: running_than_the_limit", "state = 'processing' AND counted = 1", "state = 'none'"),
    Mutant("a group never has more deliveries in any time than its rate", "contract: deliveries_than_its_rate", ":now - s.at < rate_seconds", ":now < s.at"),
    Mutant("a job that runs when its queue gets a limit counts", "contract: run_when_it_is_set", "counted = 1", "counted = 0"),
    Mutant("a job that is claimed in a queue with limits counts", "contract: running_than_the_limit", "counted = 1 if", "counted = None if"),
    Mutant("an assigned job counts towards the limits of its group", "contract: assigned_job_counts", "max_running IS NOT NULL OR rate_jobs IS NOT NULL", "1 = 0"),
    Mutant("a waiting consumer sleeps while the jobs without a group are at their limit", "contract: running_than_the_limit", "q.max_running IS NULL", "1 = 1"),
    # schedules
    Mutant("a schedule fires once for each time", "contract: fires_once_for_each_time"),
    Mutant("a queue that is moved fires no schedule", "contract: takes_its_schedules_along", "{MOVES}", "('')"),
    Mutant("a schedule keeps its next time unless that is what changes", "contract: keeps_its_next_time", "not before or before[0][TIMED] != defined[TIMED]", "True"),
    Mutant("a schedule that its task does not declare any more is marked", "contract: follows_its_decorator"),
    Mutant("a time while a schedule was paused gets no job", "contract: paused_gets_no_job"),
    Mutant("runs of a schedule do not overlap", "contract: while_its_job_is_unfinished", 'f"{KEY}{schedule.name}"', "None"),
    Mutant("the job of a handler is delivered at once", "contract: handler_of_a_lost_job"),
    Mutant("an interval advances the time", "contract: schedule_that_is_invalid"),
    Mutant("a schedule that cannot be fired here keeps no consumer awake", "contract: unknown_zone", "max(left, POLL_SECONDS) if self._is_unfit else left", "left"),
    Mutant("metadata of the application is no part of a claim", "contract: whatever_the_metadata", "or not _has_metadata.get()", ""),
    # expiry
    Mutant("jobs that have expired are cancelled", "contract: does_not_start_in_time"),
    Mutant("a job that has expired is followed up", "contract: after_one_that_expires"),
    Mutant("a job that has expired is not delivered", "contract: expired_are_cancelled_however_many"),
    # dependencies
    Mutant("a job that others wait for is completed with them", "contract: waits_until_all", " AND has_dependents = 0", ""),
    Mutant("completed jobs promote those that wait for them", "contract: waits_until_all"),
    Mutant("a failed attempt that was the last is followed up", "contract: finishes_in_any_way"),
    Mutant("a job that was lost for good is followed up", "contract: finishes_in_any_way"),
    Mutant("a job that an operator ended is followed up", "contract: finishes_in_any_way"),
    Mutant("a job waits for all its parents", "contract: waits_until_all", "waits_for > finished.number", "waits_for < 0"),
    Mutant("a job that waited is scheduled if it is not due", "contract: finishes_in_any_way", "run_at > :now", "run_at < 0"),
    Mutant("a job fails with the job that it waits for", "contract: finishes_in_any_way", "state {UNSUCCESSFUL} AND id", "p.id < 0 AND id"),
    Mutant("a job that asked for it runs after a failed one", "contract: finishes_in_any_way", "d.after_failed = 'fail' AND ", ""),
    Mutant("a job after a failed one fails at once", "contract: is_pending_or_fails_at_once"),
    Mutant("a job that failed with its parent is restored with it", "contract: restores_the_jobs", " AND waits_for > 0", " AND waits_for < 0"),
    Mutant("a job is restored when no parent of it is failed", "contract: restores_the_jobs", " AND {_PARENT} {UNSUCCESSFUL}", " AND d.id < 0"),
    Mutant("restoring a job respects its key", "contract: does_not_take_a_key", "    AND {KEY_IS_FREE} RETURNING id", "    RETURNING id"),
    Mutant("a job that waits for others also waits for a resubmitted parent", "contract: waits_again", "{STATE} = 'waiting' AND id", "{STATE} = 'none' AND id"),
    Mutant("a job that another one needs is kept", "contract: neither_pruned_nor_deleted", "(SELECT state FROM jobs c WHERE c.id = d.job_id) IN {UNFINISHED}", "FALSE"),
    Mutant("a job that another one needs is not deleted", "contract: neither_pruned_nor_deleted"),
    Mutant("a job carried to the target waits for its parents there", "contract: wait_for_their_parents_in_the_target"),
    # failure handlers
    Mutant("a failed job is handled", "contract: gets_one_job_of_its_handler"),
    Mutant("a job that failed with another one is handled", "contract: gets_one_job_of_its_handler"),
    Mutant("the job of a handler has no handler", "contract: has_no_handler", " AND after_failed = 'handle'", " AND after_failed = 'none'"),
    Mutant("a cancelled job has no handler", "contract: has_no_handler", " AND state = 'failed'", ""),
    # time and death
    Mutant("a lease is not reclaimed before it expires", HISTORY, " AND lease_expires_at <= :now", ""),
    Mutant("a job is not promoted before it is due", HISTORY, " AND run_at <= :now", ""),
    Mutant("jobs that are due are promoted", "contract: promotes_only_jobs_that_are_due"),
    Mutant("expired leases are reclaimed", "contract: did_not_finish"),
    Mutant("jobs of dead consumers are reclaimed at once", "contract: killed_consumer"),
    Mutant("running consumers keep their jobs", HISTORY, " AND consumers.state <> 'running'", ""),
    Mutant("a consumer that holds its lock is alive", HISTORY, "not (locks := self._consumer_locks) or slot is None or locks.is_held(slot)", "False"),
    # whose turn it is
    Mutant("a released lock goes to the other line", "contract: that_came_first", "[*(other for other in numbers if other != kind), kind]", "[kind, *(other for other in numbers if other != kind)]"),
    Mutant("releasing the lock wakes up a waiter", "contract: woken_one_after"),
    Mutant("a released line wakes up the next", "contract: if_none_is_recorded"),
    Mutant("a writer that has waited long is not overtaken", "contract: newcomer", " or now - self._shared[self.WAITING_SINCE + kind] >= OVERTAKE_SECONDS", ""),
    Mutant("a writer in a loop does not starve a waiter", "contract: writer_in_a_loop", "repeats or ", ""),
    Mutant("a reservation for a dead waiter expires", "contract: died_waiting", " - time.monotonic() <= HANDOVER_SECONDS", ""),
    Mutant("a reservation is void after a reboot", "contract: before_a_reboot", " <= HANDOVER_SECONDS", ""),
    Mutant("a stopped process is not waited for twice", "contract: process_stopped_with", " or self._held_seconds() >= LOCK_TIMEOUT_SECONDS", ""),
    Mutant("only a live holder is reported for a lock", "contract: check_names_a_process"),
    # operators
    Mutant("resubmit takes finished jobs", HISTORY, " AND state IN {FINISHED}", ""),
    Mutant("resubmit respects the key", "contract: resubmitted_while_the_time", "(key_until IS NULL OR", "(TRUE OR"),
    Mutant("resubmit takes a key whose time is over", "contract: while_the_time_of_another"),
    Mutant("change takes jobs that no consumer has taken", "contract: table_of_states", " AND state IN {UNTAKEN}", ""),
    Mutant("change respects the key in another queue", "contract: rules_of_the_new_queue", "IS NOT TRUE OR", "IS NOT TRUE OR TRUE OR"),
    Mutant("a changed job has an attempt left", "contract: leaves_the_job_an_attempt"),
    Mutant("a full queue refuses a job of another queue", "contract: rules_of_the_new_queue"),
    Mutant("run_now takes scheduled and waiting jobs", "contract: table_of_states", " AND state IN ('scheduled', 'waiting')", ""),
    Mutant("a verb for all jobs that match needs a filter", "contract: needs_a_filter"),
    Mutant("a verb for all that match acts in the order of dependencies", "contract: order_of_dependencies", "if parents_first", "if not parents_first"),
    Mutant("a job that is restored with its parent is not refused", "contract: are_resubmitted_with_it", " or self.get(job_id).state in FINISHED", " or True"),
    Mutant("mark_failed and cancel take unfinished jobs", HISTORY, " AND state IN {UNFINISHED}", ""),
    Mutant("assign takes unfinished jobs", HISTORY, " AND state IN {UNFINISHED}", ""),
    Mutant("a refused operator verb raises", HISTORY, "not done", "done < 0"),
    Mutant("assign ends the running delivery", HISTORY, " - CASE state WHEN 'processing' THEN 1 ELSE 0 END, {NO_LEASE}", ""),
    Mutant("running jobs are not deleted", "contract: not_deleted_unless_forced"),
    Mutant("prune takes old jobs only", HISTORY, "finished_at < coalesce(CAST(:before AS double precision), :now - CASE :state {_KEPT} END)", "finished_at > 0"),
    Mutant("prune deletes no job that finishes later", "contract: wrong_arguments_are_refused", "at_least_0(\"older_than_seconds\", older_than_seconds)", "older_than_seconds"),
    Mutant("prune keeps a job that holds its key", "contract: prune_keeps_a_job", "{KEY_IS_OVER} AND ", ""),
    Mutant("prune keeps the newest", "contract: no_id_is_given_twice", " AND +id < (SELECT max(id) FROM jobs)", ""),
    Mutant("prune keeps the last job of a schedule", "contract: jobs_that_are_still_needed", "AND id NOT IN (SELECT last_job_id FROM schedules WHERE last_job_id IS NOT NULL)", ""),
    Mutant("one consumer at a time prunes a queue", "contract: by_one_consumer_a_few"),
    # producing
    Mutant("one job holds a key", HISTORY, "\n{UNLESS_HELD}", ""),
    Mutant("a key holds within its task", "contract: within_its_task", "task = :task AND ", ""),
    Mutant("a key until started is free from the first delivery on", "contract: until_started", " AND started_at IS NULL", ""),
    Mutant("a key is free when its time is over", "contract: key_with_a_time", "\n    AND (key_expires_at IS NULL OR key_expires_at > :now)", ""),
    Mutant("a key is held until its time is over", "contract: rules_of_the_new_queue", " AND key_expires_at <= :now", ""),
    Mutant("a job that was taken is not replaced", "contract: replaced_on_demand", "\nWHERE id = :id AND state IN {UNTAKEN}", "\nWHERE id = :id"),
    Mutant("an empty name is no path", "contract: not_meant_as_a_path"),
    Mutant("a sum of times does not overflow", "contract: sums_overflow", "<= MAX_SECONDS", "<= 1.7e308"),
    Mutant("a time has a zone", "contract: wrong_arguments"),
    Mutant("the id of a job that was there is not new", "contract: whether_it_stored", "is_new=False", "is_new=True"),
    Mutant("a call fits the signature", "contract: stored_as_a_job", "self._signature.bind(*args, **kwargs)", "pass"),
    Mutant("a payload has all required fields and no others", "test_fields.py: where_the_value_is"),
    Mutant("a value of a union is restored as the type that it has", "test_fields.py: another_type_is_refused"),
    Mutant("a process has one default queue", "contract: one_default_queue", "opened.setdefault(\"default\", mine) is not mine", "opened.update(default=mine)"),
    Mutant("a key holds within its queue", HISTORY, "queue = :queue AND ", ""),
    Mutant("a full queue refuses a job", "contract: queue_at_its_limit", "max_pending IS NULL", "1"),
    Mutant("a full queue refuses a resubmit", "contract: after_every_verb", "    AND NOT EXISTS (SELECT 1 FROM queues WHERE name = jobs.queue AND NOT {HAS_ROOM})\n", ""),
    Mutant("a claimed job stops counting towards the limit", "contract: after_every_verb", '("UPDATE", "OF state, assigned_to, queue", "OLD", "-"),', ""),
    Mutant("a job that is pending again counts towards the limit", "contract: after_every_verb", '("UPDATE", "OF state, assigned_to, queue", "NEW", "+"),', ""),
    Mutant("a deleted job stops counting towards the limit", "contract: after_every_verb", '("DELETE", "", "OLD", "-"),', ""),
    Mutant("a copy counts what is pending", "contract: copy_counts"),
    Mutant("a partial copy that is used is left alone", "contract: partial_copy_in_which"),
    Mutant("a job that changed is copied again", "contract: partial_copy_brings", "there.get(row[0]) == tuple(row)", "row[0] in there"),
    Mutant("a key is a string", "contract: keys_are_no_strings"),
    Mutant("a name is not blank", "contract: blank_name", " and not value.isspace()", ""),
    Mutant("a full queue refuses a batch", "contract: queue_at_its_limit", "max_pending IS NULL", "1"),
    # the disk
    Mutant("a claim of the last attempt is synced", "contract: claimed_in_a_synced"),
    Mutant("enqueue and complete are synced", POWER, '"FULL"', '"NORMAL"'),
    Mutant("complete_and_dequeue is synced", POWER, "bool(completions)", "False"),
    Mutant("fail is synced", POWER, ", durable=True", ""),
    Mutant("a result that a task stores is synced", POWER, "result is not None)", "False)"),
    Mutant("the folder of a new queue is synced", POWER),
    Mutant("a backup's name is synced", "test_power_loss.py: backup"),
    Mutant("a backup is complete before it gets its name", "contract: backup_is_a_whole", "target.with_name", "target or target.with_name"),
    Mutant("no old log reappears next to a restored file", "test_power_loss.py: restore_leaves and stuck"),
    Mutant("a database that is open is not replaced", "test_restore.py: has_the_database_open", "try_lock_bytes(file) and ", ""),
    Mutant("a damaged backup is not restored", "test_restore.py: no_sound_queue", '!= "ok"', '== ""'),
    Mutant("a job file is synced", FILES),
    Mutant("a job file's first name is synced", FILES),
    Mutant("a job file's final name is synced", FILES),
    Mutant("a stamped copy is synced", FILES),
    Mutant("a stamped copy's name is synced", FILES),
    Mutant("a queue that is created during a move is paused", "test_move.py: created_during", "THEN 2", "THEN 0"),
    Mutant("nothing is moved while a job runs", "test_move.py: created_during"),
    Mutant("ids may restart after a finished move", "test_move.py: finishing_a_move_again", "here.attempt == mark.attempt", "True"),
    Mutant("the application's triggers do not fire in a copy", "test_move.py: do_not_fire"),
    Mutant("a migration is one transaction", "test_commit_points.py: killed and schema"),
    # errors
    Mutant("an interrupted call is rolled back", "test_commit_points.py: fails and lost"),
    Mutant("a failed call releases the lock", "contract: while_the_lock_was_held"),
    Mutant("a queue that is not closed leaves no files open", "contract: not_closed_leaves"),
    Mutant("a failed opening closes its files", "contract: opening_that_fails_closes"),
    Mutant("a failed savepoint is rolled back", "contract: nested_transaction"),
    Mutant("transactions end in the order in which they nest", "contract: wrong_order"),
    Mutant("a signal handler cannot use the queue it interrupted", "contract: signal_handler"),
    Mutant("a call that was interrupted does not keep the transaction of its caller open", "contract: transaction_of_its_caller"),
    Mutant("a transaction that was interrupted and not ended is rolled back", "contract: beginning_of_any_function"),
    Mutant("a consumer whose locks were deleted stops", "contract: locks_were_deleted", "not all(me.slot.is_linked()", "not any(True or me.slot.is_linked()"),
    # whose file it is
    Mutant("a child closes inherited connections", "test_processes.py: safely", "self.connection.close()", "_inherited_open.setdefault(Path(), []).append(self.connection)"),
    Mutant("a child forked inside a transaction is refused", "contract: forked_inside_a_transaction"),
    Mutant("a fork waits for threads inside SQLite", "test_processes.py: fork_during_calls", "timeout=max(0, until - time.monotonic())", "blocking=False"),
    Mutant("another program's file is refused", "contract: another_program", "owner != APPLICATION_ID", "False"),
    Mutant("a closed descriptor of the database is not written", "contract: whose_descriptors_other_code_has_closed"),
    Mutant("SQLite is not given a closed descriptor that it has kept", "contract: whose_descriptors_other_code_has_closed"),
    Mutant("a replaced database is not written", "contract: pulled_away"),
    Mutant("a queue that was opened stays with its file", "contract: replaced_before_its_first_use"),
    Mutant("a new connection opens the same files as the others", "contract: pulled_away"),
    Mutant("locks survive a copy of the database", "contract: copies_its_database"),
    Mutant("a transaction that lost its lock is rolled back", "contract: lost_its_lock"),
    Mutant("a deleted log is not written back", "contract: write_it_back"),
    Mutant("a log that others truncate or delete in order is not missing", "contract: truncates_or_deletes_the_log", "look() == before", "True"),
    Mutant("a deleted log is not recreated", "contract: deleted_log_is_not_recreated"),
    Mutant("another database's log is refused", "contract: took_the_place"),
    Mutant("locks of other connections are kept", "contract: leaves_the_first_one", " and _count_open(key, locks._files) == 0", ""),
    Mutant("a newer schema is refused", "contract: newer_schema"),
    Mutant("a network drive is refused", "contract: network_drive"),
    Mutant("a network drive is recognized by its last mount", "contract: last_mount", "in _mounts() if", "in _mounts()[::-1] if"),
    Mutant("a file with two hard links is refused", "contract: two_names"),
    Mutant("a file of one byte is refused", "contract: no_database_is_refused"),
    Mutant("a file that is mounted without its folder is refused", "contract: mounted_without"),
    Mutant("a file that was written in part is not mapped", "contract: full_within_a_lock_file", " and os.write(file, bytes(size)) < size", ""),
    Mutant("a full disk is not the end of a program that waits for room", "contract: full_within_a_lock_file", "QueueFull if", "QueueError if"),
    Mutant("a file without our tables is refused", "contract: only_claims"),
    Mutant("a lease exists exactly while processing", "contract: guarantee_8", "(lease_token IS NULL) = (lease_expires_at IS NULL)", "1"),
    Mutant("a file from before 0.1 is refused", "contract: created_before"),
    Mutant("a payload is JSON", "contract: not_json", "CHECK (json_valid(payload)), ", ""),
    Mutant("a value has the type of its column", "contract: not_json", "{strict}", ""),
    Mutant("files are private", "contract: private_and_usable", "0o600", "0o644"),
    Mutant("files are usable", "contract: private_and_usable"),
    # looking
    Mutant("a search covers text beyond ASCII", "contract: as_it_is_read", '            f"OR {self._BYTES.format(column)} <> length({column})"\n', ""),
    Mutant("a search covers JSON escapes", "contract: another_program_has_formatted", " OR {column} LIKE :escaped ESCAPE '!' ", " "),
    Mutant("a search matches only the displayed text", "contract: text_that_is_not_shown", 'filters["shown"](job) if filters["shown"] else job', "job"),
    Mutant("a search by a path compares the value there", "contract: value_at_a_path", ' and not _has(job.payload, filters["path"], filters["value"])', " and False"),
    Mutant("a search by error finds one group", "contract: variable_parts_only", '"fingerprint" in filters and ', "False and "),
    Mutant("a job that left its state is not found", "contract: changes_during_a_search"),
]
# fmt: on


def mutate(mutant: Mutant, folder: Path) -> None:
    (folder / "tests").mkdir()
    for each in (*ROOT.glob("*.py"), *(ROOT / name for name in ("pyproject.toml", "supervisord.conf", "Procfile"))):
        shutil.copy2(each, folder)  # and its time, by which Python finds the compiled code
    for name in ("pqueue_tools", ".streamlit"):
        shutil.copytree(ROOT / name, folder / name)
    for name in TESTS:
        shutil.copy2(ROOT / "tests" / name, folder / "tests")
    (folder / "__pycache__").symlink_to(ROOT / "__pycache__")
    if mutant.guard:
        (path,) = (path for path in sources(folder) if marks(mutant.guard, path.read_text()))
        path.write_text(without_guard(mutant, path.read_text()))


def sources(folder: Path) -> list[Path]:
    return [*folder.glob("*.py"), *folder.glob("pqueue_tools/*.py")]


def marks(guard: str, text: str) -> list[re.Match[str]]:
    return list(re.finditer(rf"^ *# guard: {re.escape(guard)}\n", text, re.MULTILINE))


def without_guard(mutant: Mutant, text: str) -> str:
    (mark,) = marks(mutant.guard, text)
    number = text.count("\n", 0, mark.start()) + 1
    statements = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt) and node.lineno > number]
    statement = min(statements, key=lambda node: node.lineno)
    place = statement.test if isinstance(statement, ast.If) and not mutant.old else statement
    start, end = _offset(text, place.lineno, place.col_offset), _offset(text, place.end_lineno, place.end_col_offset)
    kept = text[start:end]
    if not mutant.old:
        changed = "False" if place is not statement else "pass"
    else:
        assert mutant.old in kept, f"expected {mutant.old!r} below the mark of {mutant.guard!r}, got {kept!r}"
        changed = kept.replace(mutant.old, mutant.new, 1)
    return text[:start] + changed + text[end:]


def _offset(text: str, line: int | None, column: int | None) -> int:
    before = text.splitlines(keepends=True)[: (line or 0) - 1]
    whole = text.splitlines(keepends=True)[(line or 0) - 1]
    return sum(map(len, before)) + len(whole.encode()[:column].decode())


def judge(killer: str, folder: Path, *, is_whole: bool = False) -> subprocess.CompletedProcess[str]:
    """Run what should notice, on the folder's pqueue.py."""
    file, _, names = killer.partition(": ")
    if file == HISTORY:
        arguments = [str(folder / "tests" / "test_histories.py"), str(folder), str(HISTORIES)]
    elif file == "contract":
        arguments = ["-m", "unittest", "test_pqueue", "-f", *(f"-k{name.strip('()')}" for name in names.split(" or "))]
    else:
        arguments = ["-m", "pytest", "-qx", "--assert=plain", f"tests/{file}", "-k", names]
    variables = {
        **os.environ,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # and assertions are not rewritten: to load quickly
        "PYTHONDONTWRITEBYTECODE": "1",  # the code of a mutant stays its own
    }
    if not is_whole:
        variables["PQUEUE_TEST_PATIENCE"] = "30"  # what a mutant has broken may never happen
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=None if is_whole else 900,
    )


def kill(mutant: Mutant) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        mutate(mutant, Path(folder))
        return judge(mutant.killer, Path(folder), is_whole=not mutant.guard)


def killers() -> list[str]:
    """Return all that kills a mutant, each file once."""
    names: dict[str, set[str]] = {}
    for file, _, name in (mutant.killer.partition(": ") for mutant in MUTANTS):
        names.setdefault(file, set()).add(f"({name})")
    return [HISTORY if file == HISTORY else f"{file}: ({' or '.join(sorted(found))})" for file, found in names.items()]


WHOLE = [Mutant("", killer) for killer in killers()]  # so that no killer fails on whatever it is given


@pytest.fixture(autouse=True)
def tidy():
    """Leave nothing to look for: the mutants run in child processes."""


@pytest.fixture(scope="module")
def verdicts(request):
    """Run those that were chosen, several at a time: what notices a mutant often waits long for what never comes."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        yield {each["mutant"]: pool.submit(kill, each["mutant"]) for each in parameters if "mutant" in each}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.guard)
def test_queue_without_a_guard_is_caught(mutant, verdicts):
    verdict = verdicts[mutant].result()
    assert verdict.returncode == 1, verdict.stdout + verdict.stderr


@pytest.mark.parametrize("mutant", WHOLE, ids=lambda mutant: mutant.killer.partition(":")[0])
def test_unchanged_queue_passes_the_checks_that_kill_the_mutants(mutant, verdicts):
    verdict = verdicts[mutant].result()
    assert verdict.returncode == 0, verdict.stdout + verdict.stderr


def test_docs_list_the_mutants():
    docs = (ROOT / "docs/guarantees.md").read_text()
    listed = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", docs[docs.index("| guard removed") :], re.MULTILINE)
    assert listed[1:] == [(each.guard, "a history" if each.killer == HISTORY else each.killer) for each in MUTANTS]


def test_mark_of_each_guard_has_a_mutant():
    marks = [
        mark for path in sources(ROOT) for mark in re.findall(r"^ *# guard: (.+)\n", path.read_text(), re.MULTILINE)
    ]
    assert sorted(marks) == sorted(mutant.guard for mutant in MUTANTS)


if __name__ == "__main__":
    for mutant in MUTANTS:
        verdict = kill(mutant)
        why = verdict.stdout.strip().splitlines()[:1] if mutant.killer == HISTORY else []
        print("killed" if verdict.returncode == 1 else "ALIVE ", mutant.guard, "|", mutant.killer, *why, flush=True)
