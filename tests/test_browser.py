"""An operator with a real browser, before both front ends of the dashboard."""

from __future__ import annotations

import re
import shutil
import sys
import time
import urllib.request
from importlib.resources import files
from itertools import product
from urllib.parse import urlencode

import pytest
from conftest import PATIENCE_SECONDS, ROOT, free_port, wait_until
from playwright.sync_api import expect, sync_playwright
from populate import populate

import pqueue
from pqueue_tools import tables

AXE = (files("axe_playwright_python") / "axe.min.js").read_text()
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
TASKS = """
import time
from pqueue import DoNotRetry, task
from pathlib import Path

@task(max_attempts=1)
def mail(job):
    if not Path("repaired").exists():
        raise DoNotRetry("the server is down")

@task(max_attempts=1)
def charge(job):
    return round(job.payload["amount"] * 100)

@task
def patient(job):
    while not Path("go").exists():
        time.sleep(0.01)
""".replace("@task\n", "@task()\n")
PATIENCE = 1000 * PATIENCE_SECONDS  # milliseconds
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)><b>bold</b> [a](javascript:alert(3)) :red[x] $x^2$ 😀"
CONTROL = "\x1b[31m\u202e\x00"


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1280, "height": 2600})
    page.set_default_timeout(PATIENCE)
    errors = []
    page.on("pageerror", lambda error: errors.append(error))  # noqa: PLW0108 - Playwright marks its handler
    page.on("console", lambda said: errors.append(said.text) if "Content Security Policy" in said.text else None)
    page.on("dialog", lambda dialog: (errors.append(dialog.message), dialog.dismiss()))
    yield page
    page.close()
    assert errors == []


@pytest.fixture
def system(place):
    """A queue with a consumer whose task fails until it is repaired."""
    place.write("my_tasks.py", TASKS)
    queue = place.queue()
    place.start("consumer.py", "--import", "my_tasks", "--name", "anna")
    wait_until(lambda: queue.consumers())
    return place


class StandardLibrary:
    """What an operator does at the page of `python3 ops.py`."""

    def __init__(self, place, page, **variables):
        self.page, self.url = page, place.dashboard(**variables)
        page.goto(self.url)

    def count(self, state):
        return self.page.locator(f".tile:has(span:text-is('{state}')) b")

    def go(self, title):
        self.page.get_by_label("pages").get_by_role("link", name=title, exact=True).click()
        expect(self.page.locator("nav [aria-current]")).to_have_text(title)
        self.await_script()

    def await_script(self):
        expect(self.page.get_by_role("button", name="pause")).to_be_visible()

    def said(self, sentence):
        expect(self.page.locator("#said")).to_have_text(sentence)

    def filter(self, state):
        self.go("Jobs")
        self.page.get_by_label(state, exact=True).check()
        self.page.get_by_role("button", name="filter").click()
        self.page.wait_for_url(f"**state={state}**")

    def shows_jobs(self, ids):
        links = self.page.locator("#search tbody a")
        expect(links).to_have_text([str(job_id) for job_id in ids])

    def open(self, job_id):
        self.page.locator("#search").get_by_role("link", name=str(job_id), exact=True).click()
        expect(self.page.locator("h2").first).to_have_text(f"Job {job_id}")

    def open_newest_failure(self):
        """Click from the overview to the job that failed last."""
        self.page.locator("#failed tbody tr").first.locator("td a").last.click()

    def open_task(self, task):
        self.page.locator("#tasks").get_by_role("link", name=task, exact=True).click()

    def open_newest_of_task(self, job_id):
        self.page.locator("#newest").get_by_role("link", name=str(job_id), exact=True).click()

    def edit_and_resubmit(self, payload):
        self.page.get_by_text("edit and resubmit …").click()
        self.page.get_by_label("payload").fill(payload)
        self.page.get_by_role("button", name="save").click()

    def texts(self):
        return self.page.locator("pre")

    def close(self):
        self.page.goto(self.url)

    def act_on_job(self, verb):
        self.page.get_by_text(f"{verb} …", exact=True).click()
        self.page.get_by_role("button", name=f"yes, {verb}").click()

    def act_on_all_that_match(self, verb):
        self.page.get_by_label("which jobs").select_option("matching")
        self.page.get_by_role("button", name=verb, exact=True).click()
        self.page.get_by_role("button", name=f"yes, {verb}").click()

    def tick(self, job_id):
        self.page.locator(f"input[name=id][value='{job_id}']").check()

    def act_on_ticked(self, verb):
        self.page.get_by_role("button", name=verb, exact=True).click()
        self.page.get_by_role("button", name=f"yes, {verb}").click()

    def resubmit_group(self):
        self.page.locator("#failed summary").first.click()
        self.page.get_by_role("button", name=re.compile(r"yes, resubmit \d+ job")).click()

    def act_on_queue(self, verb):
        self.page.locator("#queues").get_by_text(f"{verb} …").click()
        self.page.get_by_role("button", name=f"yes, {verb}").click()

    def offers_actions(self):
        return self.page.locator("form[method=post]").count() > 0


