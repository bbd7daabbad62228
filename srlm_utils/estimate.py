"""``srlm estimate``: hours, memory and disk that a run will take, before it takes them.

A step takes its tokens (`tokens.step_tokens`) at a device's rates, and what starting it takes. On a CPU the rates are
those measured with and without bfloat16 instructions, whichever this machine has. On a GPU they are its peak times the
share of it that others measured and published, each with its source below: nothing was run on a GPU here, so hours may
be off by a factor of two either way. Tokens are counted as `tokens` counts them, answers of at most
300 tokens; a model that writes longer ones takes longer.

Of the models only their size counts. Judges and a prompt model from outside the run are taken for as large as the seed.
"""

import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from srlm_utils import resources, tokens, units
from srlm_utils.errors import ParamError
from srlm_utils.lineage import OUTSIDE, is_model_name
from srlm_utils.params import Experiment, stage_key
from srlm_utils.paths import resolve
from srlm_utils.plan import Step, list_steps, parse_win_judge
from srlm_utils.resources import GB, Size

SIZES = {  # of the models' own config.json
    "tiny-random": Size(205_120, 2, 64, 128, 1024, 64),
    "smollm2-135m-instruct": Size(134.5e6, 30, 576, 1536, 49_152, 384),
    "gemma-3-270m": Size(268.1e6, 18, 640, 2048, 262_144, 512),
    "meta-llama/Llama-3.2-1B": Size(1.24e9, 16, 2048, 8192, 128_256, 1024),
    "meta-llama/Llama-2-7b-hf": Size(6.74e9, 32, 4096, 11_008, 32_000, 8192),
    "meta-llama/Llama-3.1-8B": Size(8.03e9, 32, 4096, 14_336, 128_256, 2048),
    "meta-llama/Llama-2-13b-hf": Size(13.02e9, 40, 5120, 13_824, 32_000, 10_240),
    "meta-llama/Llama-2-70b-hf": Size(68.98e9, 80, 8192, 28_672, 32_000, 2048),
}


@dataclass(frozen=True)
class Device:
    """A device and how fast it is: tokens a second are rate[kind] / (FLOP of a token of that kind)."""

    name: str
    memory: float  # bytes; 0 is the machine's own
    rate: dict = field(repr=False)  # FLOP/s reached, by kind of token
    start: float = 0.0  # seconds until a step's kernel works, without its model
    engine_start: float = 0.0  # seconds that an engine of vLLM takes besides to compile and to measure its memory
    load: float = 0.0  # bytes a second of weights that are read


# The kit on two cores with AVX512-BF16 and SmolLM2-135M, seed 2 of the standard run (LOG.md, 2026-11-26) with nothing
# beside it: 192,935 candidates' tokens in 183 seconds; judged and trained ones relative to it as its other runs had
# them. Other work beside it left 777 a second in seed 0. A CPU's rates hold the passes of training.
_CPU_TOKENS, _SMOLLM2 = 1055.0, SIZES["smollm2-135m-instruct"]
CPU = Device(
    "cpu",
    memory=0,
    rate={kind: 2 * _SMOLLM2.parameters * _CPU_TOKENS / cost for kind, cost in tokens.COST.items()},
    start=2.9,  # a step of the smoke run (benchmarks/latest.json, step_overhead_s)
    load=1e9,
)

# Where a CPU has no bfloat16 instructions: two cores with AVX2 alone, in float32, wrote 4.3, judged 5.3, and trained
# 4.2 (SFT) and 3.7 times (DPO) as slowly in parts of `make bench` (LOG.md, 2026-11-26).
WITHOUT_BFLOAT16 = 4.3

