"""``python -m srlm_utils.example results/quickstart``: a finished run as results/example.

Left out are the weights and ``SFT/eft/train.jsonl``, which 03_build_eft makes
again from the seed within a second. Long files of rows are compressed
(`artefacts.stored`).
"""

import gzip
import shutil
import sys
from pathlib import Path

from srlm_utils import rendered
from srlm_utils.artefacts import new_folder, write_text
from srlm_utils.errors import MissingInputError, SrlmError
from srlm_utils.paths import EXAMPLE, resolve

_LEFT_OUT = shutil.ignore_patterns(
    "model", "train.jsonl", "*.lock", "*.owner", "*.work", ".*", "params", "share", "tensorboard"
)
PLAIN = 100_000  # bytes of rows that a file has at most to be kept as it is


def pack(path: Path) -> None:
    """Keep a file compressed; the same bytes give the same file, whatever the time."""
    packed = path.with_name(f"{path.name}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
    path.unlink()


def render(run: Path) -> None:
    """Replace results/example by `run`; refuses a run whose report is missing."""
    if not (run / "steps" / "09_report@run.json").is_file():
        raise MissingInputError(f"{run}: not a finished run (09_report@run is not done).")
    with new_folder(EXAMPLE) as tmp:
        shutil.copytree(run, tmp, ignore=_LEFT_OUT, dirs_exist_ok=True)
        for path in (tmp / "notebooks").glob("*.ipynb"):
            write_text(path, rendered.tidy(path.read_text(encoding="utf-8")))
        for path in tmp.rglob("*.jsonl"):
            if path.stat().st_size > PLAIN:
                pack(path)
    size = sum(p.stat().st_size for p in EXAMPLE.rglob("*") if p.is_file())
    print(f"results/example: {size / 1e6:.1f} MB from {run.name}")


if __name__ == "__main__":
    try:
        render(resolve(sys.argv[1]))
    except SrlmError as e:
        sys.exit(f"{type(e).__name__}: {e}")
