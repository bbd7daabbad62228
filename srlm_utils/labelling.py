"""Blind labelling in a notebook: people say which of two answers is better, in rows that `verdicts.read_votes` reads.

Keys come through a text field: JupyterLab leaves alone what is typed into one, so that a page of plain ipywidgets does
without a further extension.
"""

import hashlib
import time
from pathlib import Path

import ipywidgets as widgets
import pandas as pd
from filelock import FileLock
from markupsafe import escape

from srlm_utils import metrics, winrates
from srlm_utils.artefacts import RowLog, is_there, write_jsonl
from srlm_utils.errors import MissingInputError, ParamError
from srlm_utils.explore import Run, cards_html
from srlm_utils.paths import resolve, shown
from srlm_utils.verdicts import answers_digest, check_answers, from_votes, judge_label, read_votes

P_FIRST = {"1": 1.0, "t": 0.5, "2": 0.0}  # key: p_first
MAJORITY = "majority of readers"
QUIET_S = 0.7  # a key held down repeats, a click may be double: what follows faster is not a verdict on the next pair


class Study:
    """One comparison that people label: the same `n_prompts` for all of them, drawn by `seed`; 0 takes all.

    All readers write into one file, each verdict at once; what a killed kernel left half written is cut off.
    """

    def __init__(self, run: Run, model: str, opponent: str, labels: str | Path, *, n_prompts: int = 50, seed: int = 0):
        if model == opponent:
            raise ParamError(f"model and opponent are both {model}: name two models.")
        self.run, self.model, self.opponent, self.seed = run, model, opponent, seed
        self.path = resolve(labels)
        both = run.answers(model).merge(
            run.answers(opponent)[["prompt_id", "text"]], on="prompt_id", suffixes=("_a", "_b")
        )
        ids = sorted(both.prompt_id, key=lambda i: _draw(seed, i))
        self.items = both.set_index("prompt_id").loc[ids[: n_prompts or None], ["prompt", "text_a", "text_b"]]
        texts = (self.items.text_a.to_dict(), self.items.text_b.to_dict())
        check_answers(self.votes(), model, opponent, *texts, shown(self.path))

    def votes(self) -> list[dict]:
        """All verdicts so far on this comparison, of every reader."""
        if not is_there(self.path):
            return []
        with self._lock():
            rows = self._rows()
        ours = {self.model, self.opponent}
        return [r for r in rows if {r["model_a"], r["model_b"]} == ours and r["prompt_id"] in self.items.index]

    def todo(self, reader: str) -> list[tuple[str, str]]:
        """(prompt_id, order) of what a reader has not labelled, in an order of their own; AB shows `model` first."""
        done = {r["prompt_id"] for r in self.votes() if r.get("judge") == reader}
        ids = sorted(self.items.index, key=lambda i: _draw(self.seed, reader, i))
        return [
            (i, "AB" if _draw(self.seed, reader, i, "order")[0] in "01234567" else "BA") for i in ids if i not in done
        ]

    def save(self, reader: str, prompt_id: str, order: str, p_first: float, seconds: float) -> None:
        """Append one verdict and flush it to disk, unless this reader gave one from another page."""
        row = {"model_a": self.model, "model_b": self.opponent, "judge": reader, "judge_mode": "human"}
        row |= {"prompt_id": prompt_id, "order": order, "p_first": p_first, "seconds": round(seconds, 1)}
        row |= {"answers": answers_digest(*self.items.loc[prompt_id, ["text_a", "text_b"]])}
        with self._lock():
            log = RowLog(self.path, alone=True)
            if not any(self._is_by(r, reader) and r["prompt_id"] == prompt_id for r in log.rows):
                log.extend([row])
            log.close()

    def undo(self, reader: str) -> bool:
        """Take back the reader's last verdict; False if there is none."""
        with self._lock():
            rows = self._rows()
            mine = [i for i, r in enumerate(rows) if self._is_by(r, reader)]
            if mine:
                write_jsonl(self.path, rows[: mine[-1]] + rows[mine[-1] + 1 :])
        return bool(mine)

    def page(self, reader: str) -> "Page":
        """The page on which `reader` labels."""
        return Page(self, reader)

    # ---- what came out

    def tally(self, n_readers: int = 3) -> pd.DataFrame:
        """Wins, ties and losses of `model` by everyone who judged: people, their majority, and the run's judges.

        The majority is over prompts that `n_readers` or more have labelled. `first_shown` is the share of verdicts for
        the answer shown first (ties half), where a row says which that was; 0.5 is a reader whom places do not sway.
        """
        rows = []
        for who, results in self._results(n_readers).items():
            figures = metrics.head_to_head(
                [{"prompt_id": i, "order": "none", "p_first": p} for i, p in results.items()]
            )
            first = [r["p_first"] for r in self.votes() if _reader(r) == who and r["order"] != "none"]
            rows.append(
                {"who": who, "n": len(results)}
                | {k: figures[k]["value"] for k in ("win", "tie", "loss", "win_rate")}
                | {k: figures["win_rate"][k] for k in ("low", "high")}
                | {"first_shown": sum(first) / len(first) if first else None}
            )
        columns = ["who", "n", "win", "tie", "loss", "win_rate", "low", "high", "first_shown"]
        return pd.DataFrame(rows, columns=columns).set_index("who")

    def agreement(self, n_readers: int = 3) -> pd.DataFrame:
        """Cohen's kappa of every two readers, and of readers and their majority with the run's judges.

        Columns first, second, same (share of equal verdicts), value (kappa; None where both always say the same one
        thing), low, high, n, as `plots.judge_agreement` takes it.
        """
        results, people = self._results(n_readers), {_reader(r) for r in self.votes()}
        rows = []
        for i, (a, x) in enumerate(results.items()):
            for b, y in list(results.items())[i + 1 :]:
                shared = x.keys() & y.keys()
                # the run's judges among themselves stand in the report; a reader is part of the majority
                if shared and (a in people or a == MAJORITY) and b != MAJORITY:
                    same = sum(x[k] == y[k] for k in shared) / len(shared)
                    rows.append({"first": a, "second": b, "same": same} | winrates.kappa(x, y))
        return pd.DataFrame(rows, columns=["first", "second", "same", "value", "low", "high", "n"])

    def _results(self, n_readers: int) -> dict[str, dict[str, float]]:
        """1, 0.5 or 0 by prompt_id for every reader, their majority, and the judges of the run, on labelled prompts."""
        votes, ids = self.votes(), set(self.items.index)

        def of(rows):
            return metrics.outcomes(from_votes(rows, self.model, self.opponent, ids))

        readers: dict[str, list[dict]] = {}
        for r in votes:
            readers.setdefault(_reader(r), []).append(r)
        out = {who: of(rows) for who, rows in readers.items()}
        full = {i for i in ids if sum(i in results for results in out.values()) >= n_readers}
        majority = of([r for r in votes if r["prompt_id"] in full]) if n_readers > 1 else {}
        labelled = {i for results in out.values() for i in results}
        if majority:
            out[MAJORITY] = majority
        try:
            table = self.run.verdicts(self.model, self.opponent)
        except MissingInputError:  # people may compare what no judge did
            return out
        for (judge, mode), part in table[table.prompt_id.isin(labelled)].groupby(["judge", "judge_mode"], sort=False):
            if mode != "human":
                out[judge_label(judge, mode)] = dict(zip(part.prompt_id, part.result, strict=True))
        return out

    # ---- the file

    def _rows(self) -> list[dict]:
        RowLog(self.path, alone=True).close()  # cuts a torn last line
        return read_votes(self.path)

    def _lock(self) -> FileLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(f"{self.path}.lock")

    def _is_by(self, row: dict, reader: str) -> bool:
        return row.get("judge") == reader and {row["model_a"], row["model_b"]} == {self.model, self.opponent}


