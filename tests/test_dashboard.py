"""The dashboard: its files, and its use in a real browser."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pytest
import requests
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]  # it has no types
from flask.testing import FlaskClient
from playwright.sync_api import Browser, Page, expect, sync_playwright
from redis import Redis

from tests.conftest import Service
from tests.processes import ROOT, environment, gunicorn, problem_of, valkey_server, wait_until, web, worker
from tests.test_auth import ALICE, KEYS, OPS

STATIC = ROOT / "app/dashboard/static"
expect.set_options(timeout=20_000)  # ms; pages are slow on a busy machine
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def in_browser(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs Chromium."""
    skip = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian: apt-get install chromium)")
    marked: Callable[..., None] = pytest.mark.slow(skip(test))
    return marked


# The files


def test_the_page_may_load_its_own_files_only(client: FlaskClient) -> None:
    answer = client.get("/dashboard")
    assert answer.content_type == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
    assert {policy[f"{what}-src"] for what in ("script", "style", "img", "connect")} == {"'self'"}
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    links = set(re.findall(r'(?:href|src)="([^"#]+)"', answer.text))
    assert links == {"dashboard/dashboard.js", "dashboard/dashboard.css", "dashboard/icon.svg", "docs"}
    for link in links:
        with client.get(f"/{link}") as found:
            assert found.status_code == 200, link
    assert not re.search(r"<script(?! type=\"module\" src=\"dashboard/)|<style|\son\w+=|style=", answer.text)


@pytest.mark.parametrize("file", sorted(STATIC.iterdir()), ids=lambda file: file.name)
def test_each_file_is_served_and_fetches_nothing_from_elsewhere(client: FlaskClient, file: Path) -> None:
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    with client.get(f"/dashboard/{file.name}") as answer:
        assert (answer.status_code, answer.mimetype) == (200, kinds[file.suffix])
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    text = file.read_text().replace("http://www.w3.org/2000/svg", "")
    assert "//" not in re.sub(r"(^|\s)//.*", "", text, flags=re.MULTILINE)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|localStorage|sessionStorage|cookie", text
    )
    for name in re.findall(r'from "\./([^"]+)"', text):
        assert (STATIC / name).is_file()


@pytest.mark.parametrize(
    "name", ["", "nothing.js", "..%2fmain.py", "%2e%2e/main.py", "../templates/dashboard.html", "."]
)
def test_no_other_file_is_served(client: FlaskClient, name: str) -> None:
    problem_of(client.get(f"/dashboard/{name}"), 404, "not-found")


# In a browser


class Visitor(NamedTuple):
    """A page of the dashboard, and the messages of its console."""

    page: Page
    url: str
    said: list[str]

    def open(self, where: str = "") -> None:
        self.page.goto(f"{self.url}/dashboard{where}")
        expect(self.page.locator("#connection")).to_have_text("live")

    def enqueue(self, function: str, payload: Any, **options: Any) -> str:
        answer = requests.post(f"{self.url}/enqueue/{function}", json=payload, params=options, timeout=30)
        assert answer.ok, answer.text
        job_id: str = answer.json()["job_id"]
        return job_id

    def row(self, job_id: str) -> Any:
        return self.page.locator("li.job").filter(has=self.page.locator(f'a[href="#job={job_id}"]'))

    def choose(self, function: str) -> None:
        self.page.get_by_label("Function").first.select_option(function)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Close it after this module, because Playwright's loop runs in this thread until then.
    with sync_playwright() as playwright:
        # Chromium has no sandbox as root, and a container's /dev/shm may be too small for a page.
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield found
        found.close()


def visit(browser: Browser, url: str, **options: Any) -> Generator[Visitor]:
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    context.set_default_timeout(20_000)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    yield Visitor(page, url, said)
    context.close()


@pytest.fixture
def visitor(browser: Browser, service: Service) -> Iterator[Visitor]:
    for found in visit(browser, service.url):
        yield found
        assert found.said == []


