"""Which steps a run has, what each reads and writes, and whether it is done. Nothing here runs anything.

A step is ``<stage>@<model>``. Paths are relative to the run folder. A step is done when its manifest
holds the same parameters and the same input hashes as now, and its outputs are as it left them.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from srlm_utils.artefacts import is_there, read_json, sha256
from srlm_utils.errors import DataError, ParamError
from srlm_utils.lineage import (
    OUTSIDE,
    draft_of,
    init_model,
    is_draft,
    is_model_name,
    model_names,
    models_before,
    next_model,
    weights,
)
from srlm_utils.params import PLACE, STAGES, Experiment, stage_key
from srlm_utils.paths import is_hub_id, resolve, rubric_path, seed_path

OUTSIDE_LESSONS = ("judge_train", "judge_onpolicy")  # seed files that it alone learns from: written, sampled replies
VALID = "seed/valid_prompts.jsonl"  # what checkpoints answer
WIN_MODES = ("score", "pairwise", "api", "human")
JUDGED = ("prompts", "candidates", "judgements")  # what a round's pairs are built from
SEED_FILES = ("ift", "ranked_train", "ranked_eval", "valid_prompts", "test_prompts")


@dataclass(frozen=True)
class Step:
    stage: str
    model: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.stage}@{self.model}"


def pairs_for(model: str, future_chosen: bool) -> str:
    """The pairs that `model` learns from: its round's, or those whose chosen answers its draft may have written."""
    return f"{draft_of(model) if future_chosen and not is_draft(model) else init_model(model)}/aift/pairs.jsonl"


def parse_win_judge(text: str, where: str = "evaluate.win_judges") -> tuple[str, str]:
    """``"M1:score"`` -> ("M1", "score"); the last colon separates, so paths may hold others."""
    judge, _, mode = text.rpartition(":")
    several = re.search(rf":({'|'.join(WIN_MODES)}),", text)  # M0:pairwise,M1:score, which is a list elsewhere
    if several or not judge or mode not in WIN_MODES or (judge == OUTSIDE and mode != "score"):
        raise ParamError(
            f"{where}: found {text!r}, expected outside:score, <model>:pairwise or <model>:score (a "
            "model of the run, an embedded model, a hub id or a folder), <model>:api (an OpenAI-compatible endpoint) "
            'or <file>:human (verdict rows); several in brackets, as \'["M0:pairwise", "M1:score"]\'.'
        )
    return judge, mode


def select_judge(stage: str, model: str, params: dict) -> tuple[str, str]:
    """(judge, mode) that compares the checkpoints of `model`; `ParamError` for one that cannot be asked by then."""
    where = f"{stage_key(stage)}.select_judge"
    judge, mode = parse_win_judge(params["select_judge"], where)
    known = models_before(model)
    if mode == "human":
        raise ParamError(f"{where}: {judge}: nobody can vote on answers of a model in training; name a model.")
    if is_model_name(judge) and judge not in known:
        raise ParamError(
            f"{where}: {judge} does not exist yet while {model} is trained; expected {', '.join(known)} or a model "
            "from outside the run."
        )
    return judge, mode


def sft_files(model: str, use_eft: bool) -> tuple[str, ...]:
    """What a supervised model learns from; `use_eft` False leaves M1 without EFT."""
    eft = ("SFT/eft/train.jsonl",) if use_eft else ()
    made = {"SFT": (), "M1": eft}.get(model, (f"{init_model(model)}/aift/positives.jsonl",))
    return "seed/ift.jsonl", *made


def _training_step(stage: str, model: str, params: dict, data: tuple[str, ...]) -> Step:
    reads, writes = [weights(init_model(model)), *data], [f"{model}/model", f"{model}/training_log.csv"]
    if params["select_steps"]:
        judge, _ = select_judge(stage, model, params)
        reads += [VALID, *_weights_of(judge)]
        writes += [f"{model}/selection.csv", f"{model}/selection_answers.jsonl"]
    return Step(stage, model, tuple(dict.fromkeys(reads)), tuple(writes))


def _seed_data(stage: str, m: str, params: dict) -> Step:
    return Step(stage, m, (), ("M0/model.json", *(f"seed/{f}.jsonl" for f in SEED_FILES)))


def _sft(stage: str, m: str, params: dict) -> Step:
    return _training_step(stage, m, params, sft_files(m, params["use_eft"]))


def _build_eft(stage: str, m: str, params: dict) -> Step:
    return Step(stage, m, (weights(m), "seed/ranked_train.jsonl"), (f"{m}/eft/train.jsonl", f"{m}/eft/yield.json"))