class Page(widgets.VBox):
    """The pair to label, buttons, and a field that takes keys: 1 or 2 for the better answer, t a tie, u undo."""

    def __init__(self, study: Study, reader: str):
        if not reader.strip():
            raise ParamError("annotator is empty: give the reader a name, which stands beside each verdict.")
        self.study, self.reader = study, reader
        self.head, self.pair = widgets.HTML(), widgets.HTML()
        names = {"1": "1 · the first is better", "t": "t · a tie", "2": "2 · the second is better", "u": "u · undo"}
        self.buttons = {
            key: widgets.Button(description=text, layout=widgets.Layout(width="auto")) for key, text in names.items()
        }
        for key, button in self.buttons.items():
            button.on_click(lambda _, key=key: self._clicked(key))
        self.field = widgets.Text(
            placeholder="click here, then press 1, 2, t or u", layout=widgets.Layout(width="20em")
        )
        self.field.observe(self._typed, "value")
        row = widgets.HBox(list(self.buttons.values()), layout=widgets.Layout(flex_flow="row wrap"))
        super().__init__([self.head, self.pair, row, self.field])
        self._last = float("-inf")
        self._show()

    def _show(self) -> None:
        """The next pair, or thanks; nothing on the page tells which model wrote what."""
        todo = self.study.todo(self.reader)
        self.current, self.n_done = todo[0] if todo else None, len(self.study.items) - len(todo)
        self.head.value = self._progress()
        for key in P_FIRST:
            self.buttons[key].disabled = not todo
        if not todo:
            self.pair.value = "<p>All pairs are labelled. The cells below show what came out.</p>"
            return
        pid, order = self.current
        item = self.study.items.loc[pid]
        texts = (item.text_a, item.text_b) if order == "AB" else (item.text_b, item.text_a)
        replies = [{"label": f"answer {i}", "role": "", "text": t, "notes": []} for i, t in enumerate(texts, 1)]
        self.pair.value = cards_html([{"title": "", "prompt": item.prompt, "replies": replies}])
        self.shown_at = time.monotonic()

    def _clicked(self, key: str) -> None:
        self.press(key)
        self.field.focus()  # or the next key would be a command to the notebook

    def _typed(self, change) -> None:
        if change.new:
            self.field.value = ""
            self.press(change.new[-1].lower())  # a key may arrive before the field was emptied of the one before

    def press(self, key: str) -> None:
        """Take a verdict or an undo; other keys, and what comes too fast to have been read, do nothing."""
        now, before = time.monotonic(), self._last
        self._last = now
        if now - before < QUIET_S:
            self.head.value = f"{self._progress()} · too fast: not taken"
            return
        if key == "u":
            self.study.undo(self.reader)
            self._show()
        elif key in P_FIRST and self.current:
            self.study.save(self.reader, *self.current, P_FIRST[key], now - self.shown_at)
            self._show()

    def _progress(self) -> str:
        return f"{self.n_done} of {len(self.study.items)} labelled by {escape(self.reader)}"

    def __repr__(self) -> str:
        return f"Page: {self.n_done} of {len(self.study.items)} labelled by {self.reader} (needs a live notebook)"


def _reader(row: dict) -> str:
    return row.get("judge") or "unnamed"


def _draw(*parts) -> str:
    """A seeded draw that does not depend on where a row stands."""
    return hashlib.sha256("\t".join(map(str, parts)).encode()).hexdigest()
