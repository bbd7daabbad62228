"""Experiment trackers: trainings may report to one, and what is on disk stays the same."""

import importlib.util
import os
from pathlib import Path

from srlm_utils.errors import ParamError


def check(report_to: str) -> None:
    """Raise `ParamError` for a tracker whose package is not installed."""
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise ParamError(
            f"report_to = {report_to!r}: the package {report_to} is not installed. "
            f".venv/bin/pip install -c constraints.txt -e '.[{report_to}]' brings it; report_to: none goes without."
        )


def arguments(params, work: Path) -> dict:
    """What transformers' TrainingArguments take; `work` is the step's work folder.

    TensorBoard's files go to ``<run>/<model>/tensorboard``: the work folder is cleared when the step is done.
    """
    if params.report_to == "none":
        return {"report_to": "none"}
    run = work.parents[1]
    if params.report_to == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / params.model / "tensorboard")
    return {"report_to": params.report_to, "run_name": f"{run.name}-{params.model}", "project": "srlm"}
