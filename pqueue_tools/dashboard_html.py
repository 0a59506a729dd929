"""The dashboard's pages in HTML, for the standard library's server. All external text is escaped by `text`."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pqueue
from pqueue_tools import dashboard, dashboard_summary, report, tables
from pqueue_tools.dashboard import FILTERS, Query, one, prefix
from pqueue_tools.dashboard_page import SCRIPT, STYLE
from pqueue_tools.dashboard_summary import bars, charts, findings, text, tiles, time, trend
from pqueue_tools.tables import OVERVIEW_ROWS, PAGES, Button, Column, Page, Table
from pqueue_values import NO_PARAMS, QueueNotFound

ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">
<rect width="16" height="16" rx="4" fill="#1669b2"/>
<path d="M4 5h8M4 8h8M4 11h5" stroke="#fff" stroke-width="1.6" stroke-linecap="round"/></svg>"""

FILES = {
    "/style.css": ("text/css; charset=utf-8", dashboard_summary.STYLE + STYLE),
    "/script.js": ("text/javascript; charset=utf-8", SCRIPT),
    "/icon.svg": ("image/svg+xml", ICON),
    "/icon-problem.svg": ("image/svg+xml", ICON.replace("#1669b2", "#b93a00")),
}

_kept: ContextVar[dict[str, str]] = ContextVar("kept", default=NO_PARAMS)  # see `dashboard.of_viewer`
CONTROLS = {number: f"&#{number};" for number in (*range(1, 32), 127)}  # as references: a parser changes CR


# Pages ################################################################################################################


DRAWINGS: dict[str, Callable[[Any], str]] = {"trend": trend, "failures": bars}


@contextmanager
def _keeping(query: Query) -> Iterator[None]:
    """Let each link keep what the viewer of a page with this query chose."""
    token = _kept.set(dashboard.of_viewer(query))
    try:
        yield
    finally:
        _kept.reset(token)


def page(
    which: Page, figures: dict[str, Any], jobs: dashboard.JobPage | None, query: Query, message: str, token: str
) -> str:
    """Return a page of PAGES; `jobs` are those that its search found."""
    back = _with_query(f"/{which.name}", dashboard.kept(query))
    title = tables.task_title(query) if which.name == "task" else which.title
    menu = which.name if which.under is None else which.under
    with _keeping(query):
        parts = [_part(each, which, figures, jobs, query, token, back) for each in tables.parts_of(which, figures)]
        return _frame(title, "".join(parts), message, figures["overview"], menu)


def _part(
    part: Table | str, which: Page, figures: dict[str, Any], jobs: Any, query: Query, token: str, back: str
) -> str:
    if part == "findings":
        shown = findings(figures["overview"]["findings"], lambda name: _address(tables.page_of(name)))
    elif part == "tiles":
        shown = tiles(dashboard.tiles(figures["overview"]), lambda state: _address("jobs", {"state": state}))
    elif part == "charts":
        shown = _ranges(which, query) + charts(dashboard.periods(figures, one(query, "last")))
    elif part == "task":
        shown = _task(which, figures, query)
    elif part == "search":
        shown = _search(which, figures, jobs, query, token, back)
    elif part is tables.GROUPS and isinstance(figures["processes"], str):
        shown = f'<h2>{tables.GROUPS.title}</h2><p class="soft">{text(figures["processes"])}</p>'
    else:
        shown = _titled(part, part.rows(figures), token, back, None if which.name else OVERVIEW_ROWS)  # type: ignore[union-attr, arg-type]
        shown += _buttons([tables.ADD_GROUP], token, back) if part is tables.GROUPS else ""
    key = part if isinstance(part, str) else part.key
    return f'<section id="{key}">{shown}</section>'


def _ranges(which: Page, query: Query) -> str:
    """Return links to the ranges of the charts."""
    last = one(query, "last")
    current = {last if last in dashboard.DAYS else "1 h": ' aria-current="true"'}
    given = dashboard.given(query)
    links = " ".join(
        f'<a class="range" href="{html.escape(_url(which.name, {**given, "last": name}))}"'
        f"{current.get(name, '')}>{name}</a>"
        for name in dashboard.RANGES
    )
    return f'<p class="ranges">last {links}</p>'


