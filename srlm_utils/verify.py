"""``srlm verify results/<run>``: is a run folder still what its steps wrote, and is nothing learned that is measured?

Nothing is run and nothing is changed. Files outside the run (seed files, rubrics) are the business of ``srlm plan``.
"""

import csv
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from srlm_utils.artefacts import describe, find_jsonl, is_there, read_json, read_jsonl, stored
from srlm_utils.errors import DataError
from srlm_utils.lineage import init_model, is_draft, is_of_run
from srlm_utils.pairs import by_the_model
from srlm_utils.paths import run_folder
from srlm_utils.plan import SEED_FILES, VALID
from srlm_utils.seeds import HELD_OUT
from srlm_utils.selection import best
from srlm_utils.self_instruct import Pool

# the fields that name a row, by the file's name; all others are named by their prompt_id
IDS = {
    "attempts": ("attempt_id",),
    "candidates": ("cand_id",),
    "judgements": ("id", "judge_mode"),
    "answer_scores": ("prompt_id", "judge"),
    "selection_answers": ("step", "prompt_id"),
    "verdicts": ("model_a", "model_b", "judge", "judge_mode", "prompt_id", "order"),
}
# and those that name another row
NAMES = {n for names in IDS.values() for n in names} | {"group", "chosen_id", "rejected_id"}
BY_SCORE = ("score", "length_control")  # pair rules whose chosen answer scores higher
LEFT_OUT = ("/model", "/eft/train.jsonl")  # what `example` leaves out of a rendered run


@dataclass(frozen=True)
class Finding:
    """One fault: where it is, what stands there, what should, and what to do."""

    file: str
    row: str
    found: str
    expected: str
    next: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.row}" if self.row else self.file
        return f"{where}: found {self.found}; expected {self.expected}; next: {self.next}"


