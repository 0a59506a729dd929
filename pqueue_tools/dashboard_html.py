"""The dashboard's pages in HTML, for the standard library's server. Whatever comes from outside passes `text`."""

from __future__ import annotations

import html
import json
import math
import time
from typing import Any
from urllib.parse import urlencode

import pqueue
from pqueue_tools import dashboard, report, supervisor

Board = dashboard.Board

COLOURS = """
:root { color-scheme: light dark }
.pqueue { --page: light-dark(#f5f6f8, #0f1318); --card: light-dark(#fff, #171c23);
  --ink: light-dark(#1b2330, #e6eaf1); --soft: light-dark(#5b6678, #98a4b5); --line: light-dark(#e2e6ec, #2a323d);
  --completed: light-dark(#157a4c, #43cf93); --failed: light-dark(#c62f2f, #ff7575);
  --processing: light-dark(#1669b2, #62b5ff); --pending: light-dark(#8a5a00, #e9b650);
  --scheduled: light-dark(#5e4fc4, #ab9eff); --cancelled: var(--soft) }
"""
SUMMARY: str = (
    "".join(f".pqueue i.{name} {{ background: {paint} }}\n" for name, paint in dashboard.PAINT.items())
    + """
.pqueue .keys { display: flex; gap: 2px 14px; flex-wrap: wrap; font-size: 12.5px; color: var(--soft);
  margin-bottom: 8px }
.pqueue .keys b { color: var(--ink); font-weight: 600 }
.pqueue .keys i { display: inline-block; width: 14px; height: 10px; margin-right: 5px }
.pqueue .keys i.line { height: 2px; vertical-align: 4px }
.pqueue .health { display: inline-block; margin: 0 6px 6px 0; padding: 2px 10px; border: 1px solid currentColor;
  border-radius: 12px; font-size: 13px; line-height: 1.45 }
.pqueue .tiles { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 8px }
.pqueue .tile { border: 1px solid var(--line); border-radius: 8px; padding: 7px 12px; background: var(--card) }
.pqueue .tile b { display: block; font-size: 20px; font-weight: 600; line-height: 1.35; white-space: nowrap;
  font-variant-numeric: tabular-nums }
.pqueue .tile span { color: var(--soft); font-size: 12.5px; white-space: nowrap }
.pqueue .completed, .pqueue .running { color: var(--completed) }
.pqueue .failed, .pqueue .dead { color: var(--failed) }
.pqueue .processing { color: var(--processing) } .pqueue .pending { color: var(--pending) }
.pqueue .scheduled { color: var(--scheduled) } .pqueue .cancelled, .pqueue .stopped { color: var(--soft) }
@media (max-width: 900px) { .pqueue .tiles { grid-template-columns: repeat(4, minmax(0, 1fr)) } }
@media (max-width: 600px) { .pqueue .tiles { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 6px }
  .pqueue .tile { padding: 5px 7px } .pqueue .tile b { font-size: 13.5px } .pqueue .tile span { font-size: 11.5px } }
"""
)
STYLE = (
    COLOURS
    + SUMMARY
    + """
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 14px/1.45 system-ui, sans-serif }
header, main { max-width: 1280px; margin: 0 auto; padding: 0 16px }
header { display: flex; gap: 4px 16px; align-items: baseline; flex-wrap: wrap; padding-top: 12px }
header .path { color: var(--soft); font-size: 12.5px; overflow-wrap: anywhere }
nav { display: flex; gap: 14px; margin-left: auto; font-size: 13px; flex-wrap: wrap }
h1 { font-size: 18px; margin: 0 } h1 a { color: inherit; text-decoration: none }
h2 { font-size: 14px; font-weight: 600; margin: 0 0 8px } table + h2 { margin-top: 18px }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px;
  margin: 10px 0; overflow-x: auto }
.two { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 12px 28px; margin-top: 16px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 12.5px }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap }
th:last-child, td:last-child { padding-right: 0 }
tr:last-child td { border-bottom: 0 }
td.wide, th.wide { width: 99%; min-width: 140px; max-width: 0; overflow: hidden; text-overflow: ellipsis }
td.rest { width: 99%; white-space: normal; overflow-wrap: anywhere }
td.number, th.number { text-align: right }
.soft { color: var(--soft) }
.said { border-left: 3px solid var(--completed) }
.pqueue header .health { margin: 0 }
a { color: var(--processing) }
form { display: inline-flex; gap: 6px; flex-wrap: wrap; align-items: center; margin: 0 }
form.filter { margin-bottom: 8px } form.block { display: block }
input, select, button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 3px 8px; max-width: 100% }
::placeholder { color: var(--soft); opacity: 1 }
input[type=checkbox] { margin: 3px 0 0 }
button { cursor: pointer } button:hover { border-color: var(--processing) }
details { display: inline-block; vertical-align: top } summary { cursor: pointer; color: var(--processing) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--page); border: 1px solid var(--line);
  border-radius: 6px; padding: 10px; margin: 4px 0 14px; max-height: 420px; overflow-y: auto; font-size: 12.5px }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 16px; margin: 0 }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
progress { width: 90px; height: 10px; accent-color: var(--processing) }
figure { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 8px; margin: 0 }
figure > * { grid-column: 2 }
figcaption { grid-column: 1 / 3 }
figure svg.plot { width: 100%; height: 120px; display: block }
.plot .grid { stroke: var(--line) } .plot * { vector-effect: non-scaling-stroke }
.axis { display: flex; justify-content: space-between; color: var(--soft); font-size: 11.5px; line-height: 1;
  font-variant-numeric: tabular-nums }
.axis.up { flex-direction: column; text-align: right; grid-column: 1; margin: -5px 0 }
.bulk { margin-top: 10px }
.bulk button, td form { margin-right: 6px }
@media (max-width: 900px) { .two { grid-template-columns: minmax(0, 1fr) } }
@media (max-width: 600px) { header, main { padding: 0 10px } header { padding-top: 10px } nav { margin: 0 }
  section { padding: 10px } .less { display: none } table { font-size: 13px }
  th, td { padding-right: 8px } td.wide, th.wide { min-width: 76px }
  progress { width: 70px }
  input:not([type=checkbox]), select, button { min-height: 32px }
  form.filter input, form.filter select { flex: 1 1 40% } }
"""
)