class WithoutScript(StandardLibrary):
    """The same in a browser that runs no scripts."""

    def await_script(self):
        pass


class Streamlit(StandardLibrary):
    """The same at the page of `streamlit run ops.py`."""

    def __init__(self, place, page, **variables):
        port = free_port()
        self.page, self.url = page, f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "ops.py"), f"--server.port={port}"]
        command += ["--server.address=127.0.0.1"]
        place.start_command(command, **variables)
        wait_until(lambda: answers(self.url))
        page.add_init_script(HEAR_TOASTS)  # which are gone after four seconds
        page.goto(self.url)

    def said(self, sentence):
        self.page.wait_for_function("sentence => toasts.some(each => each.includes(sentence))", arg=sentence)

    def filter(self, state):
        self.go("Jobs")
        before = re.search(r"st-key-jobs-\d+", self.page.locator("[class*=st-key-jobs]").get_attribute("class"))[0]
        chosen = self.page.locator(".st-key-filter-state input")
        chosen.click()
        self.page.get_by_role("option", name=state, exact=True).click()
        self.page.keyboard.press("Escape")
        expect(self.page.locator(f".{before}")).to_have_count(0)

    def shows_jobs(self, ids):
        for row, job_id in enumerate(ids):
            expect(self._cell(row)).to_have_text(link_to(job_id))
        expect(self._cell(len(ids))).to_have_count(0)

    def _cell(self, row, column=1):
        return self.page.locator(f"[class*=st-key-jobs] [data-testid=glide-cell-{column}-{row}]")

    def open(self, job_id):
        expect(self._cell(0)).to_have_text(link_to(job_id))
        table = self.page.locator("[class*=st-key-jobs] [data-testid=stDataFrame]")
        table.click(position={"x": 15, "y": 52})  # when it has come to rest
        expect(self.page.get_by_text(f"Job {job_id}", exact=True)).to_be_visible()

    def open_newest_failure(self):
        self.page.get_by_role("button", name="show jobs").first.click()
        expect(self._cell(0)).to_have_text(re.compile(r"\d+"))
        self.page.locator("[class*=st-key-jobs] [data-testid=stDataFrame]").click(position={"x": 15, "y": 52})

    def open_task(self, task):
        self.page.get_by_role("combobox", name="row of").click()
        self.page.get_by_role("option", name=f"default {task}").click()
        self.page.get_by_role("button", name="show task").click()

    open_newest_of_task = open

    def edit_and_resubmit(self, payload):
        self.page.get_by_role("button", name="edit and resubmit", exact=True).click()
        self.page.locator("textarea").fill(payload)
        self.page.get_by_role("button", name="yes, save and resubmit", exact=True).click()

    def texts(self):
        return self.page.locator("[data-testid=stCode]")

    def act_on_job(self, verb):
        self.page.get_by_role("button", name=verb, exact=True).click()
        self.page.get_by_role("button", name=f"yes, {verb}", exact=True).click()

    def go(self, title):
        self.page.locator(".st-key-page").get_by_role("radio", name=title, exact=True).click()

    tick = open

    def act_on_ticked(self, verb):
        self.page.get_by_role("button", name="change jobs").click()
        self.page.locator(f".st-key-bulk-{verb} button").click()
        self.page.locator(".st-key-bulk-confirmed button").click()

    act_on_all_that_match = act_on_ticked

    def resubmit_group(self):
        self.page.get_by_role("button", name="resubmit all", exact=True).click()
        self.page.get_by_role("button", name=re.compile(r"yes, resubmit \d+ job")).click()

    def act_on_queue(self, verb):
        self.act_on_job(verb)

    def offers_actions(self):
        names = re.compile("resubmit|cancel|pause|limit|change")
        return self.page.get_by_role("button", name=names).count() > 0


