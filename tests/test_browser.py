"""Shared pages, comparisons, reports in a browser: every link, from disk and from a static server; nothing leaves,
nothing is cut off.

Screenshots of the first pages land in results/test-browser, wide and narrow, light and dark: look at them.
"""

import functools
import http.server
import shutil
import threading
from types import SimpleNamespace

import pytest

import srlm_utils
from srlm_utils import compare, report, share
from srlm_utils.artefacts import read_json, read_jsonl, write_json
from srlm_utils.paths import EXAMPLE
from tests.chromium import VIEWS, look, requested, shoot

pytestmark = pytest.mark.browser


STARTS = ("shared/index.html", "compared/index.html", "report/report.html")


def write_report(to) -> None:
    """The example's report as it is written today: its figures, a table, what models wrote."""
    step = SimpleNamespace(
        rows=lambda path: read_jsonl(EXAMPLE / path), params=SimpleNamespace(iterations=3, drafts=[])
    )
    table = report.wide(srlm_utils.open_run(EXAMPLE).metrics(), report.ANSWERS)
    figures = sorted((EXAMPLE / "report/figures").glob("*.png"))
    sections = [{"title": p.stem, "text": "A figure and a table.", "figure": p, "table": table} for p in figures]
    pairs, answers = report.example_pairs(step, 3), report.example_answers(step, 3)
    words = {"title": "Self-rewarding run: example", "lead": "Rates and intervals.", "foot": "Kit revision unknown."}
    report.write_html(to, sections=sections, pairs=pairs, answers=answers, **words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The example's shared pages, its report, and its comparison with a copy that says it had another beta."""
    out = tmp_path_factory.mktemp("pages")
    share.share(EXAMPLE, out / "shared")
    write_report(out / "report/report.html")
    other = tmp_path_factory.mktemp("runs") / "beta03"
    shutil.copytree(EXAMPLE, other, ignore=shutil.ignore_patterns("share", "notebooks"))
    manifest = read_json(other / "steps/07_dpo@M2.json")
    manifest["params"] |= {"beta": 0.3}
    write_json(other / "steps/07_dpo@M2.json", manifest)
    compare.compare([EXAMPLE, other], out / "compared")
    return out


@pytest.fixture(scope="module")
def server(folder):
    """Address of a static server of `folder`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def walk(browser, start: str) -> set[str]:
    """Open every page that can be reached from `start` by links within its folder; the pages that were opened."""
    root = start.rpartition("/")[0] + "/"
    todo, seen = [start], set()
    requested(browser), browser.get_log("browser")  # of the test before
    while todo:
        url = todo.pop()
        seen.add(url)
        browser.get(url)
        assert browser.get_log("browser") == [], url
        assert [u for u in requested(browser) if not u.startswith((root, "data:"))] == [], url
        assert browser.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth)"), url
        links = browser.execute_script(
            "return [...document.links].filter(a => !a.hasAttribute('download')).map(a => a.href)"
        )
        for link in links:
            page, _, anchor = link.partition("#")
            if anchor and page == url:
                assert browser.execute_script("return document.getElementById(arguments[0])", anchor), link
            if page.startswith(("file:", root)):
                assert page.startswith(root), f"{url} links to {page}, outside the folder"
                todo += [page] if page not in seen and page not in todo else []
    return seen


@pytest.mark.parametrize("where", ["disk", "server"])
@pytest.mark.parametrize("start", STARTS)
def test_every_link(browser, folder, server, start, where):
    seen = walk(browser, f"{folder.as_uri() if where == 'disk' else server}/{start}")
    pages = {url for url in seen if url.endswith(".html")}
    assert len(pages) == len(list((folder / start).parent.rglob("*.html")))


def contrast(browser, selector: str) -> float:
    """WCAG contrast of an element's text with the page."""
    script = """const c = s => getComputedStyle(document.querySelector(s));
        return [c(arguments[0]).color, c('body').backgroundColor].map(v => v.match(/\\d+/g).slice(0, 3).map(Number))"""

    def luminance(rgb):
        parts = [v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in rgb]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    a, b = sorted(map(luminance, browser.execute_script(script, selector)))
    return (b + 0.05) / (a + 0.05)


@pytest.mark.parametrize(
    "page",
    [
        *STARTS,
        "shared/notebooks/02_sft@M1.html",
        "shared/notebooks/08_evaluate@M1.html",
        "shared/models/M3.html",
    ],
)
def test_pages_fit_a_phone_and_are_readable_in_the_dark(browser, folder, page):
    for width, scheme in VIEWS:
        look(browser, width, scheme, 1600)
        browser.get((folder / page).as_uri())
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, f"{page} at {width} pixels scrolls sideways ({wide})"
        words = [s for s in ("h1", "p", "a") if browser.find_elements("css selector", s)]
        assert words[:2] == ["h1", "p"] and all(contrast(browser, s) > 4.5 for s in words), (page, scheme)
        shoot(browser, f"{page.replace('/', '_')}-{width}-{scheme}")
