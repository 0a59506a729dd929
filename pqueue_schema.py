"""The schema of a queue, and the statements that all backends share."""

from __future__ import annotations

from pqueue_values import DEFAULT_MAX_ATTEMPTS, MAX_ID, Job, SchemaMismatch

MAX_GROUPS = 10_000  # groups of failed jobs
FAILURE_CHARS = 200  # indexed characters of an error, by which failed jobs are grouped
APPLICATION_ID = 0x70717565  # "pque", in the header of an SQLite file

UNFINISHED = ("waiting", "scheduled", "pending", "processing")
FINISHED = ("completed", "failed", "cancelled")
STATES = UNFINISHED + FINISHED
UNTAKEN = ("waiting", "scheduled", "pending")

ENDS = ("failed", "expired", "died", "released", "snoozed")  # events that end an attempt; others are of operators

# A job holds its key until key_expires_at, which the first enqueue after that time sets to NULL; without one, until the
# job has finished, or was delivered for the first time. A job that holds a key is the only one of its queue and task.
# guard: a key until started is free from the first delivery on
HOLDS_KEY = f"""key IS NOT NULL AND (key_expires_at IS NOT NULL OR state IN {UNFINISHED}
    AND (key_until = 'finished' OR key_until = 'started' AND started_at IS NULL))"""

# A job that is cancelled if it does not start in time.
EXPIRES = f"expires_at IS NOT NULL AND state IN {UNTAKEN}"

# {id}, {bigint} and {float} are types. {strict}, {without_rowid} and lines that begin with {sqlite} are for SQLite,
# which checks the types of values only in STRICT tables. PostgreSQL always does, and would parse the JSON again at each
# update of the row.
# {task} is the task in an index: there a hash, as three names of 255 characters may exceed an index row of PostgreSQL.
SQLITE_TYPES = {
    "id": "INTEGER PRIMARY KEY",
    "bigint": "INTEGER",
    "float": "REAL",
    "sqlite": "",
    "strict": "\n STRICT",
    "without_rowid": "\n WITHOUT ROWID, STRICT",
    "task": "task",
    "shard": "1",
}