def link_to(job_id):
    """Return the address of a job's page, which may keep what the reader chose."""
    return re.compile(rf"[?]job={job_id}(&.*)?$")


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_SECONDS) as answer:  # noqa: S310
            return answer.status == 200
    except OSError:
        return False


HEAR_TOASTS = """
window.toasts = [];
new MutationObserver(() => {
  for (const each of document.querySelectorAll('[data-testid=stToast]')) toasts.push(each.innerText);
}).observe(document, {childList: true, subtree: true});
"""
TOUCHING = """
[...document.querySelectorAll('td')].filter(cell => {
  const end = cell.getBoundingClientRect().right - parseFloat(getComputedStyle(cell).paddingRight);
  return cell.offsetParent && [...cell.children].some(each => each.getBoundingClientRect().right > end + 1);
}).map(cell => cell.outerHTML)
"""
both = pytest.mark.parametrize("front", [StandardLibrary, Streamlit])


@both
def test_operator_sees_jobs_move_and_resubmits_failed_ones(system, page, front):
    queue = system.queue()
    site = front(system, page)
    for state in ("pending", "processing", "completed", "failed"):
        expect(site.count(state)).to_have_text("0")

    patient = queue.enqueue("patient")
    expect(site.count("processing")).to_have_text("1")
    failed = queue.enqueue_many("mail", [{"to": f"<b>{name}</b>"} for name in ("Ada", "Grace", "Edsger")])
    expect(site.count("pending")).to_have_text("3")
    system.write("go", "")
    expect(site.count("failed")).to_have_text("3")
    expect(site.count("completed")).to_have_text("1")
    assert queue.get(patient).state == "completed"

    site.filter("failed")
    site.shows_jobs(failed[::-1])
    site.open(failed[-1])
    for shown in ("the server is down", "<b>Edsger</b>"):
        expect(site.texts().filter(has_text=shown).first).to_be_visible()
    system.write("repaired", "")
    site.act_on_job("resubmit")
    site.said("resubmitted 1 job")
    wait_until(lambda: queue.get(failed[-1]).state == "completed")

    site.close()
    site.resubmit_group()
    site.said("resubmitted 2 jobs")
    expect(site.count("completed")).to_have_text("4")
    assert queue.stats()["states"] == {**dict.fromkeys(pqueue.STATES, 0), "completed": 4}


