"""What a step needs of disk and memory, asked before it starts; and whether a model's files are whole."""

import contextlib
import json
import re
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from srlm_utils.errors import ModelError, ResourceError, SrlmError
from srlm_utils.params import stage_key, yaml_section

GB = 1e9
MARGIN = 50e6  # bytes of disk that rows, a notebook and a manifest take
PYTHON = 0.5e9  # bytes of memory of a kernel with torch in it
PROMPT = 1024  # tokens of a prompt for which room is reckoned: a rubric with a long reply, or demonstrations
GROUP = Path("/sys/fs/cgroup")  # a container's own control group, of version 2
# torch raises a class of its own on a GPU alone
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


def peak_memory() -> int:
    """The most bytes of main memory that this process has held.

    On Linux the kernel's figure of this program: `getrusage` also counts the process that started it.
    """
    with contextlib.suppress(OSError, AttributeError):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_memory() -> int:
    """Bytes that are free for this process: of the machine, and of the container it runs in."""
    import psutil

    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no limit, or no control group
        limit, used = (int((GROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        # files that were read are counted as used, and go when memory is asked for
        free = min(free, limit - max(used - int(stat.get("inactive_file", 0)), 0))
    return max(free, 0)


def has_gpu() -> bool:
    """Whether there is a GPU that torch may use, asked without torch: NVIDIA's, AMD's, or one that Windows shares."""
    return any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def free_disk(folder: Path) -> int:
    """Bytes that are free where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocator's: Python's, or torch's on a GPU or a CPU. The kit's own errors are not."""
    if isinstance(error, SrlmError):
        return False
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in NO_MEMORY)
    )


def too_large(folder: str) -> ResourceError:
    """The error of weights that there is no memory for."""
    return ResourceError(
        f"{folder}: memory ran out while its weights were loaded. Close what else is running, take a smaller model "
        "(common.seed_model), or a machine with more memory."
    )


# ---- weights on disk


def tensors(path: Path) -> dict[str, dict]:
    """Names, shapes and places of the tensors in a safetensors file; `ModelError` for one that is cut short."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        n = int.from_bytes(f.read(8), "little")
        try:
            if n > size:
                raise ValueError
            found = json.loads(f.read(n))
            found.pop("__metadata__", None)
            whole = 8 + n + max((t["data_offsets"][1] for t in found.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = -1
    if whole != size:
        expected = f"expected {whole:,}" if whole > 0 else "its header cannot be read"
        raise ModelError(
            f"{path}: found {size:,} bytes, {expected}: the file was cut short or damaged. Fetch it again, or run the "
            "step that makes it."
        )
    return found


def check_weights(folder: str) -> None:
    """Raise `ModelError` if a weights file of a local model folder is not whole, or if all are pickles."""
    if Path(folder).is_dir():
        files = sorted(Path(folder).glob("*.safetensors"))
        for path in files:
            tensors(path)
        if not files:
            found = ", ".join(p.name for p in Path(folder).glob("*.bin")) or "none"
            raise ModelError(
                f"{folder}: no safetensors weights (pickle files found: {found}). A pickle runs code when it is "
                "loaded, so it is not: load the model where you trust it and "
                "save_pretrained(..., safe_serialization=True)."
            )


def n_parameters(folder: Path) -> int:
    """Numbers in a model's weights, from the heads of its files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        for tensor in tensors(path).values():
            n = 1
            for length in tensor["shape"]:
                n *= length
            total += n
    return total


@dataclass(frozen=True)
class Size:
    """What a model's size is: all its numbers, and the shape that activations and kept keys follow from."""

    parameters: float
    layers: int = 0
    width: int = 0
    inner: int = 0  # of the feed-forward part
    vocabulary: int = 0
    kept: int = 0  # numbers of keys and values a layer keeps of a token


def read_size(model: Path) -> Size:
    """The size of the model in a folder; without a shape where its architecture has other names for that."""
    n = n_parameters(model)
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        config = SimpleNamespace(**config.get("text_config", config))
        shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size)
        return Size(n, *map(int, (*shape, kept_numbers(config))))
    except (OSError, ValueError, AttributeError, TypeError):
        return Size(n)


def kept_numbers(config) -> int:
    """Numbers of keys and values that a layer keeps of a token, by a model's config; heads may share them."""
    heads = getattr(config, "num_attention_heads", 1)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * kv_heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


# ---- before a step


