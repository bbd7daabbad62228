"""Shared pages in a real browser: every link, from disk and from a static server; nothing leaves, nothing is cut off.

Screenshots of the first pages land in results/test-browser, wide and narrow, light and dark: look at them.
"""

import functools
import http.server
import threading

import pytest

from srlm_utils import compare, share
from srlm_utils.paths import EXAMPLE
from tests.chromium import VIEWS, look, requested, shoot

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("share") / "pages"
    share.share(EXAMPLE, out)
    return out


@pytest.fixture(scope="module")
def pages(folder):
    """The shared folder, and beside it the example compared with itself."""
    compare.compare([EXAMPLE, EXAMPLE], folder.with_name("compared"))
    return folder


def walk(browser, start: str, root: str) -> set[str]:
    """Open every page that can be reached from `start` by links below `root`; the pages that were opened."""
    todo, seen = [start], set()
    requested(browser)
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
        for link in {link.partition("#")[0] for link in links}:
            if link.startswith("file:") or link.startswith(root):
                assert link.startswith(root), f"{url} links to {link}, outside the folder"
                todo += [link] if link not in seen and link not in todo else []
    return seen


def test_every_link_from_disk(browser, folder):
    seen = walk(browser, (folder / "index.html").as_uri(), folder.as_uri())
    assert len(seen) == len(list(folder.rglob("*.html")))


def test_a_comparison_from_disk(browser, pages):
    compared = pages.with_name("compared")
    assert walk(browser, (compared / "index.html").as_uri(), compared.as_uri()) == {(compared / "index.html").as_uri()}


def test_every_link_from_a_static_server(browser, folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}/"
        assert len(walk(browser, f"{root}index.html", root)) == len(list(folder.rglob("*.html")))
        server.shutdown()


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
        "pages/index.html",
        "pages/notebooks/02_sft@M1.html",
        "pages/notebooks/08_evaluate@M1.html",
        "pages/models/M3.html",
        "compared/index.html",
    ],
)
def test_pages_fit_a_phone_and_are_readable_in_the_dark(browser, pages, page):
    for width, scheme in VIEWS:
        look(browser, width, scheme, 1600)
        browser.get((pages.parent / page).as_uri())
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, f"{page} at {width} pixels scrolls sideways ({wide})"
        assert all(contrast(browser, s) > 4.5 for s in ("h1", "p", "a")), (page, scheme)
        shoot(browser, f"{page.replace('/', '_')}-{width}-{scheme}")