@both
def test_operator_on_call_is_at_the_newest_traceback_in_two_clicks_and_repairs_the_job_in_three(system, page, front):
    queue = system.queue()
    ids = queue.enqueue_many("charge", [{"amount": each, "token": "hidden"} for each in ("seven", "eight")])
    earlier = queue.enqueue("a task that failed earlier", run_at=9e9, now=time.time() - 3600)
    queue.mark_failed(earlier, now=time.time() - 3600)
    wait_until(lambda: queue.stats()["states"]["failed"] == 3)
    clicks = []
    page.expose_function("clicked", lambda: clicks.append(1))
    page.add_init_script("addEventListener('click', event => event.detail && clicked(), true)")
    site = front(system, page)
    site.open_newest_failure()
    expect(site.texts().filter(has_text="in charge").first).to_be_visible()
    assert len(clicks) <= 2
    site.edit_and_resubmit('{"amount": 8, "token": "…"}')
    site.said("changed 1 job")
    assert 3 <= len(clicks) <= 5
    wait_until(lambda: queue.get(ids[-1]).state == "completed")
    assert (queue.get(ids[-1]).result, queue.get(ids[0]).state) == (800, "failed")
    assert queue.get(ids[-1]).payload == {"amount": 8, "token": "hidden"}


@both
def test_page_of_a_task_leads_to_its_newest_traceback(system, page, front):
    queue = system.queue()
    queue.enqueue_many("charge", [{"amount": "seven"}, {"amount": "eight"}])
    queue.enqueue("mail")
    wait_until(lambda: queue.stats()["states"]["failed"] == 3)
    site = front(system, page)
    site.go("Tasks")
    site.open_task("charge")
    expect(site.count("failed")).to_have_text("2")
    site.open_newest_of_task(2)
    expect(site.texts().filter(has_text="in charge").first).to_be_visible()


def test_age_after_an_action_is_that_of_the_figures_it_shows(system, page):
    system.queue().enqueue("mail", delay_seconds=3600)
    page.clock.install()
    site = StandardLibrary(system, page)
    page.locator("#queues").get_by_text("pause …").click()
    page.clock.pause_at(time.time() + 600)
    expect(page.locator("#age")).to_contain_text("paused while you confirm, updated 10 min ago")
    page.get_by_role("button", name="yes, pause").click()
    site.said("queue default paused")
    expect(page.locator("#age")).to_have_text(re.compile(r"^updated \d\.\d s ago"))


def test_action_that_takes_long_says_so_and_cannot_be_started_twice(system, page):
    queue = system.queue()
    queue.enqueue("mail", delay_seconds=3600)
    held = []
    page.route("**/act/*", lambda route: held.append(route))  # noqa: PLW0108 - Playwright marks its handler
    site = StandardLibrary(system, page)
    page.locator("#queues").get_by_text("pause …").click()
    button = page.get_by_role("button", name="yes, pause")
    button.click()
    site.said("in progress …")
    expect(button).to_be_disabled()
    held[0].continue_()
    site.said("queue default paused")
    assert len(held) == 1


@both
def test_operator_sets_jobs_aside_and_pauses_a_queue(system, page, front):
    queue = system.queue()
    late = queue.enqueue("mail", delay_seconds=3600)
    many = queue.enqueue_many("mail", range(6), delay_seconds=3600)
    site = front(system, page)
    expect(site.count("scheduled")).to_have_text("7")
    site.act_on_queue("pause")
    wait_until(lambda: queue.stats()["queues"]["default"]["paused"])
    last = queue.enqueue("mail")
    expect(site.count("pending")).to_have_text("1")

    site.filter("pending")
    site.open(last)
    site.act_on_job("mark failed")
    site.said("marked 1 job as failed")
    assert queue.get(last).state == "failed"

    site.close()
    site.filter("scheduled")
    site.shows_jobs([*many[::-1], late])
    site.act_on_all_that_match("cancel")
    site.said("cancelled 7 jobs")
    site.close()
    expect(site.count("scheduled")).to_have_text("0")
    assert queue.stats()["states"] == {**dict.fromkeys(pqueue.STATES, 0), "failed": 1, "cancelled": 7}
    site.act_on_queue("resume")
    wait_until(lambda: not queue.stats()["queues"]["default"]["paused"])


