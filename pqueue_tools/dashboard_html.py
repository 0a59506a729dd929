"""The dashboard's pages in HTML, for the standard library's server. All external text is escaped by `text`."""

from __future__ import annotations

import html
from typing import Any
from urllib.parse import urlencode

import pqueue
from pqueue_tools import dashboard, dashboard_summary, report, tables
from pqueue_tools.dashboard import prefix
from pqueue_tools.dashboard_summary import charts, health, text, tiles, trouble
from pqueue_tools.tables import Button, Column, Table

STYLE = (
    dashboard_summary.STYLE
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
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 12.5px }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap }
th:last-child, td:last-child { padding-right: 0 }
tr:last-child td { border-bottom: 0 }
td.cut, th.cut { width: 99%; min-width: 140px; max-width: 0; overflow: hidden; text-overflow: ellipsis }
td.wrap { width: 99%; white-space: normal; overflow-wrap: anywhere }
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
.bulk { margin-top: 10px }
.bulk button, td form { margin-right: 6px }
@media (max-width: 600px) { header, main { padding: 0 10px } header { padding-top: 10px } nav { margin: 0 }
  section { padding: 10px } .less { display: none } table { font-size: 13px }
  th, td { padding-right: 8px } td.cut, th.cut { min-width: 76px }
  progress { width: 70px }
  input:not([type=checkbox]), select, button { min-height: 32px }
  form.filter input, form.filter select { flex: 1 1 40% } }
"""
)

# Replace each live part when it has changed, but not while the user types, selects or confirms in it.
SCRIPT = """
const busy = part => part.contains(document.activeElement) && document.activeElement !== document.body
  || part.querySelector('details[open], input:checked');
