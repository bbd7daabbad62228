"""Trainings on two processes: the losses, weights and errors of one."""

import copy
import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from srlm_utils import chat, launched, ranks, spread_dpo, train, training_params, trainings
from srlm_utils.artefacts import read_json
from srlm_utils.errors import ParamError, StepFailed
from srlm_utils.params import Experiment
from srlm_utils.paths import PARAMS
from tests.test_packing import judgements
from tests.test_train import ANSWERS, PAIRS, FakeStep, params

CONFIGS = sorted((PARAMS / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize(
    "n,accumulation,world", [(8, 4, 2), (9, 4, 2), (7, 4, 4), (1, 4, 4), (3, 8, 2), (5, 3, 1), (12, 6, 3)]
)
def test_a_steps_loss_is_the_mean_of_its_micro_batches_whoever_has_them(n, accumulation, world):
    losses = [float(i * i) for i in range(n)]
    items, weights = ranks.fill_steps(list(range(n)), accumulation, world)
    assert len(items) % world == 0 and items[:n] == list(range(n)) and (world > 1 or len(items) == n)
    for step in range(0, len(items), accumulation):
        own = [items[step : step + accumulation][r::world] for r in range(world)]
        assert len({len(o) for o in own}) == 1  # all call the model equally often
        at = [range(step, min(step + accumulation, len(items)))[r::world] for r in range(world)]
        of_rank = [sum(losses[items[i]] * weights[i] for i in a) / len(a) for a in at]
        alone = losses[step : step + accumulation]
        assert sum(of_rank) / world == pytest.approx(sum(alone) / len(alone))


def test_micro_batches_that_do_not_divide_are_refused():
    with pytest.raises(ParamError, match="make train_batch_size a multiple of 2 times"):
        ranks.fill_steps([1, 2, 3], 3, 2)


def test_figures_are_means_over_the_micro_batches_of_all_processes(monkeypatch):
    other = {"loss": (9.0, 3), "num_tokens": (70, 1), "rank_loss": (4.0, 2)}  # (sum, micro-batches) of the second one

    def gather(everyone, own):
        assert own == {"loss": (1.0, 1), "num_tokens": (30, 1), "rank_loss": (0, 0), "none": (0, 0)}
        everyone[:] = [own, other]

    monkeypatch.setattr(ranks.dist, "all_gather_object", gather)
    logged = []

    class Trainer:
        args = SimpleNamespace(world_size=2)
        _metrics = {"train": {"loss": [1.0], "num_tokens": [30], "rank_loss": [], "none": []}}

        def log(self, logs, start_time=None):
            logged.append(self._metrics["train"])

    type("Spread", (ranks.AcrossRanks, Trainer), {})().log({})
    # 10 / 4, not the mean of 1 and 3; tokens are a running total; what no process has is no figure
    assert logged == [{"loss": [2.5], "num_tokens": [100], "rank_loss": [2.0]}]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_accelerate_reads_every_config(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    assert config.num_processes == config.num_machines * (2 if path.stem.startswith("cpu") else 8)
    assert training_params.read_config(str(path))["num_processes"] == config.num_processes
    known = {a.dest for a in launch_command_parser()._actions}
    named = {**config.fsdp_config, **config.deepspeed_config}
    assert not set(named) - known, "options that accelerate launch does not have"
    assert bool(config.fsdp_config) == (config.distributed_type == "FSDP")


@pytest.mark.parametrize(
    "values,says",
    [
        ({"launch": "params/accelerate/none.yaml"}, "no such file"),
        ({"launch": "README.md"}, "not an accelerate config"),
        (
            {"launch": "params/accelerate/cpu_ddp.yaml", "train_batch_size": 6, "micro_batch_size": 2},
            "starts 2 processes",
        ),
        ({"load_in_4bit": True, "lora_r": 0}, "load_in_4bit"),
        ({"keep_adapters": True, "lora_r": 0}, "keep_adapters"),
        ({"train_batch_size": 6, "micro_batch_size": 4}, "train_batch_size = 6 is no multiple of micro_batch_size = 4"),
        ({"dtype": "float16"}, r"for writing and judging.*Set sft\.dtype and dpo\.dtype to bfloat16"),
        (
            {"launch": "params/accelerate/deepspeed_zero3_8gpu.yaml", "load_in_4bit": True, "micro_batch_size": 1},
            "DeepSpeed cannot divide weights in 4 bits. Take an fsdp2 config",
        ),
    ],
)
def test_what_cannot_be_launched_is_refused_before_anything_runs(values, says):
    for stage, model in (("02_sft", "M1"), ("07_dpo", "M2")):
        flat = Experiment({"common": values}).flat(stage, model, "run")
        with pytest.raises(ParamError, match=says):
            training_params.check(flat)
    training_params.check(Experiment({}).flat("02_sft", "M1", "run"))
    training_params.check(Experiment({}).flat("01_seed_data", "run", "run"))
    training_params.check(Experiment({"common": {"dtype": "float16"}}).flat("05_judge", "M1", "run"))


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(training_params.importlib.util, "find_spec", lambda name: None)
    launch = {"launch": "params/accelerate/deepspeed_zero3_8gpu.yaml", "train_batch_size": 8, "micro_batch_size": 1}
    with pytest.raises(ParamError, match=r"deepspeed is not installed.*\[deepspeed\]"):
        training_params.check(Experiment({"common": launch}).flat("02_sft", "M1", "run"))


@pytest.mark.parametrize("said", ["{fsdp_version: 1}", ""])
def test_fsdp1_is_refused(tmp_path, said):
    path = tmp_path / "one.yaml"
    path.write_text(f"distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {said}\n")
    with pytest.raises(ParamError, match="fsdp_version must be 2"):
        training_params.read_config(str(path))


def test_qlora_is_refused_without_cuda(tiny):
    with pytest.raises(ParamError, match="needs a CUDA GPU"):
        train.load(tiny, params(load_in_4bit=True), four_bit=True)


def test_the_process_that_was_killed_explains_a_failure():
    said = (
        "Failures:\n[0]:\n  time      : x\n  rank      : {} (local_rank: 0)\n  exitcode  : {} (pid: 7)\n"
        "Root Cause (first observed failure):\n[0]:\n  rank      : {} (local_rank: 1)\n  exitcode  : {} (pid: 8)\n"
    )
    assert trainings.failed(said.format(1, -9, 0, 1)) == (1, -9)  # the other saw its connection break
    assert trainings.failed(said.format(1, -15, 0, 1)) == (0, 1)  # the launcher ended it, because of the other
    assert trainings.failed(said.format(1, 1, 0, 1)) == (0, 1)
    assert trainings.failed("no module named accelerate") is None


def test_processes_end_with_their_kernel(monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    kernel = {"pid": gone.pid, "host": os.uname().nodename, "created": psutil.Process(gone.pid).create_time()}
    gone.wait()
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit):
        launched._end_with(kernel)
    me = psutil.Process()
    with pytest.raises(SystemExit):  # another process has its number by now
        launched._end_with(kernel | {"pid": me.pid})
    launched._end_with(kernel | {"host": "another machine"})  # nothing to watch


def test_a_process_that_ends_by_itself_is_no_error(monkeypatch, tmp_path):
    class Process:
        n_killed = 0

        def kill(self):
            Process.n_killed += 1
            raise psutil.NoSuchProcess(1)

    monkeypatch.setattr(trainings, "_processes", lambda folder: iter([Process(), Process()]))
    monkeypatch.setattr(psutil, "wait_procs", lambda processes, timeout: ([], processes))
    trainings._end(SimpleNamespace(poll=lambda: 0), tmp_path)
    trainings._end_orphans(tmp_path)
    assert Process.n_killed == 4


def test_other_machines_are_told_what_to_start(tiny, tmp_path, monkeypatch):
    step = step_of(tmp_path, launch="params/accelerate/fsdp2_2x8gpu.yaml")
    made = trainings.Launched("sft", step, source_of(tiny), None, [], 1.0)
    assert made.command(1)[-5:] == ["--machine_rank", "1", "-m", "srlm_utils.launched", str(made.folder / "job.json")]
    monkeypatch.setenv("MASTER_ADDR", "node7")
    assert made.command(0)[-5:-3] == ["--main_process_ip", "node7"]


@pytest.mark.parametrize("dtype,said", [("float32", ["no"]), ("bfloat16", ["bf16"]), ("auto", [])])
def test_the_steps_dtype_counts_and_not_the_configs(tiny, tmp_path, dtype, said):
    step = step_of(tmp_path, launch="params/accelerate/fsdp2_8gpu.yaml", dtype=dtype)  # which has bf16
    words = trainings.Launched("sft", step, source_of(tiny), None, [], 1.0).command()
    assert [b for a, b in zip(words, words[1:], strict=False) if a == "--mixed_precision"] == said


def test_other_machines_join_behind_what_an_earlier_attempt_left(tiny, tmp_path, monkeypatch):
    step = step_of(tmp_path, launch="params/accelerate/fsdp2_2x8gpu.yaml")
    made = trainings.Launched("sft", step, source_of(tiny), None, [], 1.0)
    job, old = made.folder / "job.json", made.folder / "ranks/8.log"
    old.parent.mkdir()
    old.write_text("of an attempt before")
    assert not job.exists()

    class Begun(Exception):
        pass

    def launch():
        assert job.exists() and not old.exists()
        raise Begun

    monkeypatch.setattr(made, "_launch", launch)
    with pytest.raises(Begun):
        made.run()
    assert read_json(job)["launcher"][:2] == ["--config_file", "params/accelerate/fsdp2_2x8gpu.yaml"]


def test_gradients_are_divided_after_each_micro_batch_where_weights_are(tmp_path, monkeypatch):
    how = {"per_device": 1, "accumulation": 4, "n_items": 8}
    assert train.common_args(params(), tmp_path, **how)["accelerator_config"] is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = train.common_args(params(), tmp_path, **how)["accelerator_config"]
    assert args["gradient_accumulation_kwargs"] == {"sync_each_batch": True}


def test_a_reference_that_another_machine_wrote_is_not_waited_for(tmp_path):
    here = SimpleNamespace(file=tmp_path / "reference.json", state=SimpleNamespace(global_step=0), rows=[1, 2])
    here.args, here.accelerator = SimpleNamespace(world_size=1), SimpleNamespace(wait_for_everyone=lambda: None)
    here._own_reference = lambda: {1: [-3.0, -4.0], 0: [-1.0, -2.0]}
    here.is_world_process_zero = lambda: False
    spread_dpo.SpreadDPOTrainer.read_reference(here)
    assert here.reference == [[-1.0, -2.0], [-3.0, -4.0]]
    here.is_world_process_zero = lambda: True
    spread_dpo.SpreadDPOTrainer.read_reference(here)
    kept, here.state.global_step, here.reference = here.reference, 5, None
    spread_dpo.SpreadDPOTrainer.read_reference(here)  # an attempt that continues
    assert here.reference == kept


def step_of(folder, **kw):
    step = FakeStep()
    step.params, step.work, step.name = params(**kw), folder / "02_sft@M1.work", "02_sft@M1"
    step.work.mkdir(parents=True)
    return step


def source_of(folder):
    return {"folder": folder, "chat_template": "", "trust_remote_code": False}


def rows_of(kind, tok):
    """Rows whose micro-batches do not divide evenly: the last step of both kinds holds fewer, the last one is short."""
    if kind == "dpo":
        pairs = [p | {"chosen": p["chosen"] + " Indeed." * (i % 4)} for i, p in enumerate(PAIRS[:11])]
        return train.dpo_rows(tok, pairs, 2048)[0]
    data = [{"prompt": q, "response": a} for q, a in ANSWERS[:5]]
    data += judgements() + judgements(prompt="Name a tree.", group="q")
    return train.sft_rows(tok, data, 2048)[0]


HOW = {
    "sft": {"rank_weight": 1.0, "micro_batch_size": 8, "train_batch_size": 16},
    "dpo": {"nll_weight": 0.5, "micro_batch_size": 4, "train_batch_size": 8},
}


class Compared:
    """A selection that keeps the last step, and the weights of all models that it was shown."""

    def __init__(self):
        self.rows, self.seen = [], {}

    def compare(self, n, model, tokenizer, *, keep):
        assert not keep and tokenizer.chat_template
        self.rows.append({"step": n})
        self.seen[n] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @property
    def kept(self):
        return self.rows[-1]["step"]


class Watch(TrainerCallback):
    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 2:
            self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(tiny, folder, kind, selection=None, watch=None, **kw):
    """(training, its log, the folder of its model)."""
    tok = chat.load_tokenizer(tiny)
    step = step_of(folder, **{"learning_rate": 1e-3, "final_learning_rate": 1e-4, "epochs": 3} | HOW[kind] | kw)
    training = trainings.begin(kind, step, source_of(tiny), tok, rows_of(kind, tok), 0.9)
    if watch:
        training.trainer.add_callback(watch)
    log = training.run(selection)
    training.save(folder / "model", "# card\n")
    return training, log, folder / "model"


def assert_the_same_model(one, other):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config,kind,lora_r",
    [("cpu_ddp", "sft", 4), ("cpu_ddp", "dpo", 0), ("cpu_fsdp2", "sft", 0), ("cpu_fsdp2", "dpo", 4)],
)
def test_two_processes_train_as_one(tiny, tmp_path, capsys, config, kind, lora_r):
    how = {"lora_r": lora_r, "save_steps": 2, "keep_adapters": bool(lora_r), "gradient_checkpointing": lora_r == 0}
    watch, compared = Watch(), Compared()
    alone, log, one = trained(tiny, tmp_path / "one", kind, watch=watch, **how)
    capsys.readouterr()
    how |= {"launch": f"params/accelerate/{config}.yaml", "select_steps": 2}
    both, log2, two = trained(tiny, tmp_path / "two", kind, compared, **how)
    said = capsys.readouterr().out
    assert f"2 processes, {'FSDP' if 'fsdp' in config else 'MULTI_CPU'}, on cpu" in said
    assert f"step {len(log)} of {len(log)}: loss {log2.loss.iloc[-1]:.4f}" in said
    assert both.step.n == len(log2) == len(log) > 3
    assert log2.loss.tolist() == pytest.approx(log.loss.tolist(), abs=1e-4)
    assert log2.grad_norm.tolist() == pytest.approx(log.grad_norm.tolist(), rel=1e-3, abs=1e-4)
    figures = set(log.columns) - {"step", "epoch", "num_tokens"}
    assert figures <= set(log2.columns) and {"text_loss" if kind == "sft" else "rewards/margins"} <= figures
    for name in figures - {"entropy", "mean_token_accuracy"}:
        assert log2[name].tolist() == pytest.approx(log[name].tolist(), rel=1e-3, abs=1e-4, nan_ok=True), name
    if kind == "dpo":
        ours = alone.reference().to_numpy()  # in the order of training, three times each
        assert len(both.reference()) == 11
        assert all(abs(ours - row).max(axis=1).min() < 1e-3 for row in both.reference().to_numpy())
    assert list(compared.seen) == [0, *range(2, len(log), 2), len(log)]
    if lora_r == 0:
        for name, tensor in watch.weights.items():
            torch.testing.assert_close(compared.seen[2][name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    assert_the_same_model(one, two)
    AutoModelForCausalLM.from_pretrained(two)  # a plain model, whatever the checkpoints are
    (checkpoint,) = (tmp_path / "two").glob("*.work/checkpoints/checkpoint-*")
    assert (checkpoint / "pytorch_model_fsdp_0").is_dir() == ("fsdp" in config)
    assert (two / "adapter/adapter_model.safetensors").is_file() == bool(lora_r)
    assert not list((tmp_path / "two").glob(".*"))


def test_a_checkpoint_counts_as_whole_when_every_process_has_written_its_part():
    done = []

    class Trainer:
        accelerator = SimpleNamespace(wait_for_everyone=lambda: done.append("all there"))

        def _save_rng_state(self, output_dir):
            done.append(f"own state in {output_dir}")

        def _save_checkpoint(self):  # transformers' order, which the installed version still has
            self._save_rng_state("here")
            done.append("state of the trainer")

    type("Spread", (ranks.AcrossRanks, Trainer), {})()._save_checkpoint()
    assert done == ["own state in here", "all there", "state of the trainer"]
    theirs = inspect.getsource(transformers.Trainer._save_checkpoint)
    assert 0 < theirs.index("self._save_rng_state(") < theirs.index("save_to_json(")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_ddp", "cpu_fsdp2"])
def test_a_killed_process_is_named_and_the_training_continues(tiny, tmp_path, config):
    how = {"lora_r": 0, "epochs": 12, "save_steps": 2}
    _, log, one = trained(tiny, tmp_path / "one", "dpo", **how)
    how["launch"] = f"params/accelerate/{config}.yaml"
    tok = chat.load_tokenizer(tiny)
    step = step_of(tmp_path / "two", **{"learning_rate": 1e-3, "final_learning_rate": 1e-4} | HOW["dpo"] | how)
    args = ("dpo", step, source_of(tiny), tok, rows_of("dpo", tok), 0.9)

    def kill():
        while not list(step.work.glob("checkpoints/*/trainer_state.json")):
            time.sleep(0.02)
        os.kill(read_json(step.work / "launched/ranks/1.json")["pid"], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(StepFailed, match=r"process 1 of 2 .* killed by SIGKILL") as e:
        trainings.begin(*args).run()
    assert "Its last lines" in str(e.value) and "continues from the checkpoint of step" in str(e.value)
    assert not list(trainings._processes(step.work / "launched"))  # the other one is gone too
    reached = train.step_of(train.last_checkpoint(step.work / "checkpoints"))
    assert 2 <= reached < len(log)
    training = trainings.begin(*args)
    continued = training.run()
    training.save(tmp_path / "two/model", "# card\n")
    assert f"continuing from step {reached}" in (step.work / "launched/said.txt").read_text()
    assert continued.loss.tolist() == pytest.approx(log.loss.tolist(), abs=1e-4)
    assert_the_same_model(one, tmp_path / "two/model")


@pytest.mark.slow
def test_log_probabilities_are_not_rounded_where_the_model_is_in_bfloat16(tiny, tmp_path):
    """accelerate's FSDP rounds what leaves a model: margins of small updates would be steps of a quarter."""
    how = {"dtype": "bfloat16", "launch": "params/accelerate/cpu_fsdp2.yaml", "epochs": 2}
    training, log, _ = trained(tiny, tmp_path, "dpo", **how)
    figures = torch.tensor(training.reference().to_numpy() * 1.0)
    assert (figures != figures.bfloat16()).float().mean() > 0.9
    assert log["rewards/margins"].iloc[0] == pytest.approx(0, abs=1e-3) and log["rewards/margins"].iloc[-1] > 0.05


@pytest.mark.slow
def test_an_error_of_the_kit_comes_through_as_it_is(tiny, tmp_path):
    how = {"launch": "params/accelerate/cpu_ddp.yaml", "learning_rate": 1e30, "lora_r": 0}
    with pytest.raises(StepFailed, match=r"became (nan|inf) at step \d+, on rows"):
        trained(tiny, tmp_path, "dpo", **how)


def test_the_base_of_adapters_is_named_without_its_place():
    kept = params(keep_adapters=True)
    for folder, name in (
        ("/cache/hub/models--owner--name-8B/snapshots/0a1b", "owner/name-8B"),
        ("/cache/models/tiny-random-v1", "tiny-random-v1"),
        (str(PARAMS.parent / "results/x/M1/model"), "results/x/M1/model"),
    ):
        assert trainings.base_name({"folder": folder}, kept) == name
    assert trainings.base_name({"folder": "/a/b"}, params()) == ""


def test_adapters_that_are_kept_are_what_was_merged(tiny, tmp_path):
    from peft import PeftModel

    _, _, folder = trained(tiny, tmp_path, "sft", keep_adapters=True, learning_rate=1e-2)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    start = copy.deepcopy(base.state_dict())
    model = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    saved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    moved = 0.0
    for (name, ours), theirs in zip(model.named_parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
        moved += float((theirs.detach() - start[name]).norm())
    assert moved > 0.1
