"""The dashboard's page in Streamlit; its figures and actions are those of ops.py."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import streamlit as st

import manager
import ops
import pqueue
import report

COLOURS: list[Any] = ["#8a94a6", "#1a8f5a", "#d33a3a"]  # enqueued, completed, failed
DOT = {"completed": "green", "failed": "red", "processing": "blue", "pending": "orange", "scheduled": "violet"}


@st.cache_resource
def board() -> ops.Board:
    return ops.Board()


def page() -> None:
    st.set_page_config("pqueue", layout="wide")
    st.html("<style>.block-container { padding-top: 2.5rem } [data-testid=stMetricValue] { font-size: 1.5rem }</style>")
    st.subheader("pqueue")
    if said := st.session_state.pop("said", None):
        st.toast(said)
    for title, part in (
        (None, _overview),
        ("Processing now", _processing),
        ("Jobs", _jobs),
        ("Failed", _failed),
        ("Consumers", _consumers),
        ("Queues", _queues),
    ):
        if title:
            st.subheader(title)
        _guarded(part)


def _guarded(part: Callable[[], None]) -> None:
    """Draw a part; when the queue is not to be had, draw the sentence that says so."""
    live = part in (_overview, _processing, _failed, _consumers, _queues)

    def draw() -> None:
        try:
            part()
        except (pqueue.QueueError, ValueError) as error:
            st.error(str(error)) if part is _overview else st.caption("this part comes back by itself")

    draw.__qualname__ = part.__name__
    st.fragment(draw, run_every=ops.REFRESH_SECONDS if live else None)()


def _act(name: str, **fields: Any) -> None:
    done, sentence = ops.act(
        board(), name, {key: each if isinstance(each, list) else [str(each)] for key, each in fields.items()}
    )
    st.session_state["said"] = sentence if done else f"not done: {sentence}"
    st.rerun()


def _plain(value: str) -> str:
    """Return the text for a place where Streamlit would read Markdown."""
    return "".join(f"\\{mark}" if mark in "\\`*_{}[]()#+-.!|<>~$:&" else mark for mark in report.printable(value))


# Parts ################################################################################################################


def _overview() -> None:
    seen = board().overview()
    for problem in seen["problems"]:
        st.error(_plain(problem))
    if not seen["problems"]:
        st.success("healthy")
    found = ops.tiles(seen)
    for begin in range(0, len(found), 6):
        for column, (label, value, _) in zip(st.columns(6), found[begin : begin + 6], strict=False):
            column.metric(label, value)
    minutes = board().minutes()
    names = ["enqueued", "completed", "failed"]
    rows = [{"minute": datetime.fromtimestamp(each["at"]), **{name: each[name] for name in names}} for each in minutes]
    st.line_chart(rows, x="minute", y=names, x_label="", y_label="per minute", color=COLOURS, height=200)


def _processing() -> None:
    now = time.time()
    rows = [
        {
            "job": job.id,
            "task": job.task,
            "consumer": job.consumer,
            "elapsed": report.span(now - (job.started_at or now)),
            "lease left": report.span(max(0.0, (job.lease_expires_at or now) - now)),
            "attempt": f"{job.attempts} of {job.max_attempts}",
            "progress": job.progress,
        }
        for job in board().processing()
    ]
    _table(rows, "nothing is running", progress=st.column_config.ProgressColumn(min_value=0, max_value=1))


def _table(rows: list[dict[str, Any]], empty: str, **columns: Any) -> None:
    if rows:
        st.dataframe(rows, hide_index=True, column_config=columns)
    else:
        st.caption(empty)


def _jobs() -> None:
    places = st.columns(5)
    filters: dict[str, Any] = {"state": places[0].selectbox("state", ["", *pqueue.STATES], key="filter-state")}
    for place, name in zip(places[1:], ops.FILTERS[1:], strict=True):
        filters[name] = place.text_input(name, key=f"filter-{name}")
    before = st.session_state.get("before") if st.session_state.get("before-of") == filters else None
    jobs = board().jobs(filters, before)
    if not jobs:
        st.caption("no job matches" if any(filters.values()) else "no jobs yet: run python producer.py")
        return
    now = time.time()
    rows = [
        {
            "job": job.id,
            "state": job.state,
            "queue": job.queue,
            "task": job.task,
            "attempts": job.attempts,
            "consumer": job.consumer,
            "enqueued": report.ago(job.created_at, now),
            "detail": report.printable(ops.detail(job)[:200]),
        }
        for job in jobs
    ]
    chosen = st.dataframe(rows, hide_index=True, on_select="rerun", selection_mode="multi-row", key="jobs")
    ids = [jobs[row].id for row in chosen["selection"]["rows"] if row < len(jobs)]
    _pages(jobs, filters)
    _bulk(ids, filters)
    if len(ids) == 1:
        _job(ids[0])


def _pages(jobs: list[pqueue.Job], filters: dict[str, Any]) -> None:
    newest, older = st.columns([1, 11])
    if newest.button("newest"):
        st.session_state["before"] = None
        st.rerun()
    if len(jobs) == ops.PAGE and older.button("older jobs"):
        st.session_state["before"], st.session_state["before-of"] = jobs[-1].id, dict(filters)
        st.rerun()


def _bulk(ids: list[int], filters: dict[str, str]) -> None:
    if ops.read_only():
        return
    scopes = [f"the {len(ids)} selected"] * bool(ids) + ["all that match the filter"] * any(filters.values())
    if not scopes:
        st.caption("select jobs, or filter, to change them")
        return
    with st.popover("change jobs"):
        scope = st.radio("which", scopes)
        fields: dict[str, Any] = {"id": [str(job_id) for job_id in ids]}
        if scope == "all that match the filter":
            fields = {"scope": "matching", **{name: value or "" for name, value in filters.items()}}
        for verb in ("resubmit", "mark_failed", "cancel"):
            if st.button(verb.replace("_", " "), key=f"bulk-{verb}"):
                _act(verb, **fields)


def _job(job_id: int) -> None:
    found = board().job(job_id)
    one: pqueue.Job = found["job"]
    st.markdown(f"#### Job {one.id}")
    st.markdown(f":{DOT.get(one.state, 'gray')}[{one.state}] {_plain(found['why'])}")
    if not ops.read_only():
        _job_actions(one)
    left, right = st.columns(2)
    with left:
        st.caption("payload")
        st.code(_pretty(report.masked(one.payload)), language=None, wrap_lines=True)
        if found["file"] is not None:
            st.caption("file")
            st.code(_visible(found["file"]), language=None, wrap_lines=True)
    with right:
        for title, value in (("result", one.result and _pretty(report.masked(one.result))), ("error", one.error)):
            if value:
                st.caption(title)
                st.code(_visible(value), language=None, wrap_lines=True)
        now = time.time()
        _table(
            [{**e, "at": report.ago(e["at"], now), "error": report.first_line(e["error"])} for e in found["history"]],
            "no history",
        )


def _job_actions(one: pqueue.Job) -> None:
    verbs = ["resubmit"] if one.state in pqueue.FINISHED else ["mark_failed", "cancel"]
    for place, verb in zip(st.columns(6), verbs, strict=False):
        with place.popover(verb.replace("_", " ")):
            if st.button(f"yes, {verb.replace('_', ' ')}", key=f"{verb}-{one.id}"):
                _act(verb, id=one.id)
    if one.state in pqueue.UNFINISHED:
        with st.popover("assign"):
            name = st.text_input("consumer (empty: any)", one.assigned_to or "", key=f"assign-{one.id}")
            if st.button("yes, assign", key=f"yes-assign-{one.id}"):
                _act("assign", id=one.id, consumer=name)


def _pretty(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _visible(value: str) -> str:
    return "\n".join(report.printable(line) for line in value.split("\n"))


def _failed() -> None:
    groups = board().failures()
    _table(
        [
            {"jobs": g["jobs"], "task": g["task"], "last": g["last_id"], "error": report.printable(g["error"])}
            for g in groups
        ],
        "no job has failed",
    )
    if groups and not ops.read_only():
        with st.popover("resubmit a group"):
            group = st.selectbox("group", groups, format_func=lambda g: f"{g['jobs']} of {g['task']}: {g['error']}")
            if st.button("yes, resubmit all of it"):
                _act("resubmit_group", task=group["task"], error=group["error"])


def _consumers() -> None:
    now = time.time()
    rows = [
        {
            "consumer": each["name"],
            "state": each["state"],
            "host": each["host"],
            "pid": each["pid"],
            "jobs": ", ".join(map(str, each["job_ids"][:3])),
            "done": each["completed"],
            "failed": each["failed"],
            "seen": report.ago(each["last_seen_at"], now),
        }
        for each in board().consumers()[:100]
    ]
    _table(rows, "no consumer was here: run python consumer.py")
    found = ops.processes()
    if isinstance(found, str):
        st.caption("supervisord is not running here")
        return
    _table([{key: each[key] for key in ("group", "name", "state", "pid")} for each in found], "no processes")
    if not ops.read_only():
        if st.button(f"add {manager.GROUP_SIZE} consumers"):
            _act("add_group")
        for group in manager.added_groups():
            with st.popover(f"remove {group}"):
                if st.button(f"yes, remove {group}"):
                    _act("remove_group", group=group)


def _queues() -> None:
    queues = board().overview()["queues"]
    now = time.time()
    rows = []
    for name, each in queues.items():
        oldest = each["oldest_pending_at"]
        rows.append(
            {
                "queue": name,
                **{state: each[state] for state in pqueue.STATES},
                "oldest": None if oldest is None else report.span(max(0.0, now - oldest)),
                "paused": each["paused"],
                "limit": each["max_pending"],
            }
        )
    _table(rows, "no queue yet")
    if rows and not ops.read_only():
        left, middle, right, last = st.columns([2, 1, 2, 1])
        name = left.selectbox("queue", list(queues), label_visibility="collapsed", key="queue-chosen")
        verb = "resume" if queues[name]["paused"] else "pause"
        if middle.button(verb):
            _act(verb, queue=name)
        most = right.text_input("limit", placeholder="most pending jobs; empty: no limit", label_visibility="collapsed")
        if last.button("limit"):
            _act("limit", queue=name, max_pending=most)
