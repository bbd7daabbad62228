"""Runs the notebooks of an experiment one after the other through papermill."""

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from srlm_utils import errors, evaluate, field_benchmarks, locks, rendered, units
from srlm_utils.artefacts import is_there, read_json, write_text
from srlm_utils.errors import DataError, Interrupted, MissingInputError, ParamError, SrlmError, StepFailed
from srlm_utils.params import Experiment, yaml_section
from srlm_utils.paths import NOTEBOOKS, PROJ_ROOT, shown
from srlm_utils.plan import Step, judges_of_answers, list_steps, maker_of, plan, status
from srlm_utils.seeds import load_seeds
from srlm_utils.step import BATCH, check_external, check_means
from srlm_utils.tokens import step_work

KERNEL = {  # variables of a notebook that nobody watches
    BATCH: "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def execute(
    experiment: Experiment, run: Path, command: str, *, start: str = "", only: str = "", force: bool = False
) -> None:
    """Run what is not done. `start` and `only` name steps; `force` runs steps even if they are done.

    Raises `SrlmError` for bad input (before a notebook starts, or from its first cells) and `StepFailed` for anything
    else that ends a notebook.
    """
    steps = list_steps(experiment)
    seed = experiment.flat("01_seed_data", "run", str(run))
    if force or not status(steps[0], seed, run)[0]:
        load_seeds(seed)  # every row is checked before any kernel starts
    for step in steps:
        flat = experiment.flat(step.stage, step.model, "run")
        if step.stage == "10_benchmarks":
            field_benchmarks.load(flat)
        check_means(flat)
    names = [s.name for s in steps]
    for option in (start, only):
        if option and option not in names:
            raise ParamError(f"no step {option!r} in this experiment. Its steps: {', '.join(names)}.")
    lock = locks.take(run / ".run.lock", f"{shown(run)} is being run")
    try:
        _execute(experiment, run, command, steps, start, only, force)
    finally:
        locks.drop(lock)


def _execute(experiment, run, command, steps, start, only, force) -> None:
    planned = plan(experiment, run)
    skip_until = [s.name for s in steps].index(start) if start else 0
    todo = []
    for i, (step, params, done, _) in enumerate(planned):
        if i < skip_until or (only and step.name != only):
            continue
        if not done or force:
            todo.append((step, params))
    for step, params in todo:  # the last of them may be hours away
        check_external(step.stage, params)
        evaluate.check_judges([judge for _, judge in judges_of_answers(params)], SimpleNamespace(**params))
    write_text(run / "params.yaml", _yaml(experiment.tree))
    for step, params, *_ in planned:
        write_text(run / "params" / f"{step.name}.yaml", _yaml(params | {"run_dir": shown(run)}))
    line = ProgressLine([(s.name, step_work(s, experiment)) for s, _ in todo])
    has_run = False
    for i, (step, params) in enumerate(todo):
        # what a step before it made anew may have come out the same
        if not force and status(step, params, run)[0]:
            continue
        for path in step.reads:
            if not is_there(run / path):
                raise MissingInputError(
                    f"{step.name}: {shown(run / path)} is missing: run {maker_of(path, steps)} first."
                )
        line.begin(i, run / "steps" / f"{step.name}.work" / "progress.json")
        try:
            _run_notebook(step, params | {"run_dir": shown(run)}, run, command)
        finally:
            line.end(i)
        has_run = True
    if not has_run and (only or start):
        print(f"{only or f'{start} and what follows'}: done already; --force runs it again")
    elif not has_run:
        print(f"{shown(run)}: all {len(steps)} steps are done. Report: {shown(run / 'report/report.html')}")
    elif only:
        print(f"{only} done: {shown(run / 'notebooks')}/{only}.ipynb")
    else:
        print(f"report: {shown(run / 'report/report.html')}")


def _yaml(value) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


