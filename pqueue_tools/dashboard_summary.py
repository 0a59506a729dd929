"""The HTML that both front ends of the dashboard use: health, tiles and charts, and their colours."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable
from typing import Any

from pqueue_tools import dashboard, report
from pqueue_values import QueueNotFound

FINDINGS_SHOWN = 6  # the others unfold
NAME = re.compile(r"""(['"])(.*?)\1|\S{61,}""")  # quoted, or too long to be a word
NAME_CHARS = 60  # of a name in a finding; its tooltip is the whole
ENDS_WITH_TIME = re.compile(r"(in )?[\d.]+ (?:s|min|h|d)( ago)?$")

STYLE: str = (
    """
:root { color-scheme: light dark }
.pqueue { --page: light-dark(#f5f6f8, #0f1318); --card: light-dark(#fff, #171c23);
  --ink: light-dark(#1b2330, #e6eaf1); --soft: light-dark(#5b6678, #98a4b5); --line: light-dark(#e2e6ec, #2a323d);
  --completed: light-dark(#157a4c, #43cf93); --failed: light-dark(#b93a00, #ff8a5c);
  --processing: light-dark(#1669b2, #62b5ff); --pending: light-dark(#8a5a00, #e9b650);
  --scheduled: light-dark(#5e4fc4, #ab9eff); --cancelled: var(--soft) }
"""
    + "".join(f".pqueue i.{name} {{ background: {paint} }}\n" for name, paint in dashboard.CHART_COLOURS.items())
    + """
.pqueue .keys { display: flex; gap: 2px 14px; flex-wrap: wrap; font-size: 12.5px; color: var(--soft);
  margin-bottom: 8px }
.pqueue .keys b { color: var(--ink); font-weight: 600 }
.pqueue .keys i { display: inline-block; width: 14px; height: 10px; margin-right: 5px }
.pqueue .keys i.line { height: 2px; vertical-align: 4px }
.pqueue .health { display: inline-block; margin: 0 6px 6px 0; padding: 2px 10px; border: 1px solid currentColor;
  border-radius: 12px; font-size: 13px; line-height: 1.45 }
.pqueue a.health { text-decoration: none }
.pqueue .finding { margin: 3px 0; padding-left: 80px; overflow-wrap: anywhere }
.pqueue .finding b { float: left; margin-left: -80px }
.pqueue .tiles { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 8px }
.pqueue a.tile { text-decoration: none } .pqueue a.tile:hover { border-color: var(--processing) }
.pqueue .tile { border: 1px solid var(--line); border-radius: 8px; padding: 7px 12px; background: var(--card) }
.pqueue .tile b { display: block; font-size: 20px; font-weight: 600; line-height: 1.35; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums }
.pqueue .zero b { color: var(--soft) }
.pqueue .tile span { color: var(--soft); font-size: 12.5px }
.pqueue dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 4px 16px; margin: 8px 0 0;
  padding: 0 }
.pqueue dt { color: var(--soft); margin: 0 } .pqueue dd { margin: 0; padding: 0; overflow-wrap: anywhere }
.pqueue .completed, .pqueue .running, .pqueue .active { color: var(--completed) }
.pqueue .failed, .pqueue .dead, .pqueue .critical { color: var(--failed) }
.pqueue .warning, .pqueue .paused { color: var(--pending) } .pqueue .info { color: var(--soft) }
.pqueue .processing { color: var(--processing) } .pqueue .pending { color: var(--pending) }
.pqueue .scheduled, .pqueue .waiting { color: var(--scheduled) }
.pqueue .cancelled, .pqueue .stopped { color: var(--soft) }
.pqueue .two { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 12px 28px; margin-top: 16px }
.pqueue figure { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 8px; margin: 0 }
.pqueue figure > * { grid-column: 2 }
.pqueue figcaption { grid-column: 1 / 3 }
.pqueue figure svg.plot { width: 100%; height: 120px; display: block }
.pqueue svg.trend { width: 140px; height: 20px; display: block }
.pqueue .plot .grid { stroke: var(--line) } .pqueue .plot * { vector-effect: non-scaling-stroke }
.pqueue .axis { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); position: relative; color: var(--soft);
  font-size: 11.5px; line-height: 1; font-variant-numeric: tabular-nums }
.pqueue .axis span { border-left: 1px solid var(--line); padding-left: 4px; white-space: nowrap }
.pqueue .axis span:last-child { position: absolute; right: 0; border: 0 }
.pqueue figure svg.up { grid-column: 1; width: 52px; height: 120px; overflow: visible; font-size: 11.5px;
  text-anchor: end; fill: var(--soft) } .pqueue .up svg { overflow: visible } .pqueue .up .failed { fill: currentColor }
@media (max-width: 900px) { .pqueue .tiles { grid-template-columns: repeat(4, minmax(0, 1fr)) }
  .pqueue .two { grid-template-columns: minmax(0, 1fr) } }
@media (max-width: 600px) { .pqueue .tiles { grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 6px }
  .pqueue .axis span:last-child { display: none } .pqueue .axis.days span:nth-child(even) { visibility: hidden }
  .pqueue .finding { padding: 0 }
  .pqueue .finding b { float: none; margin: 0 4px 0 0 }
  .pqueue .tile { padding: 5px 7px } .pqueue .tile b { font-size: 13.5px } .pqueue .tile span { font-size: 11.5px } }
"""
)


def text(value: Any) -> str:
    """Return any value as HTML text on one line."""
    return html.escape(report.printable(str(value)))


def trouble(sentence: str) -> str:
    return f'<p class="health critical">{text(sentence)}</p>'


def without_queue(error: Exception) -> str:
    """Return why the queue is not available, and what to do; that there is none yet is no error."""
    what, _, remedy = str(error).partition(": ")
    severity = "warning" if isinstance(error, QueueNotFound) else "critical"
    return f"""<p class="health {severity}">{text(what)}</p>{f"<p>{text(remedy)}</p>" if remedy else ""}
<p class="soft">The page tries again every {dashboard.REFRESH_SECONDS} seconds.</p>"""


def findings(found: list[report.Finding], address: Callable[[str], str]) -> str:
    """Return each finding with its remedy and a link to the page that shows it; `address` returns that of a part, as an
    attribute."""
    lines = [_finding(each, address) for each in found]
    rest = f"<details><summary>and {report.count(len(lines) - FINDINGS_SHOWN, 'more finding')}</summary>"
    rest += f"{''.join(lines[FINDINGS_SHOWN:])}</details>"
    return "".join(lines[:FINDINGS_SHOWN]) + (rest if lines[FINDINGS_SHOWN:] else "")


def verdict(found: list[report.Finding], address: str) -> str:
    """Return the number of problems, as a link to the overview, which lists them."""
    worst = report.problems(found)
    shown = report.count(len(worst), "problem") if worst else report.NO_FINDINGS
    return f'<a class="health {worst[0].severity if worst else "completed"}" href="{address}">{shown}</a>'


def _finding(each: report.Finding, address: Callable[[str], str]) -> str:
    said = _with_names(each.text)
    if each.at is not None and (found := ENDS_WITH_TIME.search(said)):
        said = said[: found.start()] + time(each.at, "time" if found[1] or found[2] else "since", found[0])
    said = f'<a href="{address(each.part)}">{said}</a>' if each.part else said
    remedy = f'<span class="soft">: {_with_names(each.remedy)}</span>' if each.remedy else ""
    return f'<p class="finding"><b class="{each.severity}">{each.severity}</b> {said}{remedy}</p>'


def _with_names(sentence: str) -> str:
    """Return a sentence in which long names are cut, and each name may be written from right to left."""
    parts, end = [], 0
    for found in NAME.finditer(sentence):
        quote, name = found[1] or "", found[2] if found[1] else found[0]
        whole = f' title="{text(name)}"' if len(name) > NAME_CHARS else ""
        parts += [text(sentence[end : found.start()]), text(quote)]
        parts += [f"<bdi{whole}>{text(report.cut(name, NAME_CHARS))}</bdi>", text(quote)]
        end = found.end()
    return "".join(parts) + text(sentence[end:])


def time(at: float, kind: str, shown: str, **data: Any) -> str:
    """Return a time for the page's script, which shows it by its kind (see `Column`); `shown` is for other readers."""
    more = "".join(f' data-{name}="{value}"' for name, value in data.items())
    return f'<time datetime="{report.iso(at)}" data-kind="{kind}"{more}>{shown}</time>'


def tiles(shown: list[dashboard.Tile], address: Callable[[str], str]) -> str:
    """Return figures, as `dashboard.tiles` does; the number of jobs in a state leads to `address` of the state."""
    return f"""<div class="tiles">{"".join(_tile(*each, address) for each in shown)}</div>"""


def _tile(label: str, value: str | float, state: str, address: Callable[[str], str]) -> str:
    if isinstance(value, float):
        value = time(value, "since", report.span(max(0.0, report.now_shown() - value)))
    else:
        value = re.sub("(?<=[0-9]) (?=[a-z])", "&nbsp;", text(value))  # between a number and its unit
    inside = f'<span>{text(label)}</span><b class="{state}">{value}</b>'
    kind = "tile zero" if value in ("0", "none") else "tile"
    return f'<a class="{kind}" href="{address(state)}">{inside}</a>' if state else f'<div class="{kind}">{inside}</div>'


def facts(shown: dict[str, str]) -> str:
    """Return the facts that there are, each with its heading; they are HTML."""
    return f"<dl>{''.join(f'<dt>{heading}</dt><dd>{fact}</dd>' for heading, fact in shown.items() if fact)}</dl>"


def _clock(at: float, has_day: bool) -> str:
    kind, shown = ("day", report.utc(at)[5:16]) if has_day else ("minute", report.utc(at)[11:16])
    return time(at, kind, shown)


# Charts: the text of the axes in HTML, around an SVG that stretches ###################################################

WIDTH, HEIGHT = 600.0, 100.0
LEAST = 2.5  # height of a bar: 3 pixels
Minutes = list[dict[str, Any]]
Clock = Callable[[float, bool], str]  # returns a time as a label of an axis; True: with the day


TIMES_KEYS = """<div class="keys"><b>Wait and run time</b><span><i class="wait line"></i>wait</span>
<span><i class="run line"></i>run</span><span>solid p50, dashed p95</span></div>"""


def charts(minutes: Minutes, clock: Clock = _clock) -> str:
    """Return the charts of these minutes; `clock` returns a time as a label of the axis."""
    return f'<div class="two">{_jobs_chart(minutes, clock)}{_times_chart(minutes, clock)}</div>'


def trend(counts: list[tuple[int, int]]) -> str:
    """Return lines of the completed and the failed attempts of each period."""
    top = float(max(1, *map(max, counts)))
    lines = [
        line
        for place, name in enumerate(("completed", "failed"))
        for line in _line([each[place] for each in counts], top, WIDTH / len(counts), name)
        if any(each[place] for each in counts)
    ]
    completed, failed = (sum(each[place] for each in counts) for place in (0, 1))
    said = f"{completed:,} completed, " * bool(completed) + f"{failed:,} failed"
    return f"""<svg class="plot trend" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" preserveAspectRatio="none" role="img"
aria-label="{said}">{"".join(lines)}</svg>"""


def bars(numbers: list[int]) -> str:
    """Return a bar for the failures of each period."""
    top, step = max(1, *numbers), WIDTH / len(numbers)
    heights = enumerate(HEIGHT - number / top * HEIGHT for number in numbers)
    path = "".join(f"M{(place + 0.5) * step:.1f} {HEIGHT:.0f}V{y:.0f}" for place, y in heights if y < HEIGHT)
    return f"""<svg class="plot trend" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" preserveAspectRatio="none" role="img"
aria-label="{sum(numbers):,} failed"><path class="grid" d="M0 {HEIGHT:.0f}H{WIDTH:.0f}"/>
<path d="{path}" stroke-width="4" stroke="{dashboard.CHART_COLOURS["failed"]}"/></svg>"""


def _failed(minute: dict[str, Any]) -> int:
    """Return the number of failed attempts, also of those that are repeated."""
    return int(minute["failed"] + minute["retried"])


def _jobs_keys(minutes: Minutes) -> str:
    """Return the caption of the chart of jobs, with their sums."""
    total = {name: f"{name} {sum(each[name] for each in minutes):,}" for name in ("completed", "enqueued")}
    failed = sum(map(_failed, minutes))
    share = f" ({failed / (failed + sum(each['completed'] for each in minutes)):.1%})" if failed else ""
    total["failed"] = f"failed attempts {failed:,}{share}"
    number = round((minutes[1]["at"] - minutes[0]["at"]) / 60)
    return f"""<div class="keys"><b>Jobs per {"minute" if number == 1 else f"{number} minutes"}</b>
<span><i class="completed"></i>{total["completed"]}</span>
<span><i class="failed"></i>{total["failed"]}</span>
<span><i class="enqueued line"></i>{total["enqueued"]}</span></div>"""


def _jobs_chart(minutes: Minutes, clock: Clock) -> str:
    """Draw bars of completed jobs, below the axis those of failed attempts, and a line of enqueued jobs.

    Failed attempts have a quarter of the height at least, with their own scale, so that a few of them are visible
    among thousands of jobs. The last bar is partial.
    """
    most = max(map(_failed, minutes))
    top = _ceiling(max(2, most / 2, *(max(each["enqueued"], each["completed"]) for each in minutes)))
    low = _ceiling(max(2, most)) if most else 0.0
    step, zero = WIDTH / len(minutes), HEIGHT * min(top / (top + low), 0.75 if most else 1)
    marks = []
    for number, each in enumerate(minutes):
        going_on = ' opacity="0.5"' if number == len(minutes) - 1 else ""
        for name, number_of in (("completed", each["completed"]), ("failed", _failed(each))):
            if number_of:
                tall = max(LEAST, number_of / top * zero if name == "completed" else number_of / low * (HEIGHT - zero))
                marks.append(
                    f'<rect x="{number * step + 1:.1f}" y="{zero - tall if name == "completed" else zero:.1f}" '
                    f'width="{step - 2:.1f}" height="{tall:.1f}" fill="{dashboard.CHART_COLOURS[name]}"{going_on}/>'
                )
    marks += _line([each["enqueued"] / top * zero + HEIGHT - zero for each in minutes[:-1]], HEIGHT, step, "enqueued")
    tips = [", ".join(f"{each[name]:,} {name}" for name in report.COUNTED) for each in minutes]
    scale = [
        (f"{top:,.0f}", 0.0),
        ("0", zero),
        *([(f'<tspan class="failed">{low:,.0f}</tspan>', HEIGHT)] if low else []),
    ]
    return _frame(_jobs_keys(minutes), scale, marks, tips, minutes, clock)


def _times_chart(minutes: Minutes, clock: Clock) -> str:
    """Draw the wait and run times on a logarithmic scale: solid p50, dashed p95."""
    values = [max(each, 0.001) for minute in minutes for name in ("wait", "run") for each in minute[name] or ()]
    low = math.floor(math.log10(min(values, default=0.01)))
    high = max(low + 2, math.ceil(math.log10(max(values, default=1))))
    step, marks = WIDTH / len(minutes), []
    for name in ("wait", "run"):
        for place, dashes in ((1, "4 3"), (0, "")):
            seconds = [each[name] and max(each[name][place], 0.001) for each in minutes]
            marks += _line([s and math.log10(s) - low for s in seconds], high - low, step, name, dashes)
    tips = [
        ", ".join(f"{name} p50 / p95 {dashboard.times(each[name])}" for name in ("wait", "run")) for each in minutes
    ]
    powers = range(high, low - 1, -1)
    scale = [(_seconds(10.0**power), HEIGHT * (high - power) / (high - low)) for power in powers]
    return _frame(TIMES_KEYS, scale, marks, tips, minutes, clock)


def _frame(
    keys: str, scale: list[tuple[str, float]], marks: list[str], tips: list[str], minutes: Minutes, clock: Clock
) -> str:
    """Return the marks with axes, and a tooltip for each minute."""
    step = WIDTH / len(minutes)
    grid = "".join(f'<path class="grid" d="M0 {y:.1f}H{WIDTH:.0f}"/>' for _, y in scale)
    labels = "".join(f'<svg y="{y:.0f}%"><text x="100%" dy="4">{label}</text></svg>' for label, y in scale)
    shapes = "".join(
        f'<rect x="{number * step:.1f}" width="{step:.1f}" height="{HEIGHT:.0f}" fill="transparent">'
        f'<title data-at="{each["at"]:.0f}" data-text="{tip}">{report.utc(each["at"])}: {tip}</title></rect>'
        for number, (each, tip) in enumerate(zip(minutes, tips, strict=True))
    )
    has_day = minutes[1]["at"] - minutes[0]["at"] > 60
    quarters = [clock(minutes[len(minutes) * quarter // 4]["at"], has_day) for quarter in range(4)]
    summary = " ".join(re.sub("<[^>]*>", " ", keys).split())
    return f"""<figure><figcaption>{keys}</figcaption>
<svg class="up" aria-hidden="true">{labels}</svg>
<svg class="plot" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" preserveAspectRatio="none" role="img" aria-label="{summary}">
{grid}{"".join(marks)}{shapes}</svg>
<div class="axis{" days" * has_day}">{"".join(f"<span>{each}</span>" for each in [*quarters, "now"])}</div></figure>"""


def _line(values: list[float | None], top: float, step: float, name: str, dashes: str = "") -> list[str]:
    """Return a line through the middles of the minutes, with gaps for missing values; a single value is a dash."""
    path, pen = "", "M"
    for number, value in enumerate(values):
        if value is None:
            pen = "M"
        else:
            x, y = (number + 0.5) * step, HEIGHT - value / top * HEIGHT
            path += f"M{x - 0.3 * step:.1f} {y:.1f}H{x:.1f}" if pen == "M" else f"L{x:.1f} {y:.1f}"
            pen = "L"
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    how = 'fill="none" stroke-width="1.5" stroke-linecap="round"'
    return [f'<path d="{path}" {how} stroke="{dashboard.CHART_COLOURS[name]}"{dashed}/>']


def _ceiling(value: float) -> float:
    """Return the next of 2, 4, 6, 8, 10, 12, 16, 20, 40 … at or above a value of at least 2; half of it is whole."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(each * power for each in (1, 1.2, 1.6, 2, 4, 6, 8, 10) if each * power >= value)


def _seconds(value: float) -> str:
    return f"{value:,.0f} s" if value >= 1 else f"{value * 1000:g} ms"