@in_browser
def test_a_job_is_enqueued_by_fields_and_its_result_is_shown(visitor: Visitor) -> None:
    page = visitor.page
    visitor.open()
    visitor.choose("count_words")
    expect(page.locator("#function-description")).to_contain_text("most frequent")
    page.get_by_label("text (required)").fill("to be or not to be")
    page.get_by_label("n", exact=True).fill("1")
    page.get_by_role("button", name="Enqueue").click()
    expect(page.locator("#job .badge")).to_have_text("✓ finished")
    expect(page.locator("#job")).to_contain_text("total: 6")
    expect(page.locator("#job")).to_contain_text("queue", ignore_case=True)
    page.locator("#job summary").first.click()
    expect(page.locator("#job")).to_contain_text('text: "to be or not to be"')
    expect(page.locator("#job")).to_contain_text("38 bytes")
    assert page.title().startswith("finished · count_words")
    page.get_by_role("link", name="All jobs").click()
    expect(page.locator("li.job").first).to_contain_text("count_words")


@in_browser
def test_a_running_job_is_watched_canceled_and_retried(visitor: Visitor) -> None:
    page = visitor.page
    visitor.open()
    visitor.choose("report_slowly")
    page.get_by_label("JSON", exact=True).check(force=True) if page.locator("#mode").is_visible() else None
    page.locator("#json").fill("60")
    page.get_by_role("button", name="Enqueue").click()
    bar = page.locator("#job progress")
    expect(bar).to_be_visible()
    before = bar.evaluate("bar => bar.value")
    wait_until(lambda: bar.evaluate("bar => bar.value") > before)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#job .badge")).to_have_text("■ stopped")
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("#job .badge")).to_have_text("▶ started")
    expect(bar).to_be_visible()
    page.get_by_role("link", name="All jobs").click()
    row = page.locator("li.job").first
    expect(row.locator("progress")).to_be_visible()
    row.get_by_role("button", name="Cancel").click()
    expect(row.locator(".badge")).to_have_text("■ stopped")
    expect(page.locator("#news")).to_contain_text("report_slowly")


@in_browser
def test_text_of_a_job_never_becomes_markup(visitor: Visitor) -> None:
    page, evil = visitor.page, '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    failed = visitor.enqueue("fail", evil, wait=10)
    echoed = visitor.enqueue("echo", {evil: [evil]}, wait=10)
    visitor.open()
    expect(visitor.row(failed)).to_contain_text(f"ValueError: {evil}")
    for job_id in (failed, echoed):
        visitor.open(f"#job={job_id}")
        expect(page.locator("#job")).to_contain_text(evil)
        assert page.locator("#job img, #job script, li.job img").count() == 0
    page.goto(f"{visitor.url}/dashboard#job={quote(evil)}")
    expect(page.locator("#alert")).to_contain_text("Job not found")
    assert page.locator("main img, main script").count() == 0
    # The browser logs the 404 answer for this id, which is right.
    assert all("404" in line for line in visitor.said)
    visitor.said.clear()


@in_browser
def test_an_error_in_a_payload_is_shown_at_its_field(visitor: Visitor) -> None:
    page = visitor.page
    visitor.open()
    visitor.choose("estimate_pi")
    page.get_by_label("samples (required)").fill("many")
    page.get_by_role("button", name="Enqueue").click()
    field = page.get_by_label("samples (required)")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(field).to_be_focused()
    expect(page.locator("#alert")).to_contain_text("must be a number")
    field.fill("0")  # the service refuses this value
    page.get_by_role("button", name="Enqueue").click()
    expect(page.locator("#fields")).to_contain_text("greater than or equal to 1")
    expect(field).to_have_attribute("aria-invalid", "true")
    page.get_by_label("JSON", exact=True).check()
    page.locator("#json").fill('{"samples": ')
    page.get_by_role("button", name="Enqueue").click()
    expect(page.locator("#alert")).to_contain_text("The payload is not JSON")
    page.locator("#json").fill('{"samples": 10, "more": 1}')
    page.get_by_role("button", name="Enqueue").click()
    expect(page.locator("#alert")).to_contain_text("body.more")
    assert all("422" in line for line in visitor.said)  # the browser logs these answers
    visitor.said.clear()


