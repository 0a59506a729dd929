"""Take pictures of the dashboard with a realistic population: make screenshots."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from itertools import product
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright
from populate import populate

import pqueue

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"wide": (1280, 900), "phone": (390, 844)}
FRONTS = {
    "ops": [sys.executable, "ops.py", "--port"],
    "streamlit": [sys.executable, "-m", "streamlit", "run", "ops.py", "--server.port"],
}
PORT = 8599
SHOWN = {  # in README.md and docs
    "ops": ("ops", "wide", "light"),
    "ops-dark": ("ops", "wide", "dark"),
    "ops-phone": ("ops", "phone", "light"),
    "streamlit": ("streamlit", "wide", "light"),
}
EVERY = {"-".join(each): each for each in product(FRONTS, SHAPES, ("light", "dark"))}


def main(target: Path, pictures: dict[str, tuple[str, str, str]]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="shop-") as folder, sync_playwright() as player:
        url = f"{folder}/queue.db"
        queue = pqueue.open_queue(url)
        populate(queue)
        queue.pause("reports", by="ada")
        queue.enqueue_many("send_newsletter", range(40), queue="newsletter", now=time.time() - 1500)
        browser = player.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for front, command in FRONTS.items():
            child = subprocess.Popen([*command, str(PORT)], cwd=ROOT, env={**os.environ, "PQUEUE_URL": url})
            try:
                wait_for(f"http://127.0.0.1:{PORT}")
                for name, (of, shape, scheme) in pictures.items():
                    if of == front:
                        take(browser, target / f"{name}.png", shape, scheme)
            finally:
                child.terminate()
                child.wait()
        browser.close()
        queue.close()


def take(browser: Browser, path: Path, shape: str, scheme: str) -> None:
    width, height = SHAPES[shape]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.goto(f"http://127.0.0.1:{PORT}")
    page.wait_for_selector("text=consumers alive")
    page.wait_for_timeout(6000 if page.locator(".stApp").count() else 300)
    page.screenshot(path=path)
    page.close()


def wait_for(url: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url)  # noqa: S310
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"no dashboard at {url}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), EVERY if "--every" in sys.argv else SHOWN)
