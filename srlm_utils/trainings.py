"""One training as the notebooks see it: in their kernel, or in processes of its own that `accelerate launch` starts.

    training = trainings.begin("sft", step, source, tokenizer, rows)
    log = training.run(select)
    training.save(folder, card)

With `launch`, the path of an accelerate config, the kernel holds no model. It writes the tokenised rows to
``<work>/launched/``, starts `srlm_utils.launched` on them and waits. There it finds what the processes tell:
``said.txt`` for the reader, ``at.json`` for the progress bar, ``ranks/<n>.log`` with all else, ``models/<step>/`` of
the last step and of those that are to be compared, and at the end ``log.json``. Checkpoints are the trainer's, in the
step's work folder as ever, so running the cell again continues.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil

from srlm_utils import errors, ranks, train
from srlm_utils.artefacts import CARD, link_or_copy, new_folder, read_json, write_json, write_jsonl, write_text
from srlm_utils.engine import Engine
from srlm_utils.errors import SrlmError, StepFailed
from srlm_utils.paths import PROJ_ROOT, resolve, shown
from srlm_utils.training_params import read_config

TAIL = 12  # lines of a process's log in an error
REFERENCE = ["ref_chosen_logps", "ref_rejected_logps"]  # trl's names


def begin(kind: str, step, source: dict, tokenizer, rows: list[dict], consistency: float = 1.0):
    """A training of `kind` "sft" or "dpo" on tokenised `rows`, from the model at `source` (`StepRun.model_source`).

    `consistency` is DPO's alone (`train.weighed_losses`).
    """
    return (Launched if step.params.launch else Here)(kind, step, source, tokenizer, rows, consistency)


class Here:
    """A training in this process."""

    def __init__(self, kind: str, step, source: dict, tokenizer, rows: list[dict], consistency: float):
        p, self.step, self.source, self.tokenizer = step.params, step, source, tokenizer
        model, _ = train.load(params=p, **source, four_bit=p.load_in_4bit)
        if kind == "sft":
            self.trainer = train.sft_trainer(model, tokenizer, rows, p, step.work)
        else:
            self.trainer = train.dpo_trainer(model, tokenizer, rows, p, step.work, consistency)

    def reference(self) -> pd.DataFrame:
        """DPO's reference: log-probabilities of the answers, one row per pair and pass, in the order of training."""
        return pd.DataFrame(self.trainer.train_dataset.select_columns(REFERENCE).to_list())

    def run(self, selection=None) -> pd.DataFrame:
        """Train, or go on from the last checkpoint; the log, one row per optimizer step (`train.train`)."""
        return train.train(self.trainer, self.step, selection)

    def save(self, folder: Path, card: str) -> None:
        """Write the model that was trained; `folder` appears whole."""
        p = self.step.params
        if p.load_in_4bit:  # the adapters are added to the weights that were quantised, not to what became of them
            model = train.whole(self.source, p, ranks.trained_weights(self.trainer))
        else:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        train.save(model, self.tokenizer, folder, p, card=card, adapter_of=base_name(self.source, p))


def base_name(source: dict, params) -> str:
    """What adapters that are kept belong on, without where this machine has it; "" keeps none."""
    if not params.keep_adapters:
        return ""
    path = Path(source["folder"])
    if hub := re.search(r"models--(.+)--(.+)/snapshots/", path.as_posix()):
        return "/".join(hub.groups())
    return shown(path) if path.is_relative_to(PROJ_ROOT) else path.name