@in_browser
def test_the_curl_line_does_what_the_form_does(visitor: Visitor) -> None:
    page = visitor.page
    visitor.open()
    visitor.choose("echo")
    page.locator("#json").fill("""{"it's": "a $HOME \\\\ \\"test\\" `id`", "n": 12345678901234567890}""")
    page.get_by_text("Options").click()
    page.get_by_label("Delay, in seconds").fill("0.1")
    page.get_by_text("The same with curl").click()
    command = page.locator("#curl").text_content()
    assert command
    answer = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    job_id = json.loads(answer)["job_id"]
    given = requests.get(f"{visitor.url}/get_payload?job_id={job_id}", timeout=10).text
    assert given == """{"it's": "a $HOME \\\\ \\"test\\" `id`", "n": 12345678901234567890}"""
    visitor.open(f"#job={job_id}")
    page.locator("#job summary").first.click()
    expect(page.locator("#job")).to_contain_text("12345678901234567890")


@in_browser
def test_dashboard_works_below_a_path(visitor: Visitor) -> None:
    """A proxy may serve it at /some/path."""
    page = visitor.page
    page.route("**/*", lambda route: route.continue_(url=route.request.url.replace("/some/path/", "/")))
    page.goto(f"{visitor.url}/some/path/dashboard")
    expect(page.locator("#connection")).to_have_text("live")
    visitor.choose("echo")
    expect(page.locator("#curl")).to_contain_text(f"{visitor.url}/some/path/enqueue/echo")
    page.get_by_role("button", name="Enqueue").click()
    expect(page.locator("#job .badge")).to_have_text("✓ finished")


@in_browser
def test_jobs_are_filtered_and_paged(visitor: Visitor) -> None:
    page = visitor.page
    for number in range(25):
        visitor.enqueue("echo", number)
    last = visitor.enqueue("fail", "on purpose", wait=10)
    visitor.open()
    expect(page.locator("li.job")).to_have_count(20)
    first = page.locator("li.job a").first.get_attribute("href")
    page.get_by_role("button", name="Older").click()
    expect(page.get_by_role("button", name="Newest")).to_be_visible()
    assert page.locator(f'li.job a[href="{first}"]').count() == 0
    page.get_by_role("button", name="Newest").click()
    expect(page.locator("li.job a").first).to_have_attribute("href", first or "")
    page.locator('#filters [name="status"]').select_option("failed")
    expect(visitor.row(last)).to_be_visible()
    expect(page.locator("li.job .badge").filter(has_not_text="failed")).to_have_count(0)
    page.locator('#filters [name="function"]').select_option("count_words")
    expect(page.locator("#no-jobs, li.job").first).to_be_visible()
    page.locator('#filters [name="function"]').select_option("")
    page.locator('#filters [name="status"]').select_option("")
    page.locator('#filters [name="queue"]').fill("nowhere")
    expect(page.locator("#no-jobs")).to_have_text("No jobs match.")
    page.locator('#filters [name="queue"]').fill("no name!")
    expect(page.locator("#connection")).to_contain_text("Invalid request")
    page.locator('#filters [name="queue"]').fill("")
    expect(page.locator("#connection")).to_have_text("live")
    assert all("422" in line for line in visitor.said)
    visitor.said.clear()


@in_browser
def test_queues_and_workers_are_shown(visitor: Visitor) -> None:
    page = visitor.page
    visitor.open()
    card = page.locator("#queues > li").filter(has_text="default")
    expect(card).to_contain_text("1 worker")
    job_id = visitor.enqueue("sleep_for", 60)
    expect(page.locator("#workers")).to_contain_text(f"runs {job_id[:8]}")
    expect(card.locator(".chart").filter(has_text="running").locator("strong")).to_have_text("1")
    points = card.locator("polyline").first.get_attribute("points")
    assert points
    assert len(points.split()) > 1
    visitor.row(job_id).get_by_role("button", name="Cancel").click()
    expect(page.locator("#workers .badge")).to_contain_text("idle")