@contextlib.contextmanager
def _environment(values: dict[str, str]):
    """These variables in the environment, for as long as this lasts."""
    saved = {k: os.environ.get(k) for k in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for k, v in saved.items():
            if v is None:
                del os.environ[k]
            else:
                os.environ[k] = v


def _run_notebook(step: Step, params: dict, run: Path, command: str) -> None:
    """One papermill execution in a kernel of its own; the executed notebook is kept, failed or not."""
    import logging

    import papermill as pm
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    from srlm_utils import warm

    logging.getLogger("papermill").setLevel(logging.ERROR)
    # who waits for a kernel that an interrupted run ends may learn of its death last, and nobody asks any more
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    source = NOTEBOOKS / f"{step.stage}.ipynb"
    out = run / "notebooks" / f"{step.name}.ipynb"
    out.parent.mkdir(parents=True, exist_ok=True)
    known = set(pm.inspect_notebook(str(source)))
    if known != set(params):  # papermill would only warn
        raise ParamError(
            f"{shown(source)}: its parameters cell has {sorted(known - set(params))} too many and lacks "
            f"{sorted(set(params) - known)}; names must equal srlm_utils/params.py."
        )
    resume = f"continue with: {command}"
    try:
        with _environment(KERNEL):
            pm.execute_notebook(
                str(source),
                str(out),
                parameters=params,
                kernel_name="python3",
                progress_bar=False,
                cwd=str(PROJ_ROOT),
                request_save_on_cell_execute=False,
                extra_arguments=["--log-level=CRITICAL"],  # a kernel that is told to end says so with a traceback
                **warm.kernels(),
            )
    except PapermillExecutionError as e:
        where = f"{shown(out)}, cell {e.exec_count}"
        kind = getattr(errors, e.ename, None)
        if isinstance(kind, type) and issubclass(kind, SrlmError):
            raise kind(f"{e.evalue}\n  in {where}; {resume}") from None
        raise StepFailed(f"{step.name} failed in {where}: {e.ename}: {e.evalue}\n  {resume}") from None
    except KeyboardInterrupt:
        raise Interrupted(f"{step.name} was interrupted; what it made is kept\n  {resume}") from None
    except DeadKernelError:  # papermill marks the cell that ran, and all after it, as completed
        raise StepFailed(
            f"{step.name}: its kernel died in {shown(out)}, where later cells did not run, whatever they say. It was "
            f"killed from outside, or the machine is out of memory: {_lower(step, params)}.\n  {resume}"
        ) from None
    except Exception as e:
        raise StepFailed(f"{step.name} failed in {shown(out)}: {type(e).__name__}: {e}\n  {resume}") from None
    finally:
        _make_shareable(out)
    if not (run / "steps" / f"{step.name}.json").is_file():
        raise StepFailed(
            f"{step.name}: {shown(out)} ended without writing its manifest; its last cell must call "
            f"step.finish().\n  {resume}"
        )


def _lower(step: Step, params: dict) -> str:
    """Which parameter of a step makes it need less memory."""
    name = "micro_batch_size" if "micro_batch_size" in params else "batch_size" if "batch_size" in params else ""
    if not name:
        return "close what else is running"
    return f"lower {yaml_section(step.stage)}.{name} (now {params[name] or 'what fits'})"


def _make_shareable(notebook: Path) -> None:
    """Make an executed notebook, whole or broken off, fit to be read elsewhere."""
    if notebook.is_file():
        text = notebook.read_text(encoding="utf-8")
        try:
            text = rendered.tidy(text)
        except ValueError:  # papermill was interrupted while it wrote; the next run writes it anew
            text = rendered.forget_machine(text)
        write_text(notebook, text)


class ProgressLine:
    """One line for the whole run: step, rows within it, time so far, and an estimate of what is left.

    The estimate scales each step's expected work (`tokens.step_work`) by what the steps of this run
    really took; before a fiftieth of the whole is done it says nothing, since the first steps are mostly start-up.
    """

    def __init__(self, steps: list[tuple[str, float]], stream=None):
        self.steps, self.stream = steps, stream or sys.stdout
        self.tty = self.stream.isatty()
        self.start = time.monotonic()
        self.took: dict[int, float] = {}

    def begin(self, i: int, progress: Path) -> None:
        self._step_start, self._stop = time.monotonic(), threading.Event()
        if not self.tty:
            print(self._text(i, None), file=self.stream, flush=True)
            return
        self._thread = threading.Thread(target=self._watch, args=(i, progress), daemon=True)
        self._thread.start()

    def end(self, i: int) -> None:
        self.took[i] = time.monotonic() - self._step_start
        self._stop.set()
        if self.tty:
            self._thread.join()
            self._show("")

    def _watch(self, i: int, progress: Path) -> None:
        while not self._stop.wait(0.5):
            try:
                state = json.loads(progress.read_text())
            except (OSError, ValueError):
                state = None
            self._show(self._text(i, state))

    def _show(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self.stream.write(f"\r\x1b[2K{text[:width]}")
        self.stream.flush()

    def _text(self, i: int, state: dict | None) -> str:
        name = self.steps[i][0]
        rows = f" {state['done']}/{state['total']}" if state else ""
        left = self.left(i)
        eta = f" · about {units.duration(left)} left" if left is not None else ""
        return f"[{i + 1}/{len(self.steps)}] {name}{rows} · {units.duration(time.monotonic() - self.start)}{eta}"

    def left(self, i: int) -> float | None:
        """Seconds left from the start of step `i` on, less what this step has used already."""
        done = sum(self.steps[j][1] for j in self.took)
        if not done or done < sum(work for _, work in self.steps) / 50:
            return None
        rate = sum(self.took.values()) / done
        expected = rate * self.steps[i][1]
        used = time.monotonic() - self._step_start
        return max(expected - used, 0) + rate * sum(c for _, c in self.steps[i + 1 :])


_STATUS = {"step": str, "started": str, "seconds": int | float, "peak_memory_gb": int | float, "figures": dict}


def status_rows(run: Path) -> tuple[list[dict], list[str]]:
    """What the manifests of a run folder say: one row per finished step; and the steps whose manifest is damaged."""
    rows, damaged = [], []
    for path in (run / "steps").glob("*.json"):
        try:
            manifest = read_json(path)
            row = {k: manifest[k] for k in _STATUS}
            if wrong := [k for k, kind in _STATUS.items() if not isinstance(row[k], kind)]:
                raise TypeError(wrong[0])
            rows.append(row)
        except (DataError, KeyError, TypeError):
            damaged.append(path.stem)
    return sorted(rows, key=lambda r: r["started"]), sorted(damaged)


def stale_steps(run: Path) -> list[tuple[str, str]]:
    """(step, why) of what ``srlm run`` would make again, by the parameters that the run was started with."""
    if not (run / "params.yaml").is_file() or not any(run.glob("*/model")):
        return []  # a run that is rendered without its weights cannot go on
    planned = plan(Experiment.load([run / "params.yaml"]), run)
    made = {p.stem for p in (run / "steps").glob("*.json")}
    return [(step.name, why) for step, _, done, why in planned if not done and step.name in made]
