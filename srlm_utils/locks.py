"""One writer at a time: lock files, each with a file beside it that says who holds it."""

import os
import platform
import time
from pathlib import Path

from filelock import FileLock, Timeout

from srlm_utils.artefacts import named_faults, write_text
from srlm_utils.errors import LockedError


def take(path: Path, what: str) -> FileLock:
    """Hold the lock file `path`, for `drop`. Raises `LockedError`, which says of `what` who holds it, if another does.

    The lock of a dead process is nobody's, whatever it had written beside it.
    """
    lock, owner = FileLock(path), path.with_suffix(".owner")
    try:
        with named_faults(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
    except Timeout:
        who = owner.read_text(encoding="utf-8") if owner.is_file() else "another process"
        raise LockedError(f"{what} by {who}. Wait for it, or stop it and run again.") from None
    write_text(owner, f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}")
    return lock


def drop(lock: FileLock) -> None:
    """Release a lock and remove its file; while it is still held, so that nobody's new lock is removed."""
    path = Path(lock.lock_file)
    path.with_suffix(".owner").unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    lock.release()
