"""Take screenshots of the dashboard: `python -m tests.screenshots FOLDER`.

They show both pages, light and dark, at the widths of a laptop and a phone. README's docs/dashboard.png is
`overview-light-1280.png`.
"""

import re
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import requests
from playwright.sync_api import expect, sync_playwright

from tests.processes import environment, valkey_server, web, worker
from tests.test_dashboard import CHROMIUM


def main(folder: Path) -> None:
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(valkey_server(scratch / "valkey"))
        redis_url = f"redis://127.0.0.1:{server.port}/0"
        env = environment(redis_url, FUNCTION_MODULES="app.functions", SOME_LONG_FUNCTION_SECONDS=60)
        url = stack.enter_context(web(env, scratch / "web.log"))
        for number in range(2):
            stack.enter_context(worker(env, scratch / f"worker.{number}.log"))

        def enqueue(function: str, payload: object, **options: object) -> str:
            query = {name: str(value) for name, value in options.items()}
            answer = requests.post(f"{url}/enqueue/{function}", json=payload, params=query, timeout=30)
            job_id: str = answer.json()["job_id"]
            return job_id

        enqueue("count_words", {"text": "to be or not to be"}, wait=10)
        enqueue("count_words", {"text": "x\n" * 3_000_000}, timeout=1, wait=10)
        enqueue("estimate_pi", {"samples": 300_000, "seed": 7}, wait=10)
        enqueue("estimate_pi", {"samples": 1000}, delay=3600)
        shown = enqueue("count_words", {"text": "a rose is a rose is a rose", "n": 3}, wait=10)
        for name in ("Anna", "Bo", "Cleo"):
            enqueue("some_long_function", {"name": name})

        browser = stack.enter_context(sync_playwright()).chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        for scheme in ("light", "dark"):
            for width in (1280, 390):
                page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
                page.goto(f"{url}/dashboard")
                page.get_by_label("Function").first.select_option("count_words")
                page.get_by_label("text (required)").fill("to be or not to be")
                expect(page.locator("li.job progress:visible").first).to_be_visible(timeout=20_000)
                line = page.locator("polyline").first
                expect(line).to_have_attribute("points", re.compile(r"(\S+\s*){12}"), timeout=60_000)
                page.get_by_label("text (required)").blur()
                page.screenshot(path=folder / f"overview-{scheme}-{width}.png", full_page=True)
                page.goto(f"{url}/dashboard#job={shown}")
                expect(page.locator("#job")).to_contain_text("total: 8")
                page.screenshot(path=folder / f"job-{scheme}-{width}.png", full_page=True)
                page.close()
        browser.close()


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]))