# A migration is a list of statements; user_version is the number of migrations applied to a file. Once 0.1 is released,
# change the schema by adding migrations, never by editing them.
# guard: a lease exists exactly while processing
# guard: a payload is JSON
# guard: a value has the type of its column
MIGRATIONS: list[list[str]] = [
    [
        """
CREATE TABLE jobs (
    id               {id},           -- increases with every job
    queue            TEXT NOT NULL,  -- queues.name
    task             TEXT NOT NULL,  -- name of the task
    payload          TEXT NOT NULL,  -- JSON
    state            TEXT NOT NULL,  -- see the CHECK below
    priority         INTEGER NOT NULL,    -- higher first
    run_at           {float} NOT NULL,    -- when it is due, Unix seconds; later after each retry
    expires_at       {float},        -- it is cancelled if it does not start before, Unix seconds; NULL: never
    attempts         INTEGER NOT NULL DEFAULT 0,  -- deliveries so far, including the current one
    max_attempts     INTEGER,        -- deliveries before it is failed; NULL: that of the task, until first delivered
    key              TEXT,           -- NULL: none
    key_until        TEXT,           -- the job holds the key until it has 'finished' or 'started'; else NULL
    key_expires_at   {float},        -- or until then, Unix seconds; else NULL
    assigned_to      TEXT,           -- the only consumer that may run it; NULL: any
    consumer         TEXT,           -- current or last consumer; NULL: never delivered
    lease_token      TEXT,           -- consumers.token, '.', number of the claim; NULL unless processing
    lease_expires_at {float},        -- Unix seconds; NULL unless processing
    created_at       {float} NOT NULL,    -- Unix seconds
    started_at       {float},        -- start of the last delivery, Unix seconds; NULL: never delivered
    finished_at      {float},        -- Unix seconds; NULL until completed, failed or cancelled
    progress         {float},        -- 0 to 1, as stored by the task; NULL: none
    result           TEXT,           -- JSON; until completed, the partial result of `update`, if any; NULL: none
    error            TEXT,           -- of the last failed attempt; NULL: none
    meta             TEXT,           -- JSON object of what @metadata returned; NULL: none
    "group"          TEXT NOT NULL DEFAULT '',  -- its group within the queue; '': none
    counted          INTEGER,        -- 1: its last delivery counts towards queues.max_running
    waits_for        INTEGER NOT NULL DEFAULT 0,  -- unfinished jobs it waits for; above 0 if it failed with one of them
    has_dependents   INTEGER NOT NULL DEFAULT 0,  -- 1: it may be the parent in a row of dependencies
    CHECK (CASE state
        WHEN 'pending'    THEN attempts < max_attempts AND lease_token IS NULL AND finished_at IS NULL
        WHEN 'scheduled'  THEN attempts < max_attempts AND lease_token IS NULL AND finished_at IS NULL
        WHEN 'processing' THEN attempts <= coalesce(max_attempts, 0) AND lease_token IS NOT NULL AND finished_at IS NULL
        WHEN 'completed'  THEN attempts <= max_attempts AND lease_token IS NULL AND finished_at IS NOT NULL
        WHEN 'failed'     THEN attempts <= max_attempts AND lease_token IS NULL AND finished_at IS NOT NULL
        WHEN 'cancelled'  THEN attempts <= max_attempts AND lease_token IS NULL AND finished_at IS NOT NULL
        WHEN 'waiting'    THEN waits_for > 0 AND lease_token IS NULL AND finished_at IS NULL
        ELSE FALSE END),
    {sqlite} CHECK (json_valid(payload)), CHECK (result IS NULL OR json_valid(result)),
    {sqlite} CHECK (meta IS NULL OR json_valid(meta)),
    CHECK ((lease_token IS NULL) = (lease_expires_at IS NULL))
){strict}""",
        """
CREATE TABLE queues (
    name         TEXT PRIMARY KEY,
    paused       INTEGER NOT NULL DEFAULT 0,  -- 1: by an operator, 2: by a move; 0: not paused
    max_pending  INTEGER,                     -- limit of pending jobs; NULL: no limit
    pending      INTEGER NOT NULL DEFAULT 0,  -- unassigned pending jobs, counted while max_pending is set
    grouped      INTEGER NOT NULL DEFAULT 0,  -- 1: its groups take turns, see pqueue_groups
    max_running  INTEGER,                     -- limit of processing jobs of each group; NULL: no limit
    rate_jobs    INTEGER,                     -- limit of deliveries of each group ...
    rate_seconds {float},                     -- ... in any time of this length; NULL: no limit
    turn         {float} NOT NULL DEFAULT 0,  -- of the group that was served last
    unnamed_turn {float} NOT NULL DEFAULT 0,  -- of the jobs without a group
    keep_completed_seconds {float} DEFAULT 604800,   -- how long finished jobs are kept; NULL: for ever
    keep_failed_seconds    {float} DEFAULT 2592000,
    keep_cancelled_seconds {float} DEFAULT 2592000,
    max_wait_seconds {float},                -- expected wait of a due job; NULL: see pqueue_outcomes.MAX_WAIT_SECONDS
    max_failed_share {float},                -- expected share of failed attempts; NULL: see there, MAX_FAILED_SHARE
    pruned_at   {float} NOT NULL DEFAULT 0   -- when a consumer last deleted jobs that are kept no longer, Unix seconds
){strict}""",
        """
CREATE TABLE queue_tasks (  -- the tasks of each queue: a claim looks at the first jobs of each
    queue TEXT NOT NULL,  -- queues.name
    task  TEXT NOT NULL,
    PRIMARY KEY (queue, task)
){without_rowid}""",
        """
CREATE TABLE queue_groups (  -- the tasks of each group of a queue, those without a group excepted
    id      {id},
    queue   TEXT NOT NULL,  -- queues.name
    name    TEXT NOT NULL,
    task    TEXT NOT NULL,
    turn    {float} NOT NULL DEFAULT 0,  -- increases with each job; the lowest is next
    next_at {float} DEFAULT 0,           -- 0: may have a job to claim; -1: none; NULL: max_running are processing;
                                         -- else when the rate allows the next, Unix seconds
    UNIQUE (queue, name, task)
){strict}""",
        """
CREATE TABLE group_weights (  -- those other than 1
    queue  TEXT NOT NULL,
    name   TEXT NOT NULL,
    weight {float} NOT NULL,
    PRIMARY KEY (queue, name)
){without_rowid}""",
        """
CREATE TABLE group_starts (  -- the last deliveries of each group whose queue has a rate, at most rate_jobs
    queue TEXT NOT NULL,
    name  TEXT NOT NULL,
    n     {bigint} NOT NULL,  -- increases by 1
    at    {float} NOT NULL,   -- Unix seconds
    PRIMARY KEY (queue, name, n)
){without_rowid}""",
        """
CREATE TABLE consumers (
    id           {id},
    name         TEXT NOT NULL,  -- chosen by the caller; reused after a restart
    token        TEXT NOT NULL UNIQUE,  -- random, new at each start
    host         TEXT NOT NULL,
    pid          INTEGER NOT NULL,
    slot         INTEGER,        -- number of its lock and wake-up pipe; NULL: not available on this platform
    queues       TEXT,           -- JSON list of the queues it serves; NULL: all
    tasks        TEXT,           -- JSON list of the tasks it knows; NULL: all
    started_at   {float} NOT NULL,    -- Unix seconds
    last_seen_at {float} NOT NULL,    -- last heartbeat, Unix seconds
    state        TEXT NOT NULL,  -- running, stopped or dead
    completed    {bigint} NOT NULL DEFAULT 0,  -- number of jobs, as of the last heartbeat
    failed       {bigint} NOT NULL DEFAULT 0,  -- number of attempts, as of the last heartbeat
    {sqlite} CHECK (queues IS NULL OR json_valid(queues)), CHECK (tasks IS NULL OR json_valid(tasks)),
    CHECK (state IN ('running', 'stopped', 'dead'))
){strict}""",
        """
CREATE TABLE history (
    id      {id},
    job_id  {bigint} NOT NULL,   -- jobs.id; 0: none
    at      {float} NOT NULL,    -- Unix seconds
    event   TEXT NOT NULL,       -- failed, expired, died, released; by an operator: resubmitted, marked failed …
    actor   TEXT NOT NULL,       -- name of the consumer or the operator
    attempt INTEGER NOT NULL,    -- jobs.attempts at that time
    error   TEXT,                -- NULL: none
    started_at {float}           -- start of the attempt that ended, Unix seconds; NULL: none did
){strict}""",
        """
CREATE TABLE dependencies (  -- see pqueue_dependencies
    id           {id},
    job_id       {bigint} NOT NULL,  -- jobs.id
    parent_id    {bigint} NOT NULL,  -- jobs.id: the job runs after this one
    after_failed TEXT NOT NULL,      -- if the parent fails: 'fail' the job, too, or 'run' it; 'handle': it has failed
    UNIQUE (parent_id, job_id),
    CHECK (after_failed IN ('fail', 'run', 'handle'))
){strict}""",
        """
CREATE TABLE handlers (  -- see pqueue_handlers
    name TEXT PRIMARY KEY,  -- 'queue:' and the name of a queue, or 'task:' and that of a task
    task TEXT NOT NULL      -- that gets a job for each of its jobs that fails
){strict}""",
        """
CREATE TABLE schedules (  -- see pqueue_schedules.Schedule
    name          TEXT PRIMARY KEY,
    task          TEXT NOT NULL,
    payload       TEXT NOT NULL,     -- JSON
    queue         TEXT NOT NULL,
    priority      INTEGER NOT NULL,
    "group"       TEXT,              -- NULL: none
    cron          TEXT,              -- NULL: every_seconds
    zone          TEXT NOT NULL,     -- of cron
    every_seconds {float},           -- NULL: cron
    on_missed     TEXT NOT NULL,     -- once, skip or all
    overlap       INTEGER NOT NULL,  -- 1: also while the previous job is unfinished
    expire_seconds {float},          -- how long after its time a job may start; NULL: at any time
    origin        TEXT NOT NULL,     -- task, removed or schedule
    paused        INTEGER NOT NULL DEFAULT 0,
    next_at       {float} NOT NULL,  -- Unix seconds
    last_at       {float},           -- Unix seconds; NULL: no job yet
    last_job_id   {bigint},
    skipped       INTEGER NOT NULL DEFAULT 0,
    {sqlite} CHECK (json_valid(payload)),
    CHECK ((cron IS NULL) <> (every_seconds IS NULL)),
    CHECK (on_missed IN ('once', 'skip', 'all')),
    CHECK (origin IN ('task', 'removed', 'schedule'))
){strict}""",
        """
CREATE TABLE outcomes (  -- see pqueue_outcomes
    period  INTEGER NOT NULL,  -- its length: 60 or 3600 seconds; 0: the total
    at      {bigint} NOT NULL, -- when it began, Unix seconds; 0: the total
    queue   TEXT NOT NULL,
    task    TEXT NOT NULL,
    event   TEXT NOT NULL,     -- one of pqueue_outcomes.EVENTS, or counted: the last job counted as enqueued
    run     INTEGER NOT NULL,  -- bucket of the run time; -1: without a time
    wait    INTEGER NOT NULL,  -- bucket of the waiting time; -1: without a time
    shard   {bigint} NOT NULL DEFAULT {shard},  -- 0: it is in the total; else it is not yet, and was written by this
                                                -- connection of PostgreSQL: so none waits for the row of another
    number  {bigint} NOT NULL,
    run_seconds  {float} NOT NULL,  -- the sum of the run times
    wait_seconds {float} NOT NULL,  -- the sum of the waiting times
    PRIMARY KEY (period, at, queue, task, event, run, wait, shard)
){without_rowid}""",
        "CREATE INDEX outcomes_shards ON outcomes (at) WHERE shard <> 0",
        "CREATE INDEX schedules_due ON schedules (next_at) WHERE paused = 0",
        """CREATE INDEX jobs_claim ON jobs (queue, task, "group", priority DESC, run_at, id)
           WHERE state = 'pending' AND assigned_to IS NULL""",
        """CREATE INDEX jobs_assigned ON jobs (assigned_to, priority DESC, run_at, id)
           WHERE state = 'pending' AND assigned_to IS NOT NULL""",
        "CREATE INDEX jobs_waiting ON jobs (queue, run_at) WHERE state = 'waiting'",
        "CREATE INDEX jobs_scheduled ON jobs (run_at) WHERE state = 'scheduled'",
        f"CREATE INDEX jobs_expiring ON jobs (expires_at) WHERE {EXPIRES}",
        "CREATE INDEX jobs_processing ON jobs (lease_expires_at) WHERE state = 'processing'",
        """CREATE INDEX jobs_counted ON jobs (queue, "group") WHERE state = 'processing' AND counted = 1""",
        "CREATE INDEX queues_grouped ON queues (name) WHERE grouped = 1",
        "CREATE INDEX queue_groups_ready ON queue_groups (queue, task, turn, name) WHERE next_at = 0",
        "CREATE INDEX queue_groups_delayed ON queue_groups (next_at) WHERE next_at > 0",
        "CREATE INDEX jobs_finished ON jobs (state, queue, finished_at) WHERE finished_at IS NOT NULL",
        f"""CREATE INDEX jobs_failed ON jobs (task, substr(error, 1, {FAILURE_CHARS}), id, finished_at)
           WHERE state = 'failed'""",
        f"CREATE UNIQUE INDEX jobs_key ON jobs (queue, key, {{task}}) WHERE {HOLDS_KEY}",
        "CREATE INDEX history_job ON history (job_id)",
        f"CREATE INDEX history_operations ON history (id) WHERE event NOT IN {ENDS}",
        "CREATE INDEX dependencies_job ON dependencies (job_id)",
        "CREATE INDEX consumers_running ON consumers (id) WHERE state = 'running'",
    ]
]


