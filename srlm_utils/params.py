"""Parameters: one YAML an experiment, checked once, flattened to one plain dict a step.

A YAML file has `common:` (what several stages share), one section a stage and `by_model:` for what
differs between rounds. The names below are the names in every notebook's `parameters` cell, in the
YAML files and in the manifests; a test holds them together. 0 or "" switches a parameter off.
"""

import difflib
import re
from pathlib import Path
from typing import Any, Literal, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from srlm_utils.errors import ParamError
from srlm_utils.lineage import is_draft, model_names

JudgeMode = Literal["sampled", "expected", "sampled_expected"]
PairRule = Literal["score", "length_control", "random", "longer", "shorter"]
# where a model runs, as opposed to what it computes: none of these makes a step stale
PLACE = ("server_urls", "serve_command", "tensor_parallel_size", "gpu_memory_utilization")
WHICH_CARD = " CUDA_VISIBLE_DEVICES=1 in the environment chooses the second card, for example."
_KEY = re.compile(r"--(api[-_]key|hf[-_]token)\b|(KEYS?|TOKEN|SECRET|PASSWORD)=")  # in a command
_IN_ADDRESS = re.compile(r"(^|//|')[^/\s]*@|\?")  # user and password, or a query
Tracker = Literal["none", "tensorboard", "trackio", "wandb", "mlflow"]


class _Params(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Run(_Params):
    """What the runner itself needs; no notebook sees these."""

    iterations: int = Field(3, ge=1, le=20)  # the last model is M<iterations>; 3 as in the paper
    learn_from: Literal["pairs", "positives"] = "pairs"  # DPO on pairs, or SFT on positives (A.4)


class Step(_Params):
    """What every notebook gets."""

    run_dir: str = "results/scratch"  # relative paths start at the repository
    model: str = "M1"  # whose step this is
    seed: int = 0


class _ModelStep(Step):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"  # auto: bfloat16 where the hardware has it
    batch_size: int = Field(0, ge=0)  # texts sampled at once; 0 takes as many as fit
    trust_remote_code: bool = False


class _Generating(_ModelStep):
    """Steps whose models write or judge, on transformers or vLLM. What trains a model is transformers alone."""

    engine: Literal["transformers", "vllm", "server"] = "transformers"  # vllm: in the kernel; server: behind addresses
    server_urls: list[str] = []  # of vLLM servers that share the work, such as http://node1:8000/v1
    serve_command: str = ""  # starts a server for the step; holds {model} and {port}, and {index} where there are many
    tensor_parallel_size: int = Field(1, ge=1)  # GPUs that share a model, of engine vllm
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)  # of each GPU's memory, of engine vllm


class _Judged(_ModelStep):
    """Steps whose judge may be ``<model>:api``, behind an OpenAI-compatible endpoint."""

    judge_base_url: str = ""  # "" is OpenAI's own
    api_parallel: int = Field(8, ge=1)
    api_limit: int = Field(0, ge=0)  # new calls at most, 0 is any number
    api_price_in: float = Field(0.0, ge=0)  # of a million tokens, 0 is unknown
    api_price_out: float = Field(0.0, ge=0)


class SeedData(Step):
    seed_model: str = "smollm2-135m-instruct"
    seed_model_revision: str = ""
    chat_template: str = ""
    trust_remote_code: bool = False
    ift_file: str = "ift"  # a source (see `sources`): a bundled name, a path or a hub id
    ranked_train_files: list[str] = ["onpolicy_train", "ranked_train"]
    ranked_eval_files: list[str] = ["onpolicy_eval", "ranked_eval"]  # agreement is measured on each by itself
    valid_file: str = "valid_prompts"
    test_file: str = "test_prompts"
    n_ift: int = Field(0, ge=0)  # 0 takes all rows
    n_ranked_train: int = Field(0, ge=0)  # of each file
    n_ranked_eval: int = Field(0, ge=0)
    n_valid: int = Field(0, ge=0)
    n_test: int = Field(0, ge=0)
    language: str = "en"  # of Open Assistant messages, "" takes every one
    eval_share: float = Field(0.25, gt=0, lt=1)  # of a source that is named for several sets
    ift_share: float = Field(0.5, gt=0, lt=1)
    rouge_l_max: float = Field(0.7, gt=0, le=1)


