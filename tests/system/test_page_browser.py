"""The run's page in a real browser, over a real server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from symile_dist.metrics.history import HISTORY_FILE
from symile_dist.metrics.http import HttpServer
from symile_dist.view.page import page_application
from tests import made_run

CHROMIUM = Path("/usr/bin/chromium")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed"),
    pytest.mark.timeout(180),
]
DESK, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 15_000
"""Milliseconds."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """A page, and what it has complained of and asked for."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on(
            "console", lambda message: message.type in ("error", "warning") and self.complaints.append(message.text)
        )
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, url: str) -> float:
        """Returns the seconds until all that is in sight is drawn."""
        begin = time.monotonic()
        self.page.goto(url)
        self.page.wait_for_function(ALL_DRAWN, timeout=60_000)
        return time.monotonic() - begin

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).first.inner_text())

    def wait_for_text(self, selector: str, text: str) -> None:
        playwright.expect(self.page.locator(selector).first).to_contain_text(text, timeout=PATIENCE)

    def wait_until(self, condition: Callable[[], bool], words: str) -> None:
        """Of what comes with a later frame or message; meanwhile the page goes on."""
        deadline = time.monotonic() + PATIENCE / 1000
        while not condition():
            assert time.monotonic() < deadline, words
            self.page.wait_for_timeout(20)

    def show(self, selector: str) -> dict[str, float]:
        """Scrolls there; returns where it stands."""
        element = self.page.locator(selector).first
        element.evaluate("element => element.scrollIntoView({block: 'center', behavior: 'instant'})")
        self.page.wait_for_function(ALL_DRAWN, timeout=PATIENCE)
        box: dict[str, float] = element.bounding_box()
        return box


# Whether the history is read, and every chart in sight is drawn.
ALL_DRAWN = """() => {
  if (!document.body.dataset.ready || document.querySelector('#notices').textContent.includes('Reading')) return false;
  const inSight = (element) => {
    const box = element.getBoundingClientRect();
    return box.height > 0 && box.bottom > 0 && box.top < innerHeight;
  };
  return [...document.querySelectorAll('.chart')].filter(inSight).every((chart) => chart.dataset.drawn === 'yes');
}"""


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """visit(viewport, **options of the context) -> Visit; checks at the end that nothing was complained of."""
    with contextlib.ExitStack() as opened:
        visits: list[Visit] = []

        def make(viewport: dict[str, int] = DESK, **options: Any) -> Visit:
            context = browser.new_context(viewport=viewport, **options)
            opened.callback(context.close)
            visits.append(Visit(context.new_page()))
            return visits[-1]

        yield make
        for each in visits:
            assert each.complaints == []


@contextlib.contextmanager
def served(directory: Path, port: int = 0) -> Iterator[str]:
    server = HttpServer(page_application(directory), "127.0.0.1", port)
    url = server.url("/")
    assert url is not None
    assert not port or server.port == port, f"port {port} is taken"
    try:
        yield url
    finally:
        server.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_run.write_run(tmp_path / "made")


def test_loads_without_complaints_and_asks_nobody_else(run: Path, visit: Callable[..., Visit]) -> None:
    with served(run) as url:
        here = visit()
        here.open(url)
        here.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        here.page.wait_for_function(ALL_DRAWN, timeout=PATIENCE)
        assert here.requests and all(asked.startswith(url) for asked in here.requests), here.requests
        assert here.page.title() == "running, step 4,000/5,000 · made"
        assert here.text("h1") == "made" and here.text("#state") == "running"
        assert "step 4,000 of 5,000" in here.text("#progress-words") and "left" in here.text("#progress-words")
        sections = here.page.locator("section:visible h2").all_inner_texts()
        for title in ("Training", "Performance", "Data", "Reliability", "Contrastive learning", "Ranks", "Checkpoints"):
            assert title in sections
        titles, values = (here.page.locator(f".tile {part}").all_inner_texts() for part in (".tile-title", ".value"))
        tiles = dict(zip(titles, values, strict=True))
        assert tiles["Ranks"] == "8 / 8" and tiles["Restarts"] == "1" and tiles["Skipped steps"] == "3"
        assert "productive" in here.text("#goodput") and "backward" in here.text("#breakdown")
        assert "89.5%" in here.text("#goodput-words")
        assert here.page.locator("#checkpoints tbody tr").count() == 6
        assert "rank 3 was killed" in here.text("#events-list")
        assert "89.4%" in here.text("#evaluation-body")
        assert "s3://***@bucket/train" in here.text("#config-text") and "verysecret" not in here.page.content()
        assert re.match(r"5\s*straggler", here.text("tr.straggler"))