def _task(which: Page, figures: dict[str, Any], query: Query) -> str:
    """Return what happened to the jobs of a task within a range."""
    handler = tables.handled_by(figures)
    return f"""<h2>{text(tables.task_title(query))}</h2>{_ranges(which, query)}
{tiles(dashboard.task_tiles(figures["total"]), lambda state: _address("jobs", tables.task_jobs(query, state)))}
{charts(dashboard.periods(figures, one(query, "last")))}{f'<p class="soft">{text(handler)}</p>' if handler else ""}"""


def _frame(
    title: str, body: str, message: str = "", seen: dict[str, Any] | None = None, name: str | None = None
) -> str:
    """Return a page; `seen` is the overview, or None while the queue is not available."""
    found = report.problems(seen["findings"]) if seen else []
    current = {name: ' aria-current="page"'}
    links = "".join(
        f'<a href="{_address(each.name)}"{current.get(each.name, "")}>{each.title}</a>' for each in tables.MENU
    )
    verdict = dashboard_summary.verdict(seen["findings"], _address("")) if seen else ""
    mode = '<span class="health info">read-only</span>' if dashboard.read_only() else ""
    heading, site = f"({len(found)}) {title}" if found else title, text(dashboard.site_name())
    icon = "icon.svg" if seen and not found else "icon-problem.svg"
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{text(heading)} · {site}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="stylesheet" href="{prefix()}/style.css">
<link rel="icon" id="icon" href="{prefix()}/{icon}"></head><body class="pqueue">
<a class="skip" href="#main">skip to the content</a>
<header><h1><a href="{_address("")}">{site}</a></h1>
<div id="health" role="status">{verdict}{mode}</div>
<span class="path" id="path">{text(seen["path"]) if seen else ""}</span>
<span id="live"><span id="age">times in UTC</span>
<button type="button" id="pause" hidden>pause</button></span><div id="away" role="alert"></div></header>
<nav aria-label="pages">{links}</nav>
<main id="main" tabindex="-1">{body}</main>{said(message)}
<dialog id="ask" aria-label="confirmation"></dialog><script src="{prefix()}/script.js"></script></body></html>"""


def said(message: str, kind: str = "done") -> str:
    """Return what an action did, or why it was refused."""
    return f'<p id="said" class="{kind}" role="status">{text(message)}</p>'


def without_queue(error: Exception, query: Query) -> str:
    """Return the page that is shown while the queue is not available."""
    title = "no queue yet" if isinstance(error, QueueNotFound) else "queue not available"
    with _keeping(query):
        return _frame(title, f'<section id="trouble">{dashboard_summary.without_queue(error)}</section>')


def refusal(title: str, sentence: str, back: str) -> str:
    """Return the page that says why a request was refused; `back` is the page that it came from, or the address."""
    page = f'<a href="{prefix()}{html.escape(back)}">back</a> · ' if is_back(back) else ""
    with _keeping(_query_of(back)):
        body = f'<section><p>{text(sentence)}</p><p>{page}<a href="{_address("")}">to the overview</a></p></section>'
        return _frame(title, body).replace(said(""), said(sentence, "refused"))


def _query_of(address: str) -> Query:
    try:
        return parse_qs(urlsplit(address).query)
    except ValueError:
        return {}


def question(what: str, action: str, form: dashboard.Form, token: str) -> str:
    """Return a page that asks whether to perform an action on many jobs."""
    fields = _inputs({**form, "token": [token], "action": [action], "confirmed": ["1"]})
    is_all = form.get("scope") == ["matching"]
    ids = form.get("id", [])
    which = f"jobs {', '.join(ids[: tables.JOBS_ASKED_FOR])}" + " …" * (len(ids) > tables.JOBS_ASKED_FOR)
    back = one(form, "back")
    with _keeping(_query_of(back)):
        return _frame(
            what,
            f"""<section id="question"><h2>{text(what)}?</h2>
