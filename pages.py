"""The dashboard's pages in HTML, for the standard library's server. Whatever comes from outside passes `text`."""

from __future__ import annotations

import html
import json
import os
import time
from typing import Any
from urllib.parse import urlencode

import manager
import ops
import pqueue
import report

Board = ops.Board

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1c2430; --soft: #667085; --line: #e3e7ee;
  --completed: #1a8f5a; --failed: #d33a3a; --processing: #1677c7; --pending: #b7791f; --scheduled: #6b5bd2;
  --cancelled: #8a94a6; --enqueued: #8a94a6; }
@media (prefers-color-scheme: dark) { :root { --page: #10141b; --card: #181e27; --ink: #e6eaf1; --soft: #93a0b4;
  --line: #2a3341; --completed: #3ecf8e; --failed: #ff6b6b; --processing: #4fb3ff; --pending: #e8b04b;
  --scheduled: #a394ff; --cancelled: #7d899c; --enqueued: #7d899c; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 14px/1.45 system-ui, sans-serif }
header, main { max-width: 1280px; margin: 0 auto; padding: 0 16px }
header { display: flex; gap: 16px; align-items: baseline; flex-wrap: wrap; padding-top: 14px }
h1 { font-size: 18px; margin: 0 } h1 a { color: inherit; text-decoration: none }
h2 { font-size: 13px; margin: 0 0 10px; color: var(--soft); text-transform: uppercase; letter-spacing: .05em }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px;
  margin: 12px 0; overflow-x: auto }
.two { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 0 12px }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 10px; margin-bottom: 14px }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 8px 12px }
.tile b { display: block; font-size: 20px; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap }
.tile span { color: var(--soft); font-size: 12px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 12px }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap }
tr:last-child td { border-bottom: 0 }
td.wide { max-width: 420px; overflow: hidden; text-overflow: ellipsis }
td.number, th.number { text-align: right }
.completed { color: var(--completed) } .failed { color: var(--failed) } .processing { color: var(--processing) }
.pending { color: var(--pending) } .scheduled { color: var(--scheduled) } .cancelled, .soft { color: var(--soft) }
.running { color: var(--completed) } .dead { color: var(--failed) } .stopped { color: var(--soft) }
.health { margin: 0; padding: 2px 10px; border-radius: 20px; border: 1px solid currentColor; font-size: 13px }
.health.bad { border-radius: 8px; padding: 6px 12px }
.said { border-left: 3px solid var(--completed); padding-left: 12px }
a { color: var(--processing) }
form { display: inline-flex; gap: 6px; flex-wrap: wrap; align-items: center; margin: 0 }
form.filter { margin-bottom: 10px }
input, select, button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 3px 8px; max-width: 100% }
button { cursor: pointer } button:hover { border-color: var(--processing) }
details { display: inline-block } summary { cursor: pointer; color: var(--processing) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--page); border: 1px solid var(--line);
  border-radius: 6px; padding: 10px; margin: 4px 0 14px; max-height: 420px; overflow-y: auto; font-size: 12.5px }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 16px; margin: 0 }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
svg { width: 100%; height: 130px; display: block }
progress { width: 90px; height: 10px; accent-color: var(--processing) }
.legend { display: flex; gap: 16px; color: var(--soft); font-size: 12px; margin-top: 6px; flex-wrap: wrap }
.bulk { margin-top: 10px } form.block { display: block }
svg.key { width: 10px; height: 10px; display: inline-block; margin-right: 5px }
@media (max-width: 800px) { .two { grid-template-columns: minmax(0, 1fr) } section { padding: 10px 12px }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)) }
  .tile b { font-size: 15px } }
"""

# Each live part is replaced when it has changed, but not while the reader types, ticks or is about to confirm in it.
SCRIPT = """
const busy = part => part.contains(document.activeElement) && document.activeElement !== document.body
  || part.querySelector('details[open], input:checked');