@dataclass
class Verified:
    """What `verify` found. `notes` are no faults: what is absent on purpose, or not done yet."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    n_files: int = 0
    n_rows: int = 0


def verify(run: Path) -> Verified:
    """Check a run folder: manifests against files, ids, what rows refer to, and that eval, test and validation prompts
    stand nowhere in training data."""
    run = run_folder(run)
    check = _Check(run)
    check.manifests()
    check.unfinished()
    check.ids()
    for model in sorted(p.name for p in run.iterdir() if p.is_dir() and is_of_run(p.name)):
        check.round(model)
        check.judge_pairs(model)
        check.selection(model)
        check.evaluation(model)
    check.held_out()
    return check.out


class _Check:
    def __init__(self, run: Path):
        self.run, self.out = run, Verified()
        self.steps: dict[str, dict] = {}  # manifests that can be read, by step
        self.maker: dict[str, str] = {}  # the step that wrote a file
        self._rows: dict[str, list[dict]] = {}

    def fault(self, file: str, row: str, found: str, expected: str, next: str = "") -> None:
        again = f"restore the file, or make it again: srlm run ... --only {self.maker.get(file, 'STEP')} --force"
        self.out.findings.append(Finding(file, row, found, expected, next or again))

    def rows(self, file: str) -> list[dict]:
        """Rows of a file of the run, read once; [] where it is absent or cannot be read, which is a finding once."""
        if file not in self._rows:
            self._rows[file] = []
            if is_there(self.run / file):
                try:
                    self._rows[file] = [self._named(file, i, r) for i, r in enumerate(read_jsonl(self.run / file), 1)]
                except DataError as e:
                    said = str(e).removeprefix(f"{stored(self.run / file)}:").strip()
                    self.fault(file, "", said, "rows that can be read")
                self.out.n_files += 1
                self.out.n_rows += len(self._rows[file])
        return self._rows[file]

    def _named(self, file: str, i: int, row: dict) -> dict:
        """A row whose names can be looked up: a list or an object, which is none, is a finding, and stands as text."""
        wrong = {n: str(row[n]) for n in sorted(NAMES & row.keys()) if isinstance(row[n], list | dict)}
        for name, value in wrong.items():
            self.fault(file, f"row {i}", f"{name} {value}", "a text or a number")
        return row | wrong

    # ---- files

    def manifests(self) -> None:
        for path in sorted((self.run / "steps").glob("*.json")):
            name = path.stem
            try:
                manifest = read_json(path)
                written = {file: (info["sha256"], info.get("n_rows")) for file, info in manifest["outputs"].items()}
                {file: info["sha256"] for file, info in manifest["inputs"].items()}  # raises where one is missing
                if manifest["step"] != name:
                    raise ValueError(f"the manifest of {manifest['step']}")
                dict(manifest["params"])
            except (DataError, KeyError, TypeError, ValueError, AttributeError) as e:
                found = e if isinstance(e, ValueError) else f"{type(e).__name__} {e}"
                again = f"delete it; srlm run makes {name} again"
                self.fault(f"steps/{path.name}", "", f"{found}", "the manifest that the step wrote", again)
                continue
            self.steps[name] = manifest
            self.maker |= dict.fromkeys(written, name)
        rendered = not any((self.run / file).exists() for file in self.maker if file.endswith("/model"))
        for name, manifest in self.steps.items():
            for file, info in manifest["outputs"].items():
                self._output(file, info, rendered)
            self._inputs(name, manifest["inputs"])

    def _output(self, file: str, then: dict, rendered: bool) -> None:
        if not is_there(self.run / file):
            if rendered and file.endswith(LEFT_OUT):
                self.out.notes.append(f"{file} is not here: a rendered run leaves it out")
            else:
                self.fault(file, "", "no such file", f"what {self.maker[file]} wrote")
            return
        try:
            now = describe(self.run / file)
        except DataError:
            self.rows(file)  # which says it once
            return
        if now["sha256"] != then["sha256"] or now.get("n_rows") != then.get("n_rows"):
            self.fault(file, "", _summary(now), f"{_summary(then)}, as {self.maker[file]} wrote it")

    def _inputs(self, name: str, inputs: dict) -> None:
        """A step must have read what the step before it wrote last. Names of files outside the run hold a colon."""
        for file, then in inputs.items():
            maker = self.maker.get(file)
            if maker and self.steps[maker]["outputs"][file]["sha256"] != then["sha256"]:
                last = _summary(self.steps[maker]["outputs"][file])
                self.fault(
                    f"steps/{name}.json", file, f"made from {_summary(then)}", f"{last}, the last that {maker} wrote",
                    f"srlm run makes {name} again",
                )  # fmt: skip
            elif not maker and ":" not in file:
                self.out.notes.append(f"{name} read {file}, and no step here is done that wrote it")

    def unfinished(self) -> None:
        for work in sorted((self.run / "steps").glob("*.work")):
            if work.stem not in self.steps:
                self.out.notes.append(f"{work.stem} was begun and not finished; srlm run continues it")

    # ---- rows

    def ids(self) -> None:
        for pattern in ("seed/*", "*/selection_answers", "*/eft/*", "*/aift/*", "*/eval/*", "*/eval/verdicts/*"):
            for path in find_jsonl(self.run, f"{pattern}.jsonl"):
                file = path.relative_to(self.run).as_posix()
                names = IDS.get("verdicts" if path.parent.name == "verdicts" else path.stem, ("prompt_id",))
                seen: set[tuple] = set()
                for i, row in enumerate(self.rows(file), 1):
                    key = tuple(str(row.get(n)) for n in names)
                    if missing := [n for n in names if n not in row]:
                        self.fault(file, f"row {i}", f"no {missing[0]}", f"a row with {', '.join(names)}")
                    elif key in seen:
                        self.fault(file, " ".join(key), "a second row of this id", "each id once")
                    seen.add(key)

    def refer(self, file: str, name: str, known: Iterable[str], where: str) -> None:
        """Each row's field `name` must be one of `known`, the ids of `where`; nothing is said where that is absent."""
        if is_there(self.run / where):
            known = set(known)
            for row in self.rows(file):
                if row.get(name) not in known:
                    self.fault(file, _id(row), f"{name} {row.get(name)}", f"one of {where}")

    def ids_of(self, file: str, name: str) -> set:
        return {row.get(name) for row in self.rows(file)}

    def round(self, model: str) -> None:
        """What a model wrote, how it was judged, and what is learned from it; a draft's folder has its round's too."""
        attempts, prompts, candidates, judgements, pairs, positives = (
            f"{model}/aift/{n}.jsonl" for n in ("attempts", "prompts", "candidates", "judgements", "pairs", "positives")
        )
        kept = [a.get("attempt_id") for a in self.rows(attempts) if a.get("reason") == "kept"]
        self.refer(prompts, "attempt_id", kept, attempts)
        self.refer(candidates, "prompt_id", self.ids_of(prompts, "prompt_id"), prompts)
        self.refer(judgements, "id", self.ids_of(candidates, "cand_id"), candidates)
        of_round = _round_of(model)
        wanted = self.param(f"04_self_instruct@{of_round}", "n_candidates", 0)
        n = Counter(c.get("prompt_id") for c in by_the_model(self.rows(candidates)))
        for row in self.rows(prompts) if wanted else ():
            if n[row.get("prompt_id")] != wanted:
                self.fault(candidates, _id(row), f"{n[row.get('prompt_id')]} candidates", f"{wanted} of each prompt")
        if is_there(self.run / judgements) and not self.param(f"05_judge@{of_round}", "max_rows", 0):
            for cand_id in self.ids_of(candidates, "cand_id") - self.ids_of(judgements, "id"):
                self.fault(judgements, str(cand_id), "no judgement", "one of each candidate")
        by_id = {c.get("cand_id"): c for c in self.rows(candidates)}
        scores = {j.get("id"): j.get("score") for j in self.rows(judgements)}
        rule = self.param(f"06_build_pairs@{model}", "pair_rule", "score")
        for row in self.rows(pairs):
            for side in ("chosen", "rejected"):
                self._learned(pairs, row, f"{side}_id", side, f"{side}_score", by_id, scores)
            if rule in BY_SCORE and not _above(row.get("chosen_score"), row.get("rejected_score")):
                found = f"scores {row.get('chosen_score')} and {row.get('rejected_score')}"
                self.fault(pairs, _id(row), found, "a chosen answer that scores above the rejected one")
        for row in self.rows(positives):
            self._learned(positives, row, "cand_id", "response", "score", by_id, scores)

    def _learned(self, file: str, row: dict, id: str, text: str, score: str, candidates: dict, scores: dict) -> None:
        """An answer that is learned from is a candidate of its prompt, word for word, with its judge's score."""
        own = candidates.get(row.get(id))
        if own is None or own.get("prompt_id") != row.get("prompt_id"):
            self.fault(file, _id(row), f"{id} {row.get(id)}", "a candidate of this prompt")
        elif own.get("text") != row.get(text):
            self.fault(file, _id(row), f"another text than that of {row.get(id)} as {text}", "the candidate's text")
        elif scores.get(row.get(id)) != row.get(score):
            found = f"{score} {row.get(score)}"
            self.fault(file, _id(row), found, f"{scores.get(row.get(id))}, as {row.get(id)} was judged")

    def judge_pairs(self, model: str) -> None:
        """Pairs of judgements are two that the model wrote of one of its candidates, whole and with a score."""
        file, judgements = (f"{model}/aift/{name}.jsonl" for name in ("judge_pairs", "judgements"))
        if not is_there(self.run / judgements):
            return
        judged = {r.get("id"): r.get("samples") or [] for r in self.rows(judgements)}
        for row in self.rows(file):
            cand_id = str(row.get("prompt_id")).removesuffix("/judge")
            said = [s.get("text") for s in judged.get(cand_id, []) if s.get("status") == "ok" and s.get("ended")]
            if cand_id not in judged:
                self.fault(file, _id(row), f"candidate {cand_id}", f"one of {judgements}")
            elif row.get("chosen") == row.get("rejected"):
                self.fault(file, _id(row), "one text as chosen and rejected", "two judgements")
            else:
                for side in ("chosen", "rejected"):
                    if row.get(side) not in said:
                        found = f"a judgement that {cand_id} did not get as {side}"
                        self.fault(file, _id(row), found, f"one of its valid samples in {judgements}")

    def selection(self, model: str) -> None:
        """Each checkpoint was compared with the one before it on the same prompts, and the best by these is kept."""
        file, answers = f"{model}/selection.csv", f"{model}/selection_answers.jsonl"
        if not (self.run / file).is_file():
            return
        try:
            with open(self.run / file, encoding="utf-8", newline="") as f:
                found = list(csv.DictReader(f))
            kept = [int(r["step"]) for r in found if r["kept"] == "True"]
            number = {"step": int, "compared_with": int, "win_rate": float, "n": int}
            rows = [{name: kind(r[name]) for name, kind in number.items()} for r in found]
            expected = best(rows)
        except (KeyError, TypeError, ValueError, OSError) as e:
            self.fault(file, "", f"{type(e).__name__} {e}", "step, compared_with, win_rate, n, kept of each comparison")
            return
        self.out.n_files, self.out.n_rows = self.out.n_files + 1, self.out.n_rows + len(rows)
        if kept != [expected]:
            self.fault(file, "", f"kept {', '.join(map(str, kept)) or 'none'}", f"{expected}, which the win rates say")
        answered = Counter(a.get("step") for a in self.rows(answers))
        for row, before in zip(rows, [0, *(r["step"] for r in rows)], strict=False):
            if row["compared_with"] != before or row["step"] <= before:
                self.fault(file, f"step {row['step']}", f"compared_with {row['compared_with']}", f"{before}, before it")
            if row["n"] != answered[row["step"]]:
                found = f"{answered[row['step']]} answers"
                self.fault(answers, f"step {row['step']}", found, f"{row['n']}, as {file} has")
        self.refer(answers, "step", {0, *(r["step"] for r in rows)}, file)
        self.refer(answers, "prompt_id", self.ids_of(VALID, "prompt_id"), VALID)

    def evaluation(self, model: str) -> None:
        folder, tests, exam = f"{model}/eval", "seed/test_prompts.jsonl", "seed/ranked_eval.jsonl"
        replies = {
            f"{row.get('prompt_id')}/{r.get('reply_id')}"
            for row in self.rows(exam)
            for r in (row.get("replies") if isinstance(row.get("replies"), list) else [])
            if isinstance(r, dict)
        }
        self.refer(f"{folder}/judgements.jsonl", "id", replies, exam)
        self.refer(f"{folder}/answers.jsonl", "prompt_id", self.ids_of(tests, "prompt_id"), tests)
        answers = f"{folder}/answers.jsonl"
        self.refer(f"{folder}/answer_scores.jsonl", "prompt_id", self.ids_of(answers, "prompt_id"), answers)
        for path in find_jsonl(self.run / folder / "verdicts", "*.jsonl"):
            file = path.relative_to(self.run).as_posix()
            for row in self.rows(file):
                if f"{row.get('model_a')}_vs_{row.get('model_b')}" != path.stem or row.get("model_a") != model:
                    found = f"a verdict on {row.get('model_a')} and {row.get('model_b')}"
                    self.fault(file, _id(row), found, "the two models of the file's name")
            for who in path.stem.split("_vs_"):
                answers = f"{who}/eval/answers.jsonl"
                self.refer(file, "prompt_id", self.ids_of(answers, "prompt_id"), answers)

    # ---- what is measured is not learned

    def held_out(self) -> None:
        seed = {name: self.rows(f"seed/{name}.jsonl") for name in SEED_FILES}
        home = {row.get("prompt_id"): name for name in HELD_OUT for row in seed[name]}
        learned = [("seed/ift.jsonl", "01_seed_data@run"), ("seed/ranked_train.jsonl", "01_seed_data@run")]
        for path in find_jsonl(self.run, "*/aift/prompts.jsonl"):
            step = f"04_self_instruct@{_round_of(path.parts[-3])}"
            learned.append((path.relative_to(self.run).as_posix(), step))
        for file, step in learned:
            pool = Pool(self.param(step, "rouge_l_max", 0.7))
            for name in HELD_OUT:
                for row in seed[name]:
                    pool.add(str(row.get("prompt", "")), f"{name} {row.get('prompt_id')}")
            for row in self.rows(file):
                near = pool.nearest(str(row.get("prompt", "")))
                if row.get("prompt_id") in home:
                    found = f"an id of {home[row['prompt_id']]}"
                    self.fault(file, _id(row), found, "no prompt that is measured on")
                elif near:
                    self.fault(file, _id(row), f"ROUGE-L {near[0]:.2f} with {near[1]}", "no prompt that is measured on")
        eft = "SFT/eft/train.jsonl"
        for group in sorted({str(r.get("group")) for r in self.rows(eft) if r.get("group") in home}):
            self.fault(eft, group, f"an id of {home[group]}", "no prompt that is measured on")

    def param(self, step: str, name: str, default):
        return self.steps.get(step, {"params": {}})["params"].get(name, default)


def _round_of(model: str) -> str:
    """Whose round's prompts are in the folder of `model`: a draft answers those of the model it starts from."""
    return init_model(model) if is_draft(model) else model


def _summary(info: dict) -> str:
    rows = f", {info['n_rows']} rows" if "n_rows" in info else ""
    return f"sha256 {str(info['sha256'])[:12]}{rows}"


def _id(row: dict) -> str:
    return str(next((row[n] for n in ("cand_id", "id", "prompt_id") if n in row), "a row without an id"))


def _above(a, b) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float) and a > b