<p>{text(tables.filters_as_text(form) if is_all else which)}. Jobs whose state does not allow it are left unchanged.</p>
<form method="post" action="{prefix()}/act/jobs">{fields}<button autofocus>yes, {text(what)}</button>
<a class="no" href="{prefix()}{html.escape(back if is_back(back) else "/")}">no</a></form></section>""",
        )


def is_back(path: str) -> bool:
    """Return whether this is the address of a page of the dashboard, to which an action may return."""
    name = path.partition("?")[0]
    return path.startswith("/job/") or (path.startswith("/") and name[1:] in PAGES)


# Tables ###############################################################################################################


def _table(table: Table, rows: list[Any], token: str, back: str, *, ticks: bool = False, empty: str = "") -> str:
    """Return a table. If actions are allowed, add a checkbox to each job and the buttons of each row."""
    if not rows:
        return f'<p class="soft">{text(empty or table.empty)}</p>'
    columns = tables.columns_of(table, rows)
    if token and ticks:
        columns.insert(0, Column(_TICK_ALL, lambda job: _TICK.format(job.id), "html"))
    if token and any(table.buttons(row) for row in rows):
        columns.append(
            Column('<span class="only">actions</span>', lambda row: _buttons(table.buttons(row), token, back), "html")
        )
    heads = "".join(f'<th class="{_classes(each)}" scope="col">{each.heading}</th>' for each in columns)
    body = "".join(
        f'<tr data-key="{text(table.name(row))}">'
        + "".join(f'<td class="{_classes(each)}">{_cell(each, row)}</td>' for each in columns)
        + "</tr>"
        for row in rows[: table.most]
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


_TICK = '<input type="checkbox" name="id" value="{0}" aria-label="job {0}">'
_TICK_ALL = '<input type="checkbox" id="all" aria-label="all jobs of this page" hidden><span class="only">select</span>'


def _titled(table: Table, rows: list[Any], token: str, back: str, most: int | None) -> str:
    """Return a table with its title and, if it has more than `most` rows, a link to all of them."""
    shown, hidden = rows[: most or table.most], ""
    if len(rows) > len(shown):
        more = text(tables.more(table, len(rows) - len(shown)))
        link = f'<a href="{_address(tables.page_of(table.key))}">{more}</a>'
        hidden = f"<p>{link}</p>" if most else f'<p class="soft">{more}</p>'
    return f"<h2>{table.title}</h2>{_table(table, shown, token, back)}{hidden}"


def _classes(column: Column) -> str:
    kind = {"number": "number", "since": "number", "until": "number", "text": "" if column.width else "name"}
    return " ".join([kind.get(column.kind, ""), column.width] + ["less"] * (not column.on_phone)).strip()


def _cell(column: Column, row: Any) -> str:  # noqa: PLR0911 - one for each kind
    value = column.cell(row)
    if value is None or value == "":
        return ""
    if column.kind == "job":
        jobs = value if isinstance(value, list) else [value]
        links = [f'<a href="{_address(f"job/{each}")}">{each}</a>' for each in jobs[: tables.JOBS_OF_CONSUMER_SHOWN]]
        return " ".join(links) + " …" * (len(links) < len(jobs))
    if column.kind in ("time", "since", "until", "clock", "moment"):
        return time(value, column.kind, report.utc(value))
    if column.kind == "left":
        return time(value[0], "left", report.span(tables.left(*value)), progress=f"{value[1]:g}")
    if column.kind in DRAWINGS:
        return DRAWINGS[column.kind](value)
    if column.kind == "state":
        return f'<span class="state {text(value)}">{text(value)}</span>'
    if column.kind == "progress":
        return f'<progress max="1" value="{value:.3f}" aria-label="progress"></progress> {value:.0%}'
    if column.kind == "long":
        first, _, rest = value.partition("\n")
        lines = "\n".join(text(line) for line in rest.split("\n"))
        unfolds = f"<details><summary>{text(report.cut(first, 300))}</summary><pre>{lines}</pre></details>"
        return unfolds if rest else text(first)
    shown = str(value) if column.kind == "html" else text(f"{value:,}" if isinstance(value, int) else value)
    if column.width == "fold" and ", " in shown:
        shown = shown.replace(" ", "&nbsp;").replace(",&nbsp;", ", ")
    return f'<a href="{_address(*column.link(row))}">{shown}</a>' if column.link else shown


def _address(page: str, filters: Mapping[str, Any] = NO_PARAMS) -> str:
    """Return the address of a page, as an attribute."""
    return html.escape(_url(page, {**filters, **_kept.get()}))


def _url(page: str, query: Mapping[str, Any]) -> str:
    return prefix() + _with_query(f"/{page}", query)


def _with_query(path: str, query: Mapping[str, Any]) -> str:
    return f"{path}?{urlencode(query, doseq=True)}" if query else path


def _buttons(buttons: list[Button], token: str, back: str) -> str:
    return " ".join(_button(each, token, back) for each in buttons) if token else ""


def _button(button: Button, token: str, back: str) -> str:
    """Return a form inside a <details> element, which asks for confirmation."""
    form = f'<form method="post" action="{prefix()}/act/{button.action}">{_hidden(button.fields, token, back)}'
    asked = f"<button>{text(button.confirmation)}</button>"
    if button.is_long:
        asked = f"""<textarea name="{button.asks_for}" rows="12" cols="60" aria-label="payload" spellcheck="false">
{html.escape(button.value)}</textarea><button>{text(button.confirm)}</button>
<span class="soft">{text(button.hint)}</span>"""
    elif button.asks_for:
        asked = f"""<input name="{button.asks_for}" size="12" aria-label="{button.asks_for}" placeholder="{button.hint}"
