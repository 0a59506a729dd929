"""Remove each guard of pqueue.py, and some of the programs, in turn, in a copy, and see that some check notices.

`python tests/test_mutants.py` lists the mutants and what kills each.
"""

# ruff: noqa: E501 - a mutant is one line

from __future__ import annotations

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
    "test_power_loss.py",
    "test_move.py",
    "test_processes.py",
    "test_restore.py",
    "record_writes.c",
)


@dataclass(frozen=True)
class Mutant:
    guard: str
    old: str
    new: str
    killer: str = "history"  # or "contract: part of a test's name", or a file of tests and part of a test's name
    file: str = "pqueue.py"


POWER = "test_power_loss.py: nothing_that_returned"
FILES = "test_power_loss.py: each_file_with_its_job and full"
# fmt: off
MUTANTS = [
    # who may settle
    Mutant("a settling verb needs the current token", " AND lease_token = :token", ""),
    Mutant("complete needs a held lease", "if not _complete(tx, job, encoded", "if None is _complete(tx, job, encoded"),
    Mutant("the fused call tells a lost lease", "if not _complete(tx, job, result", "if None is _complete(tx, job, result"),
    Mutant("a batch completes under its tokens only", "\n    AND lease_token = json_extract(value, '$[1]')", "", "contract: reclaimed_job_among_others"),
    Mutant("fail, release, extend, update need a held lease", "            if not tx.change(sql, params):\n                raise _lost", "            if tx.change(sql, params) < 0:\n                raise _lost"),
    Mutant("each claim has a number of its own", "{next(me.claims)}", "0"),
    Mutant("a lost lease dooms its transaction", "error is None and self.lost is None and not ended", "error is None and not ended", "contract: lost_lease_undoes_the_transaction"),
    # attempts
    Mutant("an attempt counts when it is claimed", "attempts = attempts + 1, consumer", "attempts = attempts, consumer"),
    Mutant("no attempt after the last", "again = retry and job.attempts < job.max_attempts", "again = retry"),
    Mutant("no delivery after the last attempt was lost", "WHERE {HELD} AND attempts < max_attempts", "WHERE {HELD}"),
    Mutant("a released attempt does not count", "state = 'pending', attempts = attempts - 1,", "state = 'pending',"),
    Mutant("an attempt that an operator ended does not count", "CASE state WHEN 'processing' THEN 1 ELSE 0 END", "0"),
    Mutant("a resubmitted job has all its attempts", "run_at = :now, attempts = 0,", "run_at = :now,"),
    Mutant("a job delivered before comes alone", "return max(1, next(alone, len(attempts)))", "return max(1, len(attempts))", "contract: beside_one_that_kills"),
    Mutant("a job that may run once comes alone", "if made or (most == 1 and not prefetches))", "if made)", "contract: may_run_once_is_taken_alone"),
    Mutant("an attempt counts when the job begins", "if not self._has_begun(tx, job):", "if False:", "contract: had_not_begun"),
    Mutant("what had begun is not returned uncounted", "return not is_known or job_id in words", "return job_id not in words", "contract: had_not_begun"),
    Mutant("what had begun before a power cut is not known", "words[0] == boot() != 0 and", "", "contract: started_anew"),
    Mutant("a job whose lease is over does not begin", "or self._time(now) >= job.lease_expires_at:", "or False:", "contract: not_begun_when_its_lease"),
    Mutant("a job is noted as begun only while its lease lasts", "        self._expect_lease(job, now)\n        self._note_begun(job)", "        self._note_begun(job)", "contract: not_begun_when_its_lease"),
    Mutant("who takes over a slot first takes back its jobs", "                    self._recover(tx, [], self._time(now))", "                    pass", "contract: taken_over"),
    Mutant("a consumer that closes returns its jobs", "            self._release(tx, _job(row), self._time(now))", "            pass", "contract: closes_returns"),
    # who may claim, and what
    Mutant("a paused queue delivers nothing", "WHERE q.paused = 0", "WHERE 1 = 1"),
    Mutant("a paused queue delivers no assigned job", "AND queue NOT IN (SELECT name FROM queues WHERE paused <> 0) ", "", "contract: paused_queue"),
    Mutant("an assigned job is for its consumer", "state = 'pending' AND assigned_to IS NULL\n     ORDER BY", "state = 'pending'\n     ORDER BY"),
    Mutant("a consumer gets what is assigned to it only", "AND assigned_to = :consumer", "AND assigned_to IS NOT NULL"),
    Mutant("a consumer gets from its queues only", '"" if queues is None else f"AND', '"" if True else f"AND'),
    Mutant("order: priority first", 'ORDER = "priority DESC, run_at, id"', 'ORDER = "run_at, id"'),
    Mutant("order: then the time it was due", 'ORDER = "priority DESC, run_at, id"', 'ORDER = "priority DESC, id"'),
    Mutant("order: then the id", 'ORDER = "priority DESC, run_at, id"', 'ORDER = "priority DESC, run_at, -id"', "contract: by_priority_then_due"),
    # time and death
    Mutant("a lease is not taken back before it ran out", "WHERE state = 'processing' AND lease_expires_at <= :now\n", "WHERE state = 'processing'\n"),
    Mutant("a job is not promoted before it is due", "state = 'scheduled' AND run_at <= :now ORDER", "state = 'scheduled' ORDER"),
    Mutant("what is due is promoted", "    if due:", "    if False:"),
    Mutant("what expired is taken back", "    if expired:", "    if False:", "contract: did_not_finish"),
    Mutant("the dead lose their jobs at once", "    if dead is not None:", "    if False:", "contract: killed_consumer"),
    Mutant("the living keep their jobs", " AND consumers.state <> 'running')", ")"),
    Mutant("who holds its lock is alive", "not (slots := self._slots) or slot is None or slots.is_taken(slot)", "False"),
    # whose turn it is
    Mutant("a released lock goes to the other lane", "sorted(numbers, key=kind.__eq__)", "sorted(numbers, key=kind.__ne__)", "contract: that_came_first"),
    Mutant("releasing the lock wakes up a waiter", "            _ring(self._bells[heir])", "            pass", "contract: woken_one_after"),
    Mutant("releasing a lane wakes up the next", "            _ring(self._bells[0])", "            pass", "contract: woken_one_after"),
    Mutant("nobody overtakes a writer that has waited for long", "if repeats or now - self._shared[self.WAITING_SINCE + kind] >= OVERTAKE_SECONDS:", "if repeats:", "contract: newcomer"),
    Mutant("nobody takes turn after turn past a waiter", "if repeats or now - self", "if now - self", "contract: writer_in_a_loop"),
    Mutant("a lock is not kept for the dead", "return 0 < self._shared[self.RESERVED_UNTIL] - time.monotonic() <= HANDOVER_SECONDS", "return self._shared[self.RESERVED_UNTIL] > 0", "contract: died_waiting"),
    Mutant("what a lock says is void after a reboot", "time.monotonic() <= HANDOVER_SECONDS", "time.monotonic()", "contract: before_a_reboot"),
    Mutant("nobody waits again for a stopped process", "acquired or left <= 0 or self._held_seconds() >= TURN_SECONDS", "acquired or left <= 0", "contract: process_stopped_in"),
    Mutant("a problem with a lock needs a live holder", "        if self.try_acquire():  # its holder is dead", "        if False:", "contract: check_names_a_process"),
    # operators
    Mutant("resubmit takes finished jobs", "error = NULL WHERE id = :id AND state IN {FINISHED}", "error = NULL WHERE id = :id"),
    Mutant("resubmit respects the key", "    AND NOT EXISTS (SELECT 1 FROM jobs o WHERE o.queue = jobs.queue AND o.key = jobs.key AND o.state IN {UNFINISHED})", ""),
    Mutant("mark_failed takes unfinished jobs", "finished_at = :now, error = :error, {NO_LEASE}\nWHERE id = :id AND state IN {UNFINISHED}", "finished_at = :now, error = :error, {NO_LEASE}\nWHERE id = :id"),
    Mutant("cancel takes unfinished jobs", "{NO_LEASE} WHERE id = :id AND state IN {UNFINISHED}", "{NO_LEASE} WHERE id = :id"),
    Mutant("assign takes unfinished jobs", "ELSE 0 END, {NO_LEASE}\nWHERE id = :id AND state IN {UNFINISHED}", "ELSE 0 END, {NO_LEASE}\nWHERE id = :id"),
    Mutant("an operator is told of a refusal", "            if not tx.change(sql, params):\n                raise _refusal", "            if tx.change(sql, params) < 0:\n                raise _refusal"),
    Mutant("assign ends the running delivery", "attempts = attempts - CASE state WHEN 'processing' THEN 1 ELSE 0 END, {NO_LEASE}", "attempts = attempts"),
    Mutant("running jobs are not deleted", "if running and not force:", "if False:", "contract: not_deleted_unless_forced"),
    Mutant("prune takes old jobs only", "finished_at < :before\n     AND id <", "1\n     AND id <"),
    Mutant("prune keeps the newest", "AND id < (SELECT max(id) FROM jobs) ORDER", "ORDER", "contract: no_id_is_given_twice"),
    # producing
    Mutant("one unfinished job per key", "ON CONFLICT (queue, key) WHERE key IS NOT NULL AND state IN {UNFINISHED} DO NOTHING\n", ""),
    Mutant("a key holds within its queue", "WHERE queue = :queue AND key = :key AND", "WHERE key = :key AND"),
    Mutant("a full queue refuses a job", "(max_pending IS NULL OR max_pending >", "(1 OR max_pending >", "contract: queue_at_its_limit"),
    Mutant("a full queue refuses a resubmit", "    AND NOT EXISTS (SELECT 1 FROM queues WHERE name = jobs.queue AND NOT {HAS_ROOM})\n", "", "contract: after_every_verb"),
    Mutant("a claim makes room", '("UPDATE", "OF state, assigned_to, queue", "OLD", "-"),', "", "contract: after_every_verb"),
    Mutant("what is pending again takes room", '("UPDATE", "OF state, assigned_to, queue", "NEW", "+"),', "", "contract: after_every_verb"),
    Mutant("what is deleted makes room", '("DELETE", "", "OLD", "-"),', "", "contract: after_every_verb"),
    Mutant("a copy counts what is pending", "            target._count_pending(copy", "            print(copy", "contract: copy_counts"),
    Mutant("a key is a string", "        if not isinstance(key, str):", "        if False:", "contract: keys_are_no_strings"),
    Mutant("a full queue refuses a batch", 'if room is not None and room < row["number"]:', "if False:", "contract: queue_at_its_limit"),
    Mutant("a batch at once is for a queue without a limit", "name = :queue AND max_pending IS NULL)", "name = :queue)", "contract: queue_at_its_limit"),
    # the disk
    Mutant("a claim of the last attempt is synced", "if not durable and any(job.attempts == job.max_attempts for job in jobs):", "if False:", "contract: claimed_in_a_synced"),
    Mutant("enqueue and complete are synced", '"FULL" if durable and', '"NORMAL" if durable and', POWER),
    Mutant("the fused call is synced", "durable=bool(settled)", "durable=False", POWER),
    Mutant("fail is synced", 'event="failed", durable=True', 'event="failed"', POWER),
    Mutant("a result that a task stores is synced", "durable=result is not None", "durable=False", POWER),
    Mutant("the folder of a new queue is synced", "        sync(missing.parent)", "        pass", POWER),
    Mutant("a backup's name is synced", "            sync(target.parent)\n", "", "test_power_loss.py: backup"),
    Mutant("a backup takes its name last", "        part = target.with_name(", "        part = target or target.with_name(", "contract: backup_is_a_whole"),
    Mutant("no old log reappears next to a restored file", "    sync(target.parent)\n    part.replace(target)", "    part.replace(target)", "test_power_loss.py: restore_leaves"),
    Mutant("a database that is open is not replaced", "is_free and _try_lock_bytes(file) and", "is_free and", "test_restore.py: has_the_database_open"),
    Mutant("a damaged backup is not restored", '.fetchone()[0]) != "ok":', '.fetchone()[0]) == "":', "test_restore.py: no_sound_queue"),
    Mutant("a job file is synced", "            pqueue.sync_file(file.fileno())\n", "", FILES, "producer.py"),
    Mutant("a job file's first name is synced", "            pqueue.sync(self.directory)  # or a power cut", "            pass  # or a power cut", FILES, "producer.py"),
    Mutant("a job file's final name is synced", "            pqueue.sync(self.directory)\n", "", FILES, "producer.py"),
    Mutant("a stamped copy is synced", "    pqueue.sync_file(target.fileno())\n", "", FILES, "consumer.py"),
    Mutant("a stamped copy's name is synced", "    pqueue.sync_file(folder)\n", "", FILES, "consumer.py"),
    Mutant("a queue that is created during a move is paused", "THEN 2 ELSE 0 END", "THEN 0 ELSE 0 END", "test_move.py: created_during"),
    Mutant("nothing is moved while a job runs", "                if _running(source):\n                    return None", "                if False:\n                    return None", "test_move.py: created_during"),
    Mutant("a finished move knows that ids begin anew", "if at_attempt == attempt else 0", "if True else 0", "test_move.py: finished_again"),
    Mutant("the application's triggers do not fire in a copy", '        copy.execute(f"DROP TRIGGER {_quoted(name)}")', "        continue", "test_move.py: do_not_fire"),
    Mutant("a migration is one transaction", '                connection.execute("BEGIN IMMEDIATE")\n                for', "                for", "test_commit_points.py: killed and schema"),
    # errors
    Mutant("an interrupted call is rolled back", "                self._roll_back()\n            self.busy", "                pass\n            self.busy", "test_commit_points.py: fails and lost"),
    Mutant("a failed call gives its turn back", "                self._queue._exit()\n\n    def _roll_back", "                pass\n\n    def _roll_back", "contract: while_the_turnstile_was_held"),
    Mutant("a failed opening closes what it opened", "        except BaseException:\n            self.close()\n            raise\n        _queues", "        except BaseException:\n            raise\n        _queues", "test_commit_points.py: fails and opening"),
    Mutant("a failed savepoint is undone", 'self.run("ROLLBACK TO nested")', "pass", "contract: nested_transaction"),
    Mutant("transactions end in the order in which they nest", "if self.tangled:", "if False:", "contract: wrong_order"),
    Mutant("a signal handler cannot use the queue it interrupted", "        if self.busy:\n            raise", "        if False:\n            raise", "contract: signal_handler"),
    Mutant("a consumer whose locks were deleted is told", "if not all(me.slot.is_there()", "if not any(True or me.slot.is_there()", "contract: locks_were_deleted"),
    # whose file it is
    Mutant("a child closes what it inherited", "            self.connection.close()\n        self._has_turn", "            _inherited.setdefault(Path(), []).append(self.connection)\n        self._has_turn", "test_processes.py: safely"),
    Mutant("a child forked inside a transaction is refused", "if self.path in _inherited:", "if False:", "contract: forked_inside_a_transaction"),
    Mutant("nobody forks while a thread is inside SQLite", "each.in_use.acquire(timeout=max(0, until - time.monotonic()))", "each.in_use.acquire(blocking=False)", "test_processes.py: middle"),
    Mutant("another program's file is refused", "if owner != APPLICATION_ID and", "if False and", "contract: another_program"),
    Mutant("a database that was pulled away is not written", "            self.files.expect_in_place()\n            if self._synchronous", "            if self._synchronous", "contract: pulled_away"),
    Mutant("a new connection needs the files of the others", "                    other.files.expect_in_place()", "                    pass", "contract: pulled_away"),
    Mutant("locks outlast a copy of the database", "        locks._set(fcntl.F_RDLCK)\n", "", "contract: copies_its_database"),
    Mutant("a transaction that lost its lock is undone", "                self._expect_lock()\n", "", "contract: lost_its_lock"),
    Mutant("a log that was deleted is not written back", "            except DatabaseReplaced:\n                _keep_log(self.connection)\n", "            except DatabaseReplaced:\n                locks.release()\n", "contract: write_it_back"),
    Mutant("a log that was deleted is not begun anew", "        if FileLocks.lack_log(self.path):", "        if False:", "contract: begun_anew"),
    Mutant("another database's log is refused", "                self._expect_own_log()\n", "                pass\n", "contract: took_the_place"),
    Mutant("locks of other connections are kept", "if not locks._users and not _has_open(key, locks._files):", "if not locks._users:", "contract: leaves_the_first_one"),
    Mutant("a newer schema is refused", "if version > len(MIGRATIONS):", "if False:", "contract: newer_schema"),
    Mutant("a network drive is refused", "if kind.startswith(SHARED_FILE_SYSTEMS):", "if False:", "contract: network_drive"),
    Mutant("a network drive is known by its last mount", "under = {len(mount[1]): mount[2] for mount in mounts", "under = {len(mount[1]): mount[2] for mount in mounts[::-1]", "contract: last_mount"),
    Mutant("a file of two names is refused", "if found.st_nlink > 1:", "if False:", "contract: two_names"),
    Mutant("a file without our tables is refused", "if version and ours < len(TABLES):", "if False:", "contract: only_claims"),
    Mutant("a lease stands exactly while processing", "    CHECK ((lease_token IS NULL) = (lease_expires_at IS NULL))", "    CHECK (1)", "contract: guarantee_8"),
    Mutant("files are private", "os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600", "os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644", "contract: private_whatever"),
    # looking
    Mutant("a search looks at text beyond ASCII", '            f"OR {self._BYTES.format(column)} <> length({column})"\n', "", "contract: as_it_is_read"),
    Mutant("a search looks at what JSON has escaped", " OR {column} LIKE :escaped ESCAPE '!' ", " ", "contract: in_another_form"),
    Mutant("a search finds only what is shown", "if shown is None else shown(_job(row))", "", "contract: text_that_is_not_shown"),
    Mutant("a job that left its state is not found", '        load += " AND state = :state" if "state" in params else ""\n', "", "contract: leaves_its_state"),
]
# fmt: on


