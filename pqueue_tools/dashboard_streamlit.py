"""The dashboard's page in Streamlit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone, tzinfo
from functools import partial
from itertools import cycle
from typing import Any
from urllib.parse import urlencode

import streamlit as st

import pqueue
from pqueue_cron import time_zone
from pqueue_tools import dashboard, dashboard_actions, dashboard_summary, report, tables
from pqueue_tools.process import whole_number
from pqueue_tools.tables import OVERVIEW_ROWS, Button, Column, Page, Table
from pqueue_values import NO_PARAMS

STYLE = f"""<style>{dashboard_summary.STYLE}
.stApp {{ --card: transparent }} .block-container {{ padding: 1.2rem 1rem 3rem; max-width: 1312px }}
.stAppHeader {{ background: none; pointer-events: none }} .stAppHeader button {{ pointer-events: auto }}
.pqueue {{ font-size: 14px; line-height: 1.45; --card: transparent }} .pqueue p {{ margin: 0 }}
.pqueue a {{ color: var(--processing) }} .pqueue .finding {{ margin: 3px 0; font-size: 14px }}
.pqueue .two {{ margin: 0 0 1rem }}
.pqueue .title {{ display: flex; gap: 4px 16px; align-items: baseline; flex-wrap: wrap }}
.pqueue .title .health {{ margin: 0 }} .pqueue .title + .finding {{ margin-top: 10px }}
.pqueue .title b {{ font-size: 18px }} .pqueue .menu {{ display: flex; gap: 4px 20px; flex-wrap: wrap }}
.pqueue .path {{ color: var(--soft); font-size: 12.5px }}
h5 {{ padding: 0 0 0.3rem !important }}
[data-testid=stCaptionContainer], [data-testid=stCaptionContainer] p {{ opacity: 1 !important;
  color: light-dark(#5b6678, #98a4b5) !important }}
@media (max-width: 640px) {{ .st-key-filters [data-testid=stColumn] {{ min-width: 42% !important; flex: 1 1 42% }} }}
</style>"""
DIMMED = "<style>[class*=st-key-part-]:not(.st-key-part-) { opacity: 0.45 }</style>"
KEPT = ("page", "last")  # widgets whose value the address keeps, apart from the filters
STATE_COLOURS = {
    **dict(zip(dashboard.STATES_SHOWN, ("orange", "violet", "violet", "blue", "green", "red"), strict=True)),
    "running": "green",
    "active": "green",
    "dead": "red",
    "paused": "orange",
}


@st.cache_resource
def cache() -> dashboard.FigureCache:
    return dashboard.FigureCache()


def page() -> None:
    st.set_page_config(dashboard.site_name(), layout="wide")
    st.html(STYLE)
    if trouble := _refusal() or _too_old():
        st.container(border=True).html(_html(dashboard_summary.trouble(trouble)))
        return
    if message := st.session_state.pop("message", None):
        st.toast(_escaped(message))
    _section("", _health)
    try:
        _figures()
        if job_id := st.query_params.get("job", ""):
            links = " ".join(f'<a href="{_link(each.name)}">{each.title}</a>' for each in tables.MENU)
            st.html(_html(f'<p class="menu">{links}</p>'))
            _section("job", lambda: _job(whole_number(0)(job_id)))
            return
        which = _chosen_page()
        parts = tables.parts_of(which, _figures_of(which))
    except pqueue.QueueError as error:
        st.session_state["is away"] = True  # `_health` reloads the page
        st.caption(_escaped(str(error)) if "figures" in st.session_state else "")
        return
    except ValueError as error:  # from the address
        _trouble(str(error))
        return
    for part in parts:
        if isinstance(part, tables.Table):
            _section(part.key, partial(_table_of, which, part), part.title)
        elif part == "search":
            _section(part, partial(_search, which), tables.search_title(which))
        elif part != "findings":
            _section(part, {"tiles": _tiles, "charts": _charts, "task": _charts_of_task}[part])


def _figures(*, days: bool = False) -> dict[str, Any]:
    """Return the figures or, while the queue is not available, the previous ones, which `_section` dims."""
    known: dict[str, Any] = st.session_state.get("figures", {})
    try:
        known = {**known, **cache().figures(days=days)}
    except pqueue.QueueError:
        if not known or (days and "days" not in known):
            raise
    st.session_state["figures"] = known
    return known


def _chosen_page() -> Page:
    """Draw the names of the pages, and return the one that was chosen."""
    titles = {each.title: each for each in tables.MENU}
    named = tables.PAGES.get(st.query_params.get("page", ""), tables.PAGES[""])
    if "page" not in st.session_state:
        st.session_state["page"] = named.title if named.under is None else tables.PAGES[named.under].title
    title = st.segmented_control("page", titles, key="page", label_visibility="collapsed")
    which = titles.get(title or "", tables.PAGES[""])
    if named.under == which.name:
        return named
    if st.query_params.get("page", "") != which.name:
        st.query_params["page"] = which.name
    return which


def _too_old() -> str | None:
    return None if dashboard.has_streamlit() else "expected Streamlit 1.55 or newer: pip install -U streamlit"


def _refusal() -> str | None:
    """Return why this session is refused, or None: the server is open to others, or another site asks."""
    try:
        if not (dashboard.is_loopback(st.get_option("server.address") or "") or dashboard.allowed_hosts()):
            return (
                "refused: the server is open to other machines without a password; start it with --server.address "
                "127.0.0.1, or list its host names in PQUEUE_OPS_HOSTS"
            )
        headers = st.context.headers
        hosts, origins = headers.get_all("Host"), headers.get_all("Origin")
        if len(hosts) != 1 or not dashboard.is_ours(hosts[0]):
            return dashboard.OTHER_HOST
        if not all(dashboard.is_same_origin(each, hosts[0]) for each in origins):
            return dashboard.OTHER_SITE
    except ValueError as error:
        return f"refused: {error}"
    return None


def _section(key: str, part: Callable[[], None], title: str = "") -> None:
    """Draw a part. If the queue cannot be opened, only the first part shows the error."""

    def draw() -> None:
        try:
            part()
        except (pqueue.JobNotFound, ValueError) as error:  # from a filter or an address
            _trouble(str(error))
        except pqueue.QueueError as error:
            if key:
                st.caption("this part reloads automatically")
            else:
                st.html(_html(f"{_title('')}{dashboard_summary.without_queue(error)}"))
                st.html(DIMMED)

    draw.__qualname__ = key
    with st.container(border=True, key=f"part-{key}"):
        if title:
            st.markdown(f"##### {title}")
        st.fragment(draw, run_every=dashboard.REFRESH_SECONDS)()


def _trouble(sentence: str) -> None:
    st.html(_html(dashboard_summary.trouble(sentence)))


def _html(body: str) -> str:
    return f'<div class="pqueue">{body}</div>'


def _act(name: str, **fields: Any) -> None:
    by = dashboard.operator(st.context.headers)
    done, sentence = dashboard_actions.act(cache(), name, _form(fields), by)
    st.session_state["message"] = sentence if done else f"not done: {sentence}"
    st.rerun()


def _form(fields: dict[str, Any]) -> dashboard.Form:
    return {name: each if isinstance(each, list) else [str(each)] for name, each in fields.items()}


def _escaped(value: str) -> str:
    """Escape Markdown."""
    return "".join(f"\\{mark}" if mark in "\\`*_{}[]()#+-.!|<>~$:&" else mark for mark in report.printable(value))


# Parts ################################################################################################################


def _health() -> None:
    seen = cache().figures()["overview"]
    if st.session_state.pop("is away", False):
        st.rerun()
    path = f'<span class="path">{dashboard_summary.text(seen["path"])}</span>'
    mode = '<span class="health info">read-only</span>' if dashboard.read_only() else ""
    zone = f'<span class="path">times in {dashboard_summary.text(_zone())}</span>'
    title = _title(dashboard_summary.verdict(seen["findings"], _link("")) + mode + path + zone)
    found = dashboard_summary.findings(seen["findings"], lambda part: _link(tables.page_of(part)))
    st.html(_html(title + (found if _is_overview() else "")))


def _title(more: str) -> str:
    return f'<div class="title"><b>{dashboard_summary.text(dashboard.site_name())}</b>{more}</div>'


def _is_overview() -> bool:
    """Return whether this is the page that lists the findings."""
    named = tables.PAGES.get(st.query_params.get("page", ""), tables.PAGES[""])
    return "job" not in st.query_params and st.session_state.get("page", named.title) in (None, tables.PAGES[""].title)


def _zone() -> tzinfo:
    """Return the reader's time zone, or UTC if this machine does not know it."""
    with suppress(ValueError):
        return time_zone(st.context.timezone or "UTC")
    return timezone.utc


def _clock(at: float) -> str:
    return f"{datetime.fromtimestamp(at, _zone()):%Y-%m-%d %H:%M:%S}"


def _tiles() -> None:
    shown = dashboard.tiles(_figures()["overview"])
    st.html(_html(dashboard_summary.tiles(shown, lambda state: _link("jobs", {"state": state}))))


def _charts() -> None:
    _draw_charts(_figures(days=_last() in dashboard.DAYS))


def _last() -> str:
    """Draw the ranges of the charts, and return the chosen one, which the address keeps."""
    ranges = dashboard.RANGES
    if "last" not in st.session_state:
        st.session_state["last"] = _of_viewer().get("last", ranges[0])
    last = st.segmented_control("last", ranges, key="last", label_visibility="collapsed") or ranges[0]
    if st.query_params.get("last", ranges[0]) != last:
        st.query_params["last"] = last
    return str(last)


def _draw_charts(figures: dict[str, Any]) -> None:
    periods = dashboard.periods(figures, st.session_state["last"])
    charts = dashboard_summary.charts(periods, lambda at, has_day: _clock(at)[5 if has_day else 11 : 16])
    st.markdown(_html(charts), unsafe_allow_html=True)  # st.html drops SVG


def _address() -> dashboard.Query:
    return {name: st.query_params.get_all(name) for name in st.query_params}


def _charts_of_task() -> None:
    query = _address()
    st.link_button("all tasks", _url("tasks", {}))
    st.markdown(f"#### {_escaped(tables.task_title(query))}")
    figures = cache().of_task(_figures(days=_last() in dashboard.DAYS), query)
    shown = dashboard.task_tiles(figures["total"])
    st.html(_html(dashboard_summary.tiles(shown, lambda state: _link("jobs", tables.task_jobs(query, state)))))
    _draw_charts(figures)
    st.caption(_escaped(tables.handled_by(figures)))


def _of_viewer() -> dict[str, str]:
    return dashboard.of_viewer(_address())


def _url(page: str, filters: Mapping[str, str]) -> str:
    return f"?{urlencode({'page': page, **filters, **_of_viewer()})}"


def _link(page: str, filters: Mapping[str, str] = NO_PARAMS) -> str:
    """Return the address of a page, as an attribute in HTML."""
    return dashboard_summary.text(_url(page, filters))


def _figures_of(which: Page) -> dict[str, Any]:
    query = _address()
    figures = _figures(days=tables.needs_days(which, query))
    return cache().of_task(figures, query) if which.name == "task" else figures


def _table_of(which: Page, table: Table) -> None:
    query, figures = _address(), _figures_of(which)
    if table is tables.NEWEST:
        _newest(query, figures["newest"])
        return
    if table is tables.GROUPS and isinstance(figures["processes"], str):
        st.caption(_escaped(figures["processes"]))
        return
    _table(table, table.rows(figures), None if which.name else OVERVIEW_ROWS)
    if table is tables.GROUPS:
        _buttons([tables.ADD_GROUP])


def _table(table: Table, rows: list[Any], most: int | None) -> None:
    """Draw a table, and below it the buttons of a row that the operator chooses."""
    if not rows:
        st.caption(_escaped(table.empty))
        return
    shown = rows[: most or table.most]
    cells = _cells(table, shown)
    st.dataframe(cells, hide_index=True, column_config=_config(table, cells))
    if len(rows) > len(shown):
        st.caption(tables.more(table, len(rows) - len(shown)))
    named = {table.name(row): row for row in shown if table.buttons(row) or table.columns[0].link}
    if named:
        with st.container(horizontal=True):
            key = f"row of {table.title}"
            name = st.selectbox(key, list(named), label_visibility="collapsed", key=key, width=480) or ""
            for each in [] if dashboard.read_only() else table.buttons(named[name]):
                _button(each)
            _show_jobs(table, named[name])


def _show_jobs(table: Table, row: Any) -> None:
    """Draw the button that finds the jobs of a row."""
    if links := [each.link(row) for each in table.columns if each.link]:
        page, filters = links[0]
        if st.button(f"show {'task' if page == 'task' else 'jobs'}", key=f"show {table.key}"):
            st.query_params.from_dict({"page": page, **filters, **_of_viewer()})
            for key in [each for each in st.session_state if each in KEPT or str(each).startswith("filter-")]:
                del st.session_state[key]  # they are in the address
            st.rerun()


def _cells(table: Table, rows: list[Any]) -> list[dict[str, Any]]:
    columns = [each for each in _drawn(tables.columns_of(table, rows)) if each.on_phone or not _is_phone()]
    cells = [{each.heading: _table_cell(each, row) for each in columns} for row in rows]
    for name in [each.heading for each in columns if each.kind == "number"]:
        if len({type(row[name]) for row in cells}) > 1:  # Arrow, which stores the table, takes one type in a column
            cells = [{**row, name: f"{row[name]:,}" if isinstance(row[name], int) else row[name]} for row in cells]
    return cells


def _drawn(columns: Iterable[Column]) -> Iterator[Column]:
    """Yield the columns, and next to each trend one of its failures: a line chart of a table has one line."""
    for each in columns:
        yield each
        if each.kind == "trend":
            yield replace(each, heading=f"{each.heading} of failures", kind="failures", cell=_failed_of(each))


def _failed_of(trend: Column) -> Callable[[Any], list[int]]:
    return lambda row: [failed for _, failed in trend.cell(row)]


def _is_phone() -> bool:
    """Return whether the reader's browser says that it is that of a phone: Streamlit does not tell the width."""
    return "Mobi" in st.context.headers.get("User-Agent", "")


def _table_cell(column: Column, row: Any) -> Any:
    """Return a cell as a table takes it, in which a job is a link and a state is a list."""
    value = _cell(column, row)
    if column.kind == "job" and isinstance(value, int):
        return f"?{urlencode({'job': value, **_of_viewer()})}"
    return [value] if column.kind == "state" else value


KINDS: dict[str, Callable[[Any], Any]] = {  # how the cells of a column are shown
    "time": lambda at: report.ago(at, report.now_shown()),
    "clock": _clock,
    "moment": lambda at: f"{_clock(at)}, {report.ago(at, report.now_shown())}",
    "since": lambda at: report.span(max(0.0, report.now_shown() - at)),
    "until": lambda at: report.span(max(0.0, at - report.now_shown())),
    "left": lambda start_and_progress: report.span(tables.left(*start_and_progress)),
    "trend": lambda counts: [completed for completed, _ in counts],
    "failures": list,
    "long": lambda error: report.printable(report.first_line(error)),
}


def _cell(column: Column, row: Any) -> Any:
    value = column.cell(row)
    if value is None and column.kind != "progress":
        return ""
    if column.kind in KINDS:
        return KINDS[column.kind](value)
    if isinstance(value, list):
        shown = value[: tables.JOBS_OF_CONSUMER_SHOWN]
        return ", ".join(map(str, shown)) + " …" * (len(shown) < len(value))
    return report.printable(value) if isinstance(value, str) else value


def _fact(column: Column, found: Any) -> str:
    shown = dashboard_summary.text(_cell(column, found))
    return f'<b class="{shown}">{shown}</b>' if column.kind == "state" else shown


def _config(table: Table, cells: list[dict[str, Any]]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for each in [each for each in _drawn(table.columns) if each.heading in cells[0]]:
        values = [row[each.heading] for row in cells]
        if each.kind == "progress":
            config[each.heading] = st.column_config.ProgressColumn(min_value=0, max_value=1)
        elif each.kind == "trend":
            config[each.heading] = st.column_config.LineChartColumn(y_min=0)
        elif each.kind == "failures":
            config[each.heading] = st.column_config.BarChartColumn(y_min=0, color=dashboard.CHART_COLOURS["failed"])
        elif each.kind == "state":
            shown = sorted({value for row in values for value in row})
            colours = [STATE_COLOURS.get(value, "gray") for value in shown]
            config[each.heading] = st.column_config.MultiselectColumn(options=shown, color=colours)
        elif each.kind == "job" and not any(isinstance(value, str) and value[:1].isdigit() for value in values):
            config[each.heading] = st.column_config.LinkColumn(display_text=r"job=(\d+)")
        elif each.kind in ("number", "since", "until"):
            config[each.heading] = st.column_config.TextColumn(alignment="right")
            if all(isinstance(value, int) for value in values):
                config[each.heading] = st.column_config.NumberColumn(format="localized")
        elif each.width in ("cut", "wrap"):
            config[each.heading] = st.column_config.TextColumn(width="large")
        elif each.width == "fold":
            config[each.heading] = st.column_config.TextColumn(width="medium")
    return config


def _button(button: Button) -> None:
    key = f"{button.action} {' '.join(map(str, button.fields.values()))}"
    with st.popover(button.label):
        fields = dict(button.fields)
        if name := button.asks_for:
            ask = st.text_area if button.is_long else st.text_input
            fields[name] = ask(name, button.value, placeholder=button.hint, key=f"{name} of {key}")
            if button.is_long and button.hint:
                st.caption(button.hint)
        if st.button(button.confirmation, key=f"yes, {key}"):
            _act(button.action, **fields)


def _buttons(buttons: list[Button]) -> None:
    if buttons and not dashboard.read_only():
        with st.container(horizontal=True):
            for each in buttons:
                _button(each)


def _search(which: Page) -> None:
    query = _query(which)
    asked = tables.query_of(which, query)
    key, page = _shown(asked, lambda: cache().jobs(asked))
    ids: list[int] = []
    if page[0]:
        ids = _choose(tables.JOBS, page[0], "multi-row", key)
    else:
        st.caption(_escaped(tables.none_found(query, page[1])))
    with st.container(horizontal=True, vertical_alignment="center"):
        _pages(query, page)
        if which.name == "jobs" and not dashboard.read_only():
            _enqueue()
        if page[0]:
            _bulk(ids, dashboard.given(asked), tables.matching(asked, page))
    if len(ids) == 1:
        _job(ids[0])


def _enqueue() -> None:
    with st.popover("enqueue"):
        fields = {name: st.text_input(name, key=f"enqueue-{name}") for name in ("task", "queue")}
        fields["payload"] = st.text_area("payload", placeholder="JSON", key="enqueue-payload")
        if st.button("yes, enqueue"):
            _act("enqueue", **fields)


def _newest(query: dashboard.Query, found: list[pqueue.Job]) -> None:
    """Draw the jobs of a task that failed last, and the one that the reader chooses."""
    key, (jobs, _) = _shown(dashboard.newest_query(query), lambda: (found, None))
    if jobs:
        for job_id in _choose(tables.NEWEST, jobs, "single-row", key):
            _job(job_id)
    else:
        st.caption(_escaped(tables.NEWEST.empty))


def _choose(table: Table, jobs: list[pqueue.Job], mode: Any, key: str) -> list[int]:
    """Draw a table of jobs, and return the ids of those that the reader chooses."""
    rows = _cells(table, jobs)
    config = _config(table, rows)
    chosen = st.dataframe(rows, hide_index=True, column_config=config, on_select="rerun", selection_mode=mode, key=key)
    return [jobs[row].id for row in chosen["selection"]["rows"] if row < len(jobs)]


def _query(which: Page) -> dashboard.Query:
    """Draw the filters, which the address keeps, and return them with the id before which the list begins."""
    for name in dashboard.FILTERS:
        if (key := f"filter-{name}") not in st.session_state:
            found = st.query_params.get_all(name)
            states = [each for each in found if each in pqueue.STATES]
            st.session_state[key] = states if name == "state" else "".join(found[:1]) or None
    query: dashboard.Query = {}
    suggested = tables.suggestions(_figures())
    names = dashboard.FILTERS[which.name == "failed" :]
    common = [name for name in names if name not in tables.RARE_FILTERS]
    rows = st.container(key="filters")
    places = dict(zip(common, rows.columns(len(common)), strict=True))
    rare = [name for name in names if name not in common]
    is_used = any(st.session_state[f"filter-{name}"] for name in rare)
    places |= dict(zip(rare, rows.expander("more filters", expanded=is_used).columns(len(rare)), strict=True))
    for name, place in places.items():
        key = f"filter-{name}"
        if name == "state":
            query[name] = place.multiselect(name, pqueue.STATES, placeholder="any state", key=key)
        elif name in suggested:
            known = sorted({*suggested[name], st.session_state[key]} - {None})
            query[name] = [place.selectbox(name, known, placeholder="any", accept_new_options=True, key=key) or ""]
        else:
            query[name] = [place.text_input(name, placeholder=tables.HINTS.get(name, ""), key=key) or ""]
    given = dashboard.given(query)
    if dashboard.given({name: st.query_params.get_all(name) for name in names}) != given:
        st.query_params.from_dict({"page": which.name, **given, **_of_viewer()})
    before = st.session_state.get("before", "") if st.session_state.get("before-of") == given else ""
    return {**given, "before_id": [str(before)]} if before else given


def _shown(query: dashboard.Query, find: Callable[[], dashboard.JobPage]) -> tuple[str, dashboard.JobPage]:
    """Return the table's key and its jobs, unchanged while rows are selected: a selection stores row numbers."""
    state = st.session_state
    table = f"jobs-{state.get('tables', 0)}"
    if state.get("query") != query:
        state["query"], state["tables"] = query, state.get("tables", 0) + 1
        table = f"jobs-{state['tables']}"
    if table not in state or not state[table]["selection"]["rows"]:
        state["shown"] = find()
    return table, state["shown"]


def _pages(query: dashboard.Query, page: dashboard.JobPage) -> None:
    if "before_id" in query and st.button("newest jobs"):
        st.session_state["before"] = ""
        st.rerun()
    if page[1] is not None and st.button(tables.older_jobs(page)):
        st.session_state["before"], st.session_state["before-of"] = page[1], dashboard.given(query)
        st.rerun()


def _bulk(ids: list[int], filters: dashboard.Query, matching: str) -> None:
    if dashboard.read_only():
        return
    these = ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
    scopes = [f"the selected: {these}"] * bool(ids) + [matching] * bool(filters)
    if not scopes:
        st.caption("select jobs, or filter, to change them")
        return
    with st.popover("change jobs"):
        scope = st.radio("which", scopes)
        fields: dict[str, Any] = {"id": [str(job_id) for job_id in ids]}
        if scope == matching:
            fields = {"scope": "matching", **filters}
        fields["when"] = st.text_input("when to retry", "10m", key="bulk-when")
        fields["rate"] = st.text_input("at which rate", placeholder="any rate, or 10/1s", key="bulk-rate")
        for action, label in tables.bulk_actions(filters).items():
            if st.button(label, key=f"bulk-{action}"):
                what = dashboard_actions.question(cache(), action, _form(fields))
                st.session_state["asked"] = action, fields, what
        action, asked, what = st.session_state.get("asked", ("", {}, ""))
        if asked == fields:
            st.warning(f"{what}? Jobs whose state does not allow it are left unchanged.")
            if st.button(f"yes, {what}", key="bulk-confirmed"):
                del st.session_state["query"], st.session_state["asked"]  # reload the jobs, with none selected
                _act(action, **fields)


def _job(job_id: int) -> None:
    found = cache().job(job_id)
    one: pqueue.Job = found["job"]
    st.markdown(f"#### Job {one.id}")
    st.html(_html(dashboard_summary.facts({each.heading: _fact(each, found) for each in tables.FACTS})))
    _buttons(tables.job_buttons(found))
    for place, (title, text, is_cut) in zip(cycle(st.columns(2)), tables.texts(found), strict=False):
        place.caption(f"{title}: the first {dashboard.TEXT_CHARS_SHOWN:,} characters" if is_cut else title)
        shown = "\n".join(report.printable(line) for line in text.split("\n"))
        place.code(shown, language=None, wrap_lines=True, height=400 if len(shown) > 2000 else "content")
    if found["parents"]:
        st.caption(tables.PARENTS.title)
        _table(tables.PARENTS, found["parents"], None)
    st.caption(tables.HISTORY.title)
    _table(tables.HISTORY, tables.HISTORY.rows(found), None)
    for event in tables.HISTORY.rows(found):
        if event["error"] and "\n" in event["error"]:
            with st.expander(f"error of attempt {event['attempt']}" if event["attempt"] else "error"):
                st.code("\n".join(map(report.printable, event["error"].split("\n"))), language=None, wrap_lines=True)
