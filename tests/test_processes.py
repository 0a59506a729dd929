"""What becomes of the work when a process is hung up on, forks, execs, loses threads or its parent, or shuts down."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import PATIENCE_SECONDS, ROOT, wait_until

TASKS = """
import multiprocessing, os, sys, threading, time
from pathlib import Path
from pqueue import current_queue, task

@task()
def quick(job): return job.payload

@task()
def slow(job):
    Path("started").write_text(str(os.getpid()))
    while not Path("go-on").exists(): time.sleep(0.01)
    return os.getpid()

@task()
def fork(job):
    child = os.fork()
    if child == 0:
        exec(job.payload)
        return "by the child"
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

@task()
def end_child(job):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=[600])
    child.start()
    child.terminate()
    child.join()
    return child.exitcode

@task()
def leave_child(job):
    if os.fork() == 0:
        Path("child").write_text(str(os.getpid()))
        time.sleep(600)
        os._exit(0)
    slow(job)

@task()
def become(job):
    Path("started").write_text(str(os.getpid()))
    os.execvp("sleep", ["sleep", "600"])

@task()
def lose_threads(job):
    def leave(): sys.exit("a thread")
    def raise_it(): raise ValueError("in a thread")
    threads = [threading.Thread(target=each) for each in (leave, raise_it)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return "all the same"

@task()
def leave_thread(job):
    threading.Thread(target=time.sleep, args=[600]).start()
"""


@pytest.fixture
def tasks(place):
    place.write("my_tasks.py", TASKS)
    return place


def consumer(tasks, *arguments):
    return tasks.start("consumer.py", "--import", "my_tasks", *arguments)


def drain(tasks):
    return tasks.run("consumer.py", "--import", "my_tasks", "--drain")


def read(tasks, name):
    path = tasks.folder / name
    return path.exists() and path.read_text()


def started(tasks):
    return read(tasks, "started")


OPEN_AND_CLOSE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import pqueue
queue = pqueue.open_queue()
queue.enqueue("other")
queue.close()
"""


def script(place, code, python=sys.executable):
    """Run a program of its own on the queue of the place."""
    path = place.write("script.py", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    return subprocess.run(
        [python, str(path)], cwd=place.folder, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


# Signals


def test_hung_up_consumer_finishes_its_job_and_ends(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("slow")
    child = consumer(tasks)
    wait_until(lambda: started(tasks))
    child.send_signal(signal.SIGHUP)
    (tasks.folder / "go-on").touch()
    assert child.wait(PATIENCE_SECONDS) == 0
    assert queue.get(job_id).state == "completed"
    assert "stopped consumer=" in child.out.read_text()


def switches(pid):
    """Return how often a process has waited for something."""
    return int(re.search(r"^voluntary_ctxt_switches:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1])


def test_consumer_whose_terminal_is_closed_finishes_its_job_and_ends(tasks):
    queue = tasks.queue()
    ids = [queue.enqueue("slow"), queue.enqueue("quick")]
    child, terminal = pty.fork()
    if child == 0:
        try:
            os.chdir(tasks.folder)
            os.execve(sys.executable, tasks.command("consumer.py", "--import", "my_tasks"), tasks.environment())
        finally:
            os._exit(1)
    wait_until(lambda: started(tasks))
    os.close(terminal)
    looked = switches(child)
    wait_until(lambda: switches(child) > looked + 2)  # so it has handled the signal
    (tasks.folder / "go-on").touch()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [queue.get(job_id).state for job_id in ids] == ["completed", "pending"]
    assert {each["state"] for each in queue.consumers()} == {"stopped"}


def test_hung_up_producer_ends_between_jobs(place):
    child = place.start("producer.py", "--interval", 600)
    wait_until(lambda: "enqueued" in child.out.read_text())
    child.send_signal(signal.SIGHUP)
    assert child.wait(PATIENCE_SECONDS) == 0


def test_programs_under_nohup_outlive_the_terminal(place):
    children = [
        place.start_command(["nohup", *place.command(program, *arguments)])
        for program, arguments in (("producer.py", ["--interval", 0.05]), ("consumer.py", []))
    ]
    queue = place.queue()
    wait_until(lambda: queue.stats()["states"]["completed"])
    for child in children:
        child.send_signal(signal.SIGHUP)
    last = queue.list_jobs(limit=1)[0].id
    wait_until(lambda: queue.list_jobs(limit=1, state="completed")[0].id > last)
    assert [child.poll() for child in children] == [None, None]


# Fork, exec, threads


@pytest.mark.parametrize(
    ("code", "exit_code"), [("sys.exit(0)", 0), ("sys.exit(3)", 3), ("raise ValueError", 1), ("pass", 0)]
)
def test_child_that_a_task_forked_settles_nothing_and_never_becomes_a_consumer(tasks, code, exit_code):
    queue = tasks.queue()
    job_id = queue.enqueue("fork", code)
    queue.enqueue_many("quick", range(20))
    done = drain(tasks)
    assert done.returncode == 0, done.stderr
    job = queue.get(job_id)
    assert (job.state, job.attempts, job.result) == ("completed", 1, exit_code)
    assert len(queue.consumers()) == 1
    assert queue.stats()["states"]["completed"] == 21
    assert done.stdout.count("stopped consumer=") == 1


def test_task_may_end_a_child_that_it_forked(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("end_child")
    drain(tasks)
    assert queue.get(job_id).result == -signal.SIGTERM


def test_child_of_a_task_does_not_hide_that_its_consumer_died(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("leave_child")
    child = consumer(tasks)
    wait_until(lambda: started(tasks))
    child.kill()
    try:
        job = wait_until(lambda: queue.dequeue("heir"))
        assert (job.id, job.attempts) == (job_id, 2)
    finally:
        os.kill(int(wait_until(lambda: read(tasks, "child"))), signal.SIGKILL)


def test_task_that_becomes_another_program_is_ended(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("become", max_attempts=1)
    later = queue.enqueue("quick")
    child = consumer(tasks)
    wait_until(lambda: queue.get(later).state == "completed")
    assert queue.get(job_id).error == "WorkerDied: the task replaced its process by another program"
    assert child.poll() is None
    assert not os.path.exists(f"/proc/{started(tasks)}")


def test_threads_that_die_in_a_task_harm_neither_job_nor_consumer(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("lose_threads")
    queue.enqueue("quick")
    done = drain(tasks)
    assert done.returncode == 0
    assert "ValueError: in a thread" in done.stderr
    assert queue.get(job_id).result == "all the same"
    assert queue.stats()["states"]["completed"] == 2


CLOSE_SLOWLY = """
import pqueue, time
from pathlib import Path
close = pqueue.PersistentQSQLite.close

def slowly(queue):
    close(queue)
    Path("closed").touch()
    while not Path("go-on").exists(): time.sleep(0.01)

pqueue.PersistentQSQLite.close = slowly
"""


def test_second_signal_ends_a_consumer_that_is_closing_its_queue(tasks):
    tasks.write("close_slowly.py", CLOSE_SLOWLY)
    queue = tasks.queue()
    job_id = queue.enqueue("leave_thread")
    child = consumer(tasks, "--import", "close_slowly")
    wait_until(lambda: queue.get(job_id).state == "completed")
    child.send_signal(signal.SIGTERM)
    wait_until(lambda: (tasks.folder / "closed").exists())
    child.send_signal(signal.SIGTERM)
    (tasks.folder / "go-on").touch()
    assert child.wait(PATIENCE_SECONDS) in (0, -signal.SIGTERM)


def test_thread_that_a_task_left_keeps_the_process_but_not_against_a_second_signal(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("leave_thread")
    child = consumer(tasks)
    wait_until(lambda: queue.get(job_id).state == "completed")
    child.send_signal(signal.SIGTERM)
    wait_until(lambda: "stopped consumer=" in child.out.read_text())
    wait_until(lambda: {each["state"] for each in queue.consumers()} == {"stopped"})
    child.send_signal(signal.SIGTERM)
    assert child.wait(PATIENCE_SECONDS) in (0, -signal.SIGTERM)


@pytest.mark.parametrize("first", ["child", "parent"])
@pytest.mark.parametrize("parent", ["ends", "closes"])
def test_child_continues_safely_without_the_parent_that_opened_the_queue(place, parent, first):
    """Another program then finds no lock of the parent's, and would take the log of a child that has none for old."""
    code = f"""
import os, pqueue, subprocess, time
queue = pqueue.open_queue()
queue.enqueue("parent")
come, go = os.pipe()
back, forth = os.pipe()
if child := os.fork():
    os.close(come)
    os.read(back, 1) if {first!r} == "child" else None
    queue.close()
    os.write(go, b"!")
    os._exit(0 if {parent!r} == "ends" else os.waitpid(child, 0)[1])
os.close(go)
os.read(come, 1) if {first!r} == "parent" else None
queue.enqueue("child")
os.write(forth, b"!")
os.read(come, 1) if {first!r} == "child" else None
os.read(come, 1) if {parent!r} == "ends" else None
subprocess.run([sys.executable, "-c", {OPEN_AND_CLOSE!r}], check=True)
queue.enqueue("child, later")
subprocess.run([sys.executable, "-c", {OPEN_AND_CLOSE!r}], check=True)
open("done", "w").close()
"""
    done = script(place, code)
    assert (done.returncode, done.stderr) == (0, "")
    wait_until(lambda: (place.folder / "done").exists())
    assert [job.task for job in place.queue().list_jobs()] == ["other", "child, later", "other", "child", "parent"]


FORK_AMONG_THREADS = """
import os, threading, time, warnings, pqueue
warnings.simplefilter("ignore")  # Python 3.12 warns of every fork while threads run
queue = pqueue.open_queue()
over = threading.Event()

def work(name):
    while not over.is_set():
        queue.enqueue("t")
        if job := queue.dequeue(name):
            queue.complete(job)

def child_works(name):
    done = queue.enqueue("by child") and queue.dequeue(name)
    queue.complete(done)
    queue.close()

threads = [threading.Thread(target=work, args=[f"thread {n}"]) for n in range(3)]
for thread in threads: thread.start()
codes = []
for n in range(40):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            child_works(f"child {n}")
            code = 0
        finally:
            os._exit(code)
    codes.append(os.waitpid(child, 0)[1])
over.set()
for thread in threads: thread.join()
queue.close()
print(sorted(set(codes)))
"""


def test_fork_during_calls_of_other_threads_harms_no_process(place):
    done = script(place, FORK_AMONG_THREADS)
    assert (done.stdout, done.stderr) == ("[0]\n", "")
    queue = place.queue()
    states = queue.stats()["states"]
    assert states["completed"] + states["pending"] == sum(states.values())
    assert len(queue.list_jobs(task="by child")) == 40
    assert queue.check()["quick_check"] == "ok"


# The end of the interpreter


def test_threads_keep_working_while_the_interpreter_shuts_down(place):
    code = """
import pqueue, threading, time, atexit
queue = pqueue.open_queue()
queue.enqueue_many("t", range(20))
main = threading.current_thread()

def work(name):
    main.join()
    while job := queue.dequeue(name):
        time.sleep(0.001)
        queue.complete(job)

atexit.register(queue.enqueue, "at exit")
for n in range(3):
    threading.Thread(target=work, args=[f"worker {n}"]).start()
sys.exit("asked to end")
"""
    done = script(place, code)
    assert (done.returncode, done.stderr) == (1, "asked to end\n")
    queue = place.queue()
    assert queue.stats()["states"]["completed"] == 20
    assert len(queue.list_jobs(task="at exit")) == 1


def test_daemon_threads_cut_off_at_exit_lose_nothing_that_returned(place):
    code = """
import os, pqueue, threading
queue = pqueue.open_queue()
busy = [threading.Event() for _ in range(3)]

def work(name, busy):
    while True:
        os.write(1, f"{queue.enqueue('t')}\\n".encode())
        queue.dequeue(name)
        busy.set()

for n in range(3):
    threading.Thread(target=work, args=[f"worker {n}", busy[n]], daemon=True).start()
for each in busy: each.wait()
"""
    done = script(place, code)
    assert (done.returncode, done.stderr) == (0, "")
    queue = place.queue()
    acknowledged = {int(line) for line in done.stdout.splitlines()}
    assert acknowledged <= {job.id for job in queue.list_jobs(limit=1_000_000)}
    held = len(queue.list_jobs(state="processing", limit=1_000_000))
    while any(queue.count_jobs(state=state) for state in ("pending", "processing")):  # a thousand come back at a time
        queue.complete(wait_until(lambda: queue.dequeue("heir")))
    assert held
    assert set(queue.stats()["states"].values()) == {0, len(queue.list_jobs(limit=1_000_000))}
    assert queue.check()["quick_check"] == "ok"


def test_thread_that_exits_leaves_its_job_to_the_lease(place):
    queue = place.queue()
    job_id = queue.enqueue("t", now=1000)

    thread = threading.Thread(target=queue.dequeue, args=["w"], kwargs={"now": 1000})
    thread.start()
    thread.join()
    assert queue.dequeue("w", now=1059) is None
    assert queue.dequeue("w", now=1060).id == job_id


# Names and hosts


def test_two_processes_under_one_name_are_reported(place):
    queue = place.queue()
    children = [place.start("consumer.py", "--name", "same") for _ in range(2)]
    wait_until(lambda: [each["name"] for each in queue.consumers() if each["state"] == "running"] == ["same"] * 2)
    done = place.run("admin.py", "doctor")
    assert done.returncode == 1
    pids = sorted(child.pid for child in children)
    assert f"2 processes run under the name same (pids {pids[0]}, {pids[1]}): stop all but one" in done.stdout
    children[0].send_signal(signal.SIGTERM)
    assert children[0].wait(PATIENCE_SECONDS) == 0
    assert place.run("admin.py", "doctor").returncode == 0


def test_consumer_whose_supervisor_dies_during_a_job_reports_it_and_ends_with_the_job(tasks):
    queue = tasks.queue()
    job_id = queue.enqueue("slow")
    command = tasks.command("consumer.py", "--import", "my_tasks")
    keep = ["sh", "-c", '"$@" & wait', "supervisord", *command]
    supervisor = tasks.start_command(keep, SUPERVISOR_ENABLED="1", SUPERVISOR_PROCESS_NAME="w")
    orphan = int(wait_until(lambda: started(tasks)))
    supervisor.kill()
    tasks.start_command(command, SUPERVISOR_PROCESS_NAME="w")
    wait_until(lambda: [each["name"] for each in queue.consumers() if each["state"] == "running"] == ["w", "w"])
    assert "2 processes run under the name w" in tasks.run("admin.py", "doctor").stdout
    queue.enqueue_many("quick", range(50))
    (tasks.folder / "go-on").touch()
    wait_until(lambda: not os.path.exists(f"/proc/{orphan}"))
    wait_until(lambda: queue.stats()["states"]["completed"] == 51)
    assert (queue.get(job_id).result, queue.get(job_id).attempts) == (orphan, 1)
    assert tasks.run("admin.py", "doctor").returncode == 0


def test_life_does_not_hang_on_the_name_of_the_host(place):
    """Two consumers see other host names than this process, and one sees its own change while it works."""
    place.write("my_tasks.py", TASKS)
    queue = place.queue()
    job_id = queue.enqueue("slow")
    command = place.command("consumer.py", "--import", "my_tasks", "--name", "w")
    change = 'hostname before; (until test -e started; do sleep 0.05; done; hostname after; touch changed) & exec "$@"'
    child = place.start_command(["unshare", "--map-root-user", "--uts", "sh", "-c", change, "sh", *command])
    wait_until(lambda: (place.folder / "changed").exists())
    queue._dead_checked_at = 0.0
    assert queue.dequeue("heir") is None
    assert {each["name"]: (each["state"], each["host"]) for each in queue.consumers()}["w"] == ("running", "before")
    (place.folder / "go-on").touch()
    wait_until(lambda: queue.get(job_id).state == "completed")
    (place.folder / "go-on").unlink()
    (place.folder / "started").unlink()
    job_id = queue.enqueue("slow")
    wait_until(lambda: started(place))
    child.kill()
    job = wait_until(lambda: queue.dequeue("heir"))
    assert (job.id, job.error) == (job_id, "consumer w died in attempt 1 of 3")


def test_database_that_is_mounted_without_its_folder_is_refused(place):
    """Docker's `-v queue.db:/app/queue.db`: the log would stay in the container."""
    place.queue().enqueue("slow")
    place.write("app/queue.db", "")
    mount = 'mount --bind var/queue.db app/queue.db && exec "$@"'
    outer = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    child = place.start_command([*outer, *place.command("admin.py", "stats")], PQUEUE_URL="app/queue.db")
    assert child.wait() == 1
    assert "but it is mounted alone: mount its folder" in child.out.read_text()
