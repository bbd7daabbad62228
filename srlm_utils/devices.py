"""What models run on here: the device, the dtype that it computes in, and the memory it keeps."""

import contextlib
import ctypes

import torch


def keep_memory() -> None:
    """Have the C library keep memory that is freed, instead of giving it back and fetching it again.

    On a CPU every large intermediate result is otherwise made of pages that the system has to clear first: a
    microsecond for each 4 kB. glibc on Linux only; elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD: nothing gets a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back


def pick_device(device: str = "auto") -> str:
    """`device` itself, or for "auto" cuda where there is one, else cpu."""
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def pick_dtype(dtype: str = "auto", device: str = "auto") -> str:
    """`dtype` itself; "auto" is bfloat16 where the hardware computes in it and float32 elsewhere.

    On a processor without bfloat16 instructions every product is emulated: a seventh of float32's
    speed on one with AVX2 alone (LOG.md).
    """
    if dtype != "auto":
        return dtype
    if pick_device(device) == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    has = cpu_features()
    return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"


def cpu_features() -> dict[str, bool]:
    """What the processor can do, by torch's names; an older torch tells no more than what `pick_dtype` asks."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    known = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
    return {name: getattr(torch.cpu, asks, bool)() for name, asks in known.items()}