async function refresh() {
  if (document.hidden) return;
  try {
    const answer = await fetch('/live' + location.search, {credentials: 'same-origin'});
    for (const [name, text] of Object.entries(await answer.json())) {
      const part = document.getElementById(name);
      if (part && part.dataset.text !== text && !busy(part)) { part.innerHTML = text; part.dataset.text = text; }
    }
  } catch (error) { document.getElementById('health').textContent = 'the dashboard does not answer'; }
}
if (document.getElementById('overview')) setInterval(refresh, REFRESH);
""".replace("REFRESH", str(ops.REFRESH_SECONDS * 1000))

FILES = {"/style.css": ("text/css; charset=utf-8", STYLE), "/script.js": ("text/javascript; charset=utf-8", SCRIPT)}


def text(value: Any) -> str:
    """Return any value as HTML text on one line."""
    return html.escape(report.printable(str(value)))


def block(value: str) -> str:
    """Return text of many lines as HTML, its other control characters escaped."""
    return "<pre>" + "\n".join(text(line) for line in value.split("\n")) + "</pre>"


def when(at: float | None) -> str:
    if at is None:
        return ""
    return f'<time datetime="{report.iso(at)}" title="{report.clock(at)}">{report.ago(at, time.time())}</time>'


# The page of everything ###############################################################################################


def index(board: Board, query: dict[str, str], token: str) -> str:
    parts = sections(board, query, token)
    said = f'<section class="said">{text(query["said"])}</section>' if query.get("said") else ""
    body = f"""{said}
<section id="overview">{parts["overview"]}</section>
<section id="processing">{parts["processing"]}</section>
<section><h2>Jobs</h2>{_filter_form(query)}<div id="jobs">{parts["jobs"]}</div></section>
<section id="failed">{parts["failed"]}</section>
<div class="two"><section id="consumers">{parts["consumers"]}</section>
<section id="queues">{parts["queues"]}</section></div>"""
    return _page("pqueue", parts["health"], body)


def sections(board: Board, query: dict[str, str], token: str) -> dict[str, str]:
    """Return the HTML of each live part by its id."""
    seen = board.overview()
    return {
        "health": health(seen["problems"]),
        "overview": _overview(board, seen),
        "processing": _processing(board),
        "jobs": _jobs(board, query, token),
        "failed": _failed(board, token),
        "consumers": _consumers(board, token),
        "queues": _queues(seen, token),
    }


def without_queue(sentence: str) -> str:
    return _page("pqueue", trouble(sentence), '<section id="overview">This page comes back by itself.</section>')


def trouble(sentence: str) -> str:
    return f'<p class="health bad failed">{text(sentence)}</p>'


def health(problems: list[str]) -> str:
    if not problems:
        return '<p class="health completed">healthy</p>'
    return "".join(f'<p class="health bad failed">{text(each)}</p>' for each in problems)


def _page(title: str, status: str, body: str) -> str:
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="stylesheet" href="/style.css">
<link rel="icon" href="data:,"></head><body>
<header><h1><a href="/">pqueue</a></h1><div id="health">{status}</div></header>
<main>{body}</main><script src="/script.js"></script></body></html>"""


def _overview(board: Board, seen: dict[str, Any]) -> str:
    tiles = "".join(
        f'<div class="tile"><span>{text(label)}</span><b class="{state}">{text(value)}</b></div>'
        for label, value, state in ops.tiles(seen)
    )
    return f'<h2>Overview</h2><div class="tiles">{tiles}</div>{_chart(board.minutes())}'


