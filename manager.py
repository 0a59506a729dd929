"""Write the configuration of supervisord, and add, list and remove groups of consumers while it runs.

    python3 manager.py --init --import tasks  # write supervisord.conf, for consumers that run your tasks
    python3 manager.py --count 1              # three more consumers
    python3 manager.py --list
    python3 manager.py --remove consumer2     # its consumers finish their jobs first

Each added group has a file in var/supervisor.d, so it survives a restart of supervisord.
"""

from __future__ import annotations

from pqueue_tools import termination

if __name__ == "__main__":
    termination.reset_sigint()

import argparse
import socket
import sys
from contextlib import suppress

from pqueue import QueueError, open_queue
from pqueue_tools import supervisor
from pqueue_tools.process import OneLineParser, module_name, not_blank, report, whole_number, writes_to_stdout
from pqueue_tools.record import MAX_CONCURRENCY
from pqueue_tools.report import count, span
from pqueue_values import program_name


@writes_to_stdout("manager")
def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        with termination.ExitOnSignal():
            _act(options)
    except (supervisor.ManagerError, OSError, ValueError) as error:
        return report("manager", error)
    return 0


def _act(options: argparse.Namespace) -> None:
    of_consumers = supervisor.consumer_options(options.queues, options.modules, options.concurrency)
    if options.init:
        supervisor.write_configuration(of_consumers, with_producer=not options.modules)
        print(f"wrote {supervisor.CONFIGURATION}; start it with: supervisord -n -c {supervisor.CONFIGURATION}")
    elif options.count:
        for _ in range(options.count):
            group = supervisor.add_group(options.size, of_consumers)
            print(f"added {group}: {count(options.size, 'consumer')}", flush=True)
    elif options.remove:
        if options.remove in supervisor.added_groups():
            print(f"stopping {options.remove}: its consumers finish their jobs first", file=sys.stderr)
        supervisor.remove_group(options.remove)
        print(f"removed {options.remove}")
    elif options.start:
        supervisor.start(options.start, has_registered)
        print(f"started {options.start}")
    elif options.stop:
        supervisor.stop(options.stop)
        print(f"stopped {options.stop}")
    else:
        for each in supervisor.processes():
            added = "added" if each["group"] in supervisor.added_groups() else ""
            uptime = span(each["uptime_seconds"]) if each["pid"] else ""
            print(
                f"{each['group']:12} {each['name']:16} {each['state']:10} {each['pid'] or '':>8} {uptime:>10} {added}"
            )


def has_registered(pid: int) -> bool:
    """Return whether a consumer that runs as this process on this machine takes jobs from the queue, if it is found."""
    with suppress(QueueError, ValueError), open_queue(create=False) as queue:
        here = [each for each in queue.consumers(job_ids=False) if each["host"] == socket.gethostname()]
        return any((each["pid"], each["state"]) == (pid, "running") for each in here)
    return False


def _parser() -> argparse.ArgumentParser:
    # By itself, argparse does not break the line of a group.
    usage = (
        "%(prog)s (--init | --count N | --list | --remove GROUP |\n  --start CONSUMER | --stop CONSUMER) [OPTION ...]"
    )
    parser = OneLineParser(prog=program_name("manager"), usage=usage, description=__doc__)
    actions = parser.add_mutually_exclusive_group(required=True)
    actions.add_argument("--count", type=whole_number(1, 1000), metavar="N", help="add N groups of consumers")
    actions.add_argument("--list", action="store_true", help="list the processes of supervisord")
    actions.add_argument("--init", action="store_true", help="write supervisord.conf and create var/ in this folder")
    actions.add_argument("--remove", type=not_blank, metavar="GROUP", help="stop and delete an added group")
    actions.add_argument("--start", type=not_blank, metavar="CONSUMER", help="start one process, such as consumer_00")
    actions.add_argument("--stop", type=not_blank, metavar="CONSUMER", help="stop one process")
    add = parser.add_argument
    text = "consumers in a group (default: %(default)s)"
    add("--size", type=whole_number(1, 1000), default=supervisor.GROUP_SIZE, metavar="N", help=text)
    text = "serve this queue; repeatable (default: all)"
    add("--queue", dest="queues", action="append", type=not_blank, metavar="QUEUE", help=text)
    text = "how many jobs each consumer runs at the same time (default: 1)"
    add("--concurrency", type=whole_number(1, MAX_CONCURRENCY), metavar="N", help=text)
    text = "a module with tasks; repeatable"
    add("--import", dest="modules", action="append", type=module_name, metavar="MODULE", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