class Launched:
    """A training in processes of its own; the methods of `Here`."""

    def __init__(self, kind: str, step, source: dict, tokenizer, rows: list[dict], consistency: float):
        self.step, self.source, self.tokenizer, self.folder = step, source, tokenizer, step.work / "launched"
        self.config = read_config(step.params.launch)
        self.log = self.folder / "log.json"
        _end_orphans(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_jsonl(self.folder / "rows.jsonl", rows)
        # the type that the step asks for, whatever the config says; auto is what the card can do, and the config's
        precision = {"float32": "no", "bfloat16": "bf16"}.get(step.params.dtype)
        self.launcher = ["--config_file", shown(resolve(step.params.launch))]
        self.launcher += ["--mixed_precision", precision] if precision else []
        me = psutil.Process()
        self.job = {"kind": kind, "params": vars(step.params), "source": source, "consistency": consistency}
        self.job |= {"kernel": {"pid": me.pid, "host": os.uname().nodename, "created": me.create_time()}}
        self.job |= {"launcher": self.launcher}

    def reference(self) -> pd.DataFrame:
        """As `Here.reference`; known once `run` has begun to train."""
        return pd.DataFrame(read_json(self.folder / "reference.json"), columns=REFERENCE)

    def run(self, selection=None) -> pd.DataFrame:
        """As `Here.run`. Raises `StepFailed` with the last lines of the process that failed, or its own error."""
        if not self.log.exists():
            self._n_said = 0
            for name in ("said.txt", "at.json"):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "ranks", ignore_errors=True)
            write_json(self.folder / "job.json", self.job)  # last: other machines join when it is there
            self._launch()
        written = sorted(int(path.name) for path in (self.folder / "models").glob("[0-9]*"))
        for n in (0, *written) if selection else ():
            self._compare(selection, n)
        self.model = self.folder / f"models/{selection.kept if selection else written[-1]}"
        return pd.DataFrame(read_json(self.log))

    def _compare(self, selection, n: int) -> None:
        """As `checkpoints.AtSteps`, but when all is trained: the devices are free then."""
        if any(r["step"] == n for r in selection.rows):
            return
        p = self.step.params
        source = {"folder": str(self.folder / f"models/{n}"), "trust_remote_code": p.trust_remote_code}
        engine = Engine(**(source if n else self.source), device=p.device, dtype=p.dtype)
        selection.compare(n, engine.model, engine.tokenizer, keep=False)

    def save(self, folder: Path, card: str) -> None:
        """As `Here.save`: the processes wrote weights and tokenizer."""
        with new_folder(folder) as tmp:
            # the step's work folder goes when the step is done
            shutil.copytree(self.model, tmp, copy_function=link_or_copy, dirs_exist_ok=True)
            write_text(tmp / CARD, card)

    def command(self, machine: int = 0) -> list[str]:
        """What starts the processes of a machine; all machines see the same files."""
        several = self.config.get("num_machines", 1) > 1
        where = ["--machine_rank", str(machine)] if several else []
        if several and os.environ.get("MASTER_ADDR"):
            where += ["--main_process_ip", os.environ["MASTER_ADDR"]]
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *self.launcher, *where]
        return [*launcher, "-m", "srlm_utils.launched", str(self.folder / "job.json")]

    # ---- while it runs

    def _launch(self) -> None:
        for machine in range(1, self.config.get("num_machines", 1)):
            print(f"start on machine {machine}, in the kit's folder: {' '.join(self.command(machine))}")
        quiet = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
        env = os.environ | dict.fromkeys(quiet, "1") | {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJ_ROOT), env.get("PYTHONPATH", "")]))
        env.pop("MPLBACKEND", None)  # the kernel's, which is no module of theirs
        with open(self.folder / "launcher.log", "w") as out:
            launcher = subprocess.Popen(
                self.command(),
                cwd=PROJ_ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # an interrupt is this process's to pass on
            )
        try:
            self._follow(launcher)
        finally:
            _end(launcher, self.folder)  # also what a launcher that was killed left behind
        if launcher.returncode or not self.log.exists():
            raise self._error(launcher.returncode)

    def _follow(self, launcher) -> None:
        at = {"done": 0, "total": 0}
        while not at["total"] and launcher.poll() is None:
            time.sleep(0.2)
            at = self._news()
        if at["total"]:
            with self.step.progress(at["total"], "steps") as progress:
                running = True
                while running:
                    running = launcher.poll() is None
                    at = self._news()
                    progress.update(at["done"] - progress.n)
                    time.sleep(0.2 if running else 0)
        self._news()

    def _news(self) -> dict:
        """Print what was said since, and where the training is."""
        with contextlib.suppress(FileNotFoundError):
            said = (self.folder / "said.txt").read_text(encoding="utf-8")
            whole = said[: said.rfind("\n") + 1]
            print(whole[self._n_said :], end="", flush=True)
            self._n_said = len(whole)
        try:
            return read_json(self.folder / "at.json")
        except (OSError, SrlmError):
            return {"done": 0, "total": 0}

    def _error(self, code: int) -> SrlmError:
        """What went wrong: an error of the kit that a process met, or the process that failed and its last lines."""
        for path in sorted((self.folder / "ranks").glob("*.error")):
            error = read_json(path)
            kind = getattr(errors, error["kind"], StepFailed)
            return kind(error["message"])
        said = (self.folder / "launcher.log").read_text(encoding="utf-8", errors="replace")
        rank, code = failed(said) or (None, code)
        if rank is None:
            what, log = f"accelerate launch ended with exit code {code}", said
        else:
            n = self.config["num_processes"]
            end = f"ended with exit code {code}"
            if code < 0:
                end = f"was killed by {signal.Signals(-code).name}, from outside or for want of memory"
            what = f"process {rank} of {n} (counted from 0) {end}"
            path = self.folder / "ranks" / f"{rank}.log"
            log = path.read_text(encoding="utf-8", errors="replace") if path.exists() else said
        tail = "\n".join(f"  | {line}" for line in log.rstrip().splitlines()[-TAIL:])
        last = train.last_checkpoint(self.step.work / "checkpoints")
        again = "from the beginning: no checkpoint was written"
        if last:
            again = f"from the checkpoint of step {train.step_of(last)}"
        return StepFailed(
            f"{self.step.name}: {what}. Its last lines:\n{tail}\n  All of them: {shown(self.folder / 'ranks')}. "
            f"Running this cell again continues {again}."
        )


def failed(said: str) -> tuple[int, int] | None:
    """(rank, exit code) of the process that ended a training, by the report of torch's launcher; None if it has none.

    When one process is killed the others fail soon after, for want of an answer: a signal explains more than an
    exit code, except the one that the launcher itself ends processes with.
    """
    found = re.findall(r"rank\s*: (\d+) .*\n.*exitcode\s*: (-?\d+)", said)
    all_of_them = [(int(rank), int(code)) for rank, code in found]
    killed = [f for f in all_of_them if f[1] < 0 and f[1] != -signal.SIGTERM]
    return (killed or all_of_them or [None])[-1]  # the launcher names the first to fail last


def _processes(folder: Path):
    """Processes of a training in `folder` that are still there, on this machine."""
    for path in (folder / "ranks").glob("*.json"):
        with contextlib.suppress(psutil.Error, SrlmError, OSError):
            told = read_json(path)
            process = psutil.Process(told["pid"])
            if told["host"] == os.uname().nodename and process.create_time() == told["created"]:
                yield process


def _kill(processes) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended by itself
            process.kill()


def _end_orphans(folder: Path) -> None:
    """Wait for the processes of an earlier attempt, which end with their kernel, and end them if they do not."""
    _, alive = psutil.wait_procs(list(_processes(folder)), timeout=15)
    _kill(alive)


def _end(launcher, folder: Path) -> None:
    if launcher.poll() is None:
        launcher.send_signal(signal.SIGTERM)  # it ends its processes
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(timeout=15)
    _kill(_processes(folder))
    if launcher.poll() is None:
        launcher.kill()
        launcher.wait()
