"""The dashboard's page in Streamlit; its figures and actions are those of ops.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import streamlit as st

import pqueue
from pqueue_tools import dashboard, dashboard_html, report, supervisor

STYLE = f"""<style>{dashboard_html.COLOURS}{dashboard_html.SUMMARY}
.stApp {{ --card: transparent }} .block-container {{ padding: 1.2rem 1rem 3rem; max-width: 1312px }}
.stAppHeader {{ background: none; pointer-events: none }} .stAppHeader button {{ pointer-events: auto }}
.pqueue {{ font-size: 14px; line-height: 1.45; --card: transparent }} .pqueue p {{ margin: 0 }}
.pqueue .title {{ display: flex; gap: 4px 16px; align-items: baseline; flex-wrap: wrap; margin-bottom: 10px }}
.pqueue .title b {{ font-size: 18px }} .pqueue .path {{ color: var(--soft); font-size: 12.5px }}
h5 {{ padding: 0 0 0.3rem !important }}
@media (max-width: 640px) {{ .st-key-filters [data-testid=stColumn] {{ min-width: 42% !important; flex: 1 1 42% }} }}
</style>"""
LINE = {"type": "line", "strokeWidth": 1.5, "strokeCap": "round"}
MINUTE = "yearmonthdatehoursminutes"
DOT = {"completed": "green", "failed": "red", "processing": "blue", "pending": "orange", "scheduled": "violet"}


@st.cache_resource
def board() -> dashboard.Board:
    return dashboard.Board()


def page() -> None:
    st.set_page_config("pqueue", layout="wide")
    st.html(STYLE)
    if refused := _refusal():
        st.container(border=True).html(_html(dashboard_html.trouble(refused)))
        return
    if said := st.session_state.pop("said", None):
        st.toast(_plain(said))
    _section(None, _overview)
    _section("Processing now", _processing)
    _section("Jobs", _jobs)
    _section("Failed", _failed)
    _section("Consumers", _consumers)
    _section("Queues", _queues)


def _refusal() -> str | None:
    """Return why this session is shown nothing: anybody could read and act, or a page elsewhere asks."""
    try:
        if not (dashboard.is_loopback(st.get_option("server.address") or "") or dashboard.allowed_hosts()):
            return (
                "refused: the server is open to other machines, without a password; start it with --server.address "
                "127.0.0.1, or list in PQUEUE_OPS_HOSTS the names by which it may be reached"
            )
        headers = st.context.headers
        hosts, origins = headers.get_all("Host"), headers.get_all("Origin")
        if len(hosts) != 1 or not dashboard.is_ours(hosts[0]):
            return "refused: this is not a host name of the dashboard; PQUEUE_OPS_HOSTS can list more"
        if not all(dashboard.is_same_origin(each, hosts[0]) for each in origins):
            return "refused: the request comes from another site"
    except ValueError as error:
        return f"refused: {error}"
    return None


def _section(title: str | None, part: Callable[[], None]) -> None:
    """Draw a part; when the queue is not to be had, let the first one say so, until it is."""

    def draw() -> None:
        try:
            part()
        except (pqueue.QueueError, ValueError) as error:
            st.html(_html(dashboard_html.trouble(str(error)))) if title is None else st.caption(
                "this part comes back by itself"
            )

    draw.__qualname__ = part.__name__
    with st.container(border=True):
        if title:
            st.markdown(f"##### {title}")
        st.fragment(draw, run_every=dashboard.REFRESH_SECONDS)()


def _html(body: str) -> str:
    return f'<div class="pqueue">{body}</div>'


def _act(name: str, **fields: Any) -> None:
    done, sentence = dashboard.act(
        board(), name, {key: each if isinstance(each, list) else [str(each)] for key, each in fields.items()}
    )
    st.session_state["said"] = sentence if done else f"not done: {sentence}"
    st.rerun()


def _plain(value: str) -> str:
    """Return the text for a place where Streamlit would read Markdown."""
    return "".join(f"\\{mark}" if mark in "\\`*_{}[]()#+-.!|<>~$:&" else mark for mark in report.printable(value))


# Parts ################################################################################################################


def _overview() -> None:
    figures = board().figures()
    seen = figures["overview"]
    path = f'<span class="path">{dashboard_html.text(seen["path"])}</span>'
    title = f'<div class="title"><b>pqueue</b><div>{dashboard_html.health(seen["problems"])}</div>{path}</div>'
    st.html(_html(title + dashboard_html.tiles(seen)))
    minutes = figures["minutes"]
    for place, keys, chart in zip(
        st.columns(2),
        (dashboard_html.jobs_keys(minutes), dashboard_html.TIMES_KEYS),
        (_jobs_chart(minutes), _times_chart(minutes)),
        strict=True,
    ):
        place.html(_html(keys))
        place.vega_lite_chart(chart)


def _jobs_chart(minutes: dashboard_html.Minutes) -> dict[str, Any]:
    """Draw what the other front end does: bars of what completed and failed, a line of what was enqueued."""
    names = ["completed", "failed", "enqueued"]
    rows = [
        {"at": _at(each), "value": each[name], "what": name, "place": place, "going on": each is minutes[-1]}
        for each in minutes
        for place, name in enumerate(names)
    ]
    bars = {
        "mark": {"type": "bar", "binSpacing": 1},
        "encoding": {
            "order": {"field": "place"},
            "opacity": {"condition": {"test": "datum['going on']", "value": 0.5}, "value": 1},
        },
        "transform": [{"filter": "datum.what != 'enqueued'"}],
    }
    scale = {"axis": {"tickCount": 3, "tickMinStep": 1}}
    ended = "datum.what == 'enqueued' && !datum['going on']"
    return _chart(rows, names, scale, [bars, {"mark": LINE, "transform": [{"filter": ended}]}])


def _times_chart(minutes: dashboard_html.Minutes) -> dict[str, Any]:
    """Draw what the other front end does: wait and run time, by powers of ten."""
    rows = [
        {"at": _at(each), "value": seconds and max(seconds, 0.001), "what": name, "share": share}
        for each in minutes[:-1]
        for name in ("wait", "run")
        for share, seconds in zip(("p50", "p95"), each[name] or (None, None), strict=True)
    ]
    labels = "datum.value < 1 ? datum.value * 1000 + ' ms' : datum.value + ' s'"
    dashes = {"field": "share", "scale": {"domain": ["p50", "p95"], "range": [[1, 0], [4, 3]]}, "legend": None}
    scale = {"scale": {"type": "log"}, "axis": {"tickCount": 3, "labelExpr": labels}}
    return _chart(rows, ["wait", "run"], scale, [{"mark": LINE, "encoding": {"strokeDash": dashes}}])


def _at(minute: dict[str, Any]) -> datetime:
    return datetime.fromtimestamp(minute["at"])


def _chart(
    rows: list[dict[str, Any]], names: list[str], scale: dict[str, Any], layers: list[dict[str, Any]]
) -> dict[str, Any]:
    paint = {"domain": names, "range": [dashboard.PAINT[name] for name in names]}
    over_time = {"format": "%H:%M", "tickCount": 5, "grid": False}
    encoding = {
        "x": {"field": "at", "timeUnit": MINUTE, "bandPosition": 0.5, "title": None, "axis": over_time},
        "y": {"field": "value", "type": "quantitative", "title": None, **scale},
        "color": {"field": "what", "type": "nominal", "scale": paint, "legend": None},
    }
    return {"height": 150, "data": {"values": rows}, "encoding": encoding, "layer": layers}


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
        for job in board().figures()["processing"]
    ]
    _table(rows, "nothing is running", progress=st.column_config.ProgressColumn(min_value=0, max_value=1))


def _table(rows: list[dict[str, Any]], empty: str, **columns: Any) -> None:
    if rows:
        st.dataframe(rows, hide_index=True, column_config=columns)
    else:
        st.caption(empty)


def _jobs() -> None:
    places = st.container(key="filters").columns(5)
    state = places[0].selectbox("state", pqueue.STATES, index=None, placeholder="any state", key="filter-state")
    filters: dict[str, Any] = {"state": state}
    for place, name in zip(places[1:], dashboard.FILTERS[1:], strict=True):
        filters[name] = place.text_input(name, key=f"filter-{name}")
    before = st.session_state.get("before", "") if st.session_state.get("before-of") == filters else ""
    query = {**{name: value or "" for name, value in filters.items()}, "before_id": str(before)}
    table, (jobs, older) = _shown(query)
    if not jobs:
        st.caption(dashboard.none_found(query, older))
        _pages(query, filters, jobs, older)
        return
    now = time.time()
    rows = [
        {
            "job": job.id,
            "state": job.state,
            "queue": job.queue,
            "task": job.task,
            "attempt": f"{job.attempts} of {job.max_attempts}",
            "consumer": job.consumer or "",
            "enqueued": report.ago(job.created_at, now),
            "detail": report.printable(report.cut(report.detail(job), 200)),
        }
        for job in jobs
    ]
    chosen = st.dataframe(rows, hide_index=True, on_select="rerun", selection_mode="multi-row", key=table)
    ids = [jobs[row].id for row in chosen["selection"]["rows"] if row < len(jobs)]
    _pages(query, filters, jobs, older)
    _bulk(ids, filters, dashboard.matching(query, (jobs, older)))
    if len(ids) == 1:
        _job(ids[0])


def _shown(query: dict[str, str]) -> tuple[str, dashboard.Found]:
    """Return the table's key and its jobs. They stay the same while some are selected, which is by row."""
    state = st.session_state
    table = f"jobs-{state.get('tables', 0)}"
    if state.get("query") != query:
        state["query"], state["tables"] = query, state.get("tables", 0) + 1
        table = f"jobs-{state['tables']}"
    if table not in state or not state[table]["selection"]["rows"]:
        state["shown"] = board().jobs(query)
    return table, state["shown"]


