"""An operator with a real browser, before both front ends of the dashboard."""

from __future__ import annotations

import re
import shutil
import socket
import sys
import urllib.request

import pytest
from conftest import ROOT, wait_until
from playwright.sync_api import expect, sync_playwright

import pqueue

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
TASKS = """
from pqueue import DoNotRetry, task
from pathlib import Path

@task(max_attempts=1)
def mail(job):
    if not Path("repaired").exists():
        raise DoNotRetry("the server is down")
"""


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1280, "height": 2400})
    page.set_default_timeout(20_000)
    errors = []
    page.on("pageerror", lambda error: errors.append(error))  # noqa: PLW0108 - Playwright marks its handler
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


def served(place, front):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if front == "standard library":
        place.start("ops.py", "--port", port)
    else:
        place.start_command([sys.executable, "-m", "streamlit", "run", str(ROOT / "ops.py"), f"--server.port={port}"])
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: answers(url))
    return url


def answers(url):
    try:
        return urllib.request.urlopen(url).status == 200
    except OSError:
        return False


def count_on(page, front, state):
    if front == "standard library":
        return page.locator(f"#overview .tile:has(span:text-is('{state}')) b")
    return page.locator(f"[data-testid=stMetric]:has(:text-is('{state}')) [data-testid=stMetricValue]").first


@pytest.mark.parametrize("front", ["standard library", "streamlit"])
def test_operator_sees_counts_move_by_themselves(system, page, front):
    queue = system.queue()
    page.goto(served(system, front))
    for state in ("completed", "failed", "pending"):
        expect(count_on(page, front, state)).to_have_text("0")
    system.write("repaired", "")
    queue.enqueue_many("mail", range(7))
    expect(count_on(page, front, "completed")).to_have_text("7")
    queue.pause("default")
    queue.enqueue_many("mail", range(3))
    expect(count_on(page, front, "pending")).to_have_text("3")


@pytest.mark.parametrize("front", ["standard library", "streamlit"])
def test_operator_resubmits_a_group_and_pauses_a_queue(system, page, front):
    queue = system.queue()
    queue.enqueue_many("mail", range(5))
    wait_until(lambda: queue.stats()["states"]["failed"] == 5)
    page.goto(served(system, front))
    expect(count_on(page, front, "failed")).to_have_text("5")
    system.write("repaired", "")
    if front == "standard library":
        page.locator("#failed summary").click()
        page.get_by_role("button", name="yes, resubmit all").click()
        expect(page.locator(".said")).to_have_text("resubmitted 5 jobs")
    else:
        page.get_by_role("button", name="resubmit a group").click()
        page.get_by_role("button", name="yes, resubmit all of it").click()
    expect(count_on(page, front, "completed")).to_have_text("5")
    assert queue.stats()["states"] == {**dict.fromkeys(pqueue.STATES, 0), "completed": 5}
    page.get_by_role("button", name="pause", exact=True).click()
    wait_until(lambda: queue.stats()["queues"]["default"]["paused"])
    page.get_by_role("button", name="resume", exact=True).click()
    wait_until(lambda: not queue.stats()["queues"]["default"]["paused"])


def test_operator_opens_a_job_and_mends_it(system, page):
    queue = system.queue()
    job_id = queue.enqueue("mail", {"to": "<b>Ada</b>"})
    other = queue.enqueue("report", delay_seconds=3600)
    wait_until(lambda: queue.get(job_id).state == "failed")
    page.goto(served(system, "standard library"))
    page.locator("select[name=state]").select_option("failed")
    page.get_by_role("button", name="filter").click()
    expect(page.locator("#jobs tbody tr")).to_have_count(1)
    page.locator("#jobs").get_by_role("link", name=str(job_id), exact=True).click()
    expect(page.locator("dl")).to_contain_text("the server is down")
    expect(page.locator("pre").first).to_contain_text("<b>Ada</b>")
    system.write("repaired", "")
    page.get_by_text("resubmit …").click()
    page.get_by_role("button", name="yes, resubmit").click()
    expect(page.locator(".said")).to_have_text("resubmitted 1 job")
    wait_until(lambda: queue.get(job_id).state == "completed")
    page.reload()
    expect(page.locator("dl")).to_contain_text("it was completed by anna")

    page.goto(re.sub("/job.*", f"/job/{other}", page.url))
    page.get_by_text("mark failed …").click()
    page.get_by_role("button", name="yes, mark failed").click()
    expect(page.locator(".said")).to_have_text("marked as failed 1 job")
    assert queue.get(other).state == "failed"


def test_page_keeps_what_the_reader_types_while_it_refreshes(system, page):
    queue = system.queue()
    system.write("repaired", "")
    page.goto(served(system, "standard library"))
    page.locator("input[name=text]").fill("half a wor")
    queue.enqueue_many("mail", range(4))
    expect(count_on(page, "standard library", "completed")).to_have_text("4")
    expect(page.locator("#jobs tbody tr")).to_have_count(4)
    assert page.locator("input[name=text]").input_value() == "half a wor"


def test_operator_of_the_streamlit_page_opens_a_job_and_resubmits_it(system, page):
    queue = system.queue()
    job_id = queue.enqueue("mail", {"to": "Ada"})
    wait_until(lambda: queue.get(job_id).state == "failed")
    page.goto(served(system, "streamlit"))
    table = page.locator("[data-testid=stDataFrame]").first
    expect(table).to_be_visible()
    box = table.bounding_box()
    page.mouse.click(box["x"] + 15, box["y"] + 52)
    expect(page.get_by_text(f"Job {job_id}", exact=True)).to_be_visible()
    expect(page.locator("[data-testid=stCode]").first).to_contain_text("Ada")
    system.write("repaired", "")
    page.get_by_role("button", name="resubmit", exact=True).click()
    page.get_by_role("button", name="yes, resubmit", exact=True).click()
    wait_until(lambda: queue.get(job_id).state == "completed")
