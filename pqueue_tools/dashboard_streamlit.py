"""The dashboard's page in Streamlit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import streamlit as st

import pqueue
from pqueue_tools import dashboard, dashboard_summary, report, tables
from pqueue_tools.tables import Button, Column, Table

STYLE = f"""<style>{dashboard_summary.STYLE}
.stApp {{ --card: transparent }} .block-container {{ padding: 1.2rem 1rem 3rem; max-width: 1312px }}
.stAppHeader {{ background: none; pointer-events: none }} .stAppHeader button {{ pointer-events: auto }}
.pqueue {{ font-size: 14px; line-height: 1.45; --card: transparent }} .pqueue p {{ margin: 0 }}
.pqueue .two {{ margin: 0 0 1rem }}
.pqueue .title {{ display: flex; gap: 4px 16px; align-items: baseline; flex-wrap: wrap; margin-bottom: 10px }}
.pqueue .title b {{ font-size: 18px }} .pqueue .path {{ color: var(--soft); font-size: 12.5px }}
h5 {{ padding: 0 0 0.3rem !important }}
@media (max-width: 640px) {{ .st-key-filters [data-testid=stColumn] {{ min-width: 42% !important; flex: 1 1 42% }} }}
</style>"""
STATE_COLOURS = dict(zip(dashboard.STATES_SHOWN, ("orange", "violet", "gray", "blue", "green", "red"), strict=True))


@st.cache_resource
def cache() -> dashboard.FigureCache:
    return dashboard.FigureCache()


def page() -> None:
    st.set_page_config("pqueue", layout="wide")
    st.html(STYLE)
    if refused := _refusal():
        st.container(border=True).html(_html(dashboard_summary.trouble(refused)))
        return
    if message := st.session_state.pop("message", None):
        st.toast(_escaped(message))
    _section("", _overview)
    for table in (tables.PROCESSING, tables.JOBS, tables.FAILED, tables.CONSUMERS, tables.QUEUES):
        _section(table.title, _jobs if table is tables.JOBS else partial(_figures, table))


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


def _section(title: str, part: Callable[[], None]) -> None:
    """Draw a part. If the queue cannot be opened, only the first part shows the error."""

    def draw() -> None:
        try:
            part()
        except (pqueue.QueueError, ValueError) as error:
            st.caption("this part reloads automatically") if title else st.html(
                _html(dashboard_summary.trouble(str(error)))
            )

    draw.__qualname__ = title
    with st.container(border=True):
        if title:
            st.markdown(f"##### {title}")
        st.fragment(draw, run_every=dashboard.REFRESH_SECONDS)()


def _html(body: str) -> str:
    return f'<div class="pqueue">{body}</div>'


def _act(name: str, **fields: Any) -> None:
    done, sentence = dashboard.act(cache(), name, _form(fields))
    st.session_state["message"] = sentence if done else f"not done: {sentence}"
    st.rerun()


def _form(fields: dict[str, Any]) -> dashboard.Form:
    return {name: each if isinstance(each, list) else [str(each)] for name, each in fields.items()}


def _escaped(value: str) -> str:
    """Escape Markdown."""
    return "".join(f"\\{mark}" if mark in "\\`*_{}[]()#+-.!|<>~$:&" else mark for mark in report.printable(value))


# Parts ################################################################################################################


def _overview() -> None:
    figures = cache().figures()
    seen = figures["overview"]
    path = f'<span class="path">{dashboard_summary.text(seen["path"])}</span>'
    title = f'<div class="title"><b>pqueue</b><div>{dashboard_summary.health(seen["findings"])}</div>{path}</div>'
    st.html(_html(title + dashboard_summary.tiles(seen)))
    st.markdown(_html(dashboard_summary.charts(figures["minutes"])), unsafe_allow_html=True)  # st.html drops SVG


def _figures(table: Table) -> None:
    figures = cache().figures()
    _table(table, figures)
    if table is not tables.CONSUMERS:
        return
    if isinstance(figures["processes"], str):
        st.caption(_escaped(figures["processes"]))
        return
    st.markdown(f"##### {tables.GROUPS.title}")
    _table(tables.GROUPS, figures)
    _buttons([tables.ADD_GROUP])


def _table(table: Table, figures: dict[str, Any]) -> None:
    """Draw a table, and below it the buttons of a row that the operator chooses."""
    rows = table.rows(figures)
    if not rows:
        st.caption(_escaped(table.empty))
        return
    st.dataframe(_cells(table, rows), hide_index=True, column_config=_config(table))
    if hidden := table.hidden(rows):
        st.caption(hidden)
    named = {table.name(row): row for row in rows[: table.most] if table.buttons(row)}
    if named and not dashboard.read_only():
        with st.container(horizontal=True):
            key = f"row of {table.title}"
            name = st.selectbox(key, sorted(named), label_visibility="collapsed", key=key, width=480) or ""
            for each in table.buttons(named[name]):
                _button(each)


def _cells(table: Table, rows: list[Any]) -> list[dict[str, Any]]:
    return [{each.heading: _cell(each, row) for each in table.columns} for row in rows[: table.most]]


def _cell(column: Column, row: Any) -> Any:
    value = column.cell(row)
    if value is None and column.kind != "progress":
        return ""
    if column.kind == "time":
        return report.ago(value, report.now_shown())
    if isinstance(value, list):
        shown = value[: tables.JOBS_OF_CONSUMER_SHOWN]
        return ", ".join(map(str, shown)) + " …" * (len(shown) < len(value))
    return report.printable(value) if isinstance(value, str) else value


def _config(table: Table) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for each in table.columns:
        if each.kind == "progress":
            config[each.heading] = st.column_config.ProgressColumn(min_value=0, max_value=1)
        elif each.width:
            config[each.heading] = st.column_config.TextColumn(width="large")
    return config


def _button(button: Button) -> None:
    key = f"{button.label} {' '.join(map(str, button.fields.values()))}"
    with st.popover(button.label):
        fields = dict(button.fields)
        if name := button.asks_for:
            fields[name] = st.text_input(name, button.value, placeholder=button.hint, key=f"{name} of {key}")
        if st.button(button.confirmation, key=f"yes, {key}"):
            _act(button.action, **fields)


def _buttons(buttons: list[Button]) -> None:
    if buttons and not dashboard.read_only():
        with st.container(horizontal=True):
            for each in buttons:
                _button(each)


def _jobs() -> None:
    places = st.container(key="filters").columns(len(dashboard.FILTERS))
    state = places[0].selectbox("state", pqueue.STATES, index=None, placeholder="any state", key="filter-state")
    filters: dict[str, str] = {"state": state or ""}
    for place, name in zip(places[1:], dashboard.FILTERS[1:], strict=True):
        filters[name] = place.text_input(name, key=f"filter-{name}")
    before = st.session_state.get("before", "") if st.session_state.get("before-of") == filters else ""
    query = {**filters, "before_id": str(before)}
    key, page = _shown(query)
    ids: list[int] = []
    if page[0]:
        rows = _cells(tables.JOBS, page[0])
        chosen = st.dataframe(rows, hide_index=True, on_select="rerun", selection_mode="multi-row", key=key)
        ids = [page[0][row].id for row in chosen["selection"]["rows"] if row < len(page[0])]
    else:
        st.caption(_escaped(tables.none_found(query, page[1])))
    _pages(query, filters, page)
    if page[0]:
        _bulk(ids, filters, tables.matching(query, page))
    if len(ids) == 1:
        _job(ids[0])


def _shown(query: dict[str, str]) -> tuple[str, dashboard.JobPage]:
    """Return the table's key and its jobs, unchanged while rows are selected: a selection stores row numbers."""
    state = st.session_state
    table = f"jobs-{state.get('tables', 0)}"
    if state.get("query") != query:
        state["query"], state["tables"] = query, state.get("tables", 0) + 1
        table = f"jobs-{state['tables']}"
    if table not in state or not state[table]["selection"]["rows"]:
        state["shown"] = cache().jobs(query)
    return table, state["shown"]


