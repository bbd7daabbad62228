"""``srlm run | sweep | plan | estimate | status | verify | share | compare | push | agree``: the command line.

Exit codes: 0 done, 1 a step failed or `verify` found a fault, 2 bad input.
"""

import argparse
import contextlib
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import get_args

from srlm_utils.errors import ParamError, SrlmError, StepFailed
from srlm_utils.params import Experiment, JudgeMode
from srlm_utils.paths import RESULTS, run_folder, shown
from srlm_utils.plan import idle_sections, plan
from srlm_utils.printable import printable, without_secrets


def _experiment_args(parser: argparse.ArgumentParser, name: str = "--run-name", where: str = "results/") -> None:
    parser.add_argument(
        "params", nargs="+", type=Path, metavar="PARAMS", help="a params file, then overlays; later ones win"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUE",
        dest="sets",
        help="one parameter, e.g. dpo.beta=0.2 or by_model.M2.dpo.beta=0.05",
    )
    what = f"folder below {where} (default: the params file's name)"
    parser.add_argument(name, default="", dest="run_name", metavar="NAME", help=what)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="srlm", description="Self-Rewarding Language Models, notebook by notebook.")
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run every step that is not done")
    _experiment_args(run)
    which = run.add_mutually_exclusive_group()
    which.add_argument("--from", dest="start", default="", metavar="STEP", help="skip the steps before this one")
    which.add_argument("--only", default="", metavar="STEP", help="run this step alone, e.g. 05_judge@M1")
    run.add_argument("--force", action="store_true", help="run steps even if they are done")
    sweep = commands.add_parser("sweep", help="run variants with several seeds, and compare them")
    _experiment_args(sweep, "--name", "results/sweeps/")
    sweep.add_argument(
        "--variants", required=True, metavar="A,B", help="overlays of params/variants; default is the base as it is"
    )
    sweep.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds of each, from the base's own on")
    show = commands.add_parser("plan", help="list the steps, done or not, and why")
    _experiment_args(show)
    show.add_argument("--tokens", action="store_true", help="tokens that each stage makes, judges and trains")
    guess = commands.add_parser("estimate", help="hours, memory and disk that a run will take; nothing is run")
    _experiment_args(guess)
    guess.add_argument("--gpus", type=int, default=1, metavar="N", help="how many (default: 1)")
    guess.add_argument("--gpu", default="h100", choices=["h100", "a100", "cpu"], help="of which kind (default: h100)")
    status = commands.add_parser("status", help="what a run folder holds")
    status.add_argument("run", type=Path, metavar="RUN", help="e.g. results/quickstart")
    verify = commands.add_parser("verify", help="check a run folder: hashes, ids, references, leaks")
    verify.add_argument("run", type=Path, metavar="RUN", help="e.g. results/quickstart")
    share = commands.add_parser("share", help="a run as pages that open offline in any browser")
    share.add_argument("run", type=Path, metavar="RUN", help="e.g. results/quickstart")
    share.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: RUN/share)")
    push = commands.add_parser("push", help="a model and its card on the Hugging Face hub; HF_TOKEN has the token")
    push.add_argument("run", type=Path, metavar="RUN", help="e.g. results/quickstart")
    push.add_argument("model", metavar="MODEL", help="SFT, M1, M2, ...")
    push.add_argument("--repo", required=True, metavar="OWNER/NAME", help="where to; made if it is not there, private")
    push.add_argument("--data", action="store_true", help="also OWNER/NAME-aift: what its ancestors wrote and scored")
    side = commands.add_parser("compare", help="runs side by side: parameters, figures, differences with intervals")
    side.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="two or more; the first is what others differ from"
    )
    side.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: results/compare_A_B)")
    agree = commands.add_parser("agree", help="how well a model judges ranked replies")
    agree.add_argument("--model", required=True, help="a folder such as results/quickstart/M1/model, or a hub id")
    agree.add_argument(
        "--ranked", required=True, metavar="FILE", help="ranked rows, Open Assistant trees or a preference set"
    )
    agree.add_argument("--against", default="", metavar="MODEL", help="another model on the same replies, and the gain")
    agree.add_argument("--mode", default="expected", choices=get_args(JudgeMode))
    agree.add_argument("--rubric", default="short", help="short, additive, multiple_choice, or a template's path")
    agree.add_argument(
        "--all-turns", action="store_true", help="of Open Assistant later turns too, not the first alone"
    )
    agree.add_argument("--language", default="en", help="of Open Assistant messages; '' takes every one (default: en)")
    agree.add_argument("--limit", type=int, default=0, metavar="N", help="the first N prompts")
    agree.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return top


def _run_dir(args) -> Path:
    name = args.run_name or args.params[0].stem
    folder = (RESULTS / name).resolve()
    if folder.parent != RESULTS.resolve() or name.startswith("."):
        raise ParamError(f"run name {name!r}: expected a plain folder name below results/.")
    return folder


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return COMMANDS[args.command](args)
    except StepFailed as e:
        print(f"srlm: {printable(without_secrets(str(e)))}", file=sys.stderr)
        return 1
    except SrlmError as e:
        print(f"srlm: {type(e).__name__}: {printable(without_secrets(str(e)))}", file=sys.stderr)
        return 2