# Each live part is replaced when it has changed, but not while the reader types, ticks or is about to confirm in it.
SCRIPT = """
const busy = part => part.contains(document.activeElement) && document.activeElement !== document.body
  || part.querySelector('details[open], input:checked');
async function refresh() {
  if (document.hidden) return;
  try {
    const answer = await fetch('/live' + location.search, {credentials: 'same-origin'});
    if (answer.ok && !document.getElementById('jobs')) return location.reload();
    for (const [name, text] of Object.entries(await answer.json())) {
      const part = document.getElementById(name);
      if (part && part.dataset.text !== text && !busy(part)) { part.innerHTML = text; part.dataset.text = text; }
    }
  } catch (error) {
    document.getElementById('health').innerHTML = '<p class="health failed">the dashboard does not answer</p>';
  }
}
if (document.getElementById('overview')) setInterval(refresh, REFRESH);
""".replace("REFRESH", str(dashboard.REFRESH_SECONDS * 1000))

ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">
<rect width="16" height="16" rx="4" fill="#1669b2"/>
<path d="M4 5h8M4 8h8M4 11h5" stroke="#fff" stroke-width="1.6" stroke-linecap="round"/></svg>"""

FILES = {
    "/style.css": ("text/css; charset=utf-8", STYLE),
    "/script.js": ("text/javascript; charset=utf-8", SCRIPT),
    "/icon.svg": ("image/svg+xml", ICON),
}


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


def index(parts: dict[str, str], query: dict[str, str], said: str) -> str:
    """Return the page around its live parts."""
    body = f"""{_said(said)}
