"""What a step needs of disk and memory, asked before it starts; and whether a model's files are whole."""

import contextlib
import json
import re
import resource
import shutil
import sys
from pathlib import Path

from srlm_utils.errors import ModelError, ResourceError, SrlmError
from srlm_utils.params import stage_key, yaml_section

GB = 1e9
MARGIN = 50e6  # bytes of disk that rows, a notebook and a manifest take
PYTHON = 0.5e9  # bytes of memory of a kernel with torch in it
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
        group = Path("/sys/fs/cgroup")
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
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


# ---- before a step


def check(name: str, stage: str, params: dict, run: Path, model: Path | None) -> None:
    """Raise `ResourceError`, which names the parameter to lower, where a step cannot fit.

    `model` is the folder of the largest model it loads. The least that it needs decides: weights, and what training
    keeps beside them. What batches take besides is estimated, and a warning.
    """
    key = stage_key(stage)
    n = n_parameters(model) if model else 0
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
    batches = _batches(model, params, item) if training else _texts(model, params, item)
    most = max(memory, beside + batches)
    if most > free:
        by = f"{key}.micro_batch_size" if training else f"{yaml_section(stage)}.batch_size"
        print(f"WARNING: {name} may need {_gb(most)} of memory, and {_gb(free)} are free: lower {by}.")


def weight_bytes(dtype: str, on_cpu: bool) -> int:
    """Bytes of one weight of a model in a step's `dtype`. On a CPU "auto" is what that computes in."""
    if dtype == "auto" and on_cpu:
        from srlm_utils.engine import pick_dtype  # and torch, which a step with a model needs anyway

        dtype = pick_dtype(dtype, "cpu")
    return 4 if dtype == "float32" else 2


def config(model: Path) -> tuple[int, int, int, int]:
    """(layers, width, width of the feed-forward part, vocabulary) of a model."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        return tuple(int(config[k]) for k in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"))
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0, 0, 0  # an architecture with other names: nothing is estimated


def _batches(model: Path, params: dict, item: int) -> float:
    """Bytes that the activations of one micro-batch take, about; a third of them where they are computed twice."""
    layers, width, inner, vocabulary = config(model)
    token = layers * (8 * width + 3 * inner) * item / (3 if params["gradient_checkpointing"] else 1) + 12 * vocabulary
    return params["micro_batch_size"] * params["max_length"] * token


def _texts(model: Path, params: dict, item: int) -> float:
    """Bytes that the texts sampled at once take, about; 0 where the engine takes what fits."""
    layers, width, _, vocabulary = config(model)
    length = params.get("max_new_tokens", params.get("judge_max_new_tokens", 0))
    return params.get("batch_size", 0) * (2 * layers * width * length * item + 16 * vocabulary)


def _gb(n: float) -> str:
    return f"{n / GB:.1f} GB"