def _self_instruct(stage: str, m: str, params: dict) -> Step:
    models = _weights_of(m, params["prompt_model"], params["anchor_model"])
    reads = (*sorted(models), *(f"seed/{f}.jsonl" for f in SEED_FILES))
    return Step(stage, m, reads, _of_round(m, "attempts", "prompts", "candidates"))


def _judge(stage: str, m: str, params: dict) -> Step:
    reference = params["implicit_reference"]
    models = _weights_of(params["judge_model"] or m, *((m, reference) if reference else ()))
    reads = (*models, *_of_round(m, "prompts", "candidates"))
    return Step(stage, m, reads, _of_round(m, "judgements", *(["judge_pairs"] if params["meta_judge"] else ())))


def _build_pairs(stage: str, m: str, params: dict) -> Step:
    rows = _of_round(m, params["learn_from"])
    return Step(stage, m, _of_round(m, *JUDGED), (*rows, f"{m}/aift/health.json"))


def _dpo(stage: str, m: str, params: dict) -> Step:
    start, future = init_model(m), params["future_chosen"]
    data = [pairs_for(m, future)]
    if params["replay"]:
        data += [pairs_for(f"M{i}", future) for i in range(int(start[1:]), 1, -1)]  # the newest first
    if params["judge_share"]:
        data += _of_round(start, "judge_pairs")
    return _training_step(stage, m, params, tuple(data))


def _future(stage: str, m: str, params: dict) -> Step:
    start = init_model(m)
    judge = _weights_of(params["judge_model"] or start)
    return Step(stage, m, (weights(m), *judge, *_of_round(start, *JUDGED)), _of_round(m, *JUDGED))


def _evaluate(stage: str, m: str, params: dict) -> Step:
    judges = {parse_win_judge(j)[0] for j in params["win_judges"]}
    before = [f"{o}/eval/{f}.jsonl" for o in models_before(m) for f in ("answers", "answer_scores", "judgements")]
    reads = (*_weights_of(m, *sorted(judges)), "seed/ranked_eval.jsonl", "seed/test_prompts.jsonl", *before)
    writes = ["judgements.jsonl", "answers.jsonl", "answer_scores.jsonl", "metrics.json"]
    writes += [f"verdicts/{m}_vs_{o}.jsonl" for o in models_before(m)]
    return Step(stage, m, reads, tuple(f"{m}/eval/{f}" for f in writes))


def _benchmarks(stage: str, m: str, params: dict) -> Step:
    writes = ["metrics.json"]
    writes += ["alpaca_eval/model_outputs.json"] if params["alpaca_eval_file"] else []
    writes += [f"mt_bench/{f}.jsonl" for f in ("model_answer", "grades")] if params["mt_bench_file"] else []
    writes += ["lm_eval/results.json"] if params["lm_eval_tasks"] else []
    reads = _weights_of(m, params["mt_bench_judge"])
    return Step(stage, m, reads, tuple(f"{m}/benchmarks/{f}" for f in writes))


def _report(stage: str, m: str, params: dict) -> Step:
    names = model_names(params["iterations"])
    reads = ["seed/test_prompts.jsonl"]
    reads += [f"{n}/eval/{f}" for n in names for f in ("metrics.json", "answers.jsonl")]
    reads += [f"{n}/eval/verdicts/{n}_vs_{o}.jsonl" for n in names for o in models_before(n)]
    for n in names[2:-1]:
        reads += [*_of_round(n, "attempts", *JUDGED), f"{n}/aift/health.json"]
    reads += [f"{n}/aift/health.json" for n in params["drafts"]]
    reads += [f"{n}/training_log.csv" for n in names[1:]]
    reads += [f"{n}/benchmarks/metrics.json" for n in params["benchmarked"]]
    return Step(stage, m, tuple(reads), ("report",))


def _weights_of(*models: str) -> tuple[str, ...]:
    """Weights of those that are models of a run, each once; drafts and models from outside are left out."""
    return tuple(weights(name) for name in dict.fromkeys(models) if is_model_name(name))


def _of_round(model: str, *names: str) -> tuple[str, ...]:
    """Files of the round in which `model` writes and judges."""
    return tuple(f"{model}/aift/{name}.jsonl" for name in names)


_DECLARED = {
    "seed_data": _seed_data,
    "sft": _sft,
    "build_eft": _build_eft,
    "self_instruct": _self_instruct,
    "judge": _judge,
    "build_pairs": _build_pairs,
    "dpo": _dpo,
    "future": _future,
    "evaluate": _evaluate,
    "benchmarks": _benchmarks,
    "report": _report,
}