def _chart(minutes: list[dict[str, Any]]) -> str:
    """Draw the last hour: bars of what completed and failed, a line of what was enqueued."""
    top = max([1, *(each["enqueued"] for each in minutes), *(each["completed"] + each["failed"] for each in minutes)])
    width, height = 1200, 120
    step = width / len(minutes)
    bars, line = [], []
    for number, each in enumerate(minutes):
        x, y = number * step, float(height)
        for name in ("completed", "failed"):
            tall = each[name] / top * (height - 4)
            y -= tall
            if tall:
                title = f"{report.clock(each['at'])[:5]}: {each['completed']:,} completed, {each['failed']:,} failed"
                bars.append(
                    f'<rect x="{x + 1.5:.1f}" y="{y:.1f}" width="{step - 3:.1f}" height="{tall:.1f}" '
                    f'fill="var(--{name})"><title>{title}</title></rect>'
                )
        line.append(f"{x + step / 2:.1f},{height - each['enqueued'] / top * (height - 4):.1f}")
    names = ("enqueued", "completed", "failed")
    total = {name: sum(each[name] for each in minutes) for name in names}
    legend = "".join(
        f'<span><svg class="key" viewBox="0 0 10 10"><rect width="10" height="10" rx="2" fill="var(--{name})"/></svg>'
        f"{name} {total[name]:,}</span>"
        for name in names
    )
    return f"""<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="jobs per minute">
{"".join(bars)}<polyline points="{" ".join(line)}" fill="none" stroke="var(--enqueued)" stroke-width="1.5"
vector-effect="non-scaling-stroke"/></svg>
<div class="legend"><span>last hour, per minute; highest {top:,}</span>{legend}</div>"""


