import errno
import json
import math
import os
import shutil
import tracemalloc

import pytest

from srlm_utils import artefacts, example
from srlm_utils.artefacts import describe, find_jsonl, is_there, read_jsonl, sha256, write_jsonl
from srlm_utils.errors import DataError, MissingInputError, ParamError, StorageError
from srlm_utils.params import BuildPairs, Experiment, stage_key
from srlm_utils.paths import EXAMPLE, seed_path
from srlm_utils.plan import external_inputs, list_steps, make_step, parse_win_judge, status
from srlm_utils.rows import IftRow, RankedRow, load_rows
from srlm_utils.step import begin_step

ROWS = [{"id": "a", "text": "plain"}, {"id": "b", "text": "é\u2028ü"}, {"id": "c", "text": "日本"}]


def test_a_log_cut_at_any_byte_keeps_whole_batches(tmp_path):
    """Four answers to a prompt come back together or not at all: with two of them it would count as answered."""
    path, batches, ends = tmp_path / "log.jsonl", [ROWS[:1], ROWS[1:], [], ROWS[:2]], [0]
    log = artefacts.RowLog(path)
    for batch in batches:
        log.extend(batch)
        ends.append(path.stat().st_size)
    log.close()
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        log = artefacts.RowLog(path)
        n = max(i for i, end in enumerate(ends) if end <= cut)
        assert log.rows == sum(batches[:n], [])
        for batch in batches[n:]:
            log.extend(batch)
        log.close()
        assert path.read_bytes() == data
    assert artefacts.read_jsonl(path) == sum(batches, [])


@pytest.mark.parametrize(
    "data,rows",
    [
        (b'{"n": 1}\n{"n": 2}', 2),
        (b'{"n": 1}', 1),
        (b'\xef\xbb\xbf{"n": 1}', 1),  # an editor's mark
        (b'{"n": 1} \n{"n": 2} ', 2),
        (b'{"n": 1}\n{"n": 2', 1),
        (b'{"n": 1}\n2', 1),
        (b'{"n": 1}\n{"n": NaN}', 1),
        (b'{"n": 1}\n{"n": "\xc3', 1),
        (b'{"n": 1}\n  ', 1),
    ],
)
def test_a_whole_row_without_its_lines_end_stays_where_each_is_alone(tmp_path, data, rows):
    path = tmp_path / "labels.jsonl"
    path.write_bytes(data)
    for n in range(2):
        log = artefacts.RowLog(path, alone=True)
        log.extend([{"n": 3}])
        log.close()
        assert artefacts.read_jsonl(path) == [{"n": i + 1} for i in range(rows)] + [{"n": 3}] * (n + 1)


def test_a_whole_row_of_half_a_batch_goes(tmp_path):
    path = tmp_path / "log.jsonl"
    for torn in (b'{"n": 2} \n{"n": 3}', b'{"n": 2}'):  # more may follow on either
        path.write_bytes(b'{"n": 1}\n' + torn)
        assert artefacts.RowLog(path).rows == [{"n": 1}]