@both
def test_job_that_was_ticked_is_the_one_that_is_changed(system, page, front):
    queue = system.queue()
    queue.pause("default")
    ticked = queue.enqueue("mail")
    site = front(system, page)
    site.go("Jobs")
    site.tick(ticked)
    newer = queue.enqueue("mail")
    site.act_on_ticked("cancel")
    site.said("cancelled 1 job")
    assert [queue.get(job_id).state for job_id in (ticked, newer)] == ["cancelled", "pending"]


@both
def test_reader_of_a_read_only_page_finds_nothing_to_press(system, page, front):
    queue = system.queue()
    queue.enqueue("mail", delay_seconds=3600)
    site = front(system, page, PQUEUE_OPS_READONLY="1")
    expect(site.count("scheduled")).to_have_text("1")
    expect(site.count("consumers alive")).to_have_text("1")
    expect(page.get_by_role("heading", name="Queues")).to_be_visible()
    assert not site.offers_actions()


@both
def test_hostile_payload_error_and_file_are_shown_as_text(system, page, front):
    queue = system.queue()
    system.write("var/files/evil.txt", HOSTILE + CONTROL + "x" * 5000 + "\nsecond line\n")
    job_id = queue.enqueue("prepend_timestamp", {"file": "evil.txt", "note": HOSTILE + CONTROL}, run_at=9e9)
    queue.mark_failed(job_id, HOSTILE + CONTROL + "\n  " + "y" * 5000)
    site = front(system, page)
    expect(site.count("failed")).to_have_text("1")
    site.filter("failed")
    site.open(job_id)
    for shown in (HOSTILE, "second line", "yyyy", "xxxx"):
        expect(site.texts().filter(has_text=shown).first).to_be_visible()
    assert not re.search("[\x00\x1b\u202e]", page.content())
    assert page.locator("img[src=x]").count() == 0
    page.wait_for_function("document.documentElement.scrollWidth <= innerWidth")


def test_operator_with_a_phone_sees_every_control_whole(system, page):
    queue = system.queue()
    job_id = queue.enqueue("mail")
    wait_until(lambda: queue.get(job_id).state == "failed")
    queue.enqueue("prepend_timestamp", {"file": "a" * 50}, delay_seconds=60)
    page.set_viewport_size({"width": 390, "height": 2600})
    site = StandardLibrary(system, page)
    site.go("Jobs")
    expect(page.locator("#search tbody tr")).to_have_count(2)
    for title in ("Overview", "Jobs", "Failed", "Schedules", "Consumers", "Activity", "Queues"):
        site.go(title)
        for summary in page.locator("summary").all():
            summary.click()
        for cut in ("html", "section", "td:has(form)", "td:has(progress)", ".tile"):
            found = (
                f"[...document.querySelectorAll('{cut}')].filter(each => each.scrollWidth > each.clientWidth).length"
            )
            assert page.evaluate(found) == 0, (title, cut)
    page.get_by_placeholder("none").fill("7")
    page.get_by_role("button", name="set").click()
    site.said("queue default limited to 7 pending jobs")


@pytest.mark.parametrize("width", [390, 1280])
def test_long_names_leave_the_other_columns_and_the_buttons_in_sight(place, page, width):
    queue, name = place.queue(), "n" * 255
    queue.schedule(name[:200], name, cron="30 2 * * mon-fri", zone="America/Argentina/Buenos_Aires")
    for _ in range(2):
        queue.enqueue(name, queue=name, group=name[:128])
    queue.limit(name, 10**9, running=10**6, rate=(10, 0.5))
    queue.fail(queue.dequeue(name), name, retry=False)
    page.set_viewport_size({"width": width, "height": 800})
    site = StandardLibrary(place, page)
    for title in ("Overview", "Failed", "Tasks", "Queues", "Schedules", "Consumers", "Activity"):
        site.go(title)
        expect(page.locator("main section").first).to_be_visible()
        for part in page.locator("main section").all():
            wide = part.evaluate("part => part.scrollWidth - part.clientWidth")
            assert wide <= 0, (title, part.get_attribute("id"), wide)
        assert page.evaluate(TOUCHING) == [], title