def _pages(query: dict[str, str], filters: dict[str, str], page: dashboard.JobPage) -> None:
    with st.container(key="pages"):
        if query["before_id"] and st.button("newest jobs"):
            st.session_state["before"] = ""
            st.rerun(scope="fragment")
        if page[1] is not None and st.button(tables.older_jobs(page)):
            st.session_state["before"], st.session_state["before-of"] = page[1], filters
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
            fields = {"scope": "matching", **filters}
        for action in tables.BULK_ACTIONS:
            if st.button(tables.label(action), key=f"bulk-{action}"):
                st.session_state["asked"] = action, fields, dashboard.question(cache(), action, _form(fields))
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
    facts = {each.heading: _escaped(str(_cell(each, found))) for each in tables.FACTS}
    facts["state"] = f":{STATE_COLOURS.get(one.state, 'gray')}[{facts['state']}]"
    st.markdown(" · ".join(f":gray[{heading}] {fact}" for heading, fact in facts.items() if fact))
    _buttons(tables.job_buttons(one))
    for place, (title, text, is_cut) in zip(cycle(st.columns(2)), tables.texts(found), strict=False):
        place.caption(f"{title}: the first {dashboard.TEXT_CHARS_SHOWN:,} characters" if is_cut else title)
        shown = "\n".join(report.printable(line) for line in text.split("\n"))
        place.code(shown, language=None, wrap_lines=True, height=400 if len(shown) > 2000 else "content")
    st.caption(tables.HISTORY.title)
    _table(tables.HISTORY, found)
