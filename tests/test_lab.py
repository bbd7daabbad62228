"""Notebooks in JupyterLab as `make lab` opens it: menus, figures, labelling by keys, a page that is loaded again.

It runs on a copy of the kit, since people leave rows and saved notebooks behind. Screenshots: results/test-browser.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from srlm_utils.artefacts import read_jsonl
from srlm_utils.labelling import P_FIRST, QUIET_S
from tests.chromium import VIEWS, faults, look, requested, shoot

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "apputils-extension/themes": {"adaptive-theme": True},  # light or dark, as the system is
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


class Lab:
    """JupyterLab in a browser: a reader's gestures, and what the notebook on the screen holds."""

    def __init__(self, browser, root: Path, url: str, token: str):
        self.browser, self.root, self.url, self.token = browser, root, url, token

    def js(self, script: str, *args):
        return self.browser.execute_script(script, *args)

    def until(self, what: str, condition, timeout: float = 1000):
        """The first true value of `condition`; a failed test says what was waited for and shows the screen."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if value := condition():
                return value
            time.sleep(0.1)
        shoot(self.browser, "failed")
        raise AssertionError(f"{what} did not come within {timeout} s: results/test-browser/failed.png")

    def open(self, name: str) -> None:
        """A notebook by its address; the tour by the address that the server prints."""
        # a workspace each: no tabs of the notebook before
        path = "" if name == "00_tour" else f"lab/workspaces/{name}/tree/notebooks/{name}.ipynb"
        self.browser.get(f"{self.url}{path}?token={self.token}")
        self.ready(name)

    def ready(self, name: str) -> None:
        """Wait for the notebook and its kernel."""
        script = """const panel = window.jupyterapp?.shell.currentWidget
            return panel?.context?.path == arguments[0] && panel.context.isReady
                && panel.sessionContext.session?.kernel?.status == 'idle'"""
        self.until(f"{name} with an idle kernel", lambda: self.js(script, f"notebooks/{name}.ipynb"))

    def click(self, selector: str, text: str = "") -> None:
        """Click the first visible element of `selector` whose text begins with `text`."""

        def found():
            elements = self.browser.find_elements("css selector", selector)
            return next((e for e in elements if e.is_displayed() and e.text.startswith(text)), None)

        self.until(f"{selector} {text!r}", found).click()

    def run_all(self) -> list[dict]:
        """Kernel > Restart Kernel and Run All Cells; the outputs of code cells once the last has run."""
        self.click(".lm-MenuBar-item", "Kernel")
        self.click(".lm-Menu-item", "Restart Kernel and Run All Cells")
        self.click(".jp-Dialog button", "Restart")
        cells = """return jupyterapp.shell.currentWidget.content.model.sharedModel.cells
            .filter(c => c.cell_type == 'code').map(c => c.toJSON())"""
        counts = "return jupyterapp.shell.currentWidget.content.model.sharedModel.cells.map(c => c.execution_count)"
        before = self.js(counts)

        def done():
            found = self.js(cells)
            failed = [o for c in found for o in c["outputs"] if o["output_type"] == "error"]
            ran = [c["execution_count"] for c in found] == list(range(1, len(found) + 1))
            return found if failed or (ran and self.js(counts) != [None]) else None

        # a cell that ran before the restart has its number until the new kernel clears it
        if any(before):
            self.until("cleared outputs", lambda: self.js(counts) != before)
        return [o for c in self.until("the last cell", done) for o in c["outputs"]]

    def outside(self) -> list[str]:
        return [u for u in requested(self.browser) if not u.startswith((self.url, "data:", "blob:", "about:", "ws:"))]

    def whole(self, width: int = 1280, scheme: str = "light") -> None:
        """Make the window so high that all of the notebook is on the screen, and hide the file browser."""
        look(self.browser, width, scheme)
        self.js("jupyterapp.shell.collapseLeft()")
        dark = "return document.body.dataset.jpThemeLight == 'false'"
        self.until(f"the {scheme} theme", lambda: self.js(dark) == (scheme == "dark"))
        bottom = """document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0
            const cells = jupyterapp.shell.currentWidget.node.querySelectorAll('.jp-Cell')
            return Math.ceil(Math.max(...[...cells].map(c => c.getBoundingClientRect().bottom)))"""
        height = 0
        while height != (height := min(self.js(bottom) + 100, 15000)):  # cells are laid out as they come into view
            look(self.browser, width, scheme, height)
            time.sleep(0.3)

    def shoot(self, name: str) -> None:
        for width, scheme in VIEWS[::3]:  # wide and light, narrow and dark: laying out a long notebook takes seconds
            self.whole(width, scheme)
            shoot(self.browser, f"lab-{name}-{width}-{scheme}")
        look(self.browser)


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    root = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "srlm_utils", "params", "results/example"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "Makefile", root)
    home = root / "jupyter"
    for name, values in SETTINGS.items():
        path = home / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    config = {"ServerApp": {"open_browser": False}, "LabApp": {"expose_app_in_browser": True}}
    (home / "jupyter_server_config.json").write_text(json.dumps(config))
    folders = {"JUPYTER_CONFIG_DIR": home, "JUPYTER_RUNTIME_DIR": home / "runtime", "IPYTHONDIR": home / "ipython"}
    folders |= {f"JUPYTERLAB_{name.upper()}_DIR": home / name for name in ("settings", "workspaces")}
    # the command of the README, with this environment in place of .venv (-o: it is not made again)
    command = ["make", "-o", ".venv/.ready", "lab", f"BIN={Path(sys.executable).parent}"]
    with (root / "lab.log").open("w") as log:
        server = subprocess.Popen(
            command,
            cwd=root,
            env=os.environ | {name: str(path) for name, path in folders.items()} | {"PYTHONPATH": str(root)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while not (files := list((home / "runtime").glob("jpserver-*.json"))):  # it takes a free port and says which
            assert server.poll() is None, (root / "lab.log").read_text()
            time.sleep(0.1)
        info = json.loads(files[0].read_text())
        look(browser)
        requested(browser), faults(browser)  # those of pages that other tests opened
        yield Lab(browser, root, info["url"], info["token"])
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.mark.parametrize(("name", "figures"), [("00_tour", 4), ("06_build_pairs", 0), ("09_report", 13)])
def test_restart_and_run_all(lab, name, figures):
    lab.open(name)
    outputs = lab.run_all()
    assert [o for o in outputs if o["output_type"] == "error"] == []
    assert sum("image/png" in o.get("data", {}) for o in outputs) == figures
    lab.whole()
    visible = """return [...document.querySelectorAll('.jp-RenderedImage img')]
        .filter(i => i.naturalWidth > 300 && i.getBoundingClientRect().right <= innerWidth).length"""
    lab.until(f"{figures} figures that are not cut off", lambda: lab.js(visible) == figures)
    lab.shoot(name)
    assert faults(lab.browser) == [] and lab.outside() == []


def test_stages_write_to_scratch_which_the_file_browser_shows(lab):
    """Behind 06_build_pairs above; the server's root is the repository, not the notebooks' folder."""
    listing = """return jupyterapp.serviceManager.contents.get('results/scratch/M1/aift')
        .then(folder => folder.content.map(file => file.name))"""
    assert "pairs.jsonl" in lab.js(listing)
    assert len(read_jsonl(lab.root / "results/scratch/M1/aift/pairs.jsonl")) == 100


def test_ten_pairs_by_keys_then_a_reload(lab):
    labels, keys = lab.root / "results/scratch/labels.jsonl", "1t21122t11"
    lab.open("11_label")
    lab.run_all()

    def labelled(n):
        words = f"{n} of 50 labelled by reader-1"
        lab.until(words, lambda: words in lab.js("return document.body.innerText"))

    labelled(0)
    shown = "return document.querySelector('.jp-OutputArea .widget-html:nth-child(2)').innerText"
    field = lab.until("the field for keys", lambda: lab.browser.find_elements("css selector", ".widget-text input"))[0]
    field.click()
    for i, key in enumerate(keys, 1):
        time.sleep(QUIET_S + 0.1)  # faster is no verdict
        field.send_keys(key)
        labelled(i)
    at = lab.js(shown)
    lab.shoot("11_label")
    rows = read_jsonl(labels)
    assert [r["p_first"] for r in rows] == [P_FIRST[k] for k in keys]
    assert len({r["prompt_id"] for r in rows}) == 10 and {r["judge"] for r in rows} == {"reader-1"}

    lab.browser.refresh()
    lab.ready("11_label")
    outputs = lab.run_all()
    assert [o for o in outputs if o["output_type"] == "error"] == []
    labelled(10)
    assert lab.js(shown) == at and "answer 1" in at  # the pair it was at
    tables = "".join(str(o["data"]) for o in outputs if "data" in o)
    assert "M1, score (inside the loop)" in tables  # who agrees with whom
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert read_jsonl(labels) == rows and faults(lab.browser) == [] and lab.outside() == []
    lab.shoot("11_label-after")
