"""Take pictures of the dashboard with a realistic population: make screenshots."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright
from populate import populate

import pqueue

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"wide": (1280, 900), "phone": (390, 844)}
FRONTS = {"ops": [sys.executable, "ops.py"], "streamlit": [sys.executable, "-m", "streamlit", "run", "ops.py"]}
PORT = 8599


def main(target: Path, fronts: list[str]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as player:
        url = f"{folder}/queue.db"
        queue = pqueue.open_queue(url)
        populate(queue)
        browser = player.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for front in fronts:
            extra = ["--port", str(PORT)]
            if front == "streamlit":
                extra = ["--server.port", str(PORT), "--server.headless", "true", "--browser.gatherUsageStats", "false"]
            child = subprocess.Popen([*FRONTS[front], *extra], cwd=ROOT, env={**os.environ, "PQUEUE_URL": url})
            try:
                wait_for(f"http://127.0.0.1:{PORT}")
                for shape, (width, height) in SHAPES.items():
                    for scheme in ("light", "dark"):
                        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                        page.goto(f"http://127.0.0.1:{PORT}")
                        page.wait_for_selector("text=write-ahead log")
                        page.wait_for_timeout(2500 if front == "streamlit" else 300)
                        page.screenshot(path=target / f"{front}-{shape}-{scheme}.png")
                        page.close()
            finally:
                child.terminate()
                child.wait()
        browser.close()
        queue.close()


def wait_for(url: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url)  # noqa: S310
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"no dashboard at {url}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(FRONTS))