def _pages(query: dict[str, str], filters: dict[str, Any], jobs: list[pqueue.Job], before: int | None) -> None:
    label = "older jobs" if len(jobs) == dashboard.PAGE else f"searched back to job {before}: go on"
    with st.container(key="pages"):
        if query["before_id"] and st.button("newest jobs"):
            st.session_state["before"] = ""
            st.rerun(scope="fragment")
        if before is not None and st.button(label):
            st.session_state["before"], st.session_state["before-of"] = before, dict(filters)
            st.rerun(scope="fragment")


def _bulk(ids: list[int], filters: dict[str, str], matching: str) -> None:
    if dashboard.read_only():
        return
    these = ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
    scopes = [f"the selected: {these}"] * bool(ids) + [matching] * any(filters.values())
    if not scopes:
        st.caption("select jobs, or filter, to change them")
        return
    with st.popover("change jobs"):
        scope = st.radio("which", scopes)
        fields: dict[str, Any] = {"id": [str(job_id) for job_id in ids]}
        if scope == matching:
            fields = {"scope": "matching", **{name: value or "" for name, value in filters.items()}}
        for verb in ("resubmit", "mark_failed", "cancel"):
            if st.button(verb.replace("_", " "), key=f"bulk-{verb}"):
                del st.session_state["query"]  # show the jobs anew, none of them selected
                _act(verb, **fields)