<section id="overview">{parts["overview"]}</section>
<section id="processing">{parts["processing"]}</section>
<section><h2>Jobs</h2>{_filter_form(query)}<div id="jobs">{parts["jobs"]}</div></section>
<section id="failed">{parts["failed"]}</section>
<section id="consumers">{parts["consumers"]}</section>
<section id="queues">{parts["queues"]}</section>"""
    return _page("pqueue", parts["health"], body, parts["path"])


def _said(sentence: str) -> str:
    return f'<section class="said">{text(sentence)}</section>' if sentence else ""


def sections(board: Board, figures: dict[str, Any], query: dict[str, str], token: str) -> dict[str, str]:
    """Return the HTML of each live part by its id; the figures are those of the board."""
    seen = figures["overview"]
    return {
        "path": text(seen["path"]),
        "health": health(seen["problems"]),
        "overview": f'{tiles(seen)}<div class="two">{_jobs_chart(figures["minutes"])}'
        f"{_times_chart(figures['minutes'])}</div>",
        "processing": _processing(figures["processing"]),
        "jobs": _jobs(board, query, token),
        "failed": _failed(figures["failures"], token),
        "consumers": _consumers(figures["consumers"]) + _groups(figures["processes"], token),
        "queues": _queues(seen, token),
    }


def without_queue(sentence: str) -> str:
    comes_back = '<section id="overview">This page comes back by itself.</section>'
    return _page("pqueue", trouble(sentence), comes_back, again=True)


def trouble(sentence: str) -> str:
    return health([sentence])


def health(problems: list[str]) -> str:
    if not problems:
        return '<p class="health completed">healthy</p>'
    return "".join(f'<p class="health failed">{text(each)}</p>' for each in problems)


def tiles(seen: dict[str, Any]) -> str:
    return f"""<div class="tiles">{
        "".join(
            f'<div class="tile"><span>{text(label)}</span><b class="{state}">{text(value)}</b></div>'
            for label, value, state in dashboard.tiles(seen)
        )
    }</div>"""


def _page(title: str, status: str, body: str, path: str = "", *, again: bool = False) -> str:
    parts = ("processing", "jobs", "failed", "consumers", "queues")
    links = "".join(f'<a href="/#{part}">{part}</a>' for part in parts)
    refresh = f'<noscript><meta http-equiv="refresh" content="{dashboard.REFRESH_SECONDS}"></noscript>' if again else ""
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="stylesheet" href="/style.css">
<link rel="icon" href="/icon.svg">{refresh}</head><body class="pqueue">
<header><h1><a href="/">pqueue</a></h1><div id="health">{status}</div><span class="path" id="path">{path}</span>
<nav>{links}</nav></header>
<main>{body}</main><script src="/script.js"></script></body></html>"""


# Charts: a frame of HTML with the axes' text around a drawing that stretches ##########################################

WIDTH, HEIGHT = 600.0, 100.0
Minutes = list[dict[str, Any]]


TIMES_KEYS = """<div class="keys"><b>Wait and run time</b><span><i class="wait line"></i>wait</span>
<span><i class="run line"></i>run</span><span>p50 whole, p95 dashed</span></div>"""


def jobs_keys(minutes: Minutes) -> str:
    """Return the caption of the chart of jobs, with the sums over the hour."""
    total = {name: f"{name} {sum(each[name] for each in minutes):,}" for name in ("completed", "failed", "enqueued")}
    return f"""<div class="keys"><b>Jobs per minute</b><span><i class="completed"></i>{total["completed"]}</span>
<span><i class="failed"></i>{total["failed"]}</span>
<span><i class="enqueued line"></i>{total["enqueued"]}</span></div>"""