def test_a_write_that_fails_half_way_leaves_no_half_row(tmp_path, monkeypatch):
    log, write = artefacts.RowLog(tmp_path / "log.jsonl"), os.write
    log.extend(ROWS[:1])

    def full(fd, data):
        if len(data) < 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match=r"log\.jsonl: the disk is full\. What was made is kept"):
        log.extend(ROWS[1:])
    with pytest.raises(StorageError, match="x.json: the disk is full"):
        artefacts.write_json(tmp_path / "x.json", {"n": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]
    monkeypatch.setattr(os, "write", write)
    log.extend(ROWS[1:])  # the same kernel goes on once there is space
    log.close()
    assert artefacts.read_jsonl(log.path) == ROWS == log.rows


@pytest.mark.parametrize("bad", [math.nan, math.inf, [0.5, -math.inf], {"deep": [math.nan]}])
def test_what_is_no_number_is_in_no_row(tmp_path, bad):
    with pytest.raises(DataError, match="row a: score is no finite number"):
        artefacts.write_jsonl(tmp_path / "r.jsonl", [{"id": "a", "score": bad}])
    assert not list(tmp_path.iterdir())
    artefacts.write_json(tmp_path / "figures.json", {"mean": bad})  # the mean of nothing
    assert "null" in (tmp_path / "figures.json").read_text()
    (tmp_path / "old.jsonl").write_text(json.dumps({"score": bad}))
    with pytest.raises(DataError, match=r"old\.jsonl:1: not valid JSON \(-?(NaN|Infinity) is no finite number"):
        artefacts.read_jsonl(tmp_path / "old.jsonl")


def test_a_folder_appears_whole(tmp_path):
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp/left by a kill").touch()
    for text in ("old", "new"):
        with artefacts.new_folder(tmp_path / "model") as folder:
            (folder / "sub").mkdir()
            (folder / "sub/f").write_text(text)
            assert not (tmp_path / "model/sub/f").exists() or (tmp_path / "model/sub/f").read_text() == "old"
        assert (tmp_path / "model/sub/f").read_text() == text
    with pytest.raises(DataError, match="half-way"), artefacts.new_folder(tmp_path / "model") as folder:
        (folder / "f").touch()
        raise DataError("half-way")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "model",
        "model/sub",
        "model/sub/f",
    ]