@in_browser
def test_dashboard_can_be_used_with_the_keyboard(visitor: Visitor) -> None:
    page = visitor.page
    visitor.open()
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_label("Function").first).to_be_focused()
    page.keyboard.type("sleep_for")
    expect(page.get_by_label("Function").first).to_have_value("sleep_for")
    page.keyboard.press("Tab")
    expect(page.locator("#json")).to_be_focused()
    page.keyboard.press("Control+a")
    page.keyboard.type("60")
    for _ in range(2):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#job-title")).to_be_focused()
    expect(page.locator("#job .badge")).to_have_text("▶ started")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#job .badge")).to_have_text("■ stopped")


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_dashboard_is_accessible_at_every_width(browser: Browser, service: Service, scheme: str, width: int) -> None:
    """It meets WCAG 2.1 A and AA, as far as axe-core sees it, and no text makes it scroll sideways."""
    options = {"color_scheme": scheme, "viewport": {"width": width, "height": 800}}
    for visitor in visit(browser, service.url, **options):
        page = visitor.page
        failed = visitor.enqueue("fail", "x" * 300 + " " + "words " * 50, wait=10)
        running = visitor.enqueue("report_slowly", 60)
        echoed = visitor.enqueue("echo", {"long": "y" * 500, "deep": {"er": [1, None, True]}}, delay=100)
        for where in ("", f"#job={failed}", f"#job={running}", f"#job={echoed}"):
            visitor.open(where)
            if not where:
                visitor.choose("count_words")
                page.get_by_text("Options").click()
                page.get_by_text("The same with curl").click()
                expect(visitor.row(running).locator("progress")).to_be_visible()
            else:
                page.locator("#job summary").first.click()
                expect(page.locator("#job details .json").first).to_be_visible()
            found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]})
            assert found.violations_count == 0, found.generate_report()
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        requests.post(f"{service.url}/cancel?job_id={running}", timeout=10)
        requests.post(f"{service.url}/cancel?job_id={echoed}", timeout=10)
        assert visitor.said == []


@in_browser
def test_dashboard_asks_for_a_key_and_keeps_it_in_memory_only(browser: Browser, tmp_path: Path) -> None:
    with valkey_server(tmp_path / "valkey") as server:
        env = environment(f"redis://127.0.0.1:{server.port}/0", API_KEYS=json.dumps(KEYS))
        with web(env, tmp_path / "web.log") as url:
            for visitor in visit(browser, url):
                page = visitor.page
                page.goto(f"{url}/dashboard")
                expect(page.get_by_label("Key")).to_be_focused()
                found = Axe().run(page)
                assert found.violations_count == 0, found.generate_report()
                for wrong, words in (("nobody's", "does not know"), ("schlüssel", "ASCII")):
                    page.get_by_label("Key").fill(wrong)
                    page.keyboard.press("Enter")
                    expect(page.locator("#alert")).to_contain_text(words)
                page.get_by_label("Key").fill(ALICE)
                page.keyboard.press("Enter")
                expect(page.locator("#connection")).to_have_text("live")
                expect(page.locator("#no-admin")).to_be_visible()
                page.locator("#json").fill("1")
                page.get_by_role("button", name="Enqueue").click()
                expect(page.locator("#job .badge")).to_have_text("○ queued")
                page.get_by_role("button", name="Cancel").click()
                expect(page.locator("#job .badge")).to_have_text("⊘ canceled")
                page.get_by_role("link", name="All jobs").click()
                expect(page.locator("#curl")).to_contain_text("Bearer $API_KEY")
                stored = "JSON.stringify([document.cookie, {...localStorage}, {...sessionStorage}])"
                assert page.evaluate(stored) == '["",{},{}]'
                assert ALICE not in page.content()
                page.reload()
                expect(page.get_by_label("Key")).to_be_focused()
                page.get_by_label("Key").fill(OPS)
                page.keyboard.press("Enter")
                expect(page.locator("#queues > li")).to_contain_text("0 workers")
                expect(page.locator("#no-admin")).to_be_hidden()
                expect(page.locator("li.job")).to_contain_text("canceled")
                assert all("401" in line or "403" in line for line in visitor.said)