def mutate(mutant: Mutant, folder: Path) -> None:
    (folder / "tests").mkdir()
    for each in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(each, folder)
    text = (ROOT / mutant.file).read_text()
    assert mutant.old in text, f"{mutant.file} has no guard {mutant.old!r} any more: write this mutant anew"
    (folder / mutant.file).write_text(text.replace(mutant.old, mutant.new, 1))
    for name in TESTS:
        shutil.copy(ROOT / "tests" / name, folder / "tests")


def judge(killer: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run what should notice, on the folder's pqueue.py."""
    file, _, names = killer.partition(": ")
    if file == "history":
        arguments = [str(folder / "tests" / "test_histories.py"), str(folder), str(HISTORIES)]
    elif file == "contract":
        arguments = ["-m", "pytest", "-qx", "test_pqueue.py", "-k", f"{names} and not NormalDurability"]
    else:
        arguments = ["-m", "pytest", "-qx", f"tests/{file}", "-k", names]
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=900)


def kill(mutant: Mutant) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        mutate(mutant, Path(folder))
        return judge(mutant.killer, Path(folder))


WHOLE = [Mutant("none", "", "", killer) for killer in sorted({mutant.killer for mutant in MUTANTS})]


@pytest.fixture(autouse=True)
def tidy():
    """Leave nothing to look for: the mutants run in children beside the tests."""