value="{text(button.value)}"><button>{text(button.confirm or "set")}</button>"""
    return f"<details><summary>{text(button.label)} …</summary>{form}{asked}</form></details>"


def _hidden(fields: dict[str, Any], token: str, back: str) -> str:
    return _inputs({"token": [token], "back": [back], **{name: [str(value)] for name, value in fields.items()}})


def _inputs(form: dashboard.Form) -> str:
    """Return hidden fields that return the values unchanged, control characters included."""
    return "".join(
        f'<input type="hidden" name="{html.escape(name)}" value="{html.escape(value).translate(CONTROLS)}">'
        for name, values in form.items()
        for value in values
    )


# The search ###########################################################################################################


def _search(which: Page, figures: dict[str, Any], jobs: dashboard.JobPage, query: Query, token: str, back: str) -> str:
    found, before = jobs
    asked = tables.query_of(which, query)
    filters = dashboard.given(asked)
    table = _table(tables.JOBS, found, token, "", ticks=True, empty=tables.none_found(query, before))
    if token and found:
        table = _bulk_form(table, asked, tables.matching(query, jobs) if filters else "", token, back)
    given = dashboard.given(query)
    links = [f'<a href="{_address(which.name, given)}">newest jobs</a>'] if query.get("before_id") else []
    if before is not None:
        links.append(f'<a href="{_address(which.name, {**given, "before_id": before})}">{tables.older_jobs(jobs)}</a>')
    pages = f"<p>{' · '.join(links)}</p>" if links else ""
    can_enqueue = token and which.name == "jobs"
    enqueue = _ENQUEUE.format(prefix=prefix(), hidden=_hidden({}, token, back)) if can_enqueue else ""
    return f"<h2>{tables.search_title(which)}</h2>{_filter_form(which, figures, query)}{enqueue}{table}{pages}"


_ENQUEUE = """<details><summary>enqueue …</summary><form method="post" action="{prefix}/act/enqueue">{hidden}
<input name="task" list="of-task" aria-label="task to run" placeholder="task" required>
<input name="queue" list="of-queue" aria-label="queue of the job" placeholder="queue: default">
<textarea name="payload" rows="4" cols="60" aria-label="payload" placeholder="payload, JSON" spellcheck="false">
</textarea><button>enqueue</button></form></details>"""


def _filter_form(which: Page, figures: dict[str, Any], query: Query) -> str:
    states = "".join(
        f'<label class="chip"><input type="checkbox" name="state" value="{state}"'
        f"{' checked' if state in query.get('state', []) else ''}> {state}</label>"
        for state in pqueue.STATES
    )
    suggested = tables.suggestions(figures)
    lists = "".join(
        f'<datalist id="of-{name}">{"".join(f"<option>{text(each)}</option>" for each in values)}</datalist>'
        for name, values in suggested.items()
    )
    suggest = {name: f'list="of-{name}"' for name in suggested}
    fields = "".join(
        f'<input name="{name}" placeholder="{name}{f": {tables.HINTS[name]}" if name in tables.HINTS else ""}" '
        f'aria-label="{name}" size="{18 if name in tables.HINTS else 12}" value="{text(one(query, name))}" '
        f"{suggest.get(name, '')}{' class=less' if name in tables.RARE_FILTERS and not one(query, name) else ''}>"
        for name in FILTERS
        if name != "state"
    )
    chips = "" if which.name == "failed" else f'<div class="chips">{states}</div>'
    chosen = _inputs({name: [value] for name, value in _kept.get().items()})
    return f"""<form class="filter" action="{prefix()}/{which.name}">{chips}{fields}{lists}{chosen}
