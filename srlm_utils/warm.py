"""Kernels that start with their imports done.

Most of a short step is Python importing torch, transformers and trl (5 s). A server process imports them once; the
kernel of each step is forked from it, with the step's own environment, and is a process of its own like any other.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import types

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

from srlm_utils.resources import has_gpu

IMPORTS = ["srlm_utils.warm_imports"]


def possible() -> bool:
    """Linux without a GPU: elsewhere it is not safe to fork a process that has imported torch."""
    return sys.platform == "linux" and not has_gpu()


def kernels() -> dict:
    """What papermill is told so that its kernels are forked, where that is possible."""
    return {"kernel_manager_class": Manager} if possible() else {}


class Manager(AsyncKernelManager):
    """A kernel manager for papermill whose kernels are forked from the server."""

    async def _async_pre_start_kernel(self, **kwargs):
        if self.provisioner is None:
            self.kernel_id = self.kernel_id or "warm"
            self.provisioner = _Provisioner(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
        return await super()._async_pre_start_kernel(**kwargs)


class _Provisioner(LocalProvisioner):
    async def launch_kernel(self, cmd, **kwargs):
        # cmd is: python -m ipykernel_launcher -f <connection file> ...
        if "ipykernel_launcher" not in cmd:
            return await super().launch_kernel(cmd, **kwargs)
        self.process = _Process(cmd[cmd.index("ipykernel_launcher") + 1 :], kwargs["env"], kwargs.get("cwd"))
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class _Process:
    """What jupyter_client asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, arguments: list[str], env: dict[str, str], cwd: str | None):
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(IMPORTS)
        self._process = server.Process(target=_kernel, args=(arguments, dict(env), cwd or os.getcwd()))
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")  # a fork would run the caller's script once more
        try:
            self._process.start()
        finally:
            sys.modules["__main__"] = main
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return None if self._process.is_alive() else self._process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self._process.join(timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()


def _kernel(arguments: list[str], env: dict[str, str], cwd: str) -> None:
    """In the forked process: become the kernel."""
    from ipykernel import kernelapp

    from srlm_utils import warm_imports

    os.setsid()  # a group of its own: signals to the kernel reach what it starts, and nothing else
    os.environ.clear()
    os.environ.update(env)
    os.environ["MPLBACKEND"] = warm_imports.MPLBACKEND  # as the kernel would set it, had it not been forked
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_the_runner, daemon=True).start()
    sys.argv = ["ipykernel_launcher", *arguments, f"--IPKernelApp.parent_handle={os.getppid()}"]
    try:
        kernelapp.launch_new_instance()
    finally:
        atexit._run_exitfuncs()  # a fork ends without: temporary folders would stay


def _end_with_the_runner() -> None:
    multiprocessing.parent_process().join()  # not the server, but who asked it for this kernel
    os.killpg(0, signal.SIGKILL)