def expect_known(name: object, version: int) -> None:
    """Raise SchemaMismatch if the queue of this name has the schema of a newer pqueue."""
    # guard: a newer schema is refused
    if version > len(MIGRATIONS):
        raise SchemaMismatch(
            f"cannot use {name}: expected schema {len(MIGRATIONS)} or older, got {version}: "
            "use the pqueue that wrote it, or a newer one"
        )


# Parts of statements

# These are in other words on PostgreSQL, where `translated` replaces them.
# The number of pending jobs of a queue with a limit.
PENDING = "queues.pending"
# The :payloads, a JSON array.
EACH_PAYLOAD = "json_each(:payloads)"
# Of the jobs :ids, a JSON array.
THESE = "IN (SELECT value FROM json_each(:ids))"
# Of the jobs that run after these.
CHILDREN = f"IN (SELECT job_id FROM dependencies WHERE parent_id {THESE})"
# Of the queues :queues, a JSON array; NULL: all.
AMONG_QUEUES = "(:queues IS NULL OR {queue} IN (SELECT value FROM json_each(:queues)))"
# Of the tasks :tasks, names each between newlines; NULL: all.
KNOWN = "(:tasks IS NULL OR instr(:tasks, char(10) || {task} || char(10)))"
# The maximum of a job's attempts. :known_attempts has those of tasks, unless they are the default: see pqueue_tasks.
# guard: the task of the consumer limits the attempts
MOST_ATTEMPTS = f"""coalesce(max_attempts, CASE WHEN :known_attempts IS NOT NULL THEN
    CAST(substr(:known_attempts, nullif(instr(:known_attempts, char(10) || task || char(9)), 0) + length(task) + 2)
         AS INTEGER) END, {DEFAULT_MAX_ATTEMPTS})"""

# The column of a field of Job
COLUMN_OF = {name: '"group"' if name == "group" else name for name in Job._fields}
COLUMNS = ", ".join(COLUMN_OF.values())
FLOATS = ("run_at", "expires_at", "lease_expires_at", "created_at", "started_at", "finished_at", "progress")
# In a RETURNING clause, SQLite returns a whole number of a REAL column as an integer.
# guard: times and progress are floats
RETURNED = ", ".join(f"{column} + 0.0 AS {name}" if name in FLOATS else column for name, column in COLUMN_OF.items())
# The id of the last job that SQLite has counted, and the time of the last completion; see pqueue_outcomes
_OF_COUNTED = "FROM outcomes WHERE period = 0 AND at = 0 AND queue = '' AND task = '' AND event = 'counted'"
LAST_COUNTED = f"coalesce((SELECT number {_OF_COUNTED}), 0)"
LAST_COMPLETION = f"coalesce((SELECT run_seconds {_OF_COUNTED}), 0.0)"
NO_LEASE = "lease_token = NULL, lease_expires_at = NULL"
COMPLETED = f"state = 'completed', finished_at = :now, progress = 1.0, error = NULL, {NO_LEASE}"
# Only a processing job has a token: see the CHECK above.
# guard: a verb under a lease needs the current token
HELD = "id = :id AND lease_token = :token"
HELD_BY_CONSUMER = "state = 'processing' AND substr(lease_token, 1, 16) = :token"
THESE_HELD = f"substr(lease_token, 1, 16) = :token AND id {THESE}"  # without the state: its index leads to all jobs
PENDING_IN_QUEUE = "queue = :queue AND state = 'pending' AND assigned_to IS NULL"
HAS_ROOM = f"(max_pending IS NULL OR max_pending > {PENDING})"
# guard: a full queue refuses a job
# guard: a full queue refuses a batch
HAS_ROOM_FOR = f"(max_pending IS NULL OR max_pending - {PENDING} >= :number)"
# A job with a group is delivered only from a queue whose groups take turns.
# guard: a queue with a group has its groups take turns
IN_TURN = "(:group = '' OR grouped = 1)"
IS_LISTED = "EXISTS (SELECT 1 FROM queue_tasks WHERE queue = :queue AND task = :task)"
# guard: order: priority first
# guard: order: then the due time
# guard: order: then the id
ORDER = "priority DESC, run_at, id"
# Ends an EXISTS or the like that concerns a row. The OFFSET keeps PostgreSQL from joining or hashing all rows instead.
FOR_EACH = "LIMIT 1 OFFSET 0"
KEY_IS_OVER = "(key_expires_at IS NULL OR key_expires_at <= :now)"
MOVES = "('moving', 'moved')"
# Of a finished job, which itself holds no key until it is finished or started
# guard: resubmit respects the key
KEY_IS_FREE = f"""(key_until IS NULL OR NOT EXISTS (SELECT 1 FROM jobs o WHERE o.queue = jobs.queue
        AND o.task = jobs.task AND o.key = jobs.key AND {HOLDS_KEY} {FOR_EACH}))"""