class _Train(_Judged):
    max_rows: int = Field(0, ge=0)  # 0 takes all rows; a number the first so many of each file, for a quick try
    lora_r: int = Field(16, ge=0)  # 0 trains all weights
    lora_alpha: int = Field(32, ge=1)
    lora_layers: int = Field(0, ge=0)  # adapters on the last so many layers, 0 is all; fewer train faster
    dropout: float = Field(0.0, ge=0, lt=1)
    learning_rate: float = Field(1e-4, gt=0)
    final_learning_rate: float = Field(1e-5, ge=0)  # end of the cosine
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    epochs: int = Field(1, ge=1)
    train_batch_size: int = Field(16, ge=1)  # rows an optimizer step, at most
    micro_batch_size: int = Field(4, ge=1)  # rows a forward pass; judgements of one prompt share what they can
    max_length: int = Field(512, ge=16)  # tokens; longer rows are dropped and counted
    gradient_checkpointing: bool = False
    load_in_4bit: bool = False  # QLoRA: the frozen base in 4 bits, on CUDA alone
    keep_adapters: bool = False  # beside the merged weights, in <model>/model/adapter
    launch: str = ""  # an accelerate config, such as params/accelerate/fsdp2_8gpu.yaml; "" trains in the kernel
    save_steps: int = Field(50, ge=0)
    report_to: Tracker = "none"  # the log is in training_log.csv, whatever is chosen
    select_steps: int = Field(0, ge=0)  # between compared checkpoints, of which the best is kept; 0 keeps the last step
    select_judge: str = "M0:score"  # as in evaluate.win_judges; a model of the run must exist before the trained one
    select_rubric: str = "short"  # of a select_judge that scores; common.rubric where it is not set
    select_prompts: int = Field(0, ge=0)  # validation prompts, 0 takes all
    select_max_new_tokens: int = Field(160, ge=1)


class Sft(_Train):
    use_eft: bool = True  # whether M1 learns to judge; False is the paper's ablation (A.3)
    rank_weight: float = Field(0.0, ge=0)  # of the ranking loss on EFT's scores; 0 is cross-entropy alone (the paper)
    ift_epochs: int = Field(0, ge=0)  # passes over IFT alone, behind those over all rows, with a cosine of their own


class Dpo(_Train):
    beta: float = Field(0.1, gt=0)
    nll_weight: float = Field(0.0, ge=0)  # of the chosen answers' likelihood beside DPO's loss
    judge_share: float = Field(0.0, ge=0, le=0.5)  # of pairs of judgements among all pairs, at most
    replay: float = Field(0.0, ge=0, le=1)  # share of each earlier round's pairs that is learned from again
    future_chosen: bool = False  # a draft of the model comes first, and its better answers become the chosen ones


class BuildEft(_Generating):
    rubric: str = "short"  # a template of srlm_utils/prompts, or a path to your own
    formats: list[Literal["justify_first", "score_first"]] = ["justify_first", "score_first"]
    n_samples: int = Field(4, ge=1)
    temperature: float = Field(0.7, gt=0)
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = Field(120, ge=8)
    scores_from: Literal["judge", "ranks"] = "judge"  # where the seed's replies carry none
    agreement_rule: Literal["no_reversal", "strict"] = "no_reversal"
    max_response_tokens: int = Field(1024, ge=0)
    max_modal_share: float = Field(0.4, gt=0, le=1)


class SelfInstruct(_Generating):
    prompt_model: str = ""  # "" is the model in training
    n_prompts: int = Field(100, ge=1)
    n_seed_demos: int = Field(6, ge=1)
    n_generated_demos: int = Field(2, ge=0)
    prompt_temperature: float = Field(0.6, gt=0)
    prompt_top_p: float = Field(0.9, gt=0, le=1)
    max_prompt_tokens: int = Field(60, ge=4)
    min_prompt_words: int = Field(3, ge=1)
    max_prompt_words: int = Field(60, ge=1)
    rouge_l_max: float = Field(0.7, gt=0, le=1)
    attempts_per_prompt: int = Field(6, ge=1)
    n_candidates: int = Field(4, ge=1)
    anchor_model: str = ""  # an earlier model that answers too, for rejected answers alone; "" is none
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = Field(160, ge=1)