@pytest.mark.parametrize(
    "data,says",
    [
        (b'{"a": 1}\n{"a": \n', r"f\.jsonl:2: not valid JSON"),
        (b"[1]\n", r"f\.jsonl:1: found list, expected a JSON object"),
        (b'{"a": "\xff"}\n', "not UTF-8"),
        (b'{"a": 1}\n\n{"a": "\xff"}\n', r"f\.jsonl:3: not UTF-8"),
        (b'{"a": 1}\n\nnull\n', r"f\.jsonl:3: found NoneType"),
        (b'{"a": 1} {"b": 2}\n', r"f\.jsonl:1: not valid JSON"),
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


def test_a_hash_is_not_remembered_when_the_file_was_changed(tmp_path):
    """Edited by hand while a notebook is open, and as long as before."""
    path, seen = tmp_path / "rows.jsonl", set()
    for when, text in enumerate(("one", "two", "six")):
        path.write_text(text)
        os.utime(path, ns=(when, when))
        seen.add(sha256(path))
    assert len(seen) == 3


def test_a_plain_file_is_newer_than_a_compressed_one_beside_it(tmp_path):
    """A kill between the rename and the removal of the old rows leaves both."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS[:1])
    then = describe(path)
    write_jsonl(tmp_path / "rows.jsonl.gz", ROWS)
    assert read_jsonl(path) == ROWS[:1] and describe(path) == then and find_jsonl(tmp_path, "*.jsonl") == [path]


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


def test_a_torn_log_continues_in_small_batches(tmp_path):
    path = tmp_path / "log.jsonl"
    whole = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS).encode()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        for row in ROWS[whole[:cut].count(b"\n") :]:
            log = artefacts.RowLog(path)
            log.extend([row])
            log.close()
        assert artefacts.read_jsonl(path) == ROWS


def test_a_log_makes_its_folder_and_takes_nothing(tmp_path):
    log = artefacts.RowLog(tmp_path / "new" / "log.jsonl")
    log.extend([])
    log.close()
    assert log.rows == [] and log.path.read_bytes() == b""


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    artefacts.write_json(path, {"n": 1})
    with pytest.raises(TypeError):
        artefacts.write_json(path, {"n": object()})
    assert artefacts.read_json(path) == {"n": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_reader_keeps_the_file_it_opened(tmp_path):
    path = tmp_path / "x.json"
    artefacts.write_json(path, {"n": 1})
    with open(path, encoding="utf-8") as f:
        artefacts.write_json(path, {"n": 2})
        assert json.load(f) == {"n": 1}  # replaced, not written over
    assert artefacts.read_json(path) == {"n": 2}


def test_rows_written_are_rows_read(tmp_path):
    artefacts.write_jsonl(tmp_path / "r.jsonl", ROWS)
    assert artefacts.read_jsonl(tmp_path / "r.jsonl") == ROWS
    assert artefacts.describe(tmp_path / "r.jsonl")["n_rows"] == 3


def test_bad_json_files_are_named(tmp_path):
    for data in (b"{", b"\xff", b""):
        (tmp_path / "x.json").write_bytes(data)
        with pytest.raises(DataError, match=r"x\.json: not valid JSON"):
            artefacts.read_json(tmp_path / "x.json")


def test_hashes_of_folders(tmp_path):
    for folder in ("a", "b", "c"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        (tmp_path / folder / ("sub/f" if folder != "c" else "f")).write_text("same")
    a, b, c = (artefacts.sha256(tmp_path / f) for f in "abc")
    assert a == b != c  # the place within the folder counts, the folder's own does not
    (tmp_path / "a" / ".hidden").write_text("x")
    assert artefacts.sha256(tmp_path / "a") == a
    m = artefacts.model_sha256(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("# M1 of the run a")
    assert artefacts.model_sha256(tmp_path / "a") == m and artefacts.sha256(tmp_path / "a") != a
    (tmp_path / "a" / "README.md").unlink()
    (tmp_path / "a" / "more").write_text("")
    assert artefacts.sha256(tmp_path / "a") != a
    # of the four bytes "same", by sha256sum
    assert artefacts.sha256(tmp_path / "c" / "f") == "0967115f2813a3541eaef77de9d9d5773f1c0c04314b0bbfe4ff3b3b1c55b5d5"


RANKED = {"prompt_id": "p2", "prompt": "Q?", "replies": REPLIES}


@pytest.mark.parametrize(
    "shape,good,bad,field",
    [
        (IftRow, GOOD, {"prompt_id": "p2", "prompt": "Q?"}, "response"),
        (IftRow, GOOD, {"prompt_id": "p2", "prompt": " \n", "response": "A."}, "prompt"),
        (IftRow, GOOD, {"prompt_id": "p2", "prompt": ["Q?"], "response": "A."}, "prompt"),
        (IftRow, GOOD, {"prompt_id": 2, "prompt": "Q?", "response": "A."}, "prompt_id"),
        (IftRow, GOOD, GOOD, "prompt_id"),
        (IftRow, GOOD, {"prompt_id": "", "prompt": "Q?", "response": "A."}, "prompt_id"),
        (IftRow, GOOD, {"prompt_id": "p2", "prompt": "Q?", "response": ""}, "response"),
        (RankedRow, RANKED | {"prompt_id": "p1"}, RANKED | {"replies": [REPLIES[1], REPLIES[1]]}, "reply_id"),
        (RankedRow, RANKED | {"prompt_id": "p1"}, RANKED | {"replies": [r | {"rank": 1} for r in REPLIES]}, "rank"),
        (RankedRow, RANKED | {"prompt_id": "p1"}, RANKED | {"replies": [REPLIES[0], REPLIES[1] | {"score": 6}]},
         "replies.1.score"),
        (RankedRow, RANKED | {"prompt_id": "p1"}, RANKED | {"replies": [REPLIES[0], REPLIES[1] | {"score": -1}]},
         "replies.1.score"),
        (RankedRow, RANKED | {"prompt_id": "p1"}, RANKED | {"replies": [REPLIES[0], REPLIES[1] | {"text": ""}]},
         "replies.1.text"),
    ],
)  # fmt: skip
def test_errors_name_file_row_and_field(tmp_path, shape, good, bad, field):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    with pytest.raises(DataError) as e:
        load_rows(path, shape)
    assert str(e.value).startswith(f"{path}: row 2 (") and field in str(e.value).split(")", 1)[1]


def test_a_limit_cuts_but_every_row_is_checked(tmp_path):
    path = tmp_path / "ift.jsonl"
    rows = [GOOD | {"prompt_id": f"p{i}"} for i in range(3)]
    artefacts.write_jsonl(path, rows)
    assert load_rows(path, IftRow, 2) == rows[:2] and load_rows(path, IftRow) == rows
    artefacts.write_jsonl(path, [*rows, {}])
    with pytest.raises(DataError, match="row 4"):
        load_rows(path, IftRow, 2)


def test_rows_are_read_and_written_line_by_line(tmp_path, monkeypatch):
    """A large round's judgements are a gigabyte of text: memory holds its rows, and not the file three times beside."""
    rows = [{"id": i, "text": f"{i} " * 2000} for i in range(2000)]
    size = sum(len(r["text"]) for r in rows)
    monkeypatch.setattr(artefacts, "PIECE", size // 50)
    tracemalloc.start()
    try:
        artefacts.write_jsonl(tmp_path / "r.jsonl", rows)
        assert tracemalloc.get_traced_memory()[1] < size / 4
        tracemalloc.reset_peak()
        found = artefacts.read_jsonl(tmp_path / "r.jsonl")
        assert tracemalloc.get_traced_memory()[1] < 1.5 * size
    finally:
        tracemalloc.stop()
    assert found == rows and len((tmp_path / "r.jsonl").read_text().splitlines()) == 2000


def test_a_bad_row_far_behind_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(artefacts, "PIECE", 10)
    with pytest.raises(DataError, match="row 7"):
        artefacts.write_jsonl(tmp_path / "r.jsonl", [{"id": i, "x": float("nan") if i == 7 else 0.0} for i in range(9)])
    assert not [*tmp_path.iterdir()]


def test_the_line_and_byte_that_is_not_utf8(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
    with pytest.raises(DataError, match=r"r\.jsonl:2: not UTF-8 \(byte 16\)"):
        artefacts.read_jsonl(tmp_path / "r.jsonl")


def test_rows_that_a_rendered_run_keeps_compressed_are_the_same_rows(tmp_path):
    path, rows = tmp_path / "M1" / "rows.jsonl", [{"id": f"r{i}", "text": "é" * i} for i in range(50)]
    write_jsonl(path, rows)
    then = describe(path)
    example.pack(path)
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl.gz"]
    assert not path.exists() and is_there(path) and not is_there(path.with_name("other.jsonl"))
    assert read_jsonl(path) == rows and describe(path) == then and then["n_rows"] == 50
    assert find_jsonl(tmp_path, "*/rows.jsonl") == [path]
    assert artefacts.sha256(seed_path(str(path))) == then["sha256"]  # named as a source it is what it was
    write_jsonl(path, rows[:2])  # made again: what stood here before is gone
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"] and read_jsonl(path) == rows[:2]
    assert describe(path)["n_rows"] == 2 and find_jsonl(tmp_path, "*/rows.jsonl") == [path]


def test_the_example_is_small_and_its_long_files_are_compressed():
    files = [p for p in EXAMPLE.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 5e6
    assert all(p.suffix == ".gz" or p.stat().st_size <= example.PLAIN for p in files if ".jsonl" in p.name)


def test_a_run_is_rendered_without_weights_and_with_all_its_rows(tmp_path, monkeypatch):
    run, out = tmp_path / "quickstart", tmp_path / "example"
    shutil.copytree(EXAMPLE, run)
    for path in run.rglob("*.jsonl.gz"):
        write_jsonl(path.with_suffix(""), read_jsonl(path))
    assert not [*run.rglob("*.gz")]
    for name in ("M1/model/model.safetensors", "SFT/eft/train.jsonl", "steps/08_evaluate@M3.work/answers.jsonl"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("")
    monkeypatch.setattr(example, "EXAMPLE", out)
    example.render(run)
    files = {p.relative_to(EXAMPLE): p.read_bytes() for p in EXAMPLE.rglob("*") if p.is_file()}
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} == files


def test_a_compressed_log_goes_on(tmp_path):
    path = tmp_path / "labels.jsonl"
    write_jsonl(path, ROWS)
    with open(path, "a") as f:
        f.write('{"id": "half a batch"} \n{"id": "to')
    example.pack(path)
    log = artefacts.RowLog(path)
    log.extend([{"id": "d"}])
    log.close()
    assert read_jsonl(path) == [*ROWS, {"id": "d"}] and [*tmp_path.iterdir()] == [path]


def test_what_changes_while_a_step_runs_is_not_done(tmp_path):
    """Of hours of judging nobody could say which candidates they were of."""
    for name in ("prompts", "candidates", "judgements"):
        write_jsonl(tmp_path / f"M1/aift/{name}.jsonl", [])
    params = BuildPairs().model_dump()
    step = begin_step("06_build_pairs", params | {"run_dir": str(tmp_path)})
    for path in step.declared.writes:
        write_jsonl(step.output(path), [])
    write_jsonl(tmp_path / "M1/aift/candidates.jsonl", [{"cand_id": "new"}])
    with pytest.raises(DataError, match=r"06_build_pairs@M1: M1/aift/candidates\.jsonl changed while the step ran"):
        step.finish()
    assert not step.manifest_path.exists()
    write_jsonl(tmp_path / "M1/aift/candidates.jsonl", [])
    step.finish()
    assert status(step.declared, vars(step.params), tmp_path) == (True, "done")


@pytest.mark.parametrize(
    "stage,model,values",
    [
        ("01_seed_data", "run", lambda folder: {"seed_model": folder}),
        ("04_self_instruct", "M1", lambda folder: {"prompt_model": folder}),
        ("05_judge", "M1", lambda folder: {"judge_model": folder}),
        ("08_evaluate", "M1", lambda folder: {"win_judges": [f"{folder}:score", "M0:pairwise"]}),
        ("07_dpo", "M2", lambda folder: {"select_steps": 2, "select_judge": f"{folder}:pairwise"}),
        ("10_benchmarks", "M1", lambda folder: {"mt_bench_judge": folder}),
    ],
)
def test_a_model_in_a_folder_is_an_input(tiny, tmp_path, stage, model, values):
    shutil.copytree(tiny, folder := tmp_path / "mine")
    params = Experiment({stage_key(stage): values(str(folder))}).flat(stage, model)
    (name,) = [n for n, path in external_inputs(params).items() if path == folder]
    before = sha256(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert name.endswith(f":{folder}") and sha256(folder) != before


def test_a_model_that_is_a_name_is_no_input():
    common = {"select_steps": 2, "select_judge": "gpt-4o:api"}
    e = Experiment({"common": common, "benchmarks": {"mt_bench_judge": "owner/name"}})
    for stage, model in (("01_seed_data", "run"), ("07_dpo", "M2"), ("10_benchmarks", "M1")):
        names = {name.split(":")[0] for name in external_inputs(e.flat(stage, model))}
        assert not names & {"seed_model", "select_judge", "mt_bench_judge"}


@pytest.mark.parametrize(
    "tree,says",
    [
        ({"self_instruct": {"prompt_model": "M2"}}, "04_self_instruct@M1 would read M2/model"),
        ({"build_pairs": {"learn_from": "positives"}}, "07_dpo@M2 would read M1/aift/pairs.jsonl"),
        ({"report": {"iterations": 4}}, "09_report@run would read M4/"),
    ],
)
def test_a_step_that_reads_what_nobody_makes_is_refused_at_once(tree, says):
    with pytest.raises(ParamError, match=says):
        list_steps(Experiment(tree))


def test_several_judges_in_one_text_are_refused():
    with pytest.raises(ParamError, match="several in brackets"):
        parse_win_judge("M0:pairwise,M1:score")


def test_a_manifest_with_another_kind_of_outputs_is_damaged(tmp_path):
    shutil.copytree(EXAMPLE, run := tmp_path / "run", ignore=shutil.ignore_patterns("notebooks", "report"))
    step = make_step("06_build_pairs", "M1", Experiment({}).flat("06_build_pairs", "M1"))
    path = run / "steps/06_build_pairs@M1.json"
    for outputs in ([], {"M1/aift/pairs.jsonl": {}}):
        artefacts.write_json(path, artefacts.read_json(path) | {"outputs": outputs})
        assert status(step, artefacts.read_json(path)["params"], run) == (False, "its manifest is damaged")