UNLESS_HELD = "ON CONFLICT DO NOTHING"
STATE = "state || ''"  # of jobs that are found by id: for an expression, no index of the state is used

# Statements, with :named parameters. Those that differ on PostgreSQL are in pqueue_postgres.POSTGRES.


def _enqueue(payload: str, source: str) -> str:
    return f"""
INSERT INTO jobs (queue, task, payload, state, priority, run_at, expires_at, max_attempts, key, key_until,
    key_expires_at, assigned_to, meta, "group", created_at)
SELECT name, :task, {payload}, :state, :priority, :run_at, :expires_at, :max_attempts, :key, :key_until,
    :key_expires_at, :assigned_to, :meta, :group, :now
FROM {source}
WHERE name = :queue AND {IS_LISTED} AND {IN_TURN} AND {HAS_ROOM_FOR}"""


# Insert a job, unless its queue is unknown or full, its task is new in the queue, or another job holds its key.
# guard: one job holds a key
ENQUEUE = f"""{_enqueue(":payload", "queues")}
{UNLESS_HELD}"""

# Insert a job per payload, unless the queue is unknown or has no room for all, or the task is new in the queue.
# :payloads is a JSON array of [payload], which preserves the text of each.
ENQUEUE_MANY = _enqueue("substr(value, 2, length(value) - 2)", f"queues CROSS JOIN {EACH_PAYLOAD}")

# Return how many more pending jobs the queue accepts (NULL: any number), and its limit.
ROOM = f"SELECT max_pending - {PENDING} AS room, max_pending FROM queues WHERE name = :queue"

# Return the queues that have a limit.
LIMITED = "SELECT name FROM queues WHERE max_pending IS NOT NULL"

# Find the job that holds the key.
# guard: a key holds within its queue
# guard: a key holds within its task
# guard: a key is free when its time is over
WITH_KEY = f"""
SELECT id FROM jobs WHERE queue = :queue AND task = :task AND key = :key AND {HOLDS_KEY}
    AND (key_expires_at IS NULL OR key_expires_at > :now)"""

# Take the key from a job whose time is over.
# guard: a key is held until its time is over
FREE_KEY = f"""
UPDATE jobs SET key_expires_at = NULL
WHERE queue = :queue AND task = :task AND key = :key AND {HOLDS_KEY} AND key_expires_at <= :now"""

# Replace a job that no consumer has taken.
# guard: a job that was taken is not replaced
REPLACE = f"""
UPDATE jobs SET payload = :payload, priority = :priority, run_at = :run_at, expires_at = :expires_at,
    state = CASE state WHEN 'waiting' THEN state ELSE :state END
WHERE id = :id AND state IN {UNTAKEN}"""

# Create the queue unless it exists.
# guard: a queue that is created during a move is paused
ADD_QUEUE = f"""
INSERT INTO queues (name, paused)
SELECT :queue, CASE WHEN EXISTS (SELECT 1 FROM history WHERE job_id = 0 AND event IN {MOVES}) THEN 2 ELSE 0 END
WHERE true ON CONFLICT DO NOTHING"""

# List the task among those of the queue.
ADD_TASK = "INSERT INTO queue_tasks (queue, task) VALUES (:queue, :task) ON CONFLICT DO NOTHING"

# Where a consumer may take jobs from: the tasks that it knows in the queues that it serves. A job of another task or
# queue is never read: however many there are, a claim costs the same.
# guard: a paused queue delivers nothing
# guard: a consumer gets jobs of its queues only
# guard: a consumer gets jobs of its tasks only
SERVED_TASKS = f"""q.paused = 0 AND {AMONG_QUEUES.format(queue="q.name")}
    AND t.queue = q.name AND {KNOWN.format(task="t.task")}"""
# CROSS JOIN makes SQLite keep q and t in the outer loops. Queues whose groups take turns: see pqueue_groups.
PLACES = f"FROM queues q CROSS JOIN queue_tasks t CROSS JOIN jobs WHERE q.grouped = 0 AND {SERVED_TASKS}"
GROUP_PLACES = f"q.grouped = 1 AND {SERVED_TASKS}"
# guard: a job assigned to a consumer is not for others
PENDING_OF_TASK = """queue = t.queue AND task = t.task AND "group" = '' AND state = 'pending' AND assigned_to IS NULL"""
# Whether the groups of a queue have limits. Then its assigned jobs are claimed as in pqueue_groups, too.
# guard: an assigned job counts towards the limits of its group
HAS_LIMITS = "max_running IS NOT NULL OR rate_jobs IS NOT NULL"
# Of jobs and schedules.
SERVED = f"""{AMONG_QUEUES.format(queue="queue")}
    AND {KNOWN.format(task="task")} AND queue NOT IN (SELECT name FROM queues WHERE paused <> 0)"""
# guard: a consumer gets only its own assigned jobs
# guard: a paused queue delivers no assigned job
# guard: a consumer gets only assigned jobs of its tasks
ASSIGNED = f"""assigned_to = :consumer AND {KNOWN.format(task="task")}
    AND queue NOT IN (SELECT name FROM queues WHERE paused <> 0 OR {HAS_LIMITS})"""