@in_browser
def test_the_form_has_a_field_for_each_part_of_a_payload(visitor: Visitor) -> None:
    page = visitor.page
    visitor.open()
    visitor.choose("order")
    page.get_by_label("paper (required)").select_option("A5")
    page.get_by_label("color").select_option("true")
    page.get_by_label("city (required)").fill("Åbo")
    page.get_by_label("height").fill("1e3")
    page.get_by_label("tags").fill('["a", "b"]')
    page.get_by_label("JSON", exact=True).check()
    assert json.loads(page.locator("#json").input_value()) == {
        "paper": "A5", "color": True, "place": {"city": "Åbo", "height": 1000}, "tags": ["a", "b"]
    }  # fmt: skip
    page.get_by_label("Fields", exact=True).check()
    page.get_by_label("tags").fill("[")
    page.get_by_role("button", name="Enqueue").click()
    expect(page.get_by_label("tags")).to_be_focused()
    page.get_by_label("tags").fill("[1]")
    page.get_by_role("button", name="Enqueue").click()
    expect(page.locator("#alert")).to_contain_text("body.tags.0")
    page.get_by_label("tags").fill("")
    page.get_by_role("button", name="Enqueue").click()
    expect(page.locator("#job .badge")).to_have_text("✓ finished")
    expect(page.locator("#job")).to_contain_text("height: 1000")
    visitor.said.clear()


def status_of(redis_url: str, job_id: str) -> str:
    """The status of a job, read from Redis because no web server runs."""
    with Redis.from_url(redis_url) as connection:
        return (connection.hget(f"rq:job:{job_id}", "status") or b"").decode()


@in_browser
def test_browser_misses_no_end_while_the_server_restarts(browser: Browser, redis_url: str, tmp_path: Path) -> None:
    """The browser's own EventSource and the page both reconnect by themselves."""
    env = environment(redis_url)
    with worker(env, tmp_path / "worker.log"):
        with gunicorn(env, tmp_path / "web.log", "app.main:app") as (url, process):
            pages = visit(browser, url)
            visitor = next(pages)
            page = visitor.page
            go_on = tmp_path / "go-on"
            job_id = visitor.enqueue("wait_for_file", str(go_on))
            visitor.open(f"#job={job_id}")
            page.evaluate(
                """jobId => {
                    window.seen = [];
                    window.source = new EventSource(`/events?job_id=${jobId}`);
                    for (const kind of ["status", "end"]) {
                        source.addEventListener(kind, event => seen.push([kind, JSON.parse(event.data).job_status]));
                    }
                }""",
                job_id,
            )
            wait_until(lambda: page.evaluate("seen.length"))
            process.kill()
            os.killpg(process.popen.pid, signal.SIGKILL)
            expect(page.locator("#connection")).to_have_text("service not reachable, trying again")
            go_on.touch()
            wait_until(lambda: status_of(redis_url, job_id) == "finished")
        with gunicorn(env, tmp_path / "again.log", "app.main:app", port=int(url.rpartition(":")[2])):
            wait_until(lambda: page.evaluate("seen.at(-1)") == ["end", "finished"])
            expect(page.locator("#job .badge")).to_have_text("✓ finished")
            expect(page.locator("#connection")).to_have_text("live")
            # It asks once more after the end. The answer 204 means that no more events come.
            wait_until(lambda: page.evaluate("source.readyState") == 2)
            assert page.evaluate("seen.filter(([kind]) => kind === 'end').length") == 1
            pages.close()
