"""The reports in headless Chromium: nothing is asked of anybody, no error, the filter works, they fit a phone."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_evaluation_report import IMAGES, judge, random_set

from direct_pt.reports.evaluation import analyse, comparison
from direct_pt.reports.evaluation_page import write_evaluation_page

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    """One for all tests, without a net."""
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


class Visit:
    """A page that is open, what it asked for and what it complained about."""

    def __init__(self, browser: playwright.Browser, path: Path, width: int = 1200, scheme: str = "light") -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.errors.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(path.as_uri())

    def asked_of_others(self) -> list[str]:
        """Addresses that are neither the page nor in it."""
        return [url for url in self.requests[1:] if not url.startswith("data:")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of images of the right size, beside a worse model."""
    from conftest import CocoFolder
    from PIL import Image

    folder = CocoFolder(tmp_path_factory.mktemp("browser") / "set", [(8, 8)] * IMAGES, ())
    table, predictions = random_set(folder, 0)
    rng = np.random.default_rng(0)
    for row in range(IMAGES):
        Image.fromarray(rng.integers(256, size=(480, 640, 3), dtype=np.uint8)).save(table.path(row))
    judged = judge(table, predictions)
    kept = predictions.scores > 0.3
    other = judge(
        table, type(predictions)(*(getattr(predictions, n)[kept] for n in ("images", "boxes", "scores", "labels")))
    )
    figures = analyse(judged) | {"comparison": comparison(judged, other)}
    path = table.folder.parent / "report.html"
    write_evaluation_page(path, judged, figures, {"model": "runs/one", "data": "made up"}, other, "runs/other")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_opens(browser: playwright.Browser, report: Path, width: int, scheme: str) -> None:
    """Without a word to anybody; nothing is wider than the window but what scrolls for itself."""
    visit = Visit(browser, report, width, scheme)
    assert visit.errors == [] and visit.asked_of_others() == []
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    assert visit.page.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
    assert visit.page.locator("figure img").count() > 40
    back, text = (
        visit.page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
    )
    levels = [sum(map(int, color[4:-1].split(","))) for color in (back, text)]
    assert (levels[0] > levels[1] + 300) if scheme == "light" else (levels[1] > levels[0] + 300)
    visit.page.close()


def test_a_run_opens(browser: playwright.Browser, pretrained: Path) -> None:
    """Its page, on a phone."""
    visit = Visit(browser, pretrained / "run.html", width=400)
    assert visit.errors == [] and visit.asked_of_others() == []
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 400
    assert visit.page.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
    visit.page.close()


def test_filter(browser: playwright.Browser, report: Path) -> None:
    """One class at a time: its curve, its threshold, its row and its examples; all of them again."""
    page = Visit(browser, report).page

    def shown() -> dict[str, list[str]]:
        parts = {"curves": "svg .line", "marks": "svg .note", "rows": "tr[data-row]", "examples": "figure[data-row]"}
        visible = "list => list.filter(one => getComputedStyle(one).display !== 'none').map(one => one.dataset.class)"
        return {name: page.locator(selector).evaluate_all(visible) for name, selector in parts.items()}

    before = shown()
    assert before["curves"] == ["all", "all"] and before["marks"] == ["all"]
    assert before["rows"] == ["0", "1", "2", "3"] and set(before["examples"]) == {"0", "1", "2", "3"}
    page.select_option("#filter", "2")
    one = shown()
    assert one["curves"] == ["2", "2"] and one["marks"] == ["2"] and one["rows"] == ["2"]
    assert set(one["examples"]) == {"2"} and 0 < len(one["examples"]) < len(before["examples"])
    page.select_option("#filter", "all")
    assert shown() == before
    page.close()