def test_buttons_of_a_queue_are_side_by_side_on_a_phone(place, page):
    queue = place.queue()
    for name in ("a", "newsletter", "n" * 255):
        queue.enqueue_many("t", range(1100), queue=name)
        queue.pause(name)
    page.set_viewport_size({"width": 390, "height": 844})
    StandardLibrary(place, page)
    rows = page.locator("#queues tbody tr")
    expect(rows).to_have_count(3)
    for row in rows.all():
        first, second = (each.bounding_box() for each in row.locator("summary").all())
        assert first["y"] == second["y"]
    assert page.evaluate("document.querySelector('#queues').scrollWidth") <= 370


def test_page_keeps_typed_text_while_it_refreshes(system, page):
    queue = system.queue()
    system.write("repaired", "")
    site = StandardLibrary(system, page)
    site.go("Jobs")
    page.locator("input[name=text]").fill("half a wor")
    queue.enqueue_many("mail", range(4))
    expect(page.locator("#age")).to_contain_text("paused while you type")
    page.locator("input[name=text]").blur()
    expect(page.locator("#search tbody tr")).to_have_count(4)
    assert page.locator("input[name=text]").input_value() == "half a wor"


def test_page_is_dimmed_when_nobody_answers_and_not_while_figures_take_long(place, page):
    place.queue()
    url, answers = f"{place.dashboard()}/", [True]

    def respond(route):
        if not answers:
            route.abort()
            return
        answer = route.fetch()
        route.fulfill(response=answer, headers={**answer.headers, "x-age": "23.0"})  # seconds

    page.clock.install()
    page.route(url, respond)
    page.goto(url)
    expect(page.locator("#age")).to_have_text(re.compile("updated 2[3-9] s ago"))
    page.clock.run_for(1000)
    expect(page.locator("body")).not_to_have_class(re.compile("stale"))
    answers.clear()
    page.clock.run_for(12_000)
    expect(page.locator("body")).to_have_class(re.compile("stale"))
    page.unroute_all(behavior="ignoreErrors")


def test_page_says_that_the_queue_is_gone_until_it_is_back(place, page):
    page.clock.install()
    site = StandardLibrary(place, page)
    expect(page.locator("#trouble")).to_contain_text("no queue at")
    page.clock.run_for(1000)  # the age is written again
    expect(page.locator("#age")).to_have_text("")
    queue = place.queue()
    page.clock.run_for(5000)
    expect(site.count("pending")).to_have_text("0")
    queue.close()
    (place.folder / "var/queue.db").rename(place.folder / "var/away.db")
    page.clock.run_for(2000)
    expect(page.locator("#away")).to_contain_text("check the path or PQUEUE_URL")
    expect(page.locator("#health")).to_be_hidden()  # it said that there was no problem
    expect(page.locator("#age")).to_have_text(re.compile("^updated .* ago"))
    page.clock.run_for(12_000)
    expect(page.locator("body")).to_have_class(re.compile("stale"))
    (place.folder / "var/away.db").rename(place.folder / "var/queue.db")
    page.clock.run_for(5000)
    expect(page.locator("#away")).to_have_text("")
    expect(page.locator("#health")).to_be_visible()
    expect(page.locator("body")).not_to_have_class(re.compile("stale"))


END_OF_TEXT = """each => {
    const range = document.createRange()
    range.selectNodeContents(each)
    return range.getBoundingClientRect().right
}"""