# The first job of each task in each queue, and the first of those assigned to the consumer. :limit is 1.
_CANDIDATES = f"""
SELECT jobs.id, priority, run_at {PLACES} AND jobs.id =
    (SELECT id FROM jobs WHERE {PENDING_OF_TASK} ORDER BY {ORDER} LIMIT :limit)
UNION ALL
SELECT * FROM (SELECT id, priority, run_at FROM jobs
               WHERE state = 'pending' AND {ASSIGNED} ORDER BY {ORDER} LIMIT :limit) assigned"""

# guard: an attempt counts when it is claimed
LEASE = {
    "state": "'processing'",
    "attempts": "attempts + 1",
    "max_attempts": MOST_ATTEMPTS,
    "consumer": ":consumer",
    "lease_token": ":token",
    "lease_expires_at": "CAST(:lease_expires_at AS double precision)",
    "started_at": "CAST(:now AS double precision)",
}
LEASED = ", ".join(f"{column} = {value}" for column, value in LEASE.items())

# Lease the first job to the consumer; on PostgreSQL, the first :limit jobs.
CLAIM = f"""
UPDATE jobs SET {LEASED} WHERE id = (SELECT id FROM ({_CANDIDATES}) candidates ORDER BY {ORDER} LIMIT :limit)
RETURNING {RETURNED}"""

# The first row of an index. (For min(), PostgreSQL may read all jobs of a state: it plans once, perhaps with few jobs.)
# On PostgreSQL, the index keeps entries of jobs that have changed since the last vacuum; a condition in {} skips most.
FIRST_DUE = "(SELECT run_at FROM jobs WHERE state = 'scheduled' {} ORDER BY run_at LIMIT 1)"
FIRST_SCHEDULE = "(SELECT next_at FROM schedules WHERE paused = 0 {} ORDER BY next_at LIMIT 1)"
FIRST_EXPIRING = f"(SELECT expires_at FROM jobs WHERE {EXPIRES} {{}} ORDER BY expires_at LIMIT 1)"
FIRST_LEASE_END = "(SELECT lease_expires_at FROM jobs WHERE state = 'processing' {} ORDER BY lease_expires_at LIMIT 1)"

# Return whether a scheduled job or a schedule is due or a job has expired, whether a lease has expired, and
# whether groups take turns.
OVERDUE = f"""
SELECT coalesce({FIRST_DUE.format("AND run_at <= :now")}, {FIRST_SCHEDULE.format("AND next_at <= :now")},
        {FIRST_EXPIRING.format("AND expires_at <= :now")}) IS NOT NULL AS due,
    {FIRST_LEASE_END.format("AND lease_expires_at <= :now")} IS NOT NULL AS expired,
    EXISTS (SELECT 1 FROM queues WHERE grouped = 1) AS grouped"""

# When the consumer may take a job without a group; the other groups are ready at queue_groups.next_at.
# guard: a waiting consumer sleeps while the jobs without a group are at their limit
_UNNAMED_AT = f"""
SELECT coalesce((SELECT at FROM group_starts s WHERE s.queue = q.name AND s.name = '' AND n = q.rate_jobs * -1 + 1 +
    (SELECT max(n) FROM group_starts WHERE queue = q.name AND name = '')) + q.rate_seconds, 0.0) AS at
FROM queues q CROSS JOIN queue_tasks t
WHERE {GROUP_PLACES} AND EXISTS (SELECT 1 FROM jobs WHERE {PENDING_OF_TASK} {FOR_EACH})
    AND (q.max_running IS NULL OR q.max_running > (
        SELECT count(*) FROM jobs WHERE queue = q.name AND "group" = '' AND state = 'processing' AND counted = 1))"""


def next_event(has_candidate: str) -> str:
    return f"""
SELECT min(at) FROM (
    SELECT 0.0 AS at WHERE {has_candidate}
    UNION ALL SELECT 0.0 WHERE EXISTS (SELECT 1 FROM queues q CROSS JOIN queue_tasks t CROSS JOIN queue_groups g
        WHERE {GROUP_PLACES} AND g.queue = t.queue AND g.task = t.task AND g.next_at = 0)
    UNION ALL SELECT * FROM (
        SELECT next_at FROM queue_groups WHERE next_at > 0 AND {SERVED} ORDER BY next_at LIMIT 1) delayed
    UNION ALL {_UNNAMED_AT}
    UNION ALL SELECT {FIRST_DUE.format("")}
    UNION ALL SELECT {FIRST_SCHEDULE.format("")}
    UNION ALL SELECT {FIRST_LEASE_END.format("")}) events"""


# Return when the next job may be available to the consumer; 0: now.
NEXT_EVENT = next_event(f"EXISTS ({_CANDIDATES})")

# Scheduled jobs that the consumer may take.
TO_COME = f"state = 'scheduled' AND {SERVED} AND (assigned_to IS NULL OR assigned_to = :consumer)"

# Return when the first scheduled job that the consumer may take is due, or the first schedule of one; NULL: none.
NEXT_DUE = f"""
SELECT min(at) FROM (
    SELECT * FROM (SELECT run_at AS at FROM jobs WHERE {TO_COME} ORDER BY run_at LIMIT 1) first
    UNION ALL SELECT min(next_at) FROM schedules WHERE paused = 0 AND {SERVED}) events"""


def peek(of_tasks: str, among: str = "IN ({})") -> str:
    ids = f"""{of_tasks}
    UNION ALL SELECT id FROM (
        SELECT id FROM jobs WHERE state = 'pending' AND {ASSIGNED} ORDER BY {ORDER} LIMIT :limit) assigned
    UNION ALL SELECT id FROM (
        SELECT id FROM jobs WHERE {TO_COME} AND run_at <= :now ORDER BY {ORDER} LIMIT :limit) due"""
    return f"SELECT {COLUMNS} FROM jobs WHERE id {among.format(ids)} ORDER BY {ORDER} LIMIT :limit"


# Return the jobs that would be delivered next, in order: those of each task in each queue, those assigned to the
# consumer, and those that are due.
PEEK = peek(f"""
    SELECT jobs.id {PLACES}
        AND jobs.id IN (SELECT id FROM jobs WHERE {PENDING_OF_TASK} ORDER BY {ORDER} LIMIT :limit)""")

# guard: a job is not promoted before it is due
DUE = "FROM jobs WHERE state = 'scheduled' AND run_at <= :now ORDER BY run_at LIMIT :limit"

# Make scheduled jobs that are due pending.
PROMOTE = f"UPDATE jobs SET state = 'pending' WHERE id IN (SELECT id {DUE})"

