"""What a training's parameters say together: its batches, and the accelerate config that it is launched with."""

import importlib.util

import yaml

from srlm_utils.errors import ParamError
from srlm_utils.paths import resolve


def read_config(path: str) -> dict:
    """An accelerate config. Raises `ParamError` if it is none, or one that this kit cannot train with."""
    file = resolve(path)
    if not file.is_file():
        raise ParamError(f"launch = {path!r}: no such file. Expected an accelerate config, as in params/accelerate/.")
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        n = config["num_processes"]
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as e:
        raise ParamError(f"{path}: not an accelerate config with num_processes ({e}).") from e
    if not isinstance(n, int) or n < 1:
        raise ParamError(f"{path}: num_processes = {n!r}, expected a whole number of processes on all machines.")
    if config.get("distributed_type") == "FSDP" and (config.get("fsdp_config") or {}).get("fsdp_version") != 2:
        raise ParamError(f"{path}: fsdp_version must be 2: whole weights are gathered by FSDP2 alone.")
    return config


def batch_sizes(params: dict) -> tuple[int, int]:
    """(rows a micro-batch, micro-batches an optimizer step); `ParamError` where the one does not divide the other."""
    whole, micro = params["train_batch_size"], min(params["micro_batch_size"], params["train_batch_size"])
    if whole % micro:
        raise ParamError(
            f"train_batch_size = {whole} is no multiple of micro_batch_size = {micro}: an optimizer step is made of "
            "whole micro-batches. Change one of them."
        )
    return micro, whole // micro


def check(params: dict) -> None:
    """Raise `ParamError` where parameters of a training cannot go together, before anything heavy is imported."""
    if "train_batch_size" not in params:  # no training
        return
    if params["dtype"] == "float16":
        raise ParamError(
            "dtype = 'float16' is for writing and judging: gradients would underflow in it. Set sft.dtype and "
            "dpo.dtype to bfloat16, or to float32 where the hardware has none; auto picks."
        )
    if params["load_in_4bit"] and not params["lora_r"]:
        raise ParamError("load_in_4bit = True trains adapters on a frozen base: set lora_r, 16 for example.")
    if params["keep_adapters"] and not params["lora_r"]:
        raise ParamError("keep_adapters = True, but lora_r = 0 trains all weights: there are no adapters to keep.")
    _, accumulation = batch_sizes(params)
    if not params["launch"]:
        return
    config = read_config(params["launch"])
    if config.get("distributed_type") == "DEEPSPEED" and params["load_in_4bit"]:
        raise ParamError(
            f"load_in_4bit = True with launch = {params['launch']!r}: DeepSpeed cannot divide weights in 4 bits. "
            "Take an fsdp2 config, or load_in_4bit: false."
        )
    if config.get("distributed_type") == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise ParamError(
            f"launch = {params['launch']!r}: the package deepspeed is not installed. .venv/bin/pip install "
            "-c constraints.txt -e '.[deepspeed]' brings it; the fsdp2 configs need nothing more."
        )
    n = config["num_processes"]
    if accumulation % n:
        raise ParamError(
            f"{params['launch']} starts {n} processes, which cannot share the {accumulation} micro-batches of a step "
            f"evenly (train_batch_size / micro_batch_size): make train_batch_size a multiple of {n} times "
            "micro_batch_size."
        )
