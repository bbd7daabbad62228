"""What is said before a step that cannot fit, and of files that are not whole."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from srlm_utils import cli, devices, engine, estimate, resources, seed_model, train, warm
from srlm_utils.artefacts import read_json, write_json
from srlm_utils.engine import Engine
from srlm_utils.errors import ModelError, ResourceError
from srlm_utils.params import Dpo, Experiment, Judge, Sft, stage_key
from srlm_utils.paths import EXAMPLE
from srlm_utils.plan import list_steps
from tests.test_train import params


@pytest.fixture
def large(tmp_path):
    """The head of a model with a billion parameters; its weights are a hole in the file."""
    shape = [1000, 1_000_000]
    head = json.dumps({"w": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 2 * 10**9]}}).encode()
    with open(tmp_path / "model.safetensors", "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        f.truncate(8 + len(head) + 2 * 10**9)
    config = {"num_hidden_layers": 20, "hidden_size": 2000, "intermediate_size": 8000, "vocab_size": 50_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def machine(monkeypatch):
    """A machine without a GPU and with so many free bytes of memory and disk, whose processor has bfloat16."""

    def free(memory=1e15, disk=1e15, bfloat16=True):
        monkeypatch.setattr(resources, "free_memory", lambda: memory)
        monkeypatch.setattr(resources, "free_disk", lambda folder: disk)
        monkeypatch.setattr(resources, "has_gpu", lambda: False)
        monkeypatch.setattr(devices, "cpu_features", lambda: {"avx512_bf16": bfloat16})

    return free


def ask(large, kind, stage, **values):
    resources.check(f"{stage}@M1", stage, kind(**values).model_dump(), large / "run", large)


def test_memory_is_asked_for_before_a_step(large, machine, capsys):
    machine(memory=10e9)
    with pytest.raises(ResourceError, match=r"02_sft@M1 needs at least 16\.5 GB .* 10\.0 GB are free: set sft.lora_r"):
        ask(large, Sft, "02_sft", lora_r=0)
    ask(large, Sft, "02_sft", micro_batch_size=1)
    assert capsys.readouterr().out == ""
    ask(large, Sft, "02_sft", micro_batch_size=64)
    assert capsys.readouterr().out.endswith("10.0 GB are free: lower sft.micro_batch_size.\n")
    ask(large, Judge, "05_judge", batch_size=4000)
    assert "lower judge.batch_size" in capsys.readouterr().out
    machine(memory=1e9)
    with pytest.raises(ResourceError, match=r"05_judge@M1 needs at least 2\.5 GB of memory.*seed_model"):
        ask(large, Judge, "05_judge")
    ask(large, Judge, "05_judge", device="cuda")  # another memory, which is asked when it is there


def test_memory_is_counted_in_the_dtype_that_the_processor_has(large, machine, monkeypatch):
    machine(memory=3e9)
    ask(large, Judge, "05_judge")
    with pytest.raises(ResourceError, match=r"02_sft@M1 needs at least 4\.5 GB of memory"):  # to be merged
        ask(large, Sft, "02_sft")
    machine(memory=3e9, bfloat16=False)
    with pytest.raises(ResourceError, match=r"05_judge@M1 needs at least 4\.5 GB of memory"):
        ask(large, Judge, "05_judge")
    ask(large, Judge, "05_judge", dtype="bfloat16")
    ask(large, Judge, "05_judge", engine="vllm")
    monkeypatch.setattr(resources, "has_gpu", lambda: True)
    ask(large, Judge, "05_judge")
    with pytest.raises(ResourceError, match=r"needs at least 4\.5 GB of memory"):
        ask(large, Judge, "05_judge", device="cpu")


@pytest.fixture
def smollm2(large):
    """The head of a model with SmolLM2-135M's shape, whose heads share keys and values."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    config = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49_152} | heads
    (large / "config.json").write_text(json.dumps(config))
    return large


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize(
    "name,values",
    [
        ("02_sft@M1", {"micro_batch_size": 8}),
        ("02_sft@M1", {"micro_batch_size": 8, "gradient_checkpointing": True}),
        ("07_dpo@M2", {"micro_batch_size": 8}),
        ("07_dpo@M2", {"micro_batch_size": 8, "gradient_checkpointing": True}),
        ("05_judge@M1", {"batch_size": estimate.TEXTS, "max_new_tokens": 96}),
        ("08_evaluate@M1", {"batch_size": estimate.TEXTS, "max_new_tokens": 96, "judge_max_new_tokens": 200}),
    ],
)
def test_what_is_estimated_is_what_a_step_is_warned_of(smollm2, machine, capsys, name, values, bfloat16):
    machine(bfloat16=bfloat16)
    stage, model = name.split("@")
    experiment = Experiment({"common": {"seed_model": str(smollm2)}, stage_key(stage): values})
    step = next(s for s in list_steps(experiment) if s.name == name)
    expected = estimate.step_cost(step, experiment, 1, estimate.CPU).memory
    machine(memory=expected - 0.2e9, bfloat16=bfloat16)
    resources.check(name, stage, experiment.flat(stage, model), smollm2 / "run", smollm2)
    said = re.search(rf"WARNING: {name} may need (\d+\.\d) GB", capsys.readouterr().out)
    # adapters, and what AdamW keeps of them, are estimated alone
    assert float(said.group(1)) == pytest.approx(expected / 1e9, abs=0.15)


