import json

import pytest

from srlm_utils import artefacts
from srlm_utils.errors import DataError, MissingInputError
from srlm_utils.rows import IftRow, RankedRow, load_rows

ROWS = [{"id": "a", "text": "plain"}, {"id": "b", "text": "é\u2028ü"}, {"id": "c", "text": "日本"}]


def test_a_log_cut_at_any_byte_keeps_whole_rows(tmp_path):
    path = tmp_path / "log.jsonl"
    log = artefacts.RowLog(path)
    log.extend(ROWS)
    log.close()
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        log = artefacts.RowLog(path)
        n = data[:cut].count(b"\n")
        assert log.rows == ROWS[:n]
        log.extend(ROWS[n:])
        log.close()
        assert path.read_bytes() == data


@pytest.mark.parametrize(
    "data,says",
    [
        (b'{"a": 1}\n{"a": \n', r"f\.jsonl:2: not valid JSON"),
        (b"[1]\n", r"f\.jsonl:1: found list, expected a JSON object"),
        (b'{"a": "\xff"}\n', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, data, says):
    path = tmp_path / "f.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=says):
        artefacts.read_jsonl(path)


def test_bom_and_crlf_and_blank_lines_are_read(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": "x\xe2\x80\xa8y"}\r\n')
    assert artefacts.read_jsonl(path) == [{"a": 1}, {"a": "x\u2028y"}]


def test_files_appear_by_rename(tmp_path):
    path = tmp_path / "sub" / "x.json"
    artefacts.write_json(path, {"n": 1})
    artefacts.write_json(path, {"n": 2})
    assert artefacts.read_json(path) == {"n": 2}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_a_folders_hash_knows_names_and_contents(tmp_path):
    (tmp_path / "m").mkdir()
    seen = set()
    for name, text in (("a", "1"), ("a", "2 longer"), ("b", "2 longer")):
        for p in (tmp_path / "m").iterdir():
            p.unlink()
        (tmp_path / "m" / name).write_text(text)
        seen.add(artefacts.sha256(tmp_path / "m"))
    assert len(seen) == 3


GOOD = {"prompt_id": "p1", "prompt": "Q?", "response": "A."}
REPLIES = [{"reply_id": "a", "text": "x", "rank": 0}, {"reply_id": "b", "text": "y", "rank": 1}]


@pytest.mark.parametrize(
    "rows,says",
    [
        ([], "no rows"),
        ([{k: v for k, v in GOOD.items() if k != "response"}], r"row 1 \(p1\): response"),
        ([GOOD | {"response": 3}], "found 3"),
        ([GOOD | {"prompt": "  "}], "is blank"),
        ([GOOD, GOOD], r"row 2 \(p1\): prompt_id stands twice"),
        ([{"prompt": "Q?", "response": "A."}], "no prompt_id"),
    ],
)
def test_ift_rows_are_checked(tmp_path, rows, says):
    path = tmp_path / "ift.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match=says) as e:
        load_rows(path, IftRow)
    assert "ift.jsonl" in str(e.value)


@pytest.mark.parametrize(
    "replies,says",
    [
        (REPLIES[:1], "replies"),
        ([REPLIES[0], REPLIES[0]], "not unique"),
        ([REPLIES[0] | {"rank": 1}, REPLIES[1]], "rank 0"),
        ([REPLIES[0] | {"score": 6}, REPLIES[1]], r"replies\.0\.score"),
        ([REPLIES[0] | {"rank": "0"}, REPLIES[1]], r"replies\.0\.rank"),
    ],
)
def test_ranked_rows_are_checked(tmp_path, replies, says):
    path = tmp_path / "ranked.jsonl"
    path.write_text(json.dumps({"prompt_id": "p", "prompt": "Q?", "replies": replies}) + "\n")
    with pytest.raises(DataError, match=says):
        load_rows(path, RankedRow)


def test_own_fields_travel_along_and_missing_files_are_named(tmp_path):
    path = tmp_path / "ift.jsonl"
    path.write_text(json.dumps(GOOD | {"note": "mine"}) + "\n")
    assert load_rows(path, IftRow)[0]["note"] == "mine"
    with pytest.raises(MissingInputError, match=r"none\.jsonl: no such file"):
        load_rows(tmp_path / "none.jsonl", IftRow)
