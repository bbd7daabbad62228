"""Where things are. The only file that knows the layout of the repository."""

import os
import re
from pathlib import Path

from srlm_utils.errors import MissingInputError

PROJ_ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(__file__).resolve().parent
NOTEBOOKS = PROJ_ROOT / "notebooks"
PARAMS = PROJ_ROOT / "params"
RESULTS = PROJ_ROOT / "results"
EXAMPLE = RESULTS / "example"
SEED_DATA = PACKAGE / "seed_data"
PROMPTS = PACKAGE / "prompts"


def cache_dir() -> Path:
    """Folder of fetched and converted models; the variable ``SRLM_CACHE`` moves it."""
    return Path(os.environ.get("SRLM_CACHE") or Path.home() / ".cache" / "srlm").expanduser()


def shown(path: Path) -> str:
    """`path` as people read it: relative to the repository where it lies in it."""
    return str(path.relative_to(PROJ_ROOT)) if path.is_relative_to(PROJ_ROOT) else str(path)


def resolve(path: str | Path) -> Path:
    """Absolute form of `path`; relative paths start at the repository, not at the kernel's folder."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else PROJ_ROOT / path


def run_folder(path: str | Path) -> Path:
    """Absolute form of a run folder's path. Raises `MissingInputError` where there is no run."""
    run = resolve(path)
    if not (run / "steps").is_dir():
        there = ", ".join(sorted(p.parent.name for p in RESULTS.glob("*/steps"))) or "none"
        raise MissingInputError(f"{shown(run)}: no run here (no steps/ folder). Runs in results/: {there}.")
    return run


def seed_path(name: str) -> Path:
    """A seed file by name (one that the kit carries) or by path."""
    return SEED_DATA / f"{name}.jsonl" if re.fullmatch(r"\w+", name) else resolve(name)


def is_hub_id(name: str) -> bool:
    """Whether a source of seed data is ``owner/name`` or ``owner/name:split`` of the hub, and no file."""
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", name) and not name.endswith((".jsonl", ".jsonl.gz"))
    return bool(is_id) and not resolve(name).exists()


def rubric_path(name: str) -> Path:
    """A rubric by name (a template of the kit) or by path."""
    return PROMPTS / f"{name}.jinja" if re.fullmatch(r"\w+", name) else resolve(name)
