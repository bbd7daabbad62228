"""report_to: passed on to the trainer, refused before a model loads, and never instead of the log on disk."""

import importlib.util
from pathlib import Path

import pytest

from srlm_utils import tracking, train
from srlm_utils.errors import ParamError
from srlm_utils.params import Experiment
from srlm_utils.runner import execute
from srlm_utils.step import begin_step
from tests.conftest import ROOT
from tests.test_train import ANSWERS, FakeStep, params

SPEC = importlib.util.find_spec


def without(monkeypatch, package: str) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda n, *a: None if n == package else SPEC(n, *a))


def test_a_missing_tracker_is_named_before_any_kernel_starts(monkeypatch, tmp_path):
    without(monkeypatch, "wandb")
    experiment = Experiment.load([ROOT / "params/smoke.yaml"], ["dpo.report_to=wandb"])
    with pytest.raises(ParamError, match=r"wandb is not installed.*\.\[wandb\]"):
        execute(experiment, tmp_path / "run", "srlm run")
    assert not (tmp_path / "run").exists()
    flat = experiment.flat("07_dpo", "M2", str(tmp_path / "run"))
    with pytest.raises(ParamError, match="wandb is not installed"):
        begin_step("07_dpo", flat)


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ParamError, match="report_to = 'tensorbord'"):
        Experiment({"sft": {"report_to": "tensorbord"}})


def test_a_tracker_gets_every_step_and_the_log_stays(tiny, tmp_path, monkeypatch):
    """A stand-in for TensorBoard's callback: transformers makes it from the name, and it is told every step."""
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    told = []

    class Fake(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told.append((args.run_name, args.project, logs.get("loss")))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Fake)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    p = params(report_to="tensorboard", run_dir="results/a", model="M1")
    net, tok = train.load(tiny, p)
    rows, _ = train.sft_rows(tok, [{"prompt": q, "response": a} for q, a in ANSWERS], 512)
    log = train.train(train.sft_trainer(net, tok, rows, p, tmp_path / "a/steps/02_sft@M1.work"), FakeStep())
    losses = [loss for _, _, loss in told if loss is not None]
    assert losses == list(log.loss) and len(losses) == 3
    assert {t[:2] for t in told} == {("a-M1", "srlm")}
    assert Path(tracking.os.environ["TENSORBOARD_LOGGING_DIR"]) == tmp_path / "a/M1/tensorboard"


def test_tensorboards_files_outlive_the_work_folder(tiny, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    p = params(report_to="tensorboard", run_dir="results/a", model="M1")
    net, tok = train.load(tiny, p)
    rows, _ = train.sft_rows(tok, [{"prompt": q, "response": a} for q, a in ANSWERS], 512)
    log = train.train(train.sft_trainer(net, tok, rows, p, tmp_path / "a/steps/02_sft@M1.work"), FakeStep())
    events = EventAccumulator(str(tmp_path / "a/M1/tensorboard")).Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(list(log.loss), rel=1e-4)