# Return jobs that were not started in time.
EXPIRING = f"""
SELECT id, expires_at, error FROM jobs WHERE {EXPIRES} AND expires_at <= :now ORDER BY expires_at, id LIMIT :limit"""

# Return jobs whose lease has expired.
# guard: a lease is not reclaimed before it expires
LEASE_EXPIRED = f"""
SELECT {COLUMNS} FROM jobs WHERE state = 'processing' AND lease_expires_at <= :now
ORDER BY lease_expires_at LIMIT :limit"""

# Return processing jobs whose consumer has ended.
# guard: running consumers keep their jobs
ORPHANED = f"""
SELECT {COLUMNS} FROM jobs WHERE state = 'processing' AND EXISTS (SELECT 1 FROM consumers
    WHERE token = substr(lease_token, 1, 16) AND consumers.state <> 'running' {FOR_EACH}) LIMIT :limit"""

# Make a job whose delivery was lost pending again, if it has attempts left.
# guard: no delivery after the last attempt was lost
REDELIVER = f"UPDATE jobs SET state = 'pending', error = :error, {NO_LEASE} WHERE {HELD} AND attempts < max_attempts"

# Complete a job with its result.
COMPLETE_PARENT = f"UPDATE jobs SET {COMPLETED}, result = :result WHERE {HELD}"

# Complete a job with its result, unless others may depend on it, or SQLite has counted later completions.
# guard: a job that others wait for is completed with them
# guard: a completion is counted although later ones were
COMPLETE = f"{COMPLETE_PARENT} AND has_dependents = 0 AND :now > {LAST_COMPLETION}"

# Make a job failed.
FAIL = f"UPDATE jobs SET state = 'failed', finished_at = :now, error = :error, {NO_LEASE} WHERE {HELD}"

# Schedule the next attempt of a job for :run_at.
RETRY = f"UPDATE jobs SET state = 'scheduled', run_at = :run_at, error = :error, {NO_LEASE} WHERE {HELD}"

# Make a job pending again, as if it had not been claimed, or schedule it for :run_at unless that is NULL.
# guard: a released attempt does not count
RELEASE = f"""
UPDATE jobs SET state = CASE WHEN CAST(:run_at AS double precision) IS NULL THEN 'pending' ELSE 'scheduled' END,
    run_at = coalesce(:run_at, run_at), attempts = attempts - 1, {NO_LEASE} WHERE {HELD}"""

# Update the time of a job's last event if that was a delay, too.
SNOOZED_AGAIN = """
UPDATE history SET at = :now, actor = :actor
WHERE event = 'snoozed' AND id = (SELECT max(+id) FROM history WHERE job_id = :id)"""

# Renew a lease.
EXTEND = f"UPDATE jobs SET lease_expires_at = :lease_expires_at WHERE {HELD}"

# Renew the leases of a consumer.
# guard: extend_all renews the leases of one consumer
EXTEND_ALL = f"UPDATE jobs SET lease_expires_at = :lease_expires_at WHERE {HELD_BY_CONSUMER}"

# Renew the leases of these jobs that a consumer holds. :ids is a JSON array.
EXTEND_THESE = f"UPDATE jobs SET lease_expires_at = :lease_expires_at WHERE {THESE_HELD}"

# Store progress or a partial result; NULL leaves a value unchanged.
UPDATE = f"""
UPDATE jobs SET progress = coalesce(:progress, progress), result = coalesce(:result, result) WHERE {HELD}"""


# Make a finished job pending again, or scheduled, unless its queue is full or another job holds its key.
# guard: a resubmitted job has all its attempts
# guard: a resubmitted job waits for its time
# guard: resubmit takes finished jobs
# guard: a full queue refuses a resubmit
RESUBMIT = f"""
UPDATE jobs SET state = CASE WHEN CAST(:run_at AS double precision) > :now THEN 'scheduled' ELSE 'pending' END,
    run_at = :run_at, expires_at = NULL, attempts = 0, started_at = NULL, finished_at = NULL, progress = NULL,
    error = NULL, waits_for = 0
WHERE id = :id AND state IN {FINISHED}
    AND NOT EXISTS (SELECT 1 FROM queues WHERE name = jobs.queue AND NOT {HAS_ROOM})
    AND {KEY_IS_FREE}"""

# Lease a finished job again, as in its last attempt, with its partial result, but without its key.
LEASE_AGAIN = f"""
UPDATE jobs SET state = 'processing', attempts = CASE attempts WHEN 0 THEN 1 ELSE attempts END,
    max_attempts = coalesce(max_attempts, :max_attempts), consumer = :consumer, lease_token = :token,
    lease_expires_at = :lease_expires_at, started_at = :now, finished_at = NULL, progress = NULL, waits_for = 0,
    key_until = NULL, result = CASE state WHEN 'completed' THEN NULL ELSE result END
WHERE id = :id AND state IN {FINISHED}"""

# Change a job that no consumer has taken; NULL leaves a value unchanged.
# guard: change takes jobs that no consumer has taken
# guard: change respects the key in another queue
CHANGE = f"""
UPDATE jobs SET payload = coalesce(:payload, payload), priority = coalesce(:priority, priority),
    queue = coalesce(:queue, queue), max_attempts = coalesce(:max_attempts, max_attempts),
    "group" = coalesce(:group, "group"),
    expires_at = coalesce(:expires_at, coalesce(:run_at, run_at) + :expire_seconds, expires_at),
    run_at = coalesce(:run_at, run_at),
    state = CASE WHEN CAST(:run_at AS double precision) IS NULL OR state = 'waiting' THEN state
        WHEN CAST(:run_at AS double precision) > :now THEN 'scheduled' ELSE 'pending' END
WHERE id = :id AND state IN {UNTAKEN} AND (({HOLDS_KEY}) IS NOT TRUE OR NOT EXISTS (SELECT 1 FROM jobs o
    WHERE o.queue = CAST(:queue AS text) AND o.task = jobs.task AND o.key = jobs.key AND o.id <> jobs.id
        AND {HOLDS_KEY} {FOR_EACH}))"""

# Make a scheduled or waiting job pending.
# guard: run_now takes scheduled and waiting jobs
RUN_NOW = """
UPDATE jobs SET state = 'pending', run_at = :now, waits_for = 0 WHERE id = :id AND state IN ('scheduled', 'waiting')"""

# Make an unfinished job failed or cancelled.
# guard: mark_failed and cancel take unfinished jobs
END = f"""
UPDATE jobs SET state = :state, finished_at = :now, error = coalesce(:error, error), waits_for = 0, {NO_LEASE}
WHERE id = :id AND state IN {UNFINISHED}"""