def make_step(stage: str, model: str, params: dict) -> Step:
    """The declaration of one step; `params` are its flat parameters."""
    return _DECLARED[stage_key(stage)](stage, model, params)


def list_steps(experiment: Experiment) -> list[Step]:
    """All steps of a run in the order in which they run.

    Evaluations of the early models wait until every win judge of the run exists.
    """
    run = experiment.run
    order = [("01_seed_data", "run"), ("02_sft", "SFT"), ("03_build_eft", "SFT"), ("02_sft", "M1")]
    if not experiment.flat("02_sft", "M1")["use_eft"]:
        order.remove(("03_build_eft", "SFT"))
    _check_win_judges(experiment)
    order += [("08_evaluate", m) for m in ("M0", "SFT", "M1")]
    _check_drafts(experiment)
    drafts = experiment.drafts()
    for i in range(1, run.iterations):
        _check_round(experiment, f"M{i}")
        order += [(stage, f"M{i}") for stage in ("04_self_instruct", "05_judge", "06_build_pairs")]
        new, how = f"M{i + 1}", "07_dpo" if run.learn_from == "pairs" else "02_sft"
        if draft_of(new) in drafts:
            order += [(stage, draft_of(new)) for stage in ("07_dpo", "13_future", "06_build_pairs")]
        order += [(how, new), ("08_evaluate", new)]
    for model in experiment.benchmarked():
        judge = experiment.flat("10_benchmarks", model)["mt_bench_judge"]
        if is_model_name(judge) and judge not in ("M0", "SFT", "M1", *models_before(model), model):
            raise ParamError(
                f"benchmarks.mt_bench_judge: {judge} would judge {model}, which exists before it does; "
                "expected M0, SFT, M1 or a model from outside the run."
            )
        order.insert(order.index(("08_evaluate", model)) + 1, ("10_benchmarks", model))
    order.append(("09_report", "run"))
    steps, made = [make_step(stage, m, experiment.flat(stage, m)) for stage, m in order], set()
    for step in steps:  # a name that fits no other check would be found when hours of steps before it are done
        if lost := [path for path in step.reads if path not in made]:
            raise ParamError(
                f"{step.name} would read {lost[0]}, which no step before it makes: check what names a "
                f"model or a number of rounds for this step alone ({stage_key(step.stage)}, by_model)."
            )
        made |= {*step.writes}
    return steps


def _check_win_judges(experiment: Experiment) -> None:
    """Refuse win judges that do not exist when they are asked, and those whose scores an opponent lacks.

    M0 and SFT are evaluated after M1 is trained, later models as soon as they are.
    """
    names, scored = model_names(experiment.run.iterations), {}
    for model in names:
        judges = [parse_win_judge(j) for j in experiment.flat("08_evaluate", model)["win_judges"]]
        there = names[: max(names.index(model), names.index("M1")) + 1]
        for judge, _ in judges:
            if is_model_name(judge) and judge not in there:
                raise ParamError(
                    f"evaluate.win_judges: {judge} would judge {model}, which exists before it does; expected "
                    f"{', '.join(there)} or a model from outside the run."
                )
        scored[model] = {judge for judge, mode in judges if mode == "score"}
        for opponent in models_before(model):
            if missing := sorted(scored[model] - scored[opponent]):
                raise ParamError(
                    f"evaluate.win_judges: {missing[0]}:score compares {model} with {opponent}, whose answers it does "
                    f"not score. Name it for {opponent} too."
                )


def _check_drafts(experiment: Experiment) -> None:
    """Refuse drafts whose answers nobody learns from, or that a later round would learn from and that are not made."""
    models = [f"M{i}" for i in range(2, experiment.run.iterations + 1)]
    training = {m: experiment.flat("07_dpo", m) for m in models}
    asked = [m for m in models if training[m]["future_chosen"]]
    if asked and experiment.run.learn_from != "pairs":
        raise ParamError("dpo.future_chosen needs pairs: it does nothing with learn_from: positives.")
    if asked and asked != models and any(p["replay"] for p in training.values()):
        raise ParamError(
            f"dpo.future_chosen is on for {', '.join(asked)} alone, and dpo.replay learns again from the pairs of all "
            "rounds: set it for all models or for none."
        )
    for start in (init_model(m) for m in asked):
        writing, judging = (experiment.flat(stage, start) for stage in ("04_self_instruct", "05_judge"))
        for name in ("device", "dtype", "trust_remote_code", "engine", *PLACE):
            if writing[name] != judging[name]:
                raise ParamError(
                    f"self_instruct.{name} = {writing[name]!r} and judge.{name} = {judging[name]!r}: with "
                    f"dpo.future_chosen one step writes and judges. Set common.{name}."
                )
        if experiment.flat("06_build_pairs", start)["implicit_rule"] == "agree":
            raise ParamError("build_pairs.implicit_rule: agree drops what a draft wrote, which has no implicit reward.")


