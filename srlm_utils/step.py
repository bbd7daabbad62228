"""What every notebook begins and ends with: checked parameters, found inputs, a lock, a manifest.

    step = begin_step("05_judge", globals())
    rows = step.rows("M1/aift/candidates.jsonl")
    ...
    step.finish(n_judgements=len(rows))

A step works in ``steps/<step>.work/``: row logs and checkpoints that an interrupted attempt left there
are continued if parameters and inputs are the same, and thrown away if they are not.
"""

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from filelock import FileLock

from srlm_utils import locks, resources, seed_model, serve, tracking, training_params
from srlm_utils.artefacts import (
    RowLog,
    describe,
    is_there,
    model_sha256,
    named_faults,
    read_json,
    read_jsonl,
    sha256,
    stored,
    write_json,
)
from srlm_utils.errors import DataError, MissingInputError, ParamError
from srlm_utils.lineage import OUTSIDE, is_of_run, weights
from srlm_utils.params import STAGES, Experiment, check, stage_key
from srlm_utils.paths import EXAMPLE, PROJ_ROOT, resolve, shown
from srlm_utils.plan import external_inputs, external_models, fingerprint, list_steps, make_step, maker_of

BATCH = "SRLM_BATCH"  # set by the runner: no progress bars in saved notebooks
_held: dict[str, FileLock] = {}  # locks of this kernel, so that a cell can be run again


