"""Runs one command for as long as standard input is open: what a killed process has started ends with it.

The system closes the pipe of a process that ends, however it ends. ``serve`` starts this file by its path, so that it
needs nothing of the kit, and the command's environment is the caller's own.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

END_S = 20.0  # between asking a command to end and ending it


def main(words: list[str]) -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # the group below is this process's own
    try:
        command = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    except OSError as e:
        sys.exit(f"{words[0]}: {e.strerror}")
    while command.poll() is None and not select.select([0], [], [], 0.2)[0]:
        pass
    if command.returncode is not None:
        print(f"it ended with code {command.returncode}", flush=True)
    os.killpg(0, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        command.wait(END_S)
    time.sleep(0.2)  # for what the command started itself
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
