"""``srlm sweep``: variants times seeds, one run after another, each step that cells share made once.

A cell is one variant with one seed. It runs in ``results/sweep-<name>/<variant>-<seed>/``, an ordinary run folder, and
leaves what a comparison needs in ``results/sweeps/<name>/<variant>-<seed>/`` (`cells`), which is kept in git: a cell
found there is done, on whatever machine.
"""

import hashlib
import json
import shutil
import time
from pathlib import Path

from srlm_utils import cells, locks, runner, sweep_report, units
from srlm_utils.artefacts import is_there, link_or_copy, stored
from srlm_utils.cells import DEFAULT
from srlm_utils.errors import Interrupted, ParamError, SrlmError
from srlm_utils.params import Experiment, merge, read_yaml
from srlm_utils.paths import PARAMS, RESULTS, shown
from srlm_utils.plan import fingerprint, list_steps, plan, status
from srlm_utils.printable import printable, without_secrets
from srlm_utils.seeds import load_seeds
from srlm_utils.tokens import step_work


def experiments(base: Experiment, variants: list[str], n_seeds: int) -> dict[tuple[str, int], Experiment]:
    """The experiment of every cell (variant, seed), seed by seed; seeds count up from the base's own.

    A variant is an overlay of params/variants, or "default", the base as it is. Raises `ParamError` for any other name
    and for an overlay that does not fit, before anything runs.
    """
    known = sorted(p.stem for p in (PARAMS / "variants").glob("*.yaml"))
    for name in variants:
        if name not in (DEFAULT, *known):
            raise ParamError(f"--variants {name}: no such overlay. Known: {', '.join((DEFAULT, *known))}.")
    if len({*variants}) < len(variants) or n_seeds < 1:
        raise ParamError("expected --variants that differ and at least one of --seeds.")
    first = base.flat("01_seed_data", "run")["seed"]
    return {(name, seed): _cell(base, name, seed) for seed in range(first, first + n_seeds) for name in variants}


def _cell(base: Experiment, variant: str, seed: int) -> Experiment:
    overlay = {} if variant == DEFAULT else read_yaml(PARAMS / "variants" / f"{variant}.yaml")
    tree = merge(base.tree, overlay, {"common": {"variant": variant, "seed": seed}})
    return Experiment(tree, f"{base.source}, {variant}")


def run(base: Experiment, variants: list[str], n_seeds: int, name: str, command: str) -> list[str]:
    """Run what is not done of a sweep; the cells that failed, as ``<variant>-<seed>``.

    The report is written after each cell, so that a sweep of days can be read so far. Bad input stops the sweep before
    anything runs; a cell that fails later is said and the rest goes on; the same command tries it again.
    """
    queue = experiments(base, variants, n_seeds)
    work, kept = RESULTS / f"sweep-{name}", RESULTS / "sweeps" / name
    todo = [key for key, experiment in queue.items() if not is_done(kept / cell_name(*key), experiment)]
    _check_others(base, kept, queue)
    checked = []
    for key in todo:
        list_steps(queue[key])
        seed = queue[key].flat("01_seed_data", "run", "run") | {"seed": 0}  # which decides nothing there
        if seed not in checked:
            load_seeds(seed)
            checked.append(seed)
    print(f"{name}: {len(queue)} cells, {len(queue) - len(todo)} of them done before", flush=True)
    if not todo:
        print(f"report: {shown(sweep_report.write(kept))}")
    lock = locks.take(work / ".lock", f"{shown(work)} is being run")
    try:
        return _run(queue, todo, work, kept, command)
    finally:
        locks.drop(lock)


def _run(queue: dict, todo: list, work: Path, kept: Path, command: str) -> list[str]:
    costs, failed, spent, made = new_costs(queue, todo, work), [], 0.0, 0.0
    for i, key in enumerate(todo):
        left = sum(costs[k] for k in todo[i:])
        estimate = f" · about {units.duration(spent / made * left)} left" if made else ""
        print(f"cell {i + 1}/{len(todo)}: {key[0]}, seed {key[1]}{estimate}", flush=True)
        folder, started = work / cell_name(*key), time.monotonic()
        try:
            shared = adopt(queue[key], folder, sorted(p for p in work.iterdir() if p.is_dir() and p != folder))
            if shared:
                print(f"  taken over from other cells: {', '.join(shared)}", flush=True)
            cost = sum(step_work(s, queue[key]) for s, _, done, _ in plan(queue[key], folder) if not done)
            runner.execute(queue[key], folder, command)
            cells.write(cells.from_run(folder), kept / folder.name)
            spent, made = spent + time.monotonic() - started, made + cost
        except Interrupted:
            raise
        except SrlmError as e:
            failed.append(folder.name)
            print(f"  {folder.name} failed: {_said(e)}", flush=True)
            continue
        try:
            print(f"  report: {shown(sweep_report.write(kept))}", flush=True)
        except SrlmError as e:  # the cell is done all the same
            print(f"  report: not written ({_said(e)})", flush=True)
    return failed


