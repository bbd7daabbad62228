"""A run as pages: what is in the folder, what is not, and that it is written whole."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from srlm_utils import rendered, share
from srlm_utils.errors import DataError, MissingInputError
from srlm_utils.paths import EXAMPLE, PROJ_ROOT
from tests.conftest import cli, example_notebooks

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)><iframe src='//evil.example'></iframe>"


class Links(HTMLParser):
    """Every address that a page names, and the tags it has."""

    def __init__(self, html: str):
        super().__init__()
        self.links, self.sources, self.tags = [], [], set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} {name}"
            (self.links if name == "href" else self.sources if name in ("src", "srcset") else []).append(value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("share") / "pages"
    share.share(EXAMPLE, out)
    return out


def notebook(*cells) -> str:
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": list(cells)})


def code(*outputs, source="x") -> dict:
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "execution_count": 1, "source": source}
    return cell | {"outputs": list(outputs)}


def stream(text, name="stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": text}


def displayed(**data) -> dict:
    return {"output_type": "display_data", "metadata": {}, "data": {k.replace("__", "/"): v for k, v in data.items()}}


def run_with(tmp_path, *cells, **params) -> Path:
    """The smallest run: one notebook, one manifest."""
    run = tmp_path / "run"
    for sub in ("notebooks", "steps"):
        (run / sub).mkdir(parents=True)
    (run / "notebooks" / "02_sft@M1.ipynb").write_text(notebook(*cells))
    manifest = {"step": "02_sft@M1", "params": params, "figures": {"n_rows": 3}, "started": "2026-01-01T00:00:00Z"}
    (run / "steps" / "02_sft@M1.json").write_text(json.dumps(manifest | {"seconds": 61.0, "peak_memory_gb": 1.0}))
    return run


def test_the_example_is_shared_whole(folder):
    assert {p.stem for p in (folder / "notebooks").glob("*.html")} == {
        p.stem for p in (EXAMPLE / "notebooks").glob("*.ipynb")
    }
    for name in ("report.html", "metrics.csv", "params.yaml", "figures/agreement.png", "figures/agreement.csv"):
        assert (folder / name).is_file(), name
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 15e6
    steps = re.findall(r'href="notebooks/([^"]+)\.html"', (folder / "index.html").read_text())
    assert len(steps) == 18 and steps[0] == "01_seed_data@run" and steps[-1] == "09_report@run"


def test_links_stay_in_the_folder_and_lead_somewhere(folder):
    for page in folder.rglob("*.html"):
        html = page.read_text()
        found = Links(html)
        assert "default-src 'none'" in html and not found.tags & {"script", "iframe", "object", "embed", "form"}
        assert all(s.startswith("data:") for s in found.sources)
        for link in found.links:
            if link.startswith(("#", "data:", "https://")):
                continue
            target = (page.parent / link).resolve()
            assert target.is_file() and target.is_relative_to(folder.resolve()), f"{page.name}: {link}"


def test_code_is_folded_and_tables_are_tables(folder):
    html = (folder / "notebooks" / "08_evaluate@M1.html").read_text()
    assert "¶" not in html + (folder / "models" / "M3.html").read_text()
    assert html.count("<details>") == html.count("<details><summary>code</summary>") > 5
    assert "<table" in html and "<h1>08" in html and "&lt;h1" not in html and "style scoped" not in html


def test_nothing_of_this_machine_is_shared(folder, tmp_path, monkeypatch):
    places = [str(PROJ_ROOT), str(Path.home()), os.sys.prefix, "/tmp/"]
    for page in (p for p in folder.rglob("*") if p.suffix in (".html", ".csv", ".yaml")):
        assert not [p for p in places if p in page.read_text()], page
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh1234")
    printed = f"{PROJ_ROOT}/results/x /data/secret/seed.jsonl /tmp/ipykernel_12/3.py:1: hf_abcdefgh1234 {Path.home()}/a"
    run = run_with(tmp_path, code(stream(printed)), ift_file="/data/secret/seed.jsonl")
    (run / "params.yaml").write_text("seed_data:\n  ift_file: /data/secret/seed.jsonl\n")
    share.share(run, tmp_path / "out")
    text = (tmp_path / "out/notebooks/02_sft@M1.html").read_text()
    assert "results/x .../seed.jsonl 3.py:1: [HF_TOKEN] ~/a" in text
    for page in (tmp_path / "out").rglob("*.*"):
        assert "/data/secret" not in page.read_text() and "hf_abcd" not in page.read_text()


def test_what_a_model_wrote_cannot_act(tmp_path):
    markdown = {"cell_type": "markdown", "id": "m", "metadata": {}, "source": f"# A\n{EVIL} [x](javascript:alert(1))"}
    isolated = displayed(text__html=EVIL) | {"metadata": {"text/html": {"isolated": True}}}
    outputs = [stream(EVIL), displayed(text__html=f"<style>p{{}}</style><b>kept</b>{EVIL}"), isolated]
    outputs += [displayed(application__javascript="alert(3)"), displayed(text__markdown=EVIL)]
    outputs += [{"output_type": "error", "ename": "E", "evalue": EVIL, "traceback": [EVIL]}]
    share.share(run_with(tmp_path, markdown, code(*outputs, source=EVIL)), tmp_path / "out")
    html = (tmp_path / "out/notebooks/02_sft@M1.html").read_text()
    found = Links(html)
    assert not found.tags & {"script", "iframe"} and "javascript:" not in "".join(found.links)
    assert "<b>kept</b>" in html and "&lt;script&gt;alert(1)" in html


def test_links_within_a_machine_are_text_wherever_their_address_stands():
    html = '<a class="x" href="../M1/model">a</a> <a href="#b" title="t">b</a> <a title="t" href="https://x.org">c</a>'
    assert share.clean(html).startswith("a <a ") and Links(share.clean(html)).links == ["#b", "https://x.org"]


@pytest.mark.parametrize("text", ["", '{"cells": [', "[]", '{"metadata": {}}'])
def test_half_a_notebook_is_named_and_nothing_is_replaced(tmp_path, text):
    run, out = run_with(tmp_path, code(stream("whole"))), tmp_path / "out"
    share.share(run, out)
    (run / "notebooks/02_sft@M1.ipynb").write_text(text)
    with pytest.raises(DataError, match=r"02_sft@M1\.ipynb: not a whole notebook"):
        share.share(run, out)
    assert "whole" in (out / "notebooks/02_sft@M1.html").read_text()


def test_sharing_again_replaces_and_a_strange_folder_is_refused(tmp_path, monkeypatch):
    run, out = run_with(tmp_path, code(stream("first"))), tmp_path / "out"
    share.share(run, out)
    (out / "stale.html").write_text("")
    (run / "notebooks" / "02_sft@M1.ipynb").write_text(notebook(code(stream("second"))))
    share.share(run, out)
    assert not (out / "stale.html").exists() and "second" in (out / "notebooks/02_sft@M1.html").read_text()
    monkeypatch.setattr(share, "_write", lambda *a: 1 / 0)  # what fails leaves the folder as it was
    with pytest.raises(ZeroDivisionError):
        share.share(run, out)
    assert "second" in (out / "notebooks/02_sft@M1.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]
    with pytest.raises(DataError, match="was not written by srlm share"):
        share.share(run, run)
    shutil.rmtree(run / "notebooks")
    with pytest.raises(MissingInputError, match="no executed notebook"):
        share.share(run, out)


def test_a_run_of_another_version_is_shared(tmp_path):
    run = tmp_path / "run"
    leave = shutil.ignore_patterns("share", "0[2-8]*.ipynb")
    shutil.copytree(EXAMPLE, run, ignore=leave)
    (run / "params.yaml").write_text("report:\n  old_name: /data/secret/x.txt\n")
    share.share(run, tmp_path / "out")
    text = (tmp_path / "out/params.yaml").read_text()
    assert "old_name" in text and "/data/secret" not in text
    (run / "params.yaml").write_text("report: [1")
    with pytest.raises(DataError, match=r"params\.yaml: not valid YAML"):
        share.share(run, tmp_path / "out")


def test_the_command_says_where_and_how_large(tmp_path):
    result = cli("share", str(run_with(tmp_path, code(stream("a")))), "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert re.search(r"out/index\.html: \d+ files, \d+\.\d MB", result.stdout)
    missing = cli("share", str(tmp_path / "none"))
    assert missing.returncode == 2 and "no run here" in missing.stderr


# ---- executed notebooks as GitHub shows them


def test_progress_bars_leave_no_debris():
    bars = "".join(f"\r {i}%|{'#' * i}   | {i}/100 [00:00<00:01]" for i in (0, 50, 100))
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "HBox()"}
    nb = json.loads(notebook(code(stream(bars[:20], "stderr"), stream(bars[20:] + "\nafter\n", "stderr"))))
    nb["cells"].append(code(displayed() | {"data": widget}, stream("map: 5%|# | 1/20 [00:01<00:09, 2it/s]\n")))
    nb["cells"].append(code(stream("old\rnew\n\x1b[A\x1b[2Kkept")))
    nb["metadata"]["widgets"] = {"state": {}}
    out = json.loads(rendered.tidy(json.dumps(nb)))
    assert [[o["text"] for o in c["outputs"]] for c in out["cells"]] == [["after\n"], [], ["old␍new\nkept"]]
    assert "widgets" not in out["metadata"]


def test_a_notebook_that_printed_much_stays_small():
    table = displayed(text__plain="short", text__html="<table>" + "<tr></tr>" * 200_000)
    once = rendered.tidy(notebook(code(stream("x" * 5_000_000)), code(table)))
    assert len(once) < 2e6 and "4,950,100 characters left out" in once and "short" in once
    assert rendered.tidy(once) == once


def test_the_examples_notebooks_render_on_github():
    for path in example_notebooks():
        text = path.read_text()
        assert path.stat().st_size < 2e6 and "widget-view" not in text and "\\r" not in text
        assert nbformat.reads(rendered.tidy(text), 4) == nbformat.reads(text, 4), (
            f"{path.name} is not as the runner would write it"
        )