def _check_round(experiment: Experiment, model: str) -> None:
    """Refuse models that do not exist when they are asked about `model`'s prompts, and rewards that nobody gives."""
    before = models_before(model)
    judging = experiment.flat("05_judge", model)
    judge, reference = judging["judge_model"], judging["implicit_reference"]
    writing = experiment.flat("04_self_instruct", model)
    anchor = writing["anchor_model"]
    if writing["n_candidates"] < 2 and not anchor and experiment.run.learn_from == "pairs":
        raise ParamError("self_instruct.n_candidates: found 1, and a pair is made of two: set it to 2 or more.")
    for name, value in (("self_instruct.anchor_model", anchor), ("judge.implicit_reference", reference)):
        if value and value not in before:
            raise ParamError(
                f"{name}: found {value!r}, expected a model that was there before {model}: {', '.join(before)}."
            )
    rule = experiment.flat("06_build_pairs", model)["implicit_rule"]
    if rule and not reference:
        raise ParamError("build_pairs.implicit_rule needs judge.implicit_reference, an earlier model such as M0.")
    if rule == "weigh" and writing["n_candidates"] < 2 and experiment.run.learn_from == "pairs":
        raise ParamError(
            "build_pairs.implicit_rule: weigh compares how two rewards order the model's own answers to a prompt: set "
            "self_instruct.n_candidates to 2 or more."
        )
    if judging["meta_judge"] and (judging["judge_mode"] == "expected" or judge not in ("", model)):
        raise ParamError(
            "judge.meta_judge compares judgements that the model wrote itself: it needs no judge_model and "
            "a judge_mode that writes them, sampled or sampled_expected."
        )
    if judging["meta_judge"] and judging["n_samples"] < 2:
        raise ParamError(
            f"judge.meta_judge compares judgements of one answer: found judge.n_samples: {judging['n_samples']}, "
            "expected 2 or more."
        )
    share = experiment.flat("07_dpo", next_model(model))["judge_share"]
    if share and not judging["meta_judge"]:
        raise ParamError("dpo.judge_share needs judge.meta_judge: without it there are no pairs of judgements.")
    if share and rule == "weigh":
        raise ParamError(
            "dpo.judge_share and build_pairs.implicit_rule: weigh do not go together: how far two rewards agree on "
            "answers would weigh pairs of judgements, too."
        )
    if judge == OUTSIDE:
        raise ParamError(
            "judge.judge_model: the outside judge decides win rates; judging candidates, it would be inside."
        )
    if is_model_name(judge) and judge not in (*before, model):
        raise ParamError(
            f"judge.judge_model: {judge} does not exist yet when the candidates of {model} are scored; expected one of "
            f"{', '.join((*before, model))} or a model from outside the run."
        )


def idle_sections(experiment: Experiment) -> list[str]:
    """Sections of `by_model` that belong to no step, one line each.

    They are no error: fewer iterations than a file was written for leave some.
    """
    try:
        steps = list_steps(experiment)
    except ParamError:  # a command that needs the steps says it
        return []
    found = []
    for model, stages in experiment.tree.get("by_model", {}).items():
        for section in stages:
            runs = [s.model for s in steps if stage_key(s.stage) == section and not is_draft(s.model)]
            if model not in runs:
                known = "once a run" if runs == ["run"] else f"for {', '.join(runs) or 'no model'}"
                where = f"by_model.{model}.{section}"
                found.append(f"{where}: no such step; {section} runs {known}: it changes nothing")
    return found


def external_inputs(params: dict) -> dict[str, Path]:
    """Files outside the run folder that a step depends on: seed files, the judge's rubric, folders of models,
    benchmarks and their tasks. A data set of the hub is none: its name stands among the parameters."""
    files = {}
    for name, value in params.items():
        if name.endswith(("_file", "_files")):
            sources = value if isinstance(value, list) else [value]
            files |= {f"{name}:{v}": seed_path(v) for v in sources if v and not is_hub_id(v)}
    for where, named in judges_of_answers(params):
        judge, mode = parse_win_judge(named)
        if mode == "human":
            files[f"{where}:{judge}"] = resolve(judge)
        if judge == OUTSIDE:
            files |= {f"{where}:outside:{name}": seed_path(name) for name in OUTSIDE_LESSONS}
        elif where == "select_judge" and mode == "score":
            files[f"select_rubric:{params['select_rubric']}"] = rubric_path(params["select_rubric"])
    for name, model in external_models(params):  # a folder may be trained anew under its name
        if resolve(model).is_dir():
            files[f"{name}:{model}"] = resolve(model)
    if "rubric" in params:
        files[f"rubric:{params['rubric']}"] = rubric_path(params["rubric"])
    if params.get("lm_eval_include_path"):
        files["lm_eval_include_path:"] = resolve(params["lm_eval_include_path"])
    return files