@pytest.mark.parametrize("last", ["1 h", "24 h", "72 h"])
@pytest.mark.parametrize("width", [390, 1280])
def test_each_label_of_a_chart_is_at_its_minute(place, page, width, last):
    place.queue().enqueue("t")
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(f"{place.dashboard()}?{urlencode({'last': last})}")
    for chart in page.locator("figure").all():
        plot = chart.locator(".plot").bounding_box()
        labels = chart.locator(".axis span").all()[:4]
        starts = [label.bounding_box()["x"] for label in labels]
        for quarter, start in enumerate(starts):
            assert abs(start - plot["x"] - plot["width"] * quarter / 4) < 1
        shown = [number for number, label in enumerate(labels) if label.is_visible()]
        ends = [labels[number].evaluate(END_OF_TEXT) for number in shown]
        following = [*(starts[number] for number in shown[1:]), plot["x"] + plot["width"]]
        assert all(map(float.__le__, ends, following)), (shown, ends, following)


@both
def test_page_comes_back_when_the_queue_does(place, page, front):
    site = front(place, page)
    expect(page.get_by_text("no queue at")).to_be_visible()
    queue = place.queue()
    queue.enqueue("mail", queue="post")
    expect(site.count("pending")).to_have_text("1")
    expect(page.get_by_text("no queue at")).to_have_count(0)


def test_axe_finds_nothing_on_any_page(place, browser):
    """The whole of axe in light; in dark, where the document is the same, its rules about colour."""
    queue = place.queue()
    populate(queue, jobs=60)
    failed = queue.enqueue("send_mail", max_attempts=1)
    queue.mark_failed(failed, "ConnectionRefusedError: no\n  traceback")
    queue.schedule("nightly", "build_report", cron="@daily", queue="reports")
    queue.pause("reports", by="ada")
    url = place.dashboard()
    found = []
    for width in (1280, 390):
        page = browser.new_page(viewport={"width": width, "height": 844}, bypass_csp=True)
        page.set_default_timeout(PATIENCE)
        for path in [*(f"/{name}?task=send_mail" for name in tables.PAGES), f"/job/{failed}"]:
            page.goto(url + path)
            page.click("#pause")  # stale figures are dimmed
            page.evaluate(AXE)
            for scheme, rules in (("light", "{}"), ("dark", "{runOnly: ['color-contrast']}")):
                page.emulate_media(color_scheme=scheme)
                seen = page.evaluate(f"axe.run({rules})")["violations"]
                found += [(width, path, scheme, each["id"], each["nodes"][0]["html"]) for each in seen]
        page.close()
    assert found == []


def test_axe_finds_nothing_in_streamlit(place, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 844}, bypass_csp=True)
    page.set_default_timeout(PATIENCE)
    site = Streamlit(place, page)

    def expect_nothing(query, shown):
        page.goto(f"{site.url}/?{query}")
        expect(page.get_by_text(shown)).to_be_visible()
        page.evaluate(AXE)
        for width, scheme in product((1280, 390), ("light", "dark")):
            page.set_viewport_size({"width": width, "height": 844})
            page.emulate_media(color_scheme=scheme)
            violations = page.evaluate("axe.run()")["violations"]
            assert [(each["id"], each["nodes"][0]["html"]) for each in violations] == [], (query, width, scheme)

    expect_nothing("", "no queue at")
    queue = place.queue()
    failed = queue.enqueue("t", {"to": "ada"})
    queue.mark_failed(failed, "ValueError: no\n  traceback")
    expect_nothing("page=consumers", re.compile("^nothing is running$"))
    expect_nothing(f"job={failed}", re.compile("^Payload$"))
    page.close()


def test_page_works_without_its_script(system, browser):
    queue = system.queue()
    failed = queue.enqueue("mail")
    wait_until(lambda: queue.get(failed).state == "failed")
    system.write("repaired", "")
    page = browser.new_page(java_script_enabled=False)
    page.set_default_timeout(PATIENCE)
    site = WithoutScript(system, page)
    site.filter("failed")
    site.open(failed)
    site.act_on_job("resubmit")
    site.said("resubmitted 1 job")

    def shows_completed():
        site.close()
        return site.count("completed").text_content() == "1"

    wait_until(shows_completed)
    page.close()