# Assign an unfinished job to a consumer; NULL: to any.
# guard: an attempt that an operator ended does not count
# guard: assign takes unfinished jobs
# guard: assign ends the running delivery
ASSIGN = f"""
UPDATE jobs SET assigned_to = :assigned_to, state = CASE state WHEN 'processing' THEN 'pending' ELSE state END,
    attempts = attempts - CASE state WHEN 'processing' THEN 1 ELSE 0 END, {NO_LEASE}
WHERE id = :id AND state IN {UNFINISHED}"""

# Record an event of a job. Must run before the transition, while the row still describes the attempt.
RECORD = """
INSERT INTO history (job_id, at, event, actor, attempt, error, started_at)
SELECT id, :now, :event, :actor, attempts, :error, CASE state WHEN 'processing' THEN started_at END
FROM jobs WHERE id = :id"""

# Record an operator's action that concerns no job; a move has more to say, see pqueue_move.
RECORD_OPERATION = """
INSERT INTO history (job_id, at, event, actor, attempt, error) VALUES (0, :now, :event, :actor, 0, :error)"""

# Return the latest operations: the rows with one time, actor and event. A retry at a time resubmits finished jobs and
# changes the others.
OPERATIONS = f"""
SELECT at, actor, min(event) || CASE WHEN min(event) <> max(event) THEN ', ' || max(event) ELSE '' END,
    count(DISTINCT nullif(job_id, 0)), min(job_id) FROM (
    SELECT * FROM history WHERE event NOT IN {ENDS} ORDER BY id DESC LIMIT :rows) latest
GROUP BY at, actor, CASE WHEN event = 'resubmitted' OR event LIKE 'changed %' THEN '' ELSE event END
ORDER BY at DESC, max(id) DESC LIMIT :limit"""

# Return the consumers that lost the job since it was last resubmitted.
LOST_BY = """
SELECT actor FROM history WHERE job_id = :id AND event IN ('expired', 'died')
AND id > (SELECT coalesce(max(+id), 0) FROM history WHERE job_id = :id AND event = 'resubmitted') ORDER BY +id"""

# Return the jobs that a consumer holds.
HELD_BY = f"SELECT {COLUMNS} FROM jobs WHERE {HELD_BY_CONSUMER}"

# Return the leases of these jobs that a consumer holds. :ids is a JSON array.
LEASES = f"SELECT id, lease_token FROM jobs WHERE {THESE_HELD}"

# Return whether a delivery still holds its lease.
HOLDS = f"SELECT 1 FROM jobs WHERE {HELD}"

# Register a consumer, or the next process of one.
REGISTER = """
INSERT INTO consumers (name, token, host, pid, slot, queues, tasks, started_at, last_seen_at, state)
VALUES (:name, :token, :host, :pid, :slot, :queues, :tasks, :now, :now, 'running')
ON CONFLICT (token) DO UPDATE SET state = 'running', slot = :slot, tasks = :tasks, last_seen_at = :now"""

# Mark the previous consumer of this slot as dead.
MARK_DEAD = "UPDATE consumers SET state = 'dead' WHERE slot = :slot AND state = 'running' AND token <> :token"

# Mark a consumer as stopped or dead.
UNREGISTER = "UPDATE consumers SET state = :state WHERE token = :token AND state = 'running'"

# Return the running consumers.
RUNNING = "SELECT token, slot FROM consumers WHERE state = 'running' ORDER BY id"

# Record a heartbeat of a consumer, and add to its counts.
HEARTBEAT = """
UPDATE consumers SET last_seen_at = :now, completed = completed + :completed, failed = failed + :failed
WHERE token = :token"""

# Delete consumers that ended long ago.
DELETE_CONSUMERS = "DELETE FROM consumers WHERE state <> 'running' AND last_seen_at < :before"

# Jobs that no unfinished others run after.
# guard: a job that another one needs is kept
NO_DEPENDENTS = f"""(has_dependents = 0 OR NOT EXISTS (SELECT 1 FROM dependencies d WHERE d.parent_id = jobs.id
        AND (SELECT state FROM jobs c WHERE c.id = d.job_id) IN {UNFINISHED} {FOR_EACH}))"""

# Jobs that nothing needs. The newest is needed: SQLite would reuse its id.
# guard: prune keeps the newest
# guard: prune keeps a job that holds its key
# guard: prune keeps the last job of a schedule
UNNEEDED = f"""{KEY_IS_OVER} AND +id < (SELECT max(id) FROM jobs)
    AND id NOT IN (SELECT last_job_id FROM schedules WHERE last_job_id IS NOT NULL)
    AND {NO_DEPENDENTS}"""
_KEPT = " ".join(f"WHEN '{state}' THEN keep_{state}_seconds" for state in FINISHED)
# guard: prune takes old jobs only
OLD = f"""state = :state AND queue = q.name
    AND finished_at < coalesce(CAST(:before AS double precision), :now - CASE :state {_KEPT} END) AND {UNNEEDED}"""

# Return jobs that finished long ago and that nothing needs: before :before, or if that is NULL, before what their queue
# keeps. :queue is NULL for all queues.
PRUNABLE = f"""
SELECT jobs.id FROM queues q CROSS JOIN jobs WHERE (CAST(:queue AS text) IS NULL OR q.name = :queue) AND jobs.id IN
    (SELECT id FROM jobs WHERE {OLD} ORDER BY finished_at LIMIT :limit) LIMIT :limit"""

_HAS_OLD = " OR ".join(
    f"""
    EXISTS (SELECT 1 FROM jobs WHERE state = '{state}' AND queue = q.name AND finished_at < :now - keep_{state}_seconds
        AND {UNNEEDED} {FOR_EACH})"""
    for state in FINISHED
)

# Return the queues with jobs that they keep no longer, unless some were deleted since :since. (NOT BETWEEN: a clock may
# have been ahead.)
OUTDATED = f"""
SELECT name FROM queues q WHERE pruned_at NOT BETWEEN :since AND :now AND ({_HAS_OLD})
ORDER BY pruned_at, name"""

# Record that jobs of the queue are deleted now, unless some were since :since.
MARK_PRUNED = "UPDATE queues SET pruned_at = :now WHERE name = :queue AND pruned_at NOT BETWEEN :since AND :now"