def _job(job_id: int) -> None:
    found = board().job(job_id)
    one: pqueue.Job = found["job"]
    st.markdown(f"#### Job {one.id}")
    st.markdown(f":{DOT.get(one.state, 'gray')}[{one.state}] {_plain(found['why'])}")
    if not dashboard.read_only():
        _job_actions(one)
    left, right = st.columns(2)
    with left:
        _text("payload", dashboard_html.pretty(one.payload))
        _text("file", found["file"])
    with right:
        _text("result", None if one.result is None else dashboard_html.pretty(one.result))
        _text("error", one.error)
        now = time.time()
        story = [
            {**e, "at": report.ago(e["at"], now), "error": report.printable(report.first_line(e["error"]))}
            for e in found["history"]
        ]
        _table(story, "no history")


def _text(title: str, value: str | None) -> None:
    if value is not None:
        shown = "\n".join(report.printable(line) for line in value[: dashboard.MOST_CHARS].split("\n"))
        st.caption(
            title if len(value) <= dashboard.MOST_CHARS else f"{title}: the first {dashboard.MOST_CHARS:,} characters"
        )
        st.code(shown, language=None, wrap_lines=True, height=400 if len(shown) > 2000 else "content")


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


def _failed() -> None:
    groups = board().figures()["failures"][: dashboard.GROUPS]
    _table(
        [
            {"jobs": g["jobs"], "task": g["task"], "last": g["last_id"], "error": report.printable(g["error"])}
            for g in groups
        ],
        "no job has failed",
        error=st.column_config.TextColumn(width="large"),
    )
    if groups and not dashboard.read_only():
        with st.popover("resubmit a group"):
            named = {f"{g['task']}: {report.printable(g['error'])}": g for g in groups}
            name = st.selectbox("group", sorted(named), key="failed-group") or ""
            if st.button("yes, resubmit all of it", key=f"resubmit all of {name}"):  # of this one, whatever comes first
                _act("resubmit_group", task=named[name]["task"], error=named[name]["error"])


def _consumers() -> None:
    figures, now = board().figures(), time.time()
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
        for each in figures["consumers"][: dashboard.CONSUMERS]
    ]
    _table(rows, "no consumer was here: run python consumer.py")
    found = figures["processes"]
    if isinstance(found, str):
        st.caption(_plain(found))
        return
    _table([{key: each[key] for key in ("group", "name", "state", "pid")} for each in found], "no processes")
    if not dashboard.read_only():
        if st.button(f"add {supervisor.GROUP_SIZE} consumers"):
            _act("add_group")
        for group in supervisor.added_groups():
            with st.popover(f"remove {group}"):
                if st.button(f"yes, remove {group}"):
                    _act("remove_group", group=group)


def _queues() -> None:
    queues = board().figures()["overview"]["queues"]
    now = time.time()
    rows = []
    for name, each in queues.items():
        oldest = each["oldest_pending_at"]
        rows.append(
            {
                "queue": name,
                **{state: each[state] for state in dashboard.SHOWN},
                "oldest": "" if oldest is None else report.span(max(0.0, now - oldest)),
                "limit": "" if each["max_pending"] is None else f"{each['max_pending']:,}",
                "": "paused" if each["paused"] else "",
            }
        )
    _table(rows, "no queue yet")
    if rows and not dashboard.read_only():
        left, middle, right, last = st.columns([2, 1, 2, 1])
        name = left.selectbox("queue", list(queues), label_visibility="collapsed", key="queue-chosen")
        verb = "resume" if queues[name]["paused"] else "pause"
        if middle.button(verb, key=f"{verb} {name}"):
            _act(verb, queue=name)
        most = right.text_input("limit", placeholder="most pending jobs; empty: no limit", label_visibility="collapsed")
        if last.button("limit", key=f"limit {name}"):
            _act("limit", queue=name, max_pending=most)
