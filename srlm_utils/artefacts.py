"""Files that are whole or absent: JSON and JSONL written by rename, row logs that survive a kill."""

import gzip
import hashlib
import json
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from srlm_utils.errors import DataError


def write_text(path: Path, text: str) -> None:
    """Write `text` to a temporary name, flush it to disk and move it into place."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """As `write_text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.tmp")
    with open(tmp, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Rows as lines, compressed for ``.gz``: the same rows give the same bytes, whatever the time."""
    data = "".join(_line(row) for row in rows).encode("utf-8")
    write_bytes(path, gzip.compress(data, 9, mtime=0) if path.suffix == ".gz" else data)


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise DataError(
            f"{path}: not valid JSON ({e}). Restore the file, or delete it and run the step that makes it again."
        ) from e


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSONL file, also ``.gz``. Blank lines are skipped; anything but one object a line is a `DataError`."""
    rows = []
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (EOFError, gzip.BadGzipFile) as e:
        raise DataError(f"{path}: cannot be unpacked ({e}). Fetch or make the file again.") from e
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {e.start}). Save the file as UTF-8.") from e
    # not splitlines(): JSON strings may hold U+2028 and its like, which are no line ends here
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise DataError(
                f"{path}:{i}: not valid JSON ({e.msg}, column {e.colno}); expected one "
                "object a line. Mend or delete this line."
            ) from e
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{i}: found {type(row).__name__}, expected a JSON object. Mend or delete this line."
            )
        rows.append(row)
    return rows


class RowLog:
    """An append-only JSONL file that a killed step continues.

    `rows` holds what earlier attempts completed. A last line without its newline (the process died
    while writing it) is cut off when the log is opened, so its row is simply made again.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                print(f"{path.name}: dropped an incomplete last row ({len(data) - whole} bytes)")
                os.truncate(path, whole)
        self.path = path
        self.rows: list[dict] = read_jsonl(path) if path.exists() else []
        self._file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115  (open while rows come in)

    def extend(self, rows: list[dict]) -> None:
        """Append complete rows in one write and flush them to disk."""
        self._file.write("".join(_line(row) for row in rows))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.extend(rows)

    def close(self) -> None:
        self._file.close()


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256(path: Path) -> str:
    """Hash of a file, or of a folder's file names and contents. Remembered while the file is unchanged."""
    if path.is_dir():
        h = hashlib.sha256()
        for p in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
            h.update(f"{p.relative_to(path).as_posix()} {sha256(p)}\n".encode())
        return h.hexdigest()
    stat = path.stat()
    return _sha256(str(path), stat.st_size, stat.st_mtime_ns)


def describe(path: Path) -> dict:
    """What a manifest says of a file or folder: sha256, and rows for JSONL."""
    info = {"sha256": sha256(path)}
    if path.suffix == ".jsonl":
        with open(path, "rb") as f:
            info["n_rows"] = sum(1 for line in f if line.strip())
    return info