def _said(e: SrlmError) -> str:
    return f"{type(e).__name__}: {printable(without_secrets(str(e)))}"


def cell_name(variant: str, seed: int) -> str:
    return f"{variant}-{seed}"


def is_done(folder: Path, experiment: Experiment) -> bool:
    """Whether a cell's results are there; `ParamError` if other parameters made them: they are not overwritten."""
    if not folder.is_dir():
        return False
    old, new = (cells.flat_params(tree) for tree in (cells.read(folder).params, experiment.tree))
    if old != new:  # trees may differ in sections without parameters
        key = next(k for k in (*new, *old) if k not in old or k not in new or old[k] != new[k])
        raise ParamError(
            f"{shown(folder)} was made with other parameters ({key}: {old.get(key)!r} there, {new.get(key)!r} now). "
            "Give this sweep another --name, or delete that folder."
        )
    return True


def _check_others(base: Experiment, kept: Path, queue: dict) -> None:
    """Refuse a base other than that of the cells that are kept and not asked for now: one report compares them all.

    A cell whose overlay is gone cannot be made again, and is left alone.
    """
    for folder in sorted(p for p in kept.glob("*-*") if p.is_dir()):
        variant, _, seed = folder.name.rpartition("-")
        there = variant == DEFAULT or (PARAMS / "variants" / f"{variant}.yaml").is_file()
        if there and seed.isdecimal() and (variant, int(seed)) not in queue:
            is_done(folder, _cell(base, variant, int(seed)))


def adopt(experiment: Experiment, run: Path, donors: list[Path]) -> list[str]:
    """Take over from other run folders each step that is not done in `run` and would be made again just so.

    A step is the same if its parameters and its inputs' hashes are, and the donor still has its outputs as its manifest
    says: what `plan.status` asks of a step that is done. Steps come in order, so the inputs of later ones are there.
    Models are hard links (they are only ever replaced whole), all else is copied. Returns the names of these steps.
    """
    taken = []
    for step in list_steps(experiment):
        params = experiment.flat(step.stage, step.model, str(run))
        if status(step, params, run)[0] or (run / "steps" / f"{step.name}.work").is_dir():
            continue
        try:
            wanted = fingerprint(step, params, run)
        except FileNotFoundError:  # an input that this cell has yet to make
            continue
        for donor in donors:
            if status(step, params, donor)[0] and fingerprint(step, params, donor) == wanted:
                for path in (*step.writes, f"notebooks/{step.name}.ipynb", f"steps/{step.name}.json"):
                    if is_there(donor / path):
                        found = stored(donor / path)
                        _take(found, (run / path).with_name(found.name))
                taken.append(step.name)
                break
    return taken


def _take(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, copy_function=link_or_copy)
    else:
        shutil.copy2(source, target)


def new_costs(queue: dict, todo: list[tuple[str, int]], work: Path) -> dict[tuple[str, int], float]:
    """What each cell of `todo` still has to make itself, in the units of `tokens.step_work`: neither done nor shared
    with a cell before it."""
    seen: set[str] = set()
    for key, experiment in queue.items():
        made = recipes(experiment)
        seen |= {made[step.name] for step, _, done, _ in plan(experiment, work / cell_name(*key)) if done}
    costs = {}
    for key in todo:
        made = recipes(queue[key])
        costs[key] = sum(step_work(s, queue[key]) for s in list_steps(queue[key]) if made[s.name] not in seen)
        seen |= {*made.values()}
    return costs


def recipes(experiment: Experiment) -> dict[str, str]:
    """For each step all that it is made from, down to the seed: equal texts are the same step."""
    made: dict[str, str] = {}
    of_file: dict[str, str] = {}
    for step in list_steps(experiment):
        params = experiment.flat(step.stage, step.model)
        parts = [step.name, params, sorted({of_file[p] for p in step.reads if p in of_file})]
        digest = made[step.name] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        of_file |= dict.fromkeys(step.writes, digest)
    return made