def test_shows_what_a_live_run_writes(run: Path, visit: Callable[..., Visit], tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    code = """
import sys, time
from pathlib import Path
from symile_dist.metrics.history import History
history = History(Path(sys.argv[1]), tensorboard=False)
step = 4000
while not Path(sys.argv[2]).exists():
    step += 1
    history.write("train", step, samples_seen=step * 4096, loss=1 / step, grad_norm=1.0, step_seconds=0.05)
    time.sleep(0.05)
history.write("event", step, message="the writer has been told to stop", level="warning")
history.close()
"""
    writer = subprocess.Popen([sys.executable, "-c", code, str(run), str(stop)])
    try:
        with served(run) as url:
            here = visit()
            here.open(url)
            step = r"step ([\d,]+) of"
            seen: list[int] = []
            deadline = time.monotonic() + 30
            while len(set(seen)) < 4:
                assert time.monotonic() < deadline, f"the page shows no new steps: {seen}"
                found = re.search(step, here.text("#progress-words"))
                assert found
                seen.append(int(found[1].replace(",", "")))
                here.page.wait_for_timeout(200)
            assert seen == sorted(seen) and seen[-1] > 4000
            label = here.page.locator("[data-panel=loss] .chart").get_attribute("aria-label")
            last = re.search(r"to ([\d,]+):", label)
            assert last and int(last[1].replace(",", "")) > 4000, f"the curves do not grow: {label}"
            stop.touch()
            here.wait_for_text("#events-list", "the writer has been told to stop")
            told = json.loads((run / "run.json").read_text())
            (run / "run.json").write_text(json.dumps({**told, "status": "finished"}))
            here.wait_for_text("#state", "finished")
            assert here.page.title().startswith("finished, step")
    finally:
        stop.touch()
        writer.kill()
        writer.wait()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESK, PHONE], ids=["1400", "390"])
def test_is_readable(
    run: Path, visit: Callable[..., Visit], tmp_path: Path, viewport: dict[str, int], scheme: str
) -> None:
    phone = viewport is PHONE
    with served(run) as url:
        here = visit(viewport, color_scheme=scheme, is_mobile=phone, has_touch=phone)
        here.open(url)
        here.page.screenshot(path=str(tmp_path / "top.png"))
        height = here.page.evaluate("document.documentElement.scrollHeight")
        for place in range(0, height, viewport["height"]):
            here.page.evaluate("place => window.scrollTo({top: place, behavior: 'instant'})", place)
            here.page.wait_for_function(ALL_DRAWN, timeout=PATIENCE)
        here.page.screenshot(path=str(tmp_path / "whole.png"), full_page=True)
        wide = here.page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide[0] <= wide[1], f"the page is {wide[0]} pixels wide in a window of {wide[1]}"
        for selector, least in (
            ("h1", 20),
            ("#progress-words", 100),
            (".tile", 140),
            ("[data-panel=loss] .chart", 250),
            ("[data-panel=phases] .chart", 250),
            ("#ranks-table", 300),
            ("#checkpoints table", 300),
            ("#events-list li", 300),
            ("#config-text", 300),
        ):
            box = here.show(selector)
            assert box["width"] >= least and box["height"] >= 15, f"{selector}: {box}"
            assert box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"] + 1, f"{selector} is cut off: {box}"
        assert contrast(here, "body") > 7, "text is hard to read"
        for selector in (".tile-title", ".aside", ".eyebrow", "nav a", "#state", "footer"):
            assert contrast(here, selector) > 4.5, f"{selector} is hard to read in {scheme}"