class StepRun:
    """A step while it runs. `params` has the notebook's parameters as attributes."""

    def __init__(self, stage: str, params: dict):
        self.params = SimpleNamespace(**params)
        self.run = resolve(params["run_dir"])
        self.declared = make_step(stage, params["model"], params)
        self.name = self.declared.name
        self.scratch = self.run.name == "scratch"
        self.manifest_path = self.run / "steps" / f"{self.name}.json"
        self.work = self.run / "steps" / f"{self.name}.work"
        self.started = time.time()
        self._borrowed: set[str] = set()
        self._engines: list = []  # those of vLLM, whose version the manifest names
        self._stood_in: set[str] = set()

    # ---- files

    def input(self, path: str) -> Path:
        """Where an input is. A scratch run borrows from results/example what it has not made itself. Its own
        candidates never get the example's scores, nor older ones of its own: the ids are equal, the texts are not."""
        here, candidates = self.run / path, (self.run / path).with_name("candidates.jsonl")
        written, scored = (p.stat().st_mtime_ns if p.exists() else 0 for p in map(stored, (candidates, here)))
        if self.scratch and path.endswith("aift/judgements.jsonl") and written > scored:
            raise MissingInputError(
                f"{shown(candidates)} is newer than the scores, which belong to other candidates: run 05_judge first, "
                f"or delete {shown(self.run)} to begin with the example."
            )
        if is_there(here):
            return here
        if self.scratch and is_there(EXAMPLE / path):
            self._borrowed.add(path)
            return EXAMPLE / path
        raise MissingInputError(f"{shown(self.run / path)} is missing: run {maker(path)} first.")

    def is_borrowed(self, path: str) -> bool:
        """Whether an input is the example's, in a scratch run that has none of its own."""
        return self.scratch and self.input(path).is_relative_to(EXAMPLE)

    def output(self, path: str) -> Path:
        """Where an output goes; its folder is made."""
        out = self.run / path
        out.parent.mkdir(parents=True, exist_ok=True)
        return out

    def rows(self, path: str) -> list[dict]:
        """Rows of an input."""
        return read_jsonl(self.input(path))

    def log(self, name: str) -> RowLog:
        """An append-only row log of this step, with the rows that an interrupted attempt completed."""
        log = RowLog(self.work / name)
        if log.rows:
            print(f"continuing: {len(log.rows)} rows of {name} were made before")
        return log

    def model_source(self, model: str) -> dict:
        """Where a model is and how to talk to it: keyword arguments for `Engine` and `train.load`.

        `model` is a model of the run, the `outside` judge, an embedded model, a hub id or a folder. In a scratch run
        the seed model stands in for models that were never trained there.
        """
        trust = {"trust_remote_code": self.params.trust_remote_code}
        if model == OUTSIDE:
            from srlm_utils import outside

            return {"folder": outside.fetch(self)}
        if not is_of_run(model):
            return {"folder": seed_model.fetch(model)["path"], **trust}
        if model != "M0" and (self.run / weights(model)).is_dir():
            return {"folder": str(self.run / weights(model)), **trust}
        if model != "M0" and not self.scratch:
            self.input(weights(model))  # raises
        if model != "M0" and model not in self._stood_in:
            print(f"scratch run: the seed model M0 stands in for {model}")
            self._stood_in.add(model)
        info = seed_model.read_pointer(self.input("M0/model.json"))
        return {"folder": info["path"], "chat_template": info["chat_template"], **trust}

    def engine(self, model: str):
        """What generates and scores with a model: `Engine`, or what the step's `engine` names, with its parameters."""
        p, source = self.params, self.model_source(model)
        kind = vars(p).get("engine", "transformers")  # steps that train have no other
        if kind == "transformers":
            from srlm_utils.engine import Engine

            return Engine(**source, device=p.device, dtype=p.dtype, batch_size=p.batch_size)
        if kind == "vllm":
            from srlm_utils.vllm_engine import Vllm

            found = Vllm(
                **source,
                dtype=p.dtype,
                batch_size=p.batch_size,
                tensor_parallel_size=p.tensor_parallel_size,
                gpu_memory_utilization=p.gpu_memory_utilization,
            )
        else:
            from srlm_utils.servers import Servers

            found = Servers(
                **source,
                meant=model,
                names=self._served_names(model),
                urls=p.server_urls,
                command=p.serve_command,
                logs=self.work,
                batch_size=p.batch_size,
            )
        self._engines.append(found)
        return found

    def release(self) -> None:
        """End this step's servers and let go of what vLLM holds; asking an engine again brings them back."""
        serve.stop()
        if self._engines:
            from srlm_utils import vllm_engine

            vllm_engine.release()

    def _served_names(self, model: str) -> list[str]:
        """Names that say which weights a server serves: ``M1-<12 digits of their sha256>``; a hub id is one itself."""
        if not is_of_run(model) and model != OUTSIDE:
            return [model]
        names = [f"{model}-{self.model_revision(model)}"]
        if model == "M0" and (name := read_json(self.input(weights("M0")))["name"]):
            names.append(name)
        return names

    def tokenizer(self, model: str):
        """The tokenizer of a model, with the chat template that the run gave it."""
        from srlm_utils import chat

        return chat.load_tokenizer(**self.model_source(model))

    def model_revision(self, model: str) -> str:
        """Which weights a name means: 12 digits of `model_sha256` of a run's model, of the outside judge or of a
        folder; the name itself of any other."""
        if model == OUTSIDE:
            from srlm_utils import outside

            return model_sha256(Path(outside.fetch(self)))[:12]
        if not is_of_run(model):
            return model_sha256(resolve(model))[:12] if resolve(model).is_dir() else model
        if self.scratch and not (self.run / weights(model)).exists():
            model = "M0"  # its stand-in, see model_source()
        path = self.input(weights(model))
        return (model_sha256(path) if path.is_dir() else sha256(path))[:12]  # M0's is a file that names it

    # ---- life

    def begin(self) -> None:
        self._check_inputs()
        resources.check(self.name, self.declared.stage, vars(self.params), self.run, self._largest_model())
        with named_faults(self.run):
            self._lock()
        if self.manifest_path.is_file():
            shutil.rmtree(self.work, ignore_errors=True)  # it was killed after its last row: nothing to continue
        if not self.scratch:
            now = fingerprint(self.declared, vars(self.params), self.run)
            path = self.work / "fingerprint.json"
            if self.work.is_dir() and not (path.is_file() and read_json(path) == now):
                shutil.rmtree(self.work)  # left by other parameters or inputs: not ours to continue
            write_json(path, now)
        else:
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)
        self.manifest_path.unlink(missing_ok=True)  # not done again until finish()
        where = shown(self.run)
        print(
            f"{self.name} in {where}"
            + (f", inputs from {shown(EXAMPLE)}: {', '.join(sorted(self._borrowed))}" if self._borrowed else "")
        )

    def _check_inputs(self) -> None:
        for path in self.declared.reads:
            if self.scratch and path.endswith("/model"):
                continue  # model_source() has a stand-in
            self.input(path)

    def _largest_model(self) -> Path | None:
        """The folder of the largest model of the run that the step reads."""
        names = [p.split("/")[0] for p in self.declared.reads if p in (weights("M0"), weights(p.split("/")[0]))]
        folders = [Path(seed_model.read_pointer(self.input(weights("M0")))["path"])] if "M0" in names else []
        folders += [self.run / weights(m) for m in names if m != "M0" and (self.run / weights(m)).is_dir()]
        return max(folders, key=resources.n_parameters, default=None)

    def _lock(self) -> None:
        path = self.run / "steps" / f"{self.name}.lock"
        if str(path) not in _held:
            _held[str(path)] = locks.take(path, f"{self.name} is being written")

    def progress(self, total: int, unit: str = "rows"):
        """Counter for a long cell: a bar in JupyterLab, a file for the runner's line in a batch run."""
        return Progress(self.work, total, unit)

    def finish(self, **figures) -> dict:
        """Write the manifest, which makes the step done, and clear its work folder. Returns `figures`."""
        missing = [p for p in self.declared.writes if not (self.run / p).exists()]
        if missing:
            raise DataError(f"{self.name}: {missing[0]} was not written. Run the notebook from the top.")
        externals = external_inputs(vars(self.params))
        inputs = {
            p: describe(self.input(p))
            for p in self.declared.reads
            if not (self.scratch and p.endswith("/model") and not (self.run / p).exists())
        }
        inputs |= {name: describe(path) for name, path in externals.items()}
        if not self.scratch:
            began = read_json(self.work / "fingerprint.json")["inputs"]
            if changed := [name for name, info in inputs.items() if began.get(name) != info["sha256"]]:
                raise DataError(
                    f"{self.name}: {changed[0]} changed while the step ran, so what was made of it matches "
                    "neither version. Run the step again."
                )
        vllm = sorted({e.version for e in self._engines} - {""})
        write_json(
            self.manifest_path,
            {
                "step": self.name,
                "params": vars(self.params) | {"run_dir": shown(self.run)},
                "inputs": inputs,
                "outputs": {p: describe(self.run / p) for p in self.declared.writes},
                "figures": figures,
                "versions": versions() | ({"vllm": ", ".join(vllm)} if vllm else {}),
                "git": git_revision(),
                "started": time.strftime("%FT%TZ", time.gmtime(self.started)),
                "seconds": round(time.time() - self.started, 1),
                "peak_memory_gb": round(resources.peak_memory() / 1e9, 2),
            },
        )
        self.release()
        shutil.rmtree(self.work, ignore_errors=True)
        lock = _held.pop(str(self.run / "steps" / f"{self.name}.lock"), None)
        if lock:
            locks.drop(lock)
        print(f"{self.name} done in {time.time() - self.started:.0f} s")
        return figures