async function refresh() {
  if (document.hidden) return;
  try {
    const answer = await fetch(document.body.dataset.prefix + '/live' + location.search, {credentials: 'same-origin'});
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

CONTROLS = {number: f"&#{number};" for number in (*range(1, 32), 127)}  # as references: a parser changes CR


# The main page ########################################################################################################


def index(parts: dict[str, str], query: dict[str, str], message: str) -> str:
    """Return the page around its live parts."""
    body = f"""{_message(message)}
<section id="overview">{parts["overview"]}</section>
<section id="processing">{parts["processing"]}</section>
<section><h2>{tables.JOBS.title}</h2>{_filter_form(query)}<div id="jobs">{parts["jobs"]}</div></section>
<section id="failed">{parts["failed"]}</section>
<section id="consumers">{parts["consumers"]}</section>
<section id="queues">{parts["queues"]}</section>"""
    return _page("pqueue", parts["health"], body, parts["path"])


def _message(sentence: str) -> str:
    return f'<section class="said">{text(sentence)}</section>' if sentence else ""


def sections(figures: dict[str, Any], page: dashboard.JobPage, query: dict[str, str], token: str) -> dict[str, str]:
    """Return the HTML of each live part by its id."""
    seen = figures["overview"]
    return {
        "path": text(seen["path"]),
        "health": health(seen["findings"]),
        "overview": tiles(seen) + charts(figures["minutes"]),
        "processing": _titled(tables.PROCESSING, figures, token),
        "jobs": _jobs(page, query, token),
        "failed": _titled(tables.FAILED, figures, token),
        "consumers": _titled(tables.CONSUMERS, figures, token) + _supervisor(figures, token),
        "queues": _titled(tables.QUEUES, figures, token),
    }


def without_queue(sentence: str) -> str:
    comes_back = '<section id="overview">This page reloads automatically.</section>'
    return _page("pqueue", trouble(sentence), comes_back, again=True)


def _page(title: str, status: str, body: str, path: str = "", *, again: bool = False) -> str:
    parts = ("processing", "jobs", "failed", "consumers", "queues")
    links = "".join(f'<a href="{prefix()}/#{part}">{part}</a>' for part in parts)
    refresh = f'<noscript><meta http-equiv="refresh" content="{dashboard.REFRESH_SECONDS}"></noscript>' if again else ""
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="stylesheet" href="{prefix()}/style.css">
<link rel="icon" href="{prefix()}/icon.svg">{refresh}</head><body class="pqueue" data-prefix="{prefix()}">
<header><h1><a href="{prefix()}/">pqueue</a></h1><div id="health">{status}</div>
<span class="path" id="path">{path}</span>
<nav>{links}</nav></header>
<main>{body}</main><script src="{prefix()}/script.js"></script></body></html>"""


# Tables ###############################################################################################################


def _table(table: Table, rows: list[Any], token: str, *, ticks: bool = False, empty: str = "") -> str:
    """Return a table. If actions are allowed, add a checkbox to each job and the buttons of each row."""
    if not rows:
        return f'<p class="soft">{text(empty or table.empty)}</p>'
    columns = list(table.columns)
    if token and ticks:
        columns.insert(0, Column("", lambda job: _TICK.format(job.id), "html"))
    if token and any(table.buttons(row) for row in rows):
        width = "" if any(each.width for each in columns) else "wrap"
        columns.append(Column("", lambda row: _buttons(table.buttons(row), token), "html", width))
    heads = "".join(f'<th class="{_classes(each)}" scope="col">{each.heading}</th>' for each in columns)
    lines = [
        "".join(f'<td class="{_classes(each)}">{_cell(each, row)}</td>' for each in columns)
        for row in rows[: table.most]
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    hidden = f'<p class="soft">{text(table.hidden(rows))}</p>' if table.hidden(rows) else ""
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{hidden}"


_TICK = '<input type="checkbox" name="id" value="{0}" aria-label="job {0}">'


def _titled(table: Table, figures: dict[str, Any], token: str) -> str:
    return f"<h2>{table.title}</h2>{_table(table, table.rows(figures), token)}"


def _classes(column: Column) -> str:
    return " ".join(["number"] * (column.kind == "number") + [column.width] + ["less"] * (not column.on_phone)).strip()


def _cell(column: Column, row: Any) -> str:
    value = column.cell(row)
    if value is None or value == "":
        return ""
    if column.kind == "job":
        jobs = value if isinstance(value, list) else [value]
        links = [f'<a href="{prefix()}/job/{each}">{each}</a>' for each in jobs[: tables.JOBS_OF_CONSUMER_SHOWN]]
        return " ".join(links) + " …" * (len(links) < len(jobs))
    if column.kind == "time":
        ago = report.ago(value, report.now_shown())
        return f'<time datetime="{report.iso(value)}" title="{report.clock(value)}">{ago}</time>'
    if column.kind == "state":
        return f'<span class="{text(value)}">{text(value)}</span>'
    if column.kind == "progress":
        return f'<progress max="1" value="{value:.3f}"></progress>'
    shown = str(value) if column.kind == "html" else text(f"{value:,}" if isinstance(value, int) else value)
    return f'<a href="{prefix()}/?{_query(column.filters(row))}">{shown}</a>' if column.filters else shown


def _query(filters: dict[str, str]) -> str:
    return html.escape(urlencode(filters))


def _buttons(buttons: list[Button], token: str, back: str = "/") -> str:
    return " ".join(_button(each, token, back) for each in buttons) if token else ""


def _button(button: Button, token: str, back: str) -> str:
    """Return a form inside a <details> element, which asks for confirmation."""
    form = f'<form method="post" action="{prefix()}/act/{button.action}">{_hidden(button.fields, token, back)}'
    asked = f"<button>{text(button.confirmation)}</button>"
    if button.asks_for:
        asked = f"""<input name="{button.asks_for}" size="12" placeholder="{button.hint}" value="{text(button.value)}">
<button>set</button>"""
    return f"<details><summary>{text(button.label)} …</summary>{form}{asked}</form></details>"


def _hidden(fields: dict[str, Any], token: str, back: str) -> str:
    return _inputs({"token": [token], "back": [back], **{name: [str(value)] for name, value in fields.items()}})


def _inputs(form: dashboard.Form) -> str:
    """Return hidden fields that return the values unchanged, control characters included."""
    return "".join(
        f'<input type="hidden" name="{name}" value="{html.escape(value).translate(CONTROLS)}">'
        for name, values in form.items()
        for value in values
    )


def _supervisor(figures: dict[str, Any], token: str) -> str:
    if isinstance(figures["processes"], str):
        return f'<p class="soft">{text(figures["processes"])}</p>'
    return _titled(tables.GROUPS, figures, token) + _buttons([tables.ADD_GROUP], token)


# The search ###########################################################################################################


def _filter_form(query: dict[str, str]) -> str:
    states = "".join(
        f"<option{' selected' if query.get('state') == state else ''}>{state}</option>" for state in pqueue.STATES
    )
    fields = "".join(
        f'<input name="{name}" placeholder="{name}" value="{text(query.get(name, ""))}" size="12">'
        for name in dashboard.FILTERS
        if name != "state"
    )
    return f"""<form class="filter" action="{prefix()}/"><select name="state" aria-label="state">
<option value="">any state</option>
{states}</select>{fields}<button>filter</button><a href="{prefix()}/">all</a></form>"""


def _jobs(page: dashboard.JobPage, query: dict[str, str], token: str) -> str:
    jobs, before = page
    filters = {name: query[name] for name in dashboard.FILTERS if query.get(name)}
    table = _table(tables.JOBS, jobs, token, ticks=True, empty=tables.none_found(query, before))
    if token and jobs:
        table = _bulk_form(table, filters, tables.matching(query, page) if filters else "", token)
    links = [f'<a href="{prefix()}/?{_query(filters)}#jobs">newest jobs</a>'] if query.get("before_id") else []
    if before is not None:
        older = _query({**filters, "before_id": str(before)})
        links.append(f'<a href="{prefix()}/?{older}#jobs">{tables.older_jobs(page)}</a>')
    return table + (f"<p>{' · '.join(links)}</p>" if links else "")


def _bulk_form(table: str, filters: dict[str, str], matching: str, token: str) -> str:
    choice = f'<option value="matching">{matching}</option>' if matching else ""
    buttons = " ".join(
        f'<button name="action" value="{each}">{tables.label(each)}</button>' for each in tables.BULK_ACTIONS
    )
    return f"""<form method="post" action="{prefix()}/act/jobs" class="block">
{_hidden(filters, token, "/?" + urlencode(filters))}{table}
<div class="bulk"><details><summary>change jobs …</summary> <select name="scope" aria-label="which jobs">
<option value="ticked">the ticked ones</option>{choice}</select> {buttons}</details></div></form>"""


def question(what: str, action: str, form: dashboard.Form, token: str) -> str:
    """Return a page that asks whether to perform an action on many jobs."""
    fields = _inputs({**form, "token": [token], "action": [action], "confirmed": ["1"]})
    shown = ", ".join(form.get("id", [])[: tables.JOBS_ASKED_FOR]) if form.get("scope") != ["matching"] else ""
    more = " …" * (len(form.get("id", [])) > tables.JOBS_ASKED_FOR)
    which = f"jobs {shown}{more}" if shown else tables.filters_as_text(form)
    back = form.get("back", ["/"])[0]
    return _page(
        what,
        "",
        f"""<section><h2>{text(what)}?</h2><p>{text(which)}. Jobs whose state does not allow it are left unchanged.</p>
<form method="post" action="{prefix()}/act/jobs">{fields}<button autofocus>yes, {text(what)}</button>
<a href="{prefix()}{html.escape(back if back.startswith(("/?", "/job/")) else "/")}">no</a></form></section>""",
    )


# The page of one job ##################################################################################################


def job(found: dict[str, Any], message: str, token: str) -> str:
    one: pqueue.Job = found["job"]
    cells = {each.heading: _cell(each, found) for each in tables.FACTS}
    facts = "".join(f"<dt>{heading}</dt><dd>{cell}</dd>" for heading, cell in cells.items() if cell)
    parts = [
        f"<h2>Job {one.id}</h2><dl>{facts}</dl>",
        _buttons(tables.job_buttons(one), token, f"/job/{one.id}"),
        "".join(_text(one, *each) for each in tables.texts(found)),
        _titled(tables.HISTORY, found, token),
    ]
    body = "".join(f"<section>{part}</section>" for part in parts if part)
    return _page(f"job {one.id}", "", _message(message) + body)


def _text(one: pqueue.Job, title: str, value: str, is_cut: bool) -> str:
    lines = "\n".join(text(line) for line in value.split("\n"))
    whole = f'<a href="{prefix()}/api/jobs/{one.id}">the whole job as JSON</a>'
    note = f'<p class="soft">the first {dashboard.TEXT_CHARS_SHOWN:,} characters: {whole}</p>' if is_cut else ""
    return f"<h2>{title}</h2><pre>{lines}</pre>{note}"