def contrast(here: Visit, selector: str) -> float:
    """Of a text and what it stands on, as WCAG has it."""
    ratio: float = here.page.locator(f"{selector}:visible").first.evaluate(
        """element => {
          const parse = (colour) => {
            const parts = colour.match(/[\\d.]+/g).map(Number);
            if (!colour.startsWith('color(srgb')) return parts;
            return [...parts.slice(0, 3).map((each) => 255 * each), parts[3] ?? 1];
          };
          let behind = element;
          let ground = [0, 0, 0, 0];
          while (behind && (ground[3] ?? 1) === 0) {
            ground = parse(getComputedStyle(behind).backgroundColor);
            behind = behind.parentElement;
          }
          const light = (rgb) => {
            const linear = (each) => (each <= 0.03928 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
            const [r, g, b] = rgb.slice(0, 3).map((each) => linear(each / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const [one, two] = [light(parse(getComputedStyle(element).color)), light(ground)];
          return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
        }"""
    )
    return ratio


def background(here: Visit) -> str:
    return str(here.page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_dark_mode_follows_the_system_and_can_be_switched(run: Path, visit: Callable[..., Visit]) -> None:
    with served(run) as url:
        here = visit(color_scheme="light")
        here.open(url)
        light = background(here)
        here.page.locator("#theme").click()
        dark = background(here)
        assert dark != light, "the switch changes nothing"
        here.open(url)
        assert background(here) == dark, "the choice is forgotten"
        here.page.locator("#theme").click()
        assert background(here) == light, "the switch does not lead back to the system's theme"
        here.page.emulate_media(color_scheme="dark")
        assert background(here) == dark, "the page does not follow the system"


def test_zoom_hover_and_keyboard(run: Path, visit: Callable[..., Visit]) -> None:
    with served(run) as url:
        here = visit()
        here.open(url)
        box = here.show("[data-panel=loss] .chart")
        across = box["y"] + box["height"] / 2

        here.page.mouse.move(box["x"] + box["width"] * 0.5, across)
        tooltip = here.page.locator("#tooltip")
        playwright.expect(tooltip).to_contain_text(
            re.compile(r"Step [\d,]+.*training.*validation", re.S), timeout=PATIENCE
        )
        here.page.mouse.move(box["x"] + box["width"] * 0.52, across)
        before = tooltip.inner_text()
        here.page.mouse.move(box["x"] + box["width"] * 0.8, across)
        here.wait_until(lambda: tooltip.inner_text() != before, "the tooltip stays at one step")

        other = here.page.locator("[data-panel=grad_norm] .chart")
        whole = other.get_attribute("aria-label")
        here.page.mouse.move(box["x"] + box["width"] * 0.4, across)
        here.page.mouse.down()
        here.page.mouse.move(box["x"] + box["width"] * 0.6, across, steps=8)
        here.page.mouse.up()
        playwright.expect(here.page.locator("#reset")).to_be_visible(timeout=PATIENCE)
        here.wait_until(lambda: other.get_attribute("aria-label") != whole, "other charts do not follow")
        label = other.get_attribute("aria-label")
        first, last = (int(each.replace(",", "")) for each in re.findall(r"steps ([\d,]+) to ([\d,]+)", label)[0])
        assert 1200 < first < 1900 and 2000 < last < 2700, f"other charts do not follow: {label}"
        here.wait_until(
            lambda: any(f"first={first}&last={last}" in asked for asked in here.requests),
            "the server was not asked for detail",
        )
        here.page.locator("#reset").click()
        playwright.expect(here.page.locator("#reset")).to_be_hidden(timeout=PATIENCE)

        here.page.locator("#first").fill("3000")
        here.page.locator("#first").press("Enter")
        playwright.expect(here.page.locator("#reset")).to_be_visible(timeout=PATIENCE)
        here.page.locator("[data-panel=loss] .chart").dblclick()
        playwright.expect(here.page.locator("#reset")).to_be_hidden(timeout=PATIENCE)

        here.page.locator("[data-panel=loss] .chart").focus()
        here.page.keyboard.press("End")
        playwright.expect(tooltip).to_contain_text("Step 4,000", timeout=PATIENCE)
        here.page.keyboard.press("ArrowLeft")
        playwright.expect(tooltip).to_contain_text("Step 3,990", timeout=PATIENCE)
        playwright.expect(here.page.locator("#spoken")).to_contain_text("training", timeout=PATIENCE)
        here.page.keyboard.press("+")
        playwright.expect(here.page.locator("#reset")).to_be_visible(timeout=PATIENCE)
        here.page.keyboard.press("Escape")
        playwright.expect(here.page.locator("#reset")).to_be_hidden(timeout=PATIENCE)


def test_nan_and_infinity_are_told(run: Path, visit: Callable[..., Visit]) -> None:
    with served(run) as url:
        here = visit()
        here.open(url)
        here.page.locator("#first").fill("3100")
        here.page.locator("#last").fill("3120")
        here.page.locator("#last").press("Enter")
        playwright.expect(here.page.locator("#reset")).to_be_visible(timeout=PATIENCE)
        box = here.show("[data-panel=grad_norm] .chart")
        tooltip = here.page.locator("#tooltip")
        deadline = time.monotonic() + 10
        place = 0.3
        while "∞" not in tooltip.inner_text():
            assert time.monotonic() < deadline, f"infinity is not told: {tooltip.inner_text()}"
            place = 0.3 + (place + 0.02 - 0.3) % 0.6
            here.page.mouse.move(box["x"] + box["width"] * place, box["y"] + box["height"] / 2)


def test_switches_change_what_is_drawn(run: Path, visit: Callable[..., Visit]) -> None:
    with served(run) as url:
        here = visit()
        here.open(url)
        here.show("[data-panel=loss] .chart")

        def drawn(panel: str) -> str:
            return str(here.page.evaluate(f"document.querySelector('[data-panel={panel}] canvas').toDataURL()"))

        here.page.mouse.move(0, 0)
        pictures = [drawn("loss")]
        for press in (
            lambda: here.page.locator("label:has(#smooth)").click(),
            lambda: here.page.locator("label:has(#marks)").click(),
            lambda: here.page.get_by_role("button", name="Logarithmic axis: Loss").click(),
            lambda: here.page.locator("[data-panel=loss] .legend button").first.click(),
        ):
            press()
            here.page.mouse.move(0, 0)
            here.wait_until(lambda: drawn("loss") not in pictures, f"switch {len(pictures)} changes nothing")
            pictures.append(drawn("loss"))
        here.show("[data-panel=phases] .chart")
        before = drawn("phases")
        here.page.get_by_role("button", name=re.compile("^Shares: Phases")).click()
        here.wait_until(lambda: drawn("phases") != before, "the switch to shares changes nothing")


def test_survives_a_restart_of_its_server(run: Path, visit: Callable[..., Visit]) -> None:
    here = visit()
    with served(run) as url:
        here.open(url)
    port = int(url.rsplit(":", 1)[1].strip("/"))
    here.wait_for_text("#connection", "No connection")
    here.wait_for_text("#notices", "does not answer")
    assert "step 4,000" in here.text("#progress-words"), "what was known is gone"
    # The run is another one by now: begun anew, shorter.
    (run / HISTORY_FILE).unlink()
    made_run.write_history(run, last=500)
    with served(run, port):
        here.wait_for_text("#progress-words", "step 500 of")
        playwright.expect(here.page.locator("#connection")).to_be_empty(timeout=PATIENCE)
        playwright.expect(here.page.locator("#notices .notice")).to_have_count(0, timeout=PATIENCE)
        chart = here.page.locator("[data-panel=loss] .chart")  # drawn a frame later than words are written
        playwright.expect(chart).to_have_attribute("aria-label", re.compile("to 500:"), timeout=PATIENCE)
    here.complaints.clear()  # the browser's own: the server was not there


def test_a_finished_run_from_its_history_alone(tmp_path: Path, visit: Callable[..., Visit]) -> None:
    made_run.write_history(tmp_path, last=600, total=600, end="finished")
    (tmp_path / "config.yaml").write_text(made_run.CONFIG.replace("steps: 5000", "steps: 600"))
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", HISTORY_FILE]
    with served(tmp_path) as url:
        here = visit()
        here.open(url)
        assert here.page.title() == "finished, step 600/600 · made"
        here.show("[data-panel=loss] .chart")
        assert here.page.locator("#notices .notice").count() == 0
        assert here.page.locator("#ranks").is_hidden() and here.page.locator("#checkpoints").is_hidden()
        assert here.page.locator("#events-list li").count() >= 1


def test_a_run_that_has_not_begun(tmp_path: Path, visit: Callable[..., Visit]) -> None:
    (tmp_path / "config.yaml").write_text(made_run.CONFIG)
    (tmp_path / "run.json").write_text(json.dumps({"name": "made", "status": "starting"}))
    with served(tmp_path) as url:
        here = visit()
        here.open(url)
        assert here.text("#state") == "starting" and "no step yet" in here.text("#progress-words")
        assert here.page.locator(".chart:visible").count() == 0
        made_run.write_history(tmp_path, last=100)
        playwright.expect(here.page.locator("[data-panel=loss] .chart")).to_be_visible(timeout=PATIENCE)


def test_no_address_leads_out_of_the_page(run: Path, visit: Callable[..., Visit]) -> None:
    with served(run) as url:
        here = visit()
        for path in (
            "config.yaml",
            "%2e%2e/%2e%2e/etc/passwd",
            "..%2fconfig.yaml",
            "history.jsonl",
            "api/curves/../../x",
            "%00",
        ):
            reply = here.page.goto(url + path)
            assert reply.status in (400, 404), f"{path}: {reply.status}"
        assert here.page.request.post(f"{url}api/run").status == 405
        here.complaints.clear()  # of the answers themselves


def test_nothing_that_a_run_says_is_read_as_markup(run: Path, visit: Callable[..., Visit]) -> None:
    evil = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
    told = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**told, "name": evil, "status": "failed", "message": evil}))
    (run / "ranks.json").write_text(json.dumps([{"rank": 0, "host": evil, "phases": {evil: 1.0}}]))
    with (run / HISTORY_FILE).open("a") as file:
        file.write(made_run.line({"kind": "event", "step": 4000, "message": evil, "level": "error"}))
        file.write(made_run.line({"kind": "train", "step": 4001, f"uniformity/{evil}": 1.0, "phases": {evil: 1.0}}))
    with served(run) as url:
        here = visit()
        here.open(url)
        here.wait_for_text("#events-list", "<script>")
        assert "onerror" in here.text("h1") and here.page.locator("main img").count() == 0
        assert "taken" not in here.page.title().split("·")[0]