def _experiment(args) -> Experiment:
    """The experiment of a command line; what it asks for and does not reach is said first."""
    experiment = Experiment.load(args.params, args.sets)
    for line in (*experiment.shadowed, *idle_sections(experiment)):
        print(f"WARNING: {line}", file=sys.stderr)
    return experiment


@contextlib.contextmanager
def _resumable(args, **options: str):
    """The command that goes on with what runs inside, which SIGTERM ends as Ctrl-C does: both say that command."""
    program = Path(sys.argv[0])
    found = shutil.which("srlm") or program.name != "srlm"
    words = ["srlm" if found else str(program), args.command, *map(str, args.params)]  # make calls it by its path
    for s in args.sets:
        words += ["--set", s]
    for option, value in options.items():
        words += [f"--{option.replace('_', '-')}", value] if value else []
    command = shlex.join(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield command
    except KeyboardInterrupt:  # between two steps
        raise StepFailed(f"interrupted; what was made is kept\n  continue with: {command}") from None


def _run(args) -> int:
    from srlm_utils.runner import execute

    experiment = _experiment(args)
    with _resumable(args, run_name=args.run_name, **{"from": args.start}, only=args.only) as command:
        execute(experiment, _run_dir(args), command, start=args.start, only=args.only, force=args.force)
    return 0


def _sweep(args) -> int:
    from srlm_utils import sweep

    name = _run_dir(args).name
    variants = [v.strip() for v in args.variants.split(",")]
    base = _experiment(args)
    with _resumable(args, variants=args.variants, seeds=str(args.seeds), name=name) as command:
        failed = sweep.run(base, variants, args.seeds, name, command)
    if failed:
        raise StepFailed(f"{len(failed)} cells failed: {', '.join(failed)}. The same command tries them again.")
    return 0


def _plan(args) -> int:
    from srlm_utils.tokens import token_table

    experiment = _experiment(args)
    if args.tokens:
        print(token_table(experiment))
        return 0
    run = _run_dir(args)
    rows = plan(experiment, run)
    for step, _, done, why in rows:
        print(f"{'done' if done else 'run ':<5} {step.name:<22} {'' if done else why}".rstrip())
    print(f"{sum(r[2] for r in rows)} of {len(rows)} steps done in {run.name}")
    return 0


def _estimate(args) -> int:
    from srlm_utils.estimate import DEVICES, report

    print(report(_experiment(args), args.gpus, DEVICES[args.gpu]))
    return 0


def _status(args) -> int:
    from srlm_utils.runner import stale_steps, status_rows

    run = run_folder(args.run)
    rows, damaged = status_rows(run)
    for r in rows:
        figures = ", ".join(f"{k} {v}" for k, v in r["figures"].items() if not isinstance(v, dict))
        print(f"{r['step']:<22} {r['seconds']:>7.0f} s  {r['peak_memory_gb']:>5.1f} GB  {figures}")
    print(f"{len(rows)} steps done, {sum(r['seconds'] for r in rows) / 60:.1f} min of work")
    for work in sorted((run / "steps").glob("*.work")):
        if not work.with_suffix(".json").exists():
            print(f"{work.stem:<22} was begun and not finished")
    for name in damaged:
        print(f"{name:<22} its manifest is damaged: srlm run makes it again")
    for name, why in stale_steps(run):
        if name not in damaged:
            print(f"{name:<22} is stale: {why}")
    return 0


def _verify(args) -> int:
    from srlm_utils.verify import verify

    found = verify(args.run)
    for note in found.notes:
        print(f"note: {note}")
    for finding in found.findings:
        print(printable(str(finding)))
    print(f"{args.run}: {found.n_files} files, {found.n_rows} rows checked, {len(found.findings)} findings")
    return 1 if found.findings else 0


def _share(args) -> int:
    from srlm_utils.share import share

    run = run_folder(args.run)
    out = args.out.resolve() if args.out else run / "share"
    files = share(run, out)
    print(f"{shown(out / 'index.html')}: {len(files)} files, {sum(p.stat().st_size for p in files) / 1e6:.1f} MB")
    return 0


def _push(args) -> int:
    from srlm_utils.hub import push

    for address in push(run_folder(args.run), args.model, args.repo, data=args.data):
        print(address)
    return 0


def _compare(args) -> int:
    from srlm_utils.compare import compare

    runs = [run_folder(run) for run in args.runs]
    out = args.out.resolve() if args.out else RESULTS / "_".join(["compare", *(run.name for run in runs)])
    compare(runs, out)
    print(shown(out / "index.html"))
    return 0


def _agree(args) -> int:
    from srlm_utils.agree import report

    print(report(args))
    return 0


COMMANDS = {
    "run": _run,
    "sweep": _sweep,
    "plan": _plan,
    "estimate": _estimate,
    "status": _status,
    "verify": _verify,
    "share": _share,
    "compare": _compare,
    "push": _push,
    "agree": _agree,
}


if __name__ == "__main__":
    sys.exit(main())