# Generated, A100: lmdeploy 0.2.0 wrote 3,387 tok/s of Llama 2 7B to prompts as long as the answers
# (docs/en/benchmark/a100_fp16.md): 0.146 of 312 TFLOP/s. vLLM 0.4.3 did 2,566 (vllm pull request 5046, online, its card
# not told); TensorRT-LLM 0.6.1 525 a GPU for Llama 2 70B on four (docs/source/performance.md), which is 0.23.
# H100: vLLM wrote 2.06 times an A100's tokens of Mistral 7B (LambdaLabsML/vllm-benchmark, benchmark_v0.md).
# Judged, one pass over a prompt: TensorRT-LLM's first token behind 2,048 of Llama 2 7B and 70B came after 133 and, on
# four GPUs, 377 ms on A100 (0.67 and 0.60 of the peak), in fp8 on H100 after 36 and 109 ms (0.39 and 0.33 of
# 1,979 TFLOP/s; the same share of the bfloat16 peak is assumed).
# Trained: torchtitan with FSDP2 (its docs/performance.md) had 2,904 tok/s of an 8B model on each of 64 A100 (56.8 %),
# 331 of a 70B one (51.7 %), and 5,762 of 8B on each of 8 H100 (33 %). Those are full sequences of 8,192: rows here have
# 100 to 600 tokens, so half of it is assumed.
# Start: 20 s for a kernel's imports on a cluster's storage, 90 s for vLLM to compile, capture graphs and measure its
# memory (39 s of compiling a 35B model, route179.dev 2026-06-30; weights apart), 1 GB/s of weights read: assumptions.
A100 = Device(
    "a100", 80 * GB, {"generated": 312e12 * 0.146, "judged": 312e12 * 0.6, "trained": 312e12 * 0.52 / 2}, 20, 90, GB
)
H100 = Device(
    "h100",
    80 * GB,
    {"generated": A100.rate["generated"] * 2.06, "judged": 989e12 * 0.33, "trained": 989e12 * 0.33 / 2},
    start=20,
    engine_start=90,
    load=GB,
)
DEVICES = {d.name: d for d in (H100, A100, CPU)}
# Llama 2 70B, a batch of 32 on eight A100: transformers took 948 s, vLLM 134 s (rkooo567/llm_benchmark). The kit's
# engine is faster than `generate` (docs/speed.md), on a CPU; on a GPU it was not measured.
TRANSFORMERS_SLOWER = 948.26 / 133.70

TEXTS = 64  # texts at once that must fit beside the weights for the rates above
CUDA = 1.5 * GB  # context, communication buffers and what fragments leave unused, of each card
COMPARED = 4  # models that a launched training keeps until they are compared: a few hundred steps, every 200
ROW = 8  # bytes on disk of a token in a row: its text, about four, in the row log and in the step's output


@dataclass(frozen=True)
class Cost:
    """What one step takes: tokens by kind, devices that work, seconds, bytes of memory on each of them."""

    step: Step
    tokens: dict[str, int]
    devices: int
    seconds: float
    memory: float


def size_of(name: str) -> Size:
    """The size of a model: a known name, a local folder, or as the name says (``-8B``); else `ParamError`."""
    if name in SIZES:
        return SIZES[name]
    folder: Path = resolve(name)
    if (folder / "config.json").is_file():
        return resources.read_size(folder)
    said = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name.replace("_", "-").lower())
    if not said:
        raise ParamError(
            f"common.seed_model = {name!r}: how large is it? Expected a name that says so, such as Qwen2.5-7B, a "
            f"folder with config.json and safetensors, or one of {', '.join(SIZES)}."
        )
    n = float(said[-1][0]) * {"b": 1e9, "m": 1e6}[said[-1][1]]
    return replace(min(SIZES.values(), key=lambda s: abs(s.parameters / n - 1)), parameters=n)


def step_cost(step: Step, experiment: Experiment, n_devices: int, device: Device) -> Cost:
    """Time and memory of one step, on as many of `n_devices` as its parameters make work."""
    p, size = experiment.flat(step.stage, step.model), size_of(_seed_model(experiment))
    made, key = tokens.step_tokens(step, experiment), stage_key(step.stage)
    if not any(made.values()):
        return Cost(step, made, 0, device.start, resources.PYTHON)
    training = key in ("sft", "dpo")
    item = resources.weight_bytes(p["dtype"], device is CPU)
    copies, width = (1, n_devices if p.get("launch") else 1) if training else _replicas(p, n_devices)
    copies, width = (1, 1) if device is CPU else (copies, width)
    vllm, rate = p.get("engine", "transformers") != "transformers" and not training, dict(device.rate)
    if device is CPU and resources.weight_bytes("auto", True) == 4:
        rate = {k: v / WITHOUT_BFLOAT16 for k, v in rate.items()}
    if device is not CPU:
        slower = 1 if vllm else TRANSFORMERS_SLOWER
        rate = {k: v / (slower if k == "generated" else 1) for k, v in rate.items()}
    seconds = sum(made[k] * _flop(k, size, p, device) / rate[k] for k in rate) / (copies * width)
    loads = _models_loaded(key, p)
    seconds += device.start + loads * (item * size.parameters / device.load + device.engine_start * vllm)
    memory = (_training_memory if training else _sampling_memory)(size, p, width, item)
    if training and p["select_steps"]:  # checkpoints answer, and are judged, on one device
        memory = max(memory, _sampling_memory(size, p, 1, item))
    return Cost(step, made, copies * width, seconds, memory + (resources.PYTHON if device is CPU else CUDA))


