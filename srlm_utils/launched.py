"""One process of a training that a notebook launched: python -m srlm_utils.launched <work>/launched/job.json

Started by `accelerate launch` (`trainings.Launched`), once for each device. It trains on the rows beside the job file,
and the first process writes the models there. It ends when the kernel that asked for it is gone.
"""

import atexit
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
from transformers import TrainerCallback

from srlm_utils.artefacts import read_json, read_jsonl, write_json
from srlm_utils.errors import SrlmError

SAID = 20  # lines on the losses of a training, about


def main(path: str) -> None:
    job, folder, rank = read_json(Path(path)), Path(path).parent, int(os.environ.get("RANK", 0))
    ranks = folder / "ranks"
    ranks.mkdir(exist_ok=True)
    log = os.open(ranks / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):  # whatever writes there, Python or not
        os.dup2(log, stream)
    me = psutil.Process()
    write_json(ranks / f"{rank}.json", {"pid": me.pid, "host": os.uname().nodename, "created": me.create_time()})
    threading.Thread(target=_end_with, args=(job["kernel"],), daemon=True).start()
    try:
        _run(job, folder)
    except SrlmError as e:
        write_json(ranks / f"{rank}.error", {"kind": type(e).__name__, "message": str(e)})
        raise
    # all is written: what takes threads of torch's down in the wrong order at the very end must not count as a failure
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(0)


def _end_with(kernel: dict) -> None:
    """End this process when the kernel ends. On another machine than the kernel's, it ends with the others."""
    if kernel["host"] != os.uname().nodename:
        return
    while True:
        try:
            process = psutil.Process(kernel["pid"])
            if process.create_time() != kernel["created"] or process.status() == psutil.STATUS_ZOMBIE:
                os._exit(1)
        except psutil.NoSuchProcess:
            os._exit(1)
        time.sleep(1)


def _run(job: dict, folder: Path) -> None:
    from transformers import TrainingArguments

    from srlm_utils import checkpoints, devices, ranks, spread_dpo, train, trainings

    p, source, work = SimpleNamespace(**job["params"]), job["source"], folder.parent
    cpu = devices.pick_device(p.device) == "cpu"
    bf16 = devices.pick_dtype(p.dtype, "cpu" if cpu else "cuda") == "bfloat16"
    # transformers must know how the model will be sharded before it loads it; `ddp_timeout` seconds are for the first
    # process to load all of a large model at the end
    known = TrainingArguments(output_dir=str(folder), use_cpu=cpu, bf16=bf16, ddp_timeout=7200)
    first, world = known.process_index == 0, known.world_size
    say = _Said(folder / "said.txt", first)
    rows = read_jsonl(folder / "rows.jsonl")
    model, tokenizer = train.load(params=p, **source, four_bit=p.load_in_4bit, place=False)
    if job["kind"] == "sft":
        trainer = train.sft_trainer(model, tokenizer, rows, p, work, world)
    else:
        trainer = spread_dpo.trainer(
            model, tokenizer, rows, p, work, world, folder / "reference.json", job["consistency"]
        )
    how = trainer.accelerator.distributed_type.value
    say(f"{world} process{'es' * (world > 1)}, {how}, on {trainer.args.device.type}")
    if last := train.last_checkpoint(work / "checkpoints"):
        say(f"continuing from step {train.step_of(last)}")
    del model  # Trainer has it

    def write(n: int, total: int) -> None:
        """The model after a step that the kernel will compare, or the last."""
        if n != total and not (p.select_steps and n % p.select_steps == 0) or (folder / f"models/{n}").exists():
            return
        weights = ranks.trained_weights(trainer)
        if not first:
            for _ in weights:  # it takes all processes to gather one
                pass
            return
        say(f"writing the model of step {n}")
        with ranks.loading_whole(), checkpoints.untouched_randomness():
            model = train.whole(source, p, weights)
            train.save(model, tokenizer, folder / f"models/{n}", p, adapter_of=trainings.base_name(source, p))

    trainer.add_callback(_EachStep(say, write))
    log = train.train(trainer, _Step(folder, first))
    if first:
        write_json(folder / "log.json", log.to_dict("records"))
    trainer.accelerator.end_training()


class _EachStep(TrainerCallback):
    def __init__(self, say, write):
        self.say, self.write = say, write

    def on_step_end(self, args, state, control, **kwargs):
        self.write(state.global_step, state.max_steps)  # before the trainer's checkpoint of this step

    def on_log(self, args, state, control, logs=None, **kwargs):
        every = -(-state.max_steps // SAID)
        if "loss" in (logs or {}) and (state.global_step % every == 0 or state.global_step == state.max_steps):
            self.say(f"step {state.global_step} of {state.max_steps}: loss {logs['loss']:.4f}")


class _Said:
    """Lines for the notebook, from the first process alone."""

    def __init__(self, path: Path, speaks: bool):
        self.path, self.speaks = path, speaks

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        if self.speaks:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(text + "\n")


class _Step:
    """What `train.train` needs of a step: its progress, kept where the kernel looks."""

    def __init__(self, folder: Path, first: bool):
        self.folder, self.first = folder, first

    def progress(self, total: int, unit: str):
        self.n, self.total = 0, total
        self._tell()
        return self

    def update(self, n: int = 1) -> None:
        self.n += n
        self._tell()

    def _tell(self) -> None:
        if self.first:
            write_json(self.folder / "at.json", {"done": self.n, "total": self.total})

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass


if __name__ == "__main__":
    main(sys.argv[1])