def judges_of_answers(params: dict) -> list[tuple[str, str]]:
    """(parameter, ``judge:mode``) of each judge that compares answers: for win rates, or to choose a checkpoint."""
    select = [params["select_judge"]] if params.get("select_steps") else []
    return [("win_judges", j) for j in params.get("win_judges", [])] + [("select_judge", j) for j in select]


def external_models(params: dict) -> list[tuple[str, str]]:
    """(parameter, name) of each model from outside the run that a step loads."""
    found = [(name, params.get(name, "")) for name in ("seed_model", "judge_model", "prompt_model", "mt_bench_judge")]
    judges = [(where, *parse_win_judge(named)) for where, named in judges_of_answers(params)]
    found += [(where, judge) for where, judge, mode in judges if mode not in ("api", "human")]
    return [(n, m) for n, m in found if m not in ("", OUTSIDE) and not is_model_name(m) and not m.endswith(":api")]


def fingerprint(step: Step, params: dict, run: Path) -> dict:
    """What decides whether a step's outputs are still valid: parameters and input hashes.

    Raises FileNotFoundError if an input is missing. Places do not count, so a run can be moved, and its models too.
    """
    inputs = {p: sha256(run / p) for p in step.reads}
    inputs |= {name: sha256(path) for name, path in external_inputs(params).items()}
    return {"params": {k: v for k, v in params.items() if k not in ("run_dir", *PLACE)}, "inputs": inputs}


def status(step: Step, params: dict, run: Path) -> tuple[bool, str]:
    """(done, why): whether a step can be skipped, and the reason in a few words.

    A parameter added after a manifest was written had its default then: new ones are off until they are asked for.
    """
    path = run / "steps" / f"{step.name}.json"
    work = run / "steps" / f"{step.name}.work"
    if not path.is_file():
        return False, "was interrupted: will continue" if (work / "fingerprint.json").is_file() else "not run yet"
    try:
        now = fingerprint(step, params, run)
    except FileNotFoundError as e:
        return False, f"input is gone: {Path(e.filename).name}"
    except DataError as e:
        return False, f"an input cannot be read: {e}"
    try:
        manifest = read_json(path)
        old = {
            "params": STAGES[stage_key(step.stage)]().model_dump() | manifest["params"],
            "inputs": {k: v["sha256"] for k, v in manifest["inputs"].items()},
        }
        outputs = {name: info["sha256"] for name, info in manifest["outputs"].items()}
    except (DataError, KeyError, TypeError, AttributeError):
        return False, "its manifest is damaged"
    changed = [k for k in now["params"] if old["params"][k] != now["params"][k]]
    if changed:
        k = changed[0]
        return False, f"{k} changed: {old['params'][k]!r} -> {now['params'][k]!r}"
    stale = [k for k in now["inputs"] if old["inputs"].get(k) != now["inputs"][k]]
    if stale:
        return False, f"input changed: {stale[0]}"
    for name, digest in outputs.items():
        if not is_there(run / name):
            return False, f"output is gone: {name}"
        try:
            same = sha256(run / name) == digest
        except DataError:  # it cannot be unpacked
            same = False
        if not same:
            return False, f"output was changed: {name}"
    return True, "done"


def plan(experiment: Experiment, run: Path) -> list[tuple[Step, dict, bool, str]]:
    """Each step with its parameters, whether it is done, and why. Steps after one that must run wait for it."""
    out, dirty = [], {}
    for step in list_steps(experiment):
        params = experiment.flat(step.stage, step.model, str(run))
        done, why = status(step, params, run)
        waits = [dirty[p] for p in step.reads if p in dirty]
        if done and waits:
            done, why = False, f"after {waits[0]}"
        if not done:
            dirty |= dict.fromkeys(step.writes, step.name)
        out.append((step, params, done, why))
    return out


def maker_of(path: str, steps: list[Step]) -> str | None:
    """Name of the step that writes `path`."""
    return next((s.name for s in steps if path in s.writes), None)