_RETENTION = """
SELECT name AS queue, '{state}' AS state, keep_{state}_seconds AS keep_seconds,
    (SELECT count(*) FROM jobs WHERE state = '{state}' AND queue = q.name AND finished_at > :now - :seconds) AS added,
    (SELECT count(*) FROM jobs WHERE state = '{state}' AND queue = q.name
        AND finished_at < :now + :seconds - keep_{state}_seconds) AS expiring,
    (SELECT finished_at FROM jobs WHERE state = '{state}' AND queue = q.name AND finished_at IS NOT NULL AND {unneeded}
        ORDER BY finished_at LIMIT 1) + keep_{state}_seconds AS deleted_at
FROM queues q"""

# Return what each queue keeps, how many jobs finished in the last :seconds and are to be deleted in the next, and when.
RETENTION = " UNION ALL ".join(_RETENTION.format(state=state, unneeded=UNNEEDED) for state in FINISHED)

# Delete the history of these jobs. :ids is a JSON array.
DELETE_HISTORY = f"DELETE FROM history WHERE job_id {THESE}"

# Delete the dependencies of these jobs and on them. :ids is a JSON array.
DELETE_DEPENDENCIES = f"DELETE FROM dependencies WHERE job_id {THESE} OR parent_id {THESE}"

# Delete these jobs. :ids is a JSON array.
DELETE_JOBS = f"DELETE FROM jobs WHERE id {THESE}"

# Return the states of these jobs. :ids is a JSON array.
STATES_OF = f"SELECT id, state FROM jobs WHERE id {THESE}"

# The conditions by which an index finds the jobs of a state.
INDEXED = {state: [f"state = '{state}'"] for state in ("waiting", "scheduled", "processing")}
INDEXED["pending"] = [f"state = 'pending' AND assigned_to IS {null}" for null in ("NULL", "NOT NULL")]
INDEXED |= {state: [f"state = '{state}' AND finished_at IS NOT NULL"] for state in FINISHED}

_COUNT_UNFINISHED = "SELECT queue, '{state}', count(*), min(run_at) FROM jobs WHERE {condition} GROUP BY queue"
_COUNT_FINISHED = """
SELECT name, '{state}', (SELECT count(*) FROM jobs WHERE {condition} AND queue = q.name), NULL FROM queues q"""

# Count jobs by queue and state through indexes (a million jobs in 50 ms). One statement, so that each job is counted
# exactly once.
COUNTS = " UNION ALL ".join(
    (_COUNT_UNFINISHED if state in UNFINISHED else _COUNT_FINISHED).format(state=state, condition=condition)
    for state in STATES
    for condition in INDEXED[state]
)

# Return the unfinished jobs.
UNFINISHED_IDS = " UNION ALL ".join(
    f"SELECT id FROM jobs WHERE {condition}" for state in UNFINISHED for condition in INDEXED[state]
)

# Count the pending jobs that are not assigned by queue and task.
PENDING_TASKS = """
SELECT queue, task, count(*) FROM jobs WHERE state = 'pending' AND assigned_to IS NULL GROUP BY queue, task"""

# Count the leases that ran out before :before.
EXPIRED_LEASES = "SELECT count(*) FROM jobs WHERE state = 'processing' AND lease_expires_at < :before"

# Return the queues and tasks of pending jobs that no claim finds.
UNLISTED = """
SELECT queue, task FROM jobs WHERE state = 'pending' AND assigned_to IS NULL
EXCEPT SELECT queue, task FROM queues JOIN queue_tasks ON queue = name ORDER BY queue, task"""

# Return what PENDING_TASKS does, of the queues where a job was due before :before and none was started or ended since.
# Of the events, the last 100 suffice: an attempt that failed and is repeated is among them, if only such end.
STALLED = f"""
SELECT queue, task, jobs FROM (
    SELECT queue, task, count(*) AS jobs, min(run_at) AS oldest FROM jobs
    WHERE state = 'pending' AND assigned_to IS NULL GROUP BY queue, task) waiting
WHERE oldest < :before AND NOT EXISTS
    (SELECT 1 FROM jobs WHERE state = 'completed' AND queue = waiting.queue AND finished_at >= :before {FOR_EACH})
AND NOT EXISTS
    (SELECT 1 FROM jobs WHERE state = 'failed' AND queue = waiting.queue AND finished_at >= :before {FOR_EACH})
AND queue NOT IN (SELECT queue FROM jobs WHERE state = 'processing' AND started_at >= :before)
AND queue NOT IN (SELECT coalesce((SELECT queue FROM jobs WHERE jobs.id = job_id), '') FROM history
    WHERE history.id > (SELECT max(id) FROM history) - 100 AND at >= :before)"""


def failures(first_line: str, hours: str, joined: str, place: str, last_id: str) -> str:
    """Count failed jobs by task and first line of the error, its digits replaced by 0: `failures` folds the rest. The
    last column has the hours since :first, each with its number of jobs: 3:17,4:1. `place` is larger the later a job
    failed; `last_id` is the id in the largest. The LIMIT, larger than any table, keeps SQLite before 3.41 from
    flattening the subquery, and so from reading the rows instead of the index."""
    for digit in "123456789":
        first_line = f"replace({first_line}, '{digit}', '0')"
    shown = "CASE WHEN hour >= 0 THEN CAST(hour AS text) || ':' || CAST(number AS text) END"
    return f"""
SELECT task, line, CAST(sum(number) AS bigint), CAST(sum(recent) AS bigint), {last_id} AS last_id,
    min(first_at), max(last_at), {joined}({shown}, ',') FROM (
    SELECT task, {first_line} AS line, CASE WHEN finished_at >= :first THEN {hours} ELSE -1 END AS hour,
        count(*) AS number, sum(CASE WHEN finished_at >= :since THEN 1 ELSE 0 END) AS recent, max({place}) AS place,
        min(finished_at) AS first_at, max(finished_at) AS last_at FROM (
        SELECT task, coalesce(substr(error, 1, {FAILURE_CHARS}), '') AS error, id, finished_at FROM jobs
        WHERE state = 'failed' LIMIT {MAX_ID}) failed
    GROUP BY task, line, hour) counted
GROUP BY task, line ORDER BY max(place) DESC LIMIT {MAX_GROUPS}"""


# Return the groups of failed jobs that were last to fail.
FAILURES = failures(
    "substr(error, 1, instr(error || char(10), char(10)) - 1)",
    "CAST((finished_at - :first) / 3600 AS INTEGER)",
    "group_concat",
    "printf('%020.6f %020d', finished_at, id)",
    "CAST(substr(max(place), 22) AS INTEGER)",
)

TABLES: tuple[str, ...] = ("jobs", "queues", "queue_tasks", "queue_groups", "group_weights", "group_starts")
TABLES += ("consumers", "history", "schedules", "dependencies", "handlers", "outcomes")