@pytest.fixture(scope="module")
def verdicts(request):
    """Run those that were chosen, as many at a time as there are processors."""
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {each["mutant"]: pool.submit(kill, each["mutant"]) for each in parameters if "mutant" in each}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.guard)
def test_queue_without_a_guard_is_caught(mutant, verdicts):
    verdict = verdicts[mutant].result()
    assert verdict.returncode == 1, verdict.stdout + verdict.stderr


@pytest.mark.parametrize("mutant", WHOLE, ids=lambda mutant: mutant.killer)
def test_whole_queue_passes_what_kills_the_mutants(mutant, verdicts):
    verdict = verdicts[mutant].result()
    assert verdict.returncode == 0, verdict.stdout + verdict.stderr


def test_list_of_the_mutants_stands_in_the_docs():
    docs = (ROOT / "docs/guarantees.md").read_text()
    told = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", docs[docs.index("| guard removed") :], re.MULTILINE)
    assert told[1:] == [(each.guard, "a history" if each.killer == "history" else each.killer) for each in MUTANTS]


if __name__ == "__main__":
    for mutant in MUTANTS:
        verdict = kill(mutant)
        why = verdict.stdout.strip().splitlines()[:1] if mutant.killer == "history" else []
        print("killed" if verdict.returncode == 1 else "ALIVE ", mutant.guard, "|", mutant.killer, *why, flush=True)
