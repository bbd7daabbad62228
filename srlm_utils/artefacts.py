"""Files that are whole or absent: JSON and JSONL written by rename, row logs that survive a kill."""

import errno
import gzip
import hashlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from srlm_utils.errors import DataError, StorageError

PIECE = 4_000_000  # characters of rows that are written at a time
CARD = "README.md"  # of a model


def write_text(path: Path, text: str) -> None:
    """Write `text` to a temporary name, flush it to disk and move it into place."""
    _write_whole(path, [text.encode()])


def _write_whole(path: Path, pieces: Iterable[bytes]) -> None:
    tmp = path.with_name(f".{path.name}.tmp")
    with named_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            for piece in pieces:
                _write(fd, piece)
            os.fsync(fd)
        except (OSError, DataError):
            tmp.unlink(missing_ok=True)  # a full disk needs its bytes back
            raise
        finally:
            os.close(fd)
        os.replace(tmp, path)
        _sync_folder(path.parent)


def link_or_copy(source: str, target: str) -> None:
    """A second name for a file that is only ever replaced whole, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def replace_folder(made: Path, folder: Path) -> None:
    """Move a finished folder into place, its files flushed to disk first; what stood there is removed."""
    with named_faults(folder):
        for path in made.rglob("*"):
            if path.is_file():
                with open(path, "rb") as f:
                    os.fsync(f.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
        _sync_folder(folder.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder` when the block ends; an error in it leaves nothing of
    the new folder, and the old one as it was."""
    tmp = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)  # of a process that was killed
    try:
        with named_faults(folder):
            tmp.mkdir(parents=True)
        yield tmp
        replace_folder(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _sync_folder(folder: Path) -> None:
    """Flush a folder's names to disk: without it a power cut may undo a rename."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def named_faults(path: Path):
    """Raise `StorageError`, which says what to do, for a disk that is full or a folder that is read-only."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            say = "the disk is full. What was made is kept: free some space and run the same command again"
        elif e.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            say = "this folder cannot be written to. Give the run a folder that can, or change its permissions"
        else:
            raise
        raise StorageError(f"{path}: {say} ({e.strerror}).") from e


def write_json(path: Path, value) -> None:
    """Figures that are no number (the mean of nothing, say) become null."""
    write_text(path, json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Rows as lines, compressed for ``.gz``: the same rows give the same bytes, whatever the time.

    What was `stored` compressed under this name goes. Raises `DataError` for a row that holds NaN or infinity.
    """
    pieces = _pieces(rows)
    if path.suffix == ".gz":
        pieces = [gzip.compress(b"".join(pieces), 9, mtime=0)]
    _write_whole(path, pieces)
    path.with_name(f"{path.name}.gz").unlink(missing_ok=True)


def _pieces(rows: Iterable[dict]) -> Iterator[bytes]:
    """Rows as lines, a few megabytes at a time: judgements of a large round are as much text as memory may hold."""
    lines, size = [], 0
    for row in rows:
        lines.append(_line(row))
        size += len(lines[-1])
        if size > PIECE:
            yield "".join(lines).encode()
            lines, size = [], 0
    yield "".join(lines).encode()


def _line(row: dict, end: str = "\n") -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False) + end
    except ValueError as e:
        bad = next((k for k, v in row.items() if _finite(v) != v), "")
        raise DataError(f"row {next(iter(row.values()), '')}: {bad} is no finite number ({e}).") from e


def _parse(text: str):
    """The value of a JSON text; ValueError for all that cannot be kept: NaN, infinity, half a surrogate pair."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in text or "\\uD" in text:  # an escaped emoji is two of these; one alone is no text
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _refuse(name: str):
    raise ValueError(f"{name} is no finite number")


def read_json(path: Path):
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except ValueError as e:  # of decoding, too
        raise DataError(
            f"{path}: not valid JSON ({e}). Restore the file, or delete it and run the step that makes it again."
        ) from e


def stored(path: Path) -> Path:
    """Where a file of a run is: under its own name or, in a rendered run, compressed beside it (``<name>.gz``)."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if packed.is_file() and not path.exists() else path


def is_there(path: Path) -> bool:
    """Whether a file of a run is there, `stored` either way."""
    return stored(path).exists()


def find_jsonl(folder: Path, pattern: str) -> list[Path]:
    """JSONL files that match a pattern that ends in ``.jsonl``, under their own names however they are `stored`."""
    packed = {path.with_suffix("") for path in folder.glob(f"{pattern}.gz")}
    return sorted(packed | {*folder.glob(pattern)})


_UNPACKING = EOFError, gzip.BadGzipFile, zlib.error  # what is raised by a file that is no whole ``.gz``


def _open(path: Path):
    return gzip.open(path) if path.suffix == ".gz" else open(path, "rb")


def _not_unpacked(where, e: Exception) -> DataError:
    return DataError(f"{where}: cannot be read, it cannot be unpacked ({e}). Fetch or make the file again.")


@contextmanager
def _unpacked(path: Path):
    """The bytes of a file that may be `stored` compressed; `DataError` where they cannot be unpacked."""
    path = stored(path)
    try:
        with _open(path) as f:
            yield f
    except _UNPACKING as e:
        raise _not_unpacked(path, e) from e


def read_bytes(path: Path) -> bytes:
    """A file's bytes, `stored` either way."""
    with _unpacked(path) as f:
        return f.read()


def count_rows(path: Path) -> int:
    """Rows of a JSONL file, `stored` either way, whatever they hold."""
    with _unpacked(path) as f:
        return sum(1 for line in f if line.strip())


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSONL file, also ``.gz`` and what is `stored` so. Blank lines are skipped; anything but one object a
    line is a `DataError`."""
    return [row for _, row in iter_jsonl(path)]


def read_optional(path: Path) -> list[dict]:
    """What `read_jsonl` reads; [] for no file."""
    return read_jsonl(path) if is_there(path) else []


def iter_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    """(``file:line``, row) of what `read_jsonl` reads, one by one."""
    start, i, path = 0, 0, stored(path)
    try:
        with _open(path) as f:
            # lines of bytes: JSON strings may hold U+2028 and its like, which are no line ends here; and text is
            # decoded many lines at once, when no fault has a line
            for i, data in enumerate(f, 1):
                line = data.decode("utf-8-sig" if i == 1 else "utf-8")
                if line.strip():
                    yield f"{path}:{i}", parse_row(line, f"{path}:{i}")
                start += len(data)
    except _UNPACKING as e:
        raise _not_unpacked(f"{path}:{i}" if i else path, e) from e
    except UnicodeDecodeError as e:
        raise DataError(f"{path}:{i}: not UTF-8 (byte {start + e.start}). Save the file as UTF-8.") from e


def parse_row(line: str, where: str) -> dict:
    """The object of one line; `DataError` that begins with `where` for anything else."""
    try:
        row = _parse(line)
    except ValueError as e:
        why = f"{e.msg}, column {e.colno}" if isinstance(e, json.JSONDecodeError) else e
        raise DataError(
            f"{where}: not valid JSON ({why}); expected one object a line. Mend or delete this line."
        ) from e
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {type(row).__name__}, expected a JSON object. Mend or delete this line.")
    return row


class RowLog:
    """An append-only JSONL file that a killed step continues.

    `rows` holds what earlier attempts completed. Rows of one `extend` come back together or not at all: a blank before
    the line's end says that more of them follow. What the process was writing when it died is cut off when the log is
    opened, so its rows are simply made again. `alone`: each row is an `extend` of its own, and people edit the file; a
    last row that is whole is kept, though its line has no end.
    """

    def __init__(self, path: Path, *, alone: bool = False):
        with named_faults(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if (packed := stored(path)) != path:  # it goes on as it was
                _write_whole(path, [read_bytes(path)])
                packed.unlink()
            if path.exists():
                data = path.read_bytes()
                whole = data.rfind(b"\n") + 1 if alone else _complete(data)
                if alone and _is_row(data[whole:]):
                    with open(path, "ab") as f:
                        f.write(b"\n")
                elif whole < len(data):
                    print(f"{path.name}: dropped an incomplete last row or batch ({len(data) - whole} bytes)")
                    os.truncate(path, whole)
            self.path = path
            self.rows: list[dict] = read_jsonl(path) if path.exists() else []
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (open while rows come in)
            _sync_folder(path.parent)

    def extend(self, rows: list[dict]) -> None:
        """Append complete rows and flush them to disk, all of them or none."""
        lines = [_line(row, " \n") for row in rows[:-1]] + [_line(row) for row in rows[-1:]]
        fd = self._file.fileno()
        before = os.fstat(fd).st_size
        with named_faults(self.path):
            try:
                _write(fd, "".join(lines).encode())
                os.fsync(fd)
            except OSError:
                os.truncate(fd, before)
                raise
        self.rows.extend(rows)

    def close(self) -> None:
        self._file.close()


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(_parse(line.decode("utf-8-sig")), dict)
    except ValueError:  # of decoding, too
        return False


def _complete(data: bytes) -> int:
    """Length of a row log up to the end of its last complete batch."""
    end = data.rfind(b"\n") + 1
    while data[max(end - 2, 0) : end] == b" \n":
        end = data.rfind(b"\n", 0, end - 1) + 1
    return end


@lru_cache(maxsize=4096)
def _sha256(path: str, unpack: bool, size: int, mtime_ns: int) -> str:
    with _unpacked(Path(path)) if unpack else open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256(path: Path) -> str:
    """Hash of a file, or of a folder's file names and contents; of what a file says that is `stored` compressed, with
    `DataError` if it cannot be unpacked. Remembered while the file is unchanged."""
    if path.is_dir():
        return _of_files(path, (p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")))
    found = stored(path)
    stat = found.stat()
    return _sha256(str(found), found != path, stat.st_size, stat.st_mtime_ns)


def model_sha256(folder: Path) -> str:
    """`sha256` of a model's folder without its card, which names the run: equal weights are one model in any run."""
    return _of_files(folder, (p for p in folder.iterdir() if p.is_file() and p.name != CARD and p.name[0] != "."))


def _of_files(folder: Path, files: Iterable[Path]) -> str:
    h = hashlib.sha256()
    for p in sorted(files):
        h.update(f"{p.relative_to(folder).as_posix()} {sha256(p)}\n".encode())
    return h.hexdigest()


def describe(path: Path) -> dict:
    """What a manifest says of a file or folder: sha256, and rows for JSONL."""
    info = {"sha256": sha256(path)}
    if path.suffix == ".jsonl":
        info["n_rows"] = count_rows(path)
    return info