def check(name: str, stage: str, params: dict, run: Path, model: Path | None) -> None:
    """Raise `ResourceError`, which names the parameter to lower, where a step cannot fit.

    `model` is the folder of the largest model it loads. The least that it needs decides: weights, and what training
    keeps beside them. What batches take besides is estimated, and a warning.
    """
    key = stage_key(stage)
    size = read_size(model) if model else Size(0)
    n = size.parameters
    training, disk = key in ("sft", "dpo"), MARGIN
    on_cpu = params.get("device") == "cpu" or not has_gpu()
    here = params.get("engine", "transformers") == "transformers"  # a server has a dtype of its own, as vLLM has
    item = weight_bytes(params.get("dtype", "auto"), on_cpu and here) if n else 0
    memory = beside = PYTHON + n * item  # the least in all; what is held beside a batch
    lower = "take a smaller model (common.seed_model), or a machine with more memory"
    if training:
        disk += n * item
        memory = PYTHON + n * 4  # adapters are added to their base in float32
        if not params["lora_r"]:
            lower = f"set {key}.lora_r to train adapters (16 takes {_gb(memory)})"
            memory = beside = PYTHON + n * 16  # float32 weights, their gradients, and the two averages of AdamW
            disk += n * 12 * 2 if params["save_steps"] else 0  # a new checkpoint is written before the old one goes
    free = free_disk(run)
    if disk > free:
        checkpoints = training and not params["lora_r"] and params["save_steps"]
        advice = f"; or set {key}.save_steps to 0: its checkpoints take {_gb(n * 24)}" if checkpoints else ""
        raise ResourceError(
            f"{name} needs {_gb(disk)} of disk in {run}, and {_gb(free)} are free. Free some, or move the run{advice}."
        )
    elsewhere = params.get("engine") == "server" or params.get("device") == "cuda"
    if not n or elsewhere or not on_cpu:
        return
    free = free_memory()
    if memory > free:
        raise ResourceError(f"{name} needs at least {_gb(memory)} of memory, and {_gb(free)} are free: {lower}.")
    batches = (activation_bytes if training else _texts)(size, params, item)
    most = max(memory, beside + batches)
    if most > free:
        by = f"{key}.micro_batch_size" if training else f"{yaml_section(stage)}.batch_size"
        print(f"WARNING: {name} may need {_gb(most)} of memory, and {_gb(free)} are free: lower {by}.")


def weight_bytes(dtype: str, on_cpu: bool) -> int:
    """Bytes of one weight of a model in a step's `dtype`. On a CPU "auto" is what that computes in."""
    if dtype == "auto" and on_cpu:
        from srlm_utils.devices import pick_dtype  # and torch, which a step with a model needs anyway

        dtype = pick_dtype(dtype, "cpu")
    return 4 if dtype == "float32" else 2


def activation_bytes(size: Size, params: dict, item: int) -> float:
    """Bytes that the activations of one micro-batch take, about: numbers of `item` bytes, and logits in float32.

    That is `micro_batch_size` rows of `max_length` tokens: they seldom fill it, but a batch that does decides. A pair
    is one row, not two: its prompt is read once (`pair_forward`), and with two answers of max_new_tokens it is about as
    long in the presets. In results/example the largest micro-batches, of SFT and of DPO alike, held half of these
    tokens, and with weights and Python the peaks were 1.0 and 0.8 of the estimate; with two rows a pair DPO's would be
    0.5. Gradient checkpointing keeps what each layer reads, and the activations of the one that is computed again.
    """
    layer = 8 * size.width + 3 * size.inner  # numbers of a token
    kept = size.layers * size.width + layer if params["gradient_checkpointing"] else size.layers * layer
    logits = 12 * size.vocabulary  # with their gradient
    return params["micro_batch_size"] * params["max_length"] * (kept * item + logits)


def text_bytes(layers: int, kept: int, vocabulary: int, length: int, item: int) -> int:
    """Bytes that one of the texts sampled at once takes: its keys and values, of `length` tokens with its prompt, and
    logits with copies in float32. `kept` numbers of `item` bytes a token and layer (`kept_numbers`)."""
    return layers * kept * length * item + 16 * vocabulary


def text_length(params: dict) -> int:
    """Tokens of a sampled text with its prompt, for which a step needs room."""
    return PROMPT + max(params.get("max_new_tokens", 0), params.get("judge_max_new_tokens", 0))


def _texts(size: Size, params: dict, item: int) -> int:
    """Bytes that the texts sampled at once take, about; 0 where the engine takes what fits."""
    return params.get("batch_size", 0) * text_bytes(size.layers, size.kept, size.vocabulary, text_length(params), item)


def _gb(n: float) -> str:
    """With one decimal, however large: what is needed and what is free may differ by less than a GB."""
    return f"{n / GB:.1f} GB"