def test_keys_that_heads_share_are_kept_once(smollm2, tiny, monkeypatch):
    size = resources.read_size(smollm2)
    assert replace(size, parameters=134.5e6) == estimate.SIZES["smollm2-135m-instruct"]
    assert size.layers * size.kept * 2 == 23_040  # bytes a token
    model, one = Engine(tiny, dtype="float32", device="cpu"), resources.read_size(seed_model.Path(tiny))
    text = resources.text_bytes(one.layers, one.kept, one.vocabulary, 100, 4)
    for free, fit in ((2 * 64 * text, 64), (2 * 64 * text - 1, 32)):
        monkeypatch.setattr(engine, "free_memory", lambda free=free: free)
        assert model._fitting(100) == fit


def test_disk_is_asked_for_before_a_step(large, machine):
    machine(disk=10e9)
    ask(large, Dpo, "07_dpo")
    ask(large, Dpo, "07_dpo", lora_r=0, save_steps=0)
    with pytest.raises(ResourceError, match=r"M1 needs 26\.1 GB of disk.*set dpo.save_steps to 0.* take 24\.0 GB"):
        ask(large, Dpo, "07_dpo", lora_r=0)
    machine(disk=1e6)
    with pytest.raises(ResourceError, match=r"needs 0\.1 GB of disk .*Free some, or move the run\."):
        resources.check("09_report@run", "09_report", {}, large / "run", None)


def test_what_a_container_keeps_of_files_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "GROUP", tmp_path)
    without = resources.free_memory()
    assert without > 100_000
    (tmp_path / "memory.max").write_text("100000\n")
    (tmp_path / "memory.current").write_text("90000\n")
    (tmp_path / "memory.stat").write_text("anon 50000\ninactive_file 30000\nactive_file 10000\n")
    assert resources.free_memory() == 100_000 - 90_000 + 30_000
    (tmp_path / "memory.max").write_text("max\n")
    assert resources.free_memory() > 100_000


@pytest.mark.parametrize("device", ["/dev/nvidiactl", "/dev/kfd", "/dev/dxg"])
def test_a_gpu_is_one_for_memory_and_for_warm_kernels_alike(large, monkeypatch, device):
    monkeypatch.setattr(resources, "free_memory", lambda: 0)
    monkeypatch.setattr(resources.Path, "exists", lambda path: str(path) == device)
    assert resources.has_gpu() and not warm.possible()
    monkeypatch.setattr(resources, "free_disk", lambda folder: 1e15)
    ask(large, Judge, "05_judge")  # whose memory is not the machine's


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert resources.free_disk(tmp_path / "a/b/c") == resources.free_disk(tmp_path) > 0


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_a_model_file_that_was_cut_short_is_named(tiny, tmp_path, cut):
    folder = tmp_path / "mine"
    shutil.copytree(tiny, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    for load in (Engine, lambda f: train.load(f, params()), seed_model.fetch):
        with pytest.raises(ModelError, match=r"model\.safetensors: found [\d,]+ bytes, .*was cut short or damaged"):
            load(str(folder))


def test_pickles_are_not_loaded_by_anyone(tiny, tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for load in (Engine, lambda f: train.load(f, params()), seed_model.fetch):
        with pytest.raises(ModelError, match=r"pytorch_model\.bin.*A pickle runs code"):
            load(str(folder))


def test_parameters_are_counted_from_the_heads(tiny, large):
    assert resources.n_parameters(large) == 10**9
    model = Engine(tiny, dtype="float32", device="cpu").model
    assert resources.n_parameters(seed_model.Path(tiny)) >= sum(p.numel() for p in model.parameters())


def test_status_of_a_run_with_damaged_and_stale_steps(tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(EXAMPLE, run, ignore=shutil.ignore_patterns("notebooks", "report"))
    for model in ("SFT", "M1", "M2", "M3"):
        write_json(run / model / "model/config.json", {})
    (run / "steps/05_judge@M2.json").write_text('{"step": ')
    other = run / "steps/08_evaluate@M2.json"
    write_json(other, read_json(other) | {"seconds": "ten", "figures": [1]})
    assert cli.main(["status", str(run)]) == 0
    out = capsys.readouterr().out
    assert "05_judge@M2            its manifest is damaged" in out
    assert "08_evaluate@M2         its manifest is damaged" in out
    assert "04_self_instruct@M1    is stale: input changed: M1/model" in out
    assert "06_build_pairs@M1      is stale: after 04_self_instruct@M1" in out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel counts the process that started it as well")
def test_the_peak_of_memory_is_that_of_the_process_itself():
    held = bytearray(b"x") * 600_000_000
    code = "from srlm_utils import resources; x = bytearray(b'x') * 50_000_000; print(resources.peak_memory())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50_000_000 < int(out.stdout) < len(held) < resources.peak_memory()