def _jobs_chart(minutes: Minutes) -> str:
    """Draw the last hour: bars of what completed and failed, a line of what was enqueued; the last is going on."""
    top = _ceiling(max(2, *(max(each["enqueued"], each["completed"] + each["failed"]) for each in minutes)))
    step = WIDTH / len(minutes)
    marks = []
    for number, each in enumerate(minutes):
        y, going_on = HEIGHT, ' opacity="0.5"' if number == len(minutes) - 1 else ""
        for name in ("completed", "failed"):
            tall = each[name] / top * HEIGHT
            y -= tall
            if tall:
                marks.append(
                    f'<rect x="{number * step + 1:.1f}" y="{y:.1f}" width="{step - 2:.1f}" height="{tall:.1f}" '
                    f'fill="{dashboard.PAINT[name]}"{going_on}/>'
                )
    marks += _line([each["enqueued"] for each in minutes[:-1]], top, step, "enqueued")
    told = [", ".join(f"{each[name]:,} {name}" for name in ("enqueued", "completed", "failed")) for each in minutes]
    return _frame(jobs_keys(minutes), [f"{top:,.0f}", f"{top / 2:,.0f}", "0"], marks, told, minutes)


def _times_chart(minutes: Minutes) -> str:
    """Draw, for the last hour, how long jobs waited and ran, by powers of ten: p50 whole, p95 dashed."""
    values = [max(each, 0.001) for minute in minutes[:-1] for name in ("wait", "run") for each in minute[name] or ()]
    low = math.floor(math.log10(min(values, default=0.01)))
    high = max(low + 2, math.ceil(math.log10(max(values, default=1))))
    step, marks = WIDTH / len(minutes), []
    for name in ("wait", "run"):
        for place, dashes in ((1, "4 3"), (0, "")):
            seconds = [each[name] and max(each[name][place], 0.001) for each in minutes[:-1]]
            marks += _line([s and math.log10(s) - low for s in seconds], high - low, step, name, dashes)
    told = [
        ", ".join(f"{name} p50 / p95 {dashboard.times(each[name])}" for name in ("wait", "run")) for each in minutes
    ]
    scale = [_seconds(10.0**power) for power in range(high, low - 1, -1)]
    return _frame(TIMES_KEYS, scale, marks, told, minutes)