class Judge(_Generating):
    judge_model: str = ""  # "" is the model in training
    meta_judge: bool = False  # whether the model compares its own judgements, for pairs to learn judging from
    implicit_reference: str = ""  # an earlier model: candidates also get their implicit reward; "" is none
    max_rows: int = Field(0, ge=0)  # candidates
    rubric: str = "short"
    judge_mode: JudgeMode = "expected"
    max_response_tokens: int = Field(1024, ge=0)  # what the judge sees of a response, 0 is all
    n_samples: int = Field(3, ge=1)
    temperature: float = Field(0.7, gt=0)
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = Field(120, ge=8)


class BuildPairs(Step):
    learn_from: Literal["pairs", "positives"] = "pairs"
    pair_rule: PairRule = "score"  # the paper's, length control, or a control that no score decides (`pairs`)
    implicit_rule: Literal["", "agree", "weigh"] = ""  # what the implicit reward decides: which pairs, how much
    length_rho: float = Field(0.32, ge=0, lt=0.5)  # of length_control
    chosen_ended: bool = False  # only answers that ended by themselves may be chosen
    same_form: bool = False  # both answers of a pair hold a list, or neither does
    min_margin: float = Field(0.0, ge=0, le=5)
    positive_min_score: float = Field(4.5, ge=0, le=5)
    on_unhealthy: Literal["warn", "stop"] = "warn"
    min_parse_rate: float = Field(0.5, ge=0, le=1)
    min_score_mass: float = Field(0.5, ge=0, le=1)
    max_modal_share: float = Field(0.8, gt=0, le=1)
    max_tie_rate: float = Field(0.5, ge=0, le=1)
    min_pair_yield: float = Field(0.3, ge=0, le=1)


class Future(_Generating):
    """A draft writes and is judged as its round is (`Experiment.flat`): no section of a YAML file is its own."""

    max_rows: int = Field(0, ge=0)  # prompts
    n_candidates: int = Field(4, ge=1)
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = Field(160, ge=1)
    judge_model: str = ""  # "" is the model that the round starts from
    rubric: str = "short"
    judge_mode: JudgeMode = "expected"
    max_response_tokens: int = Field(1024, ge=0)
    n_samples: int = Field(3, ge=1)
    judge_temperature: float = Field(0.7, gt=0)
    judge_top_p: float = Field(0.9, gt=0, le=1)
    judge_max_new_tokens: int = Field(120, ge=8)


class Evaluate(_Generating, _Judged):
    max_rows: int = Field(0, ge=0)  # ranked prompts, and test prompts
    rubric: str = "short"
    judge_modes: list[JudgeMode] = Field(["expected", "sampled"], min_length=1)
    max_response_tokens: int = Field(1024, ge=0)
    n_samples: int = Field(3, ge=1)
    judge_temperature: float = Field(0.7, gt=0)
    judge_top_p: float = Field(0.9, gt=0, le=1)
    judge_max_new_tokens: int = Field(120, ge=8)
    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = Field(160, ge=1)
    safety_file: str = "safety_prompts"  # "" asks none
    win_judges: list[str] = ["M1:score", "M0:pairwise"]


class Report(Step):
    iterations: int = Field(3, ge=1, le=20)
    variant: str = "default"
    n_examples: int = Field(3, ge=1)
    benchmarked: list[str] = []  # models with a 10_benchmarks step
    drafts: list[str] = []  # with a 13_future step