class Progress:
    """Counts rows towards `total`; works as a context manager."""

    def __init__(self, work: Path, total: int, unit: str):
        self.path, self.total, self.n, self._last = work / "progress.json", total, 0, 0.0
        self.bar = None
        if not os.environ.get(BATCH):
            from tqdm.auto import tqdm

            self.bar = tqdm(total=total, unit=f" {unit}", smoothing=0.1)

    def update(self, n: int = 1) -> None:
        self.n += n
        if self.bar is not None:
            self.bar.update(n)
        elif time.monotonic() - self._last > 0.5:
            self._last = time.monotonic()
            tmp = self.path.with_suffix(".tmp")
            with contextlib.suppress(OSError):  # a full disk stops rows, not the counting of them
                tmp.write_text(json.dumps({"done": self.n, "total": self.total}))
                os.replace(tmp, self.path)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.bar is not None:
            self.bar.close()


def check_means(params: dict) -> None:
    """Raise `ParamError` where what a step's parameters name cannot be had: a tracker, a launcher, an engine."""
    tracking.check(params.get("report_to", "none"))
    training_params.check(params)
    serve.check(params)


def check_external(stage: str, params: dict) -> None:
    """Raise `SrlmError` where a file or a folder outside the run that a step's parameters name is not there."""
    for name, path in external_inputs(params).items():
        name, _, value = name.partition(":")
        if name.endswith("rubric") and not path.is_file():
            raise ParamError(
                f"{stage}: {name} = {value!r}: no such template. Expected short, additive, "
                "multiple_choice or the path of a .jinja file."
            )
        if not is_there(path):
            raise MissingInputError(f"{name}: {path}: no such file.")
    for name, model in external_models(params):
        seed_model.check_name(model, name)


def begin_step(stage: str, namespace: dict) -> StepRun:
    """Check a notebook's parameters and inputs, take the step's lock, and say what will be read.

    `namespace` is the notebook's ``globals()``; exactly the stage's parameters are taken from it.
    Raises `ParamError`, `MissingInputError`, `ResourceError` or `LockedError` before any model is loaded.
    """
    # an error about the input is a message to a reader, not a stack of the kit's insides
    _quiet_kit_errors()
    cls = STAGES[stage_key(stage)]
    absent = [n for n in cls.model_fields if n not in namespace]
    if absent:
        raise ParamError(f"{stage}: parameter {absent[0]} is not set; run the cell tagged `parameters` first.")
    values = check(cls, {n: namespace[n] for n in cls.model_fields}, stage)
    check_external(stage, values)
    check_means(values)
    step = StepRun(stage, values)
    step.begin()
    return step


def maker(path: str) -> str:
    """Name of the step that makes `path` in a run, whatever the run's length and variant."""
    for learn_from, future in (("pairs", False), ("positives", False), ("pairs", True)):
        common = {"iterations": 20, "learn_from": learn_from}
        longest = Experiment({"common": common, "dpo": {"future_chosen": future}})
        if name := maker_of(path, list_steps(longest)):
            return name
    return "the step that makes it"


def versions() -> dict[str, str]:
    """Versions that decide what a run computes."""
    found = {"python": sys.version.split()[0]}
    for name in ("srlm-kit", "torch", "transformers", "trl", "peft", "papermill"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_revision() -> str:
    """Commit of the kit, with ``-dirty`` for uncommitted changes; "" outside a checkout."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=PROJ_ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _quiet_kit_errors() -> None:
    """Show errors that the kit raises on purpose as one line instead of a traceback, in IPython."""
    try:
        shell = get_ipython()  # noqa: F821
    except NameError:
        return
    from srlm_utils.errors import SrlmError

    def show(shell, etype, value, tb, tb_offset=None):
        lines = [f"{etype.__name__}: {value}"]
        shell._showtraceback(etype, value, lines)
        return lines

    shell.set_custom_exc((SrlmError,), show)