def _table(heads: list[str], rows: list[list[str]], empty: str) -> str:
    """Return a table of cells that are HTML already. A head that begins with # is a column of numbers."""
    if not rows:
        return f'<p class="soft">{empty}</p>'
    kinds = ["number" if head.startswith("#") else "wide" if head.startswith("~") else "" for head in heads]
    top = "".join(f'<th class="{kind}">{head.lstrip("#~")}</th>' for head, kind in zip(heads, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _processing(board: Board) -> str:
    now = time.time()
    rows = [
        [
            _link(job.id),
            text(job.task),
            text(job.consumer),
            report.span(now - (job.started_at or now)),
            report.span(max(0.0, (job.lease_expires_at or now) - now)),
            f"{job.attempts} of {job.max_attempts}",
            "" if job.progress is None else f'<progress max="1" value="{job.progress:.3f}"></progress>',
        ]
        for job in board.processing()
    ]
    heads = ["job", "task", "consumer", "elapsed", "lease left", "attempt", "progress"]
    return "<h2>Processing now</h2>" + _table(heads, rows, "nothing is running")


def _link(job_id: int) -> str:
    return f'<a href="/job/{job_id}">{job_id}</a>'


def _search(label: str, **filters: str) -> str:
    return f'<a href="/?{html.escape(urlencode(filters))}">{text(label)}</a>'


def _filter_form(query: dict[str, str]) -> str:
    states = "".join(
        f"<option{' selected' if query.get('state') == state else ''}>{state}</option>" for state in pqueue.STATES
    )
    fields = "".join(
        f'<input name="{name}" placeholder="{name}" value="{text(query.get(name, ""))}" size="12">'
        for name in ops.FILTERS
        if name != "state"
    )
    return f"""<form class="filter" action="/"><select name="state" aria-label="state">
<option value="">any state</option>
{states}</select>{fields}<button>filter</button><a href="/">all</a></form>"""


def _jobs(board: Board, query: dict[str, str], token: str) -> str:
    before = query.get("before_id", "")
    jobs = board.jobs(query, int(before) if before.isascii() and before.isdigit() and len(before) < 19 else None)
    rows = [
        [
            *([f'<input type="checkbox" name="id" value="{job.id}" aria-label="job {job.id}">'] if token else []),
            _link(job.id),
            f'<span class="{job.state}">{job.state}</span>',
            text(job.queue),
            text(job.task),
            str(job.attempts),
            text(job.consumer or ""),
            when(job.created_at),
            text(ops.detail(job)[:200]),
        ]
        for job in jobs
    ]
    heads = [*([""] if token else []), "job", "state", "queue", "task", "#attempts", "consumer", "enqueued", "~detail"]
    found = {name: query[name] for name in ops.FILTERS if query.get(name)}
    nothing = "no job matches" if found or before else "no jobs yet: run <code>python producer.py</code>"
    older = ""
    if len(jobs) == ops.PAGE:
        older = f'<p><a href="/?{html.escape(urlencode({**found, "before_id": str(jobs[-1].id)}))}">older jobs</a></p>'
    made = _table(heads, rows, nothing)
    return f"{_bulk_form(made, found, token) if token and jobs else made}{older}"


def _bulk_form(made: str, found: dict[str, str], token: str) -> str:
    kept = "".join(f'<input type="hidden" name="{name}" value="{text(value)}">' for name, value in found.items())
    matching = '<option value="matching">all that match the filter</option>' if found else ""
    buttons = "".join(
        f'<button name="action" value="{verb}">{verb.replace("_", " ")}</button>'
        for verb in ("resubmit", "mark_failed", "cancel")
    )
    return f"""<form method="post" action="/act/jobs" class="block">
{_hidden(token, "/?" + urlencode(found))}{kept}{made}
<div class="bulk"><details><summary>change jobs …</summary> <select name="scope" aria-label="which jobs">
<option value="ticked">the ticked ones</option>{matching}</select> {buttons}</details></div></form>"""


def _hidden(token: str, back: str) -> str:
    return f'<input type="hidden" name="token" value="{token}"><input type="hidden" name="back" value="{text(back)}">'


def _button(action: str, label: str, token: str, back: str = "/", *, ask: bool = True, **fields: Any) -> str:
    """Return a form of one button, which asks first."""
    if not token:
        return ""
    kept = "".join(f'<input type="hidden" name="{name}" value="{text(value)}">' for name, value in fields.items())
    form = f'<form method="post" action="/act/{action}">{_hidden(token, back)}{kept}'
    if not ask:
        return f"{form}<button>{label}</button></form>"
    return f"<details><summary>{label} …</summary>{form}<button>yes, {label}</button></form></details>"


def _failed(board: Board, token: str) -> str:
    rows = [
        [
            f"{each['jobs']:,}",
            text(each["task"]),
            _link(each["last_id"]),
            _search(each["error"], state="failed", task=each["task"]),
            _button("resubmit_group", "resubmit all", token, task=each["task"], error=each["error"]),
        ]
        for each in board.failures()[:20]
    ]
    heads = ["#jobs", "task", "last", "~error", ""]
    return "<h2>Failed</h2>" + _table(heads, rows, "no job has failed")


def _consumers(board: Board, token: str) -> str:
    rows = [
        [
            text(each["name"]),
            f'<span class="{each["state"]}">{each["state"]}</span>',
            f"{text(each['host'])} / {each['pid']}",
            " ".join(_link(job_id) for job_id in each["job_ids"][:3]) + (" …" if len(each["job_ids"]) > 3 else ""),
            f"{each['completed']:,}",
            f"{each['failed']:,}",
            when(each["last_seen_at"]),
        ]
        for each in board.consumers()[:100]
    ]
    heads = ["consumer", "state", "host / pid", "jobs", "#done", "#failed", "seen"]
    made = _table(heads, rows, "no consumer was here: run <code>python consumer.py</code>")
    return f"<h2>Consumers</h2>{made}{_groups(token)}"


def _groups(token: str) -> str:
    if not os.path.exists(manager.SOCKET):
        return '<p class="soft">supervisord is not running here</p>'
    found = ops.processes()
    if isinstance(found, str):
        return f'<p class="soft">{text(found)}</p>'
    added = manager.added_groups()
    lines = []
    for group in dict.fromkeys(each["group"] for each in found):
        states = [f"{text(each['name'])} {text(each['state'].lower())}" for each in found if each["group"] == group]
        remove = _button("remove_group", f"remove {group}", token, group=group) if group in added else ""
        lines.append(f"<p><b>{text(group)}</b> <span class='soft'>{', '.join(states)}</span> {remove}</p>")
    add = _button("add_group", f"add {manager.GROUP_SIZE} consumers", token)
    return f"<h2>Supervisor</h2>{''.join(lines)}{add}"


def _queues(seen: dict[str, Any], token: str) -> str:
    now = time.time()
    rows = []
    for name, each in seen["queues"].items():
        oldest = each["oldest_pending_at"]
        verb = "resume" if each["paused"] else "pause"
        limit = "" if each["max_pending"] is None else f"{each['max_pending']:,}"
        rows.append(
            [
                _search(name, queue=name),
                *(f"{each[state]:,}" for state in ("pending", "scheduled", "processing", "completed", "failed")),
                "" if oldest is None else report.span(max(0.0, now - oldest)),
                limit,
                '<span class="failed">paused</span>' if each["paused"] else "",
                _button(verb, verb, token, ask=False, queue=name) + _limit_form(name, token),
            ]
        )
    heads = ["queue", "#pending", "#scheduled", "#processing", "#completed", "#failed", "oldest", "#limit", "", ""]
    return "<h2>Queues</h2>" + _table(heads, rows, "no queue yet")


def _limit_form(name: str, token: str) -> str:
    if not token:
        return ""
    return f"""<details><summary>limit …</summary><form method="post" action="/act/limit">{_hidden(token, "/")}
<input type="hidden" name="queue" value="{text(name)}"><input name="max_pending" size="6" placeholder="none">
<button>set</button></form></details>"""


# The page of one job ##################################################################################################


def job(found: dict[str, Any], said: str, token: str) -> str:
    one: pqueue.Job = found["job"]
    facts = {
        "state": f'<span class="{one.state}">{one.state}</span>, {text(found["why"])}',
        "queue": text(one.queue),
        "task": text(one.task),
        "priority": str(one.priority),
        "attempts": f"{one.attempts} of {one.max_attempts}",
        "key": text(one.key or ""),
        "assigned to": text(one.assigned_to or ""),
        "consumer": text(one.consumer or ""),
        "enqueued": when(one.created_at),
        "due": when(one.run_at),
        "started": when(one.started_at),
        "finished": when(one.finished_at),
        "progress": "" if one.progress is None else f"{one.progress:.0%}",
    }
    body = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items() if value)
    parts = [f"<section><h2>Job {one.id}</h2><dl>{body}</dl></section>", _job_actions(one, token)]
    parts.append(f"<section><h2>Payload</h2>{block(_pretty(report.masked(one.payload)))}{_shown(found, one)}</section>")
    if found["history"]:
        rows = [
            [when(e["at"]), text(e["event"]), text(e["actor"]), str(e["attempt"]), text(report.first_line(e["error"]))]
            for e in found["history"]
        ]
        story = _table(["when", "event", "who", "#attempt", "~error"], rows, "")
        parts.append(f"<section><h2>History</h2>{story}</section>")
    if said:
        parts.insert(0, f'<section class="said">{text(said)}</section>')
    return _page(f"job {one.id}", "", "".join(parts))


def _shown(found: dict[str, Any], one: pqueue.Job) -> str:
    shown = ""
    if one.result is not None:
        shown += f"<h2>Result</h2>{block(_pretty(report.masked(one.result)))}"
    if one.error is not None:
        shown += f"<h2>Error</h2>{block(one.error)}"
    if found["file"] is not None:
        shown += f"<h2>File</h2>{block(found['file'])}"
    return shown


def _pretty(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


def _job_actions(one: pqueue.Job, token: str) -> str:
    if not token:
        return ""
    back = f"/job/{one.id}"
    if one.state in pqueue.FINISHED:
        return f"<section>{_button('resubmit', 'resubmit', token, back, id=one.id)}</section>"
    assign = f"""<details><summary>assign …</summary><form method="post" action="/act/assign">{_hidden(token, back)}
<input type="hidden" name="id" value="{one.id}"><input name="consumer" placeholder="any consumer"
value="{text(one.assigned_to or "")}"><button>assign</button></form></details>"""
    failed = _button("mark_failed", "mark failed", token, back, id=one.id)
    return f"<section>{failed} {_button('cancel', 'cancel', token, back, id=one.id)} {assign}</section>"