<button>filter</button> <a href="{_address(which.name)}">clear</a></form>"""


_WHEN = """ <label>in <input name="when" value="10m" size="6"></label>
<label>at <input name="rate" placeholder="any rate, or 10/1s" size="14" aria-label="rate"></label>"""


def _bulk_form(table: str, query: Query, matching: str, token: str, back: str) -> str:
    choice = f'<option value="matching">{matching}</option>' if matching else ""
    buttons = " ".join(
        f'<button name="action" value="{each}">{label}</button>' + (_WHEN if each == "retry" else "")
        for each, label in tables.bulk_actions(query).items()
    )
    fields = _inputs({"token": [token], "back": [back], **dashboard.given(query)})
    return f"""<form method="post" action="{prefix()}/act/jobs" class="block">
{fields}<div class="bulk"><select name="scope" aria-label="which jobs">
<option value="ticked">the ticked jobs</option>{choice}</select> {buttons}</div>{table}</form>"""


# The page of one job ##################################################################################################


def job(found: dict[str, Any], query: Query, message: str, token: str, seen: dict[str, Any]) -> str:
    one: pqueue.Job = found["job"]
    back = _with_query(f"/job/{one.id}", dashboard.of_viewer(query))
    with _keeping(query):
        facts = dashboard_summary.facts({each.heading: _cell(each, found) for each in tables.FACTS})
        buttons = _buttons(tables.job_buttons(found), token, back)
        timeline = _titled(tables.HISTORY, tables.HISTORY.rows(found), token, back, None)
        texts = {title.lower(): _text(one, title, value, is_cut) for title, value, is_cut in tables.texts(found)}
        parts = {"facts": f"<h2>Job {one.id}</h2>{buttons}{facts}", "error": texts.pop("error", "")}
        parents = _titled(tables.PARENTS, found["parents"], token, back, None) if found["parents"] else ""
        parts |= {"parents": parents, "timeline": timeline, **texts}
        body = "".join(f'<section id="{key}">{part}</section>' for key, part in parts.items() if part)
        return _frame(f"job {one.id}", body, message, seen, "jobs")


def _text(one: pqueue.Job, title: str, value: str, is_cut: bool) -> str:
    lines = "\n".join(text(line) for line in value.split("\n"))
    whole = f'<a href="{prefix()}/api/jobs/{one.id}">the whole job as JSON</a>'
    note = f'<p class="soft">the first {dashboard.TEXT_CHARS_SHOWN:,} characters: {whole}</p>' if is_cut else ""
    return f'<h2>{title}</h2><pre tabindex="0">{lines}</pre>{note}'