def test_a_thousand_ranks_and_a_hundred_thousand_records(tmp_path: Path, visit: Callable[..., Visit]) -> None:
    made_run.write_long_history(tmp_path, 100_000)
    made_run.write_files(tmp_path, world_size=1024, slow=700)
    with served(tmp_path) as url:
        here = visit()
        cold = here.open(url)
        warm = visit().open(url)
        print(f"drawn after {warm:.2f} s, and {cold:.2f} s while the server reads the history")
        # Loosely, as machines differ: 2 s are the goal.
        assert warm < 8 and cold < 25
        assert here.page.locator("#ranks-table tbody tr").count() < 60, "rows out of sight are made"
        here.show("#ranks-scroll")
        here.page.locator("#ranks-filter").fill("700")
        playwright.expect(here.page.locator("#ranks-table tbody tr")).to_have_count(1, timeout=PATIENCE)
        assert "straggler" in here.text("#ranks-table tbody")
        here.page.locator("#ranks-filter").fill("node-012")
        playwright.expect(here.page.locator("#ranks-table tbody tr")).to_have_count(8, timeout=PATIENCE)
        here.page.locator("#ranks-filter").fill("")
        here.page.get_by_role("button", name="× median").click()
        assert here.text("#ranks-table tbody td").startswith("700"), "sorting puts the slowest first"
        here.page.locator("#ranks-scroll").evaluate("element => { element.scrollTop = element.scrollHeight }")
        here.page.wait_for_function(
            "() => [...document.querySelectorAll('#ranks-table tbody tr')].some((row) => row.ariaRowIndex === '1025')"
        )
