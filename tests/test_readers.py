"""Blind readers' votes: whose a pair is, with which intervals, and what is refused."""

import pandas as pd
import pytest

from srlm_utils import metrics, readers, report
from srlm_utils.errors import DataError
from srlm_utils.paths import PROJ_ROOT


def vote(seed, pid, preferred, reader=1, opponent="M1"):
    return [seed, pid, "M3", opponent, reader, preferred]


def written(tmp_path, *rows, columns=readers.COLUMNS):
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / readers.FILE, index=False)
    return tmp_path


def test_a_pair_goes_to_more_votes(tmp_path):
    rows = [vote(0, "a", "M3"), vote(0, "a", "M3", 2), vote(0, "b", "M3"), vote(0, "b", "M1", 2), vote(0, "c", "M1")]
    rows += [vote(0, "d", "tie"), vote(0, "d", "M3", 2)]  # one vote and one who cannot tell: it is that vote's
    found = readers.results(readers.read(written(tmp_path, *rows)))
    assert dict(zip(found.prompt_id, found.result, strict=True)) == {"a": 1.0, "b": 0.5, "c": 0.0, "d": 1.0}


def test_the_table_has_an_interval_over_prompts_and_one_over_seeds_too(tmp_path):
    ids = [f"p{i}" for i in range(40)]
    rows = [vote(s, pid, "M3" if i % 4 else "M1") for s in (0, 1, 2) for i, pid in enumerate(ids)]
    rows += [
        vote(0, pid, "M2", opponent="M2") if i else vote(0, pid, "tie", opponent="M2") for i, pid in enumerate(ids)
    ]
    three, one = readers.table(readers.read(written(tmp_path, *rows))).to_dict("records")
    assert (three["compared"], three["more votes"]) == ("M3 with M1", "90 to 30")
    # three seeds that say the same of each prompt are no more prompts: the interval is that of 40, not of 120
    forty = metrics.mean([float(i % 4 > 0) for i in range(40)])
    assert three["preferred, over prompts"] == report.rate(forty | {"unit": "share", "n": 120})
    assert three["over prompts and seeds"].endswith("seeds: 3") and three["by seed"] == "0: 75 %, 1: 75 %, 2: 75 %"
    assert one["compared"] == "M3 with M2" and one["over prompts and seeds"] == "" and one["more votes"] == "0 to 39"


@pytest.mark.parametrize(
    "rows,says",
    [
        ([vote(0, "a", "M3"), vote(0, "b", "M2")], "row 3 prefers 'M2', expected M3, M1 or tie"),
        ([vote(0, "a", "M3"), vote(0, "a", "M1")], "row 3 is this reader's second verdict"),
        ([vote(0, "a", "M3"), vote("", "b", "M3")], "row 3 has no seed"),
        ([vote(0, "", "M3")], "row 2 has no prompt_id"),
        ([vote(0, "a", "M3"), [0, "b", "M1", "M3", 1, "M1"]], "M1 and M3 stand both ways round"),
    ],
)
def test_verdicts_that_are_none_are_named(tmp_path, rows, says):
    with pytest.raises(DataError, match=says):
        readers.read(written(tmp_path, *rows))


def test_a_missing_column_is_named(tmp_path):
    with pytest.raises(DataError, match="no column preferred; expected seed"):
        readers.read(written(tmp_path, vote(0, "a", "M3")[:-1], columns=readers.COLUMNS[:-1]))


def test_nobody_has_read(tmp_path):
    assert readers.table(readers.read(tmp_path)).empty


READ = sorted(p.parent for p in (PROJ_ROOT / "results/sweeps").glob(f"*/{readers.FILE}"))


@pytest.mark.parametrize("sweep", READ, ids=lambda p: p.name)
def test_the_documented_votes_are_those_of_the_rows(sweep):
    said = " ".join((PROJ_ROOT / "docs/results.md").read_text().split())
    table = readers.table(readers.read(sweep)).to_dict("records")
    assert table
    for row in table:
        assert row["more votes"] in said, row


@pytest.mark.parametrize("sweep", ["standard", "standard_paper_pairs"])
def test_the_first_page_quotes_the_rows(sweep):
    table = readers.table(readers.read(PROJ_ROOT / "results/sweeps" / sweep)).to_dict("records")
    everything = next(r for r in table if r["compared"] == "M3 with M1")
    share = everything["preferred, over prompts"].split(" %")[0]
    n = int(everything["preferred, over prompts"].split("n=")[1])
    readme = " ".join((PROJ_ROOT / "README.md").read_text().split())
    assert f"{float(share):.0f} % of {n:,} pairs" in readme
