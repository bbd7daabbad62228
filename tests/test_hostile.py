"""Secrets stay out of files and messages, and nothing that a model wrote acts where it is shown."""

import json
import re
import shutil
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest

from srlm_utils import cli, rendered, runner
from srlm_utils.artefacts import write_jsonl
from srlm_utils.paths import NOTEBOOKS, RESULTS
from srlm_utils.printable import printable, printable_output, without_secrets
from srlm_utils.report import write_html

KEY = "sk-planted-7f3a9c0e51d24b68"
ATTACKS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "' onmouseover='alert(3)",
    "</pre></body><iframe src=https://example.org></iframe>",
    "[click](javascript:alert(4)) ![x](https://example.org/pixel.png)",
    "{{ 7 * 7 }} {% for x in y %}",
    "\x1b]0;owned\x07\x1b[2J\x1b[8mhidden\x1b[0m \x9b31m \x00 \r overwritten \x7f",
    "\u202eesrever\u202c שלום 👩‍👩‍👧",
    "</style><style>@import url(https://example.org)</style>",
    "<svg/onload=alert(5)>&lt;b&gt;",
]


class Tags(HTMLParser):
    """(name, attributes) of each tag that a browser would see."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_a_report_of_attacks_is_text(tmp_path):
    evil = "\n".join(ATTACKS)
    candidate = {"cand_id": evil, "score": None, "role": "", "ended": True, "text": evil}
    write_html(
        tmp_path / "r.html",
        title=evil,
        lead=evil,
        foot=evil,
        sections=[{"title": evil, "text": evil, "table": pd.DataFrame({evil: [evil]}, index=[evil])}],
        pairs=[{"prompt": evil, "candidates": [candidate]}],
        answers=[{"prompt": evil, "answers": [(evil, evil, False)]}],
    )
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    tags = Tags(html).found
    assert not {name for name, _ in tags} & {"script", "img", "iframe", "svg", "a", "object", "form", "base"}
    assert [dict(at).get("href") for name, at in tags if name == "link"] == ["data:,"]  # no icon is asked for
    tags = [tag for tag in tags if tag[0] != "link"]
    allowed = {"class", "border", "style", "lang", "charset", "name", "content", "http-equiv"}
    assert {key for _, attributes in tags for key in attributes} <= allowed
    assert [name for name, _ in tags].count("style") == 1 and "url(" not in html.split("<style>")[1].split("</style>")[
        0
    ]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202d\u202e]", html)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', html)
    assert dict(part.strip().split(" ", 1) for part in policy.split(";")) == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert "שלום 👩‍👩‍👧" in html and "{{ 7 * 7 }}" in html  # read as they were written


def test_control_characters_become_visible_and_letters_stay():
    assert printable("\x1b[2J\r\x00") == "␛[2J␍␀"
    assert printable("a\u202eb\u2067c\u2069d\u202c") == "a\ufffdb\ufffdc\ufffdd\ufffd"
    assert printable("a\tb\nc é 日本 🙂 שלום") == "a\tb\nc é 日本 🙂 שלום"
    red = {"output_type": "error", "traceback": ["\x1b[0;31mKeyError\x1b[0m: \x1b[2J\x1b]0;x\x07"]}
    assert printable_output([red])[0]["traceback"] == ["\x1b[0;31mKeyError\x1b[0m: ␛[2J␛]0;x␇"]
    shown = {"output_type": "display_data", "data": {"text/plain": ["\x1b[31m"], "n": 3}}
    assert printable_output(shown)["data"] == {"text/plain": ["␛[31m"], "n": 3}


def test_secrets_are_known_by_the_names_of_their_variables(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    monkeypatch.setenv("OPENAI_API_KEY", "short")
    assert without_secrets("hf_abcdefghij and short") == "[HF_TOKEN] and short"
    monkeypatch.setenv("OPENAI_API_KEYS", "sk-1234567,sk-7654321")
    assert without_secrets("keys sk-1234567,sk-7654321") == "keys [OPENAI_API_KEYS]"


def test_of_a_secret_that_begins_as_another_nothing_is_left(monkeypatch):
    for first, second in (("A_TOKEN", "B_TOKEN"), ("B_TOKEN", "A_TOKEN")):
        monkeypatch.setenv(first, "abcdefgh")
        monkeypatch.setenv(second, "abcdefgh-the-rest")
        assert without_secrets("abcdefgh-the-rest, abcdefgh") == f"[{second}], [{first}]"


def test_a_secret_is_found_as_a_notebook_writes_it(monkeypatch):
    secret = 'pass"word\\1'
    monkeypatch.setenv("DB_PASSWORD", secret)
    cell = {"outputs": [{"output_type": "stream", "name": "stdout", "text": f"it is {secret}"}]}
    nb = json.loads(rendered.tidy(json.dumps({"metadata": {}, "cells": [cell]})))
    assert nb["cells"][0]["outputs"][0]["text"] == "it is [DB_PASSWORD]"


@pytest.fixture
def run():
    """A run with one scored prompt whose candidates are attacks: 06_build_pairs needs no model."""
    run = RESULTS / "test-hostile"
    shutil.rmtree(run, ignore_errors=True)
    candidates = [
        {"cand_id": f"M1-p0-{i}", "prompt_id": "M1-p0", "text": text, "n_tokens": 3, "ended": True}
        for i, text in enumerate(ATTACKS)
    ]
    judged = [
        {"id": c["cand_id"], "judge_mode": "expected", "score": i / 2, "cut": False} for i, c in enumerate(candidates)
    ]
    judged[6]["score"], judged[0]["score"] = 5.0, 0.0  # the terminal's escapes are chosen, the script is rejected
    write_jsonl(run / "M1/aift/prompts.jsonl", [{"prompt_id": "M1-p0", "prompt": "\n".join(ATTACKS)}])
    write_jsonl(run / "M1/aift/candidates.jsonl", candidates)
    write_jsonl(run / "M1/aift/judgements.jsonl", judged)
    yield run
    shutil.rmtree(run, ignore_errors=True)


ONLY = ["run", "params/smoke.yaml", "--run-name", "test-hostile", "--only", "06_build_pairs@M1"]


def test_an_executed_notebook_shows_attacks_and_does_not_obey_them(run, monkeypatch):
    monkeypatch.chdir(RESULTS.parent)
    assert cli.main(ONLY) == 0
    nb = nbformat.read(run / "notebooks/06_build_pairs@M1.ipynb", 4)
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    streams = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "␛]0;owned␇" in streams and "␍ overwritten" in streams
    assert "\x1b" not in streams and "[2J" not in streams  # what clears a screen is left out
    assert "<script>alert(1)</script>" in streams  # text, which no page runs
    for output in outputs:
        assert printable_output(output) == output
        html = "".join(output.get("data", {}).get("text/html", ""))
        assert "<script" not in html and "onerror" not in html
        assert "text/markdown" not in output.get("data", {})  # where a link could be followed
    rows = (run / "M1/aift/pairs.jsonl").read_text(encoding="utf-8")
    assert "\\u001b]0;owned" in rows  # what is learned is what was written


def test_a_planted_key_is_in_no_file_and_no_message(run, tmp_path, monkeypatch, capsys):
    """Even where a cell prints it and dies of it."""
    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    path = tmp_path / "notebooks/06_build_pairs.ipynb"
    nb = nbformat.read(path, 4)
    leak = ["import os", "key = os.environ['OPENAI_API_KEY']", "print(key)", "display({'k': key})"]
    leak = "\n".join([*leak, "raise RuntimeError(f'bad key {key}')"])
    nb.cells.append(nbformat.v4.new_code_cell(leak))
    nbformat.write(nb, path)
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.chdir(RESULTS.parent)
    assert cli.main(ONLY) == 1
    said = capsys.readouterr()
    assert "RuntimeError: bad key [OPENAI_API_KEY]" in said.err and KEY not in said.out + said.err
    files = [p for p in run.rglob("*") if p.is_file()]
    assert any("[OPENAI_API_KEY]" in p.read_text(encoding="utf-8") for p in files if p.suffix == ".ipynb")
    assert not [p for p in files if KEY.encode() in p.read_bytes()]