class Benchmarks(_Generating, _Judged):
    """Benchmarks of the field: a step of a run only where one of them is asked for (`asks_benchmarks`)."""

    max_rows: int = Field(0, ge=0)  # instructions, and questions
    alpaca_eval_file: str = ""  # instructions, "" leaves AlpacaEval out
    alpaca_eval_annotator: str = "weighted_alpaca_eval_gpt4_turbo"  # AlpacaEval 2's; "" writes the answers alone
    mt_bench_file: str = ""  # questions of two turns, "" leaves MT-Bench out
    mt_bench_judge: str = ""  # <model>:api rates, 1 to 10; a model gives expected scores, 0 to 5; "" nobody
    rubric: str = "short"  # of a judge that is a model
    max_response_tokens: int = Field(1024, ge=0)  # what that judge sees of an answer, 0 is all
    temperature: float = Field(0.7, ge=0)  # of AlpacaEval's answers; MT-Bench's categories have their own
    top_p: float = Field(0.9, gt=0, le=1)
    max_new_tokens: int = Field(1024, ge=1)
    lm_eval_tasks: list[str] = []  # tasks of lm-evaluation-harness
    lm_eval_include_path: str = ""  # folder with tasks of your own
    lm_eval_limit: int = Field(0, ge=0)  # rows a task, 0 takes all


STAGES: dict[str, type[Step]] = {
    "seed_data": SeedData,
    "sft": Sft,
    "build_eft": BuildEft,
    "self_instruct": SelfInstruct,
    "judge": Judge,
    "build_pairs": BuildPairs,
    "dpo": Dpo,
    "evaluate": Evaluate,
    "report": Report,
    "benchmarks": Benchmarks,
    "future": Future,
}
NOT_IN_YAML = {"run_dir", "model", "benchmarked", "drafts"}  # the runner sets these
SECTIONS = set(STAGES) - {"future"}  # of a stage, in a YAML file; a draft is asked as its round is


def yaml_section(stage: str) -> str:
    """The section of a YAML file that a stage's parameters of writing come from."""
    key = stage_key(stage)
    return key if key in SECTIONS else "self_instruct"


def stage_key(stage: str) -> str:
    """Section of a stage's notebook: "05_judge" -> "judge"."""
    return stage.split("_", 1)[1]


def asks_benchmarks(params: dict) -> bool:
    """Whether flat parameters of 10_benchmarks ask for any benchmark."""
    return any(params[name] for name in ("alpaca_eval_file", "mt_bench_file", "lm_eval_tasks"))