def _seed_model(experiment: Experiment) -> str:
    return experiment.flat("01_seed_data", "run")["seed_model"]


def _flop(kind: str, size: Size, p: dict, device: Device) -> float:
    """FLOP of one token: 2 a parameter and pass. Adapters leave out the pass that gives the weights' gradients."""
    passes = 1
    if kind == "trained" and "lora_r" in p and device is not CPU:  # there the rate is that of whole steps
        passes = (2 if p["lora_r"] else 3) + p["gradient_checkpointing"]
    return 2 * passes * size.parameters


def _replicas(p: dict, n_devices: int) -> tuple[int, int]:
    """(copies of the model that share the work, devices that share a copy) of a step that writes or judges.

    Servers that a `serve_command` starts are as wide as it says; those of one's own are taken for one on each device.
    """
    if p.get("engine", "transformers") == "transformers":
        return 1, 1
    if p["engine"] == "vllm":
        return 1, min(p["tensor_parallel_size"], n_devices)
    if not p["serve_command"]:
        return n_devices, 1
    words = shlex.split(p["serve_command"].replace("=", " "))

    def option(*names: str) -> int:
        return next((int(b) for a, b in zip(words, words[1:], strict=False) if a in names and b.isdigit()), 1)

    width = min(option("--tensor-parallel-size", "-tp"), n_devices)
    copies = max(len(p["server_urls"]), 1) * option("--data-parallel-size", "-dp")
    return max(min(copies, n_devices // width), 1), width


def _models_loaded(key: str, p: dict) -> int:
    """How often a step reads a model's weights."""
    if key == "evaluate":
        return 1 + len({j for j, mode in map(parse_win_judge, p["win_judges"]) if mode in ("score", "pairwise")})
    if key == "self_instruct":
        return 1 + bool(p["prompt_model"]) + bool(p["anchor_model"])
    if key == "future":
        return 2
    return 1 + 2 * bool(p.get("implicit_reference"))


def _training_memory(size: Size, p: dict, n_devices: int, item: int) -> float:
    """Bytes a device: weights and what AdamW keeps, divided among the devices, and one micro-batch's activations."""
    if p["lora_r"]:
        layers = min(p["lora_layers"] or size.layers, size.layers)
        adapters = layers * p["lora_r"] * (8 * size.width + 3 * (size.width + size.inner))  # seven of them a layer
        kept = _base_weight(p, item) * size.parameters + 16 * adapters
    else:
        kept = 16 * size.parameters  # float32 weights, their gradients, and the two averages of AdamW
    return (
        kept / n_devices
        + resources.activation_bytes(size, p, item)
        + (_gathered(size, p, item) if n_devices > 1 else 0)
    )


def _base_weight(p: dict, item: int) -> float:
    """Bytes of a weight of the model that a training starts from; QLoRA's are 4 bits and their scales."""
    return 0.55 if p.get("load_in_4bit") else item


def _gathered(size: Size, p: dict, item: int) -> float:
    """Bytes a device of what FSDP2 holds whole, the head and at most two layers: weights, and where they learn the
    gradients of one that are about to be divided, in their own type and in float32."""
    layer = 2 * size.width**2 + size.kept * size.width + 3 * size.width * size.inner
    return layer * (2 * _base_weight(p, item) + (0 if p["lora_r"] else item + 4)) + item * size.width * size.vocabulary


def _sampling_memory(size: Size, p: dict, n_devices: int, item: int) -> float:
    """Bytes a device that weights and `TEXTS` texts at once need; vLLM takes what there is."""
    text = resources.text_bytes(size.layers, size.kept, size.vocabulary, resources.text_length(p), item)
    return (item * size.parameters + TEXTS * text) / n_devices


def disk(experiment: Experiment, costs: list[Cost]) -> float:
    """Bytes: each model of the run, the largest training's checkpoints, models from outside, and rows."""
    size, outside = size_of(_seed_model(experiment)), {_seed_model(experiment)}
    item, checkpoints, models = 2 * size.parameters, 0.0, 0
    for cost in costs:
        p, key = experiment.flat(cost.step.stage, cost.step.model), stage_key(cost.step.stage)
        named = [p.get("prompt_model", ""), p.get("judge_model", "")]
        if key in ("sft", "dpo"):
            models += 1
            kept = 0.0 if p["lora_r"] or not p["save_steps"] else 12 * size.parameters * 2  # the new one beside the old
            if p["select_steps"]:
                named.append(_loaded_for(p["select_judge"]))
                kept += (COMPARED if p.get("launch") else 1) * item
            checkpoints = max(checkpoints, kept)
        named += [_loaded_for(judge) for judge in p.get("win_judges", [])]
        outside |= {n for n in named if n and not is_model_name(n) and n != OUTSIDE}
    rows = sum(sum(cost.tokens.values()) for cost in costs) * ROW
    return models * item + checkpoints + len(outside) * item + rows


def _loaded_for(judge: str) -> str:
    """The model of a win judge that is loaded here; "" for an endpoint, people and the bundled judge."""
    name, mode = parse_win_judge(judge)
    return name if mode in ("score", "pairwise") else ""


def estimate(experiment: Experiment, n_devices: int, device: Device) -> tuple[list[Cost], float]:
    """(what each step takes, in order; bytes of disk)."""
    if n_devices < 1:
        raise ParamError(f"--gpus {n_devices}: expected a number of 1 or more.")
    costs = [step_cost(step, experiment, n_devices, device) for step in list_steps(experiment)]
    return costs, disk(experiment, costs)


def headline(costs: list[Cost], on_disk: float, n_devices: int, device: Device) -> str:
    """One line: ``8 x h100: 3.1 hours, 25 GPU hours; 61 GB a device; 210 GB of disk``."""
    hours = sum(c.seconds for c in costs) / 3600
    where = "cpu" if device is CPU else f"{n_devices} x {device.name}"
    time = f"{60 * hours:.0f} minutes" if hours < 2 else f"{hours:.1f} hours"
    if device is not CPU:
        time += f", {hours * n_devices:.0f} GPU hours"
    memory = max(c.memory for c in costs)
    a_device = "" if device is CPU else " a device"
    return f"{where}: {time}; {_gb(memory)}{a_device}; {_gb(on_disk)} of disk"


def report(experiment: Experiment, n_devices: int, device: Device) -> str:
    """The table that ``srlm estimate`` prints: one row per step, the headline, and what does not fit or is idle."""
    costs, on_disk = estimate(experiment, n_devices, device)
    lines = [f"{'step':<22}{'generated':>11}{'judged':>11}{'trained':>11}{'devices':>9}{'minutes':>9}{'GB each':>9}"]
    for c in costs:
        made = "".join(f"{units.tokens(v):>11}" for v in c.tokens.values())
        lines.append(
            f"{c.step.name:<22}{made}{c.devices or '-':>9}{c.seconds / 60:>9.1f}{c.memory / GB:>9.1f}".rstrip()
        )
    lines += ["", headline(costs, on_disk, n_devices, device)]
    room = device.memory or resources.free_memory()
    large = [c for c in costs if c.memory > room]
    if large:
        worst = max(large, key=lambda c: c.memory)
        lines.append(
            f"WARNING: {worst.step.name} needs {_gb(worst.memory)} a device and there are {_gb(room)}; "
            f"{len(large)} steps do not fit. {_advice(worst, experiment)}"
        )
    idle = sum((n_devices - max(c.devices, 1)) * c.seconds for c in costs) / 3600
    if device is not CPU and idle > 0.5 * n_devices * sum(c.seconds for c in costs) / 3600:
        lines.append(
            f"note: devices stand idle for {idle:.0f} of the GPU hours: `engine: server` with several server_urls "
            "spreads writing and judging, `launch` training."
        )
    return "\n".join(lines)


def _advice(cost: Cost, experiment: Experiment) -> str:
    p, key = experiment.flat(cost.step.stage, cost.step.model), stage_key(cost.step.stage)
    if key not in ("sft", "dpo"):
        return "Share the model among devices (tensor_parallel_size)."
    if p["select_steps"] and p.get("launch"):
        return f"Comparing checkpoints loads whole models: {key}.select_steps = 0 does without."
    if not p["lora_r"]:
        return f"Take more devices with {key}.launch, or set {key}.lora_r to train adapters."
    return f"Lower {key}.micro_batch_size or {key}.max_length, or set {key}.gradient_checkpointing."


def _gb(n: float) -> str:
    return f"{n / GB:.1f} GB" if n < 10 * GB else f"{n / GB:.0f} GB"