def _frame(keys: str, scale: list[str], marks: list[str], told: list[str], minutes: Minutes) -> str:
    """Return the marks with axes, and a sentence for each minute that is pointed at."""
    step = WIDTH / len(minutes)
    lines = [HEIGHT * number / (len(scale) - 1) for number in range(len(scale))]
    grid = "".join(f'<path class="grid" d="M0 {y:.1f}H{WIDTH:.0f}"/>' for y in lines)
    tips = "".join(
        f'<rect x="{number * step:.1f}" width="{step:.1f}" height="{HEIGHT:.0f}" fill="transparent">'
        f"<title>{_clock(each['at'])}: {said}</title></rect>"
        for number, (each, said) in enumerate(zip(minutes, told, strict=True))
    )
    quarters = [_clock(minutes[len(minutes) * quarter // 4]["at"]) for quarter in range(4)]
    return f"""<figure><figcaption>{keys}</figcaption>
<div class="axis up">{"".join(f"<span>{each}</span>" for each in scale)}</div>
<svg class="plot" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" preserveAspectRatio="none" aria-hidden="true">
{grid}{"".join(marks)}{tips}</svg>
<div class="axis">{"".join(f"<span>{each}</span>" for each in [*quarters, "now"])}</div></figure>"""


def _line(values: list[float | None], top: float, step: float, name: str, dashes: str = "") -> list[str]:
    """Return a line through the middles of the minutes, broken where there is no value; a lone one is a dot."""
    path, pen = "", "M"
    for number, value in enumerate(values):
        if value is None:
            pen = "M"
        else:
            path += f"{pen}{(number + 0.5) * step:.1f} {HEIGHT - value / top * HEIGHT:.1f}" + "h0" * (pen == "M")
            pen = "L"
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    how = 'fill="none" stroke-width="1.5" stroke-linecap="round"'
    return [f'<path d="{path}" {how} stroke="{dashboard.PAINT[name]}"{dashed}/>']


def _ceiling(value: float) -> float:
    """Return the next of 2, 4, 6, 8, 10, 12, 16, 20, 40 … at or above a value of at least 2; half of it is whole."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(each * power for each in (1, 1.2, 1.6, 2, 4, 6, 8, 10) if each * power >= value)


def _seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1000:g} ms"


def _clock(at: float) -> str:
    return time.strftime("%H:%M", time.localtime(at))


# Tables ###############################################################################################################


def _table(heads: list[str], rows: list[list[str]], empty: str) -> str:
    """Return a table of cells that are HTML already. A head begins with # for numbers, with ~ for what takes the
    width that is left and may be cut, with = for what takes it whole, with - for what a phone leaves out."""
    if not rows:
        return f'<p class="soft">{empty}</p>'
    classes = {"#": "number", "~": "wide", "=": "rest", "-": "less"}
    kinds = [" ".join(name for mark, name in classes.items() if mark in head[:2]) for head in heads]
    top = "".join(
        f'<th class="{kind}" scope="col">{head.lstrip("#~=-")}</th>' for head, kind in zip(heads, kinds, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _more(shown: int, found: int, noun: str) -> str:
    return f'<p class="soft">and {report.count(found - shown, noun)} more</p>' if found > shown else ""


def _processing(jobs: list[pqueue.Job]) -> str:
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
        for job in jobs
    ]
    heads = ["job", "task", "-consumer", "#elapsed", "-#lease left", "-attempt", "~progress"]
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
        for name in dashboard.FILTERS
        if name != "state"
    )
    return f"""<form class="filter" action="/"><select name="state" aria-label="state">
<option value="">any state</option>
{states}</select>{fields}<button>filter</button><a href="/">all</a></form>"""


def _jobs(board: Board, query: dict[str, str], token: str) -> str:
    jobs, before = shown = board.jobs(query)
    rows = [
        [
            *([f'<input type="checkbox" name="id" value="{job.id}" aria-label="job {job.id}">'] if token else []),
            _link(job.id),
            f'<span class="{job.state}">{job.state}</span>',
            text(job.queue),
            text(job.task),
            f"{job.attempts} of {job.max_attempts}",
            text(job.consumer or ""),
            when(job.created_at),
            text(report.cut(report.detail(job), 200)),
        ]
        for job in jobs
    ]
    kept = {name: query[name] for name in dashboard.FILTERS if query.get(name)}
    heads = [
        *([""] if token else []),
        "job",
        "state",
        "-queue",
        "task",
        "-attempt",
        "-consumer",
        "-enqueued",
        "~detail",
    ]
    made = _table(heads, rows, dashboard.none_found(query, before))
    if token and jobs:
        made = _bulk_form(made, kept, dashboard.matching(query, shown) if kept else "", token)
    return made + _pager(kept, query.get("before_id", ""), jobs, before)


def _pager(kept: dict[str, str], after: str, jobs: list[pqueue.Job], before: int | None) -> str:
    links = [f'<a href="/?{html.escape(urlencode(kept))}#jobs">newest jobs</a>'] if after else []
    if before is not None:
        label = "older jobs" if len(jobs) == dashboard.PAGE else f"searched back to job {before:,}: go on"
        links.append(f'<a href="/?{html.escape(urlencode({**kept, "before_id": str(before)}))}#jobs">{label}</a>')
    return f"<p>{' · '.join(links)}</p>" if links else ""


def _bulk_form(made: str, found: dict[str, str], matching: str, token: str) -> str:
    kept = "".join(f'<input type="hidden" name="{name}" value="{text(value)}">' for name, value in found.items())
    choice = f'<option value="matching">{matching}</option>' if matching else ""
    buttons = "".join(
        f'<button name="action" value="{verb}">{verb.replace("_", " ")}</button>'
        for verb in ("resubmit", "mark_failed", "cancel")
    )
    return f"""<form method="post" action="/act/jobs" class="block">
{_hidden(token, "/?" + urlencode(found))}{kept}{made}
<div class="bulk"><details><summary>change jobs …</summary> <select name="scope" aria-label="which jobs">
<option value="ticked">the ticked ones</option>{choice}</select> {buttons}</details></div></form>"""


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


def _failed(groups: list[dict[str, Any]], token: str) -> str:
    rows = [
        [
            f"{each['jobs']:,}",
            text(each["task"]),
            _link(each["last_id"]),
            _search(each["error"], state="failed", task=each["task"]),
            _button("resubmit_group", "resubmit all", token, task=each["task"], error=each["error"]),
        ]
        for each in groups[: dashboard.GROUPS]
    ]
    made = _table(["#jobs", "task", "-last", "~error", ""], rows, "no job has failed")
    return f"<h2>Failed</h2>{made}{_more(len(rows), len(groups), 'group')}"


def _consumers(consumers: list[dict[str, Any]]) -> str:
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
        for each in consumers[: dashboard.CONSUMERS]
    ]
    heads = ["consumer", "state", "-host / pid", "jobs", "#done", "#failed", "~seen"]
    made = _table(heads, rows, "no consumer was here: run <code>python consumer.py</code>")
    return f"<h2>Consumers</h2>{made}{_more(len(rows), len(consumers), 'consumer')}"


def _groups(found: list[dict[str, Any]] | str, token: str) -> str:
    if isinstance(found, str):
        return f'<p class="soft">{text(found)}</p>'
    added = supervisor.added_groups()
    lines = []
    for group in dict.fromkeys(each["group"] for each in found):
        states = [
            f"{text(each['name']) if each['name'] != group else ''} {text(each['state'].lower())}"
            for each in found
            if each["group"] == group
        ]
        remove = _button("remove_group", f"remove {group}", token, group=group) if group in added else ""
        lines.append(f"<p><b>{text(group)}</b> <span class='soft'>{', '.join(states)}</span> {remove}</p>")
    add = _button("add_group", f"add {supervisor.GROUP_SIZE} consumers", token)
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
                *(f"{each[state]:,}" for state in dashboard.SHOWN),
                "" if oldest is None else report.span(max(0.0, now - oldest)),
                limit,
                '<span class="failed">paused</span>' if each["paused"] else "",
                _button(verb, verb, token, ask=False, queue=name) + _limit_form(name, token),
            ]
        )
    heads = [
        "queue",
        "#pending",
        "-#scheduled",
        "-#processing",
        "-#completed",
        "#failed",
        "-#oldest",
        "-#limit",
        "",
        "=",
    ]
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
    parts.append(f"<section>{_texts(found, one)}</section>")
    if found["history"]:
        rows = [
            [
                when(e["at"]),
                text(e["event"]),
                text(e["actor"]),
                str(e["attempt"]),
                text(report.cut(report.first_line(e["error"]), 300)),
            ]
            for e in found["history"]
        ]
        story = _table(["when", "event", "who", "-#attempt", "=error"], rows, "")
        parts.append(f"<section><h2>History</h2>{story}</section>")
    return _page(f"job {one.id}", "", _said(said) + "".join(parts))


def _texts(found: dict[str, Any], one: pqueue.Job) -> str:
    texts = {
        "Payload": pretty(one.payload),
        "Result": None if one.result is None else pretty(one.result),
        "Error": one.error,
        "File": found["file"],
    }
    shown = ""
    for title, value in texts.items():
        if value is not None:
            shown += f"<h2>{title}</h2>{block(value[: dashboard.MOST_CHARS])}"
            if len(value) > dashboard.MOST_CHARS:
                whole = f'<a href="/api/jobs/{one.id}">the whole job as JSON</a>'
                shown += f'<p class="soft">the first {dashboard.MOST_CHARS:,} characters: {whole}</p>'
    return shown


def pretty(value: Any) -> str:
    """Return a payload or result on many lines, or more than MOST_CHARS of them: deep lists grow by their indents."""
    parts, size = [], 0
    encoder = json.JSONEncoder(ensure_ascii=False, indent=2, check_circular=False)  # to check, it would keep the value
    for part in encoder.iterencode(value):
        parts.append(part)
        size += len(part)
        if size > dashboard.MOST_CHARS:
            break
    return "".join(parts)


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