def shared_names() -> set[str]:
    """Names that `common:` may hold: what the runner needs and what two stages or more take."""
    names = [n for section in SECTIONS for n in STAGES[section].model_fields]
    return (
        {n for n in names if names.count(n) > 1}
        | set(Run.model_fields)
        | {"seed_model", "seed_model_revision", "chat_template", "variant"}
    ) - NOT_IN_YAML


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML keeps the last alone.

    As nodes are composed: later, what `<<` takes over stands among a mapping's own keys.
    """

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if first := seen.get(key.value):
                    raise ParamError(f"line {line}: {key.value} stands in line {first} already. Keep one of them.")
                seen[key.value] = line
        return node


def read_yaml(path: Path) -> dict:
    """An experiment or overlay file as nested dicts; `ParamError` names the file and what is wrong."""
    if not path.is_file():
        raise ParamError(f"{path}: no such parameter file. Expected a YAML file such as params/quickstart.yaml.")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except ParamError as e:
        raise ParamError(f"{path}: {e}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ParamError(f"{path}: not valid YAML ({e}).") from e
    _check_names(data, str(path))
    return data


def _suggest(name: str, known) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(sorted(known))}."


def _check_names(data: Any, where: str) -> None:
    """Refuse unknown sections and names, with the nearest known one."""
    sections = {"common", "by_model", *SECTIONS}
    if not isinstance(data, dict):
        raise ParamError(f"{where}: found {type(data).__name__}, expected sections such as `common:` and `sft:`.")
    for section, values in data.items():
        if section not in sections:
            raise ParamError(f"{where}: unknown section {section!r}.{_suggest(str(section), sections)}")
        if not isinstance(values, dict):
            raise ParamError(f"{where}: section {section!r} holds {values!r}, expected `name: value` lines.")
        if section == "by_model":
            for model, stages in values.items():
                if not isinstance(stages, dict) or set(stages) & {"common", "by_model"}:
                    raise ParamError(
                        f"{where}: by_model.{model} holds {stages!r}, expected stage sections "
                        "such as `dpo: {beta: 0.05}`."
                    )
                _check_names(stages, f"{where}: by_model.{model}")
            continue
        known = shared_names() if section == "common" else set(STAGES[section].model_fields) - NOT_IN_YAML
        for name in values:
            if name not in known:
                raise ParamError(f"{where}: unknown parameter {section}.{name}.{_suggest(str(name), known)}")


def _field(section: str, name: str):
    for cls in [Run, *STAGES.values()] if section == "common" else [STAGES[section]]:
        if name in cls.model_fields:
            return cls.model_fields[name]


def parse_set(text: str) -> dict:
    """``--set dpo.beta=0.2`` or ``by_model.M2.dpo.beta=0.2`` as a nested dict, typed by the field."""
    path, eq, value = text.partition("=")
    keys = path.strip().split(".")
    if not eq or len(keys) != (4 if keys[0] == "by_model" else 2):
        raise ParamError(f"--set {text}: expected section.name=value, for example --set dpo.beta=0.2.")
    tree: dict = {}
    at = tree
    for key in keys[:-1]:
        at = at.setdefault(key, {})
    at[keys[-1]] = None
    _check_names(tree, f"--set {text}")
    annotation = _field(keys[-2], keys[-1]).annotation
    try:
        raw = yaml.safe_load(value) if get_origin(annotation) is list else value
        if get_origin(annotation) is list and isinstance(raw, str):
            raw = [raw]
        at[keys[-1]] = TypeAdapter(annotation).validate_python(raw)
    except (ValidationError, yaml.YAMLError) as e:
        hint = WHICH_CARD if keys[-1] == "device" else ""
        raise ParamError(f"--set {text}: {value!r} is no {_type_name(annotation)}.{hint}") from e
    return tree


def _type_name(annotation) -> str:
    return getattr(annotation, "__name__", str(annotation).replace("typing.", ""))


def merge(*trees: dict) -> dict:
    """Nested dicts laid over each other; later ones win."""
    out: dict = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, dict) and isinstance(out.get(key), dict)
            out[key] = merge(out[key], value) if both else value
    return out


def shadowed(tree: dict, asked: dict) -> list[str]:
    """Values of `asked` that have no effect in `tree`: the file sets the name more closely, by section or by model.

    ``sft.rank_weight = 0.0 does not change by_model.M1.sft.rank_weight = 4.0``, one line per parameter.
    """
    models = tree.get("by_model", {})
    found = []
    for section, values in asked.items():
        if section == "by_model":
            continue
        for name, value in values.items():
            stages = [k for k, cls in STAGES.items() if name in cls.model_fields] if section == "common" else [section]
            paths = [(k,) for k in stages if k != section] + [("by_model", m, k) for m in models for k in stages]
            closer = {
                ".".join((*path, name)): _at(tree, path).get(name) for path in paths if name not in _at(asked, path)
            }
            closer = [f"{path} = {v}" for path, v in closer.items() if v is not None and not _has(v, value)]
            if closer:
                found.append(f"{section}.{name} = {value} does not change {', '.join(closer)}")
    return found


def _has(value, asked) -> bool:
    """Whether `value` is what was asked, or a list with all of it (judge modes, for one)."""
    return value == asked or isinstance(value, list) and isinstance(asked, list) and {*asked} <= {*value}


def _at(tree: dict, path: tuple[str, ...]) -> dict:
    for key in path:
        tree = tree.get(key, {})
    return tree


def refuse_keys(name: str, value, where: str = "") -> None:
    """Raise `ParamError` for a command or an address that holds a key. The message does not show it."""
    if (_KEY if name == "serve_command" else _IN_ADDRESS).search(str(value)):
        variable = "OPENAI_API_KEY" if name == "judge_base_url" else "VLLM_API_KEY or HF_TOKEN"
        raise ParamError(
            f"{where}{name} holds a key, or a user or a query, which would stand in params.yaml and in every manifest: "
            f"set it in the environment, as {variable}."
        )


def check(cls: type[BaseModel], values: dict, where: str) -> dict:
    """`values` as a complete, typed, plain dict of `cls`; `ParamError` on the first misfit."""
    for name in ("serve_command", "server_urls", "judge_base_url"):
        refuse_keys(name, values.get(name, ""), f"{where}: ")
    try:
        return cls.model_validate(values).model_dump()
    except ValidationError as e:
        err = e.errors()[0]
        name = ".".join(map(str, err["loc"]))
        hint = ""
        if isinstance(err["input"], str) and err["type"] in ("float_type", "int_type"):
            hint = (
                " YAML reads 5e-7 as text; write 5.0e-7."
                if "e" in err["input"].lower()
                else " Write it without quotes."
            )
        if name == "device":
            hint = WHICH_CARD
        raise ParamError(f"{where}: {name} = {err['input']!r}: {err['msg']}.{hint}") from e


class Experiment:
    """One checked experiment: the merged tree, and the flat parameters of any step of it."""

    def __init__(self, tree: dict, source: str = "params"):
        _check_names(tree, source)
        self.tree, self.source = tree, source
        self.shadowed: list[str] = []  # what `load` was asked for and does not reach a step
        common = tree.get("common", {})
        self.run = Run(**check(Run, {k: v for k, v in common.items() if k in Run.model_fields}, f"{source}: common"))
        for stage in STAGES:  # every value is checked now, whether its step runs today or next week
            self.flat(f"00_{stage}", "M1", "run")
        known = model_names(self.run.iterations)
        for model, stages in tree.get("by_model", {}).items():
            if model not in known:
                raise ParamError(f"{source}: by_model.{model}: no such model.{_suggest(str(model), known)}")
            for stage in stages:
                self.flat(f"00_{stage}", model, "run")

    @classmethod
    def load(cls, files: list[Path], sets: list[str] = ()) -> "Experiment":
        """Files laid over each other, then sets. Overlays name the variant, unless one of them does it itself."""
        trees = [read_yaml(f) for f in files] + [parse_set(s) for s in sets]
        named = {"common": {"variant": "+".join(f.stem for f in files[1:])}} if files[1:] else {}
        experiment = cls(merge(trees[0], named, *trees[1:]), str(files[0]))
        experiment.shadowed = shadowed(experiment.tree, merge({}, *trees[1:]))
        return experiment

    def benchmarked(self) -> list[str]:
        """Models whose 10_benchmarks step is part of this experiment."""
        return [m for m in model_names(self.run.iterations) if asks_benchmarks(self.flat("10_benchmarks", m))]

    def drafts(self) -> list[str]:
        """F2, F3 ...: drafts of the models that learn from what their drafts wrote."""
        if self.run.learn_from != "pairs":
            return []
        numbers = range(2, self.run.iterations + 1)
        return [f"F{i}" for i in numbers if self.flat("07_dpo", f"M{i}")["future_chosen"]]

    def flat(self, stage: str, model: str, run_dir: str = "") -> dict:
        """Parameters of one step: plain types, names equal to the notebook's `parameters` cell."""
        key = stage_key(stage)
        cls = STAGES[key]
        common = self.tree.get("common", {})
        values = {k: v for k, v in common.items() if k in cls.model_fields} | self.tree.get(key, {})
        # a draft is trained as the model that it is a draft of, in the round of the one before
        of_model = f"M{int(model[1:]) - (key != 'dpo')}" if is_draft(model) else model
        values |= self.tree.get("by_model", {}).get(of_model, {}).get(key, {})
        if values.get("select_steps") and isinstance(rubric := common.get("rubric"), str):
            values = {"select_rubric": rubric} | values  # by which the judge among the models was taught
        if key == "future":
            values |= self._of_round(of_model, cls)
        if key == "report":
            values = values | {"benchmarked": self.benchmarked(), "drafts": self.drafts()}
        return check(cls, values | {"model": model, "run_dir": run_dir}, f"{self.source}: {key}")

    def _of_round(self, model: str, cls: type[Step]) -> dict:
        """How the answers to a round's prompts are written and judged, by the names of `Future`."""
        writing, judging = self.flat("04_self_instruct", model), self.flat("05_judge", model)
        as_judge = ("temperature", "top_p", "max_new_tokens")
        # a judge's max_rows are candidates, a draft's prompts
        found = {k: v for k, v in judging.items() if k not in (*as_judge, "max_rows")} | writing
        found |= {f"judge_{k}": judging[k] for k in as_judge}
        return {k: v for k, v in found.items() if k in cls.model_fields}
