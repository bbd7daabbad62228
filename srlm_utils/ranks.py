"""One training on several processes: who trains what, how losses are normalised, and the whole weights at its end.

The losses are those of one process (tests/test_launch.py). A dataset row is a micro-batch, made and ordered without
regard to the number of processes. Three means make a step's loss:

1. Within a micro-batch: over its text tokens, over its score digits, over its ranked pairs of replies, or over its
   preference pairs. Replies to a prompt are compared within their micro-batch, and a micro-batch is never divided, so
   nothing here is counted on one process and divided on another.
2. Over the micro-batches of one process. Step k takes those from k A to k A + A - 1, where A is train_batch_size /
   micro_batch_size, and process r of W takes every W-th, from r on. Trainer divides each loss by the A / W it takes.
3. Over the processes: DDP, FSDP and ZeRO average gradients.

Together that is the mean over the A micro-batches. The last step may hold fewer, n, and W need not divide them: it is
filled up to m with micro-batches of weight 0, since all processes must call the model equally often, and the others
get the weight m / n. Figures in the log are averaged over the same micro-batches, in `AcrossRanks.log`.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy

from srlm_utils.errors import ParamError


def fill_steps(batches: list, accumulation: int, world: int) -> tuple[list, list[float]]:
    """(micro-batches, weights of their losses) for `world` processes and `accumulation` micro-batches a step in all.

    Raises `ParamError` where a step's micro-batches do not divide among the processes.
    """
    if accumulation % world:
        raise ParamError(
            f"a step has {accumulation} micro-batches (train_batch_size / micro_batch_size), which {world} processes "
            f"cannot share evenly: make train_batch_size a multiple of {world} times micro_batch_size."
        )
    n = len(batches) % accumulation or min(accumulation, len(batches))  # in the last step
    fill = -n % world
    weights = [1.0] * (len(batches) - n) + [(n + fill) / n] * n + [0.0] * fill
    return batches + batches[-1:] * fill, weights


class AcrossRanks:
    """A trl trainer whose figures are lists with one number per micro-batch, of this process's micro-batches alone."""

    def create_accelerator_and_postprocess(self) -> None:
        # without a GPU accelerate would train whole copies of a model that it was asked to shard, and not say so
        if self.args.use_cpu and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and (policy := plugin.mixed_precision_policy):
            # accelerate would also round what leaves the model, where the log-probability of a whole answer is no more
            # than a quarter of a nat exact in bfloat16, and gradients before they are added up
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=policy.param_dtype, reduce_dtype=torch.float32, output_dtype=torch.float32
            )

    def _save_rng_state(self, output_dir: str) -> None:
        # each process writes its own; then the first one writes the trainer's state, by which a checkpoint counts as
        # whole (`train.last_checkpoint`): without the wait it did so while another was still writing
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Average over the micro-batches of all processes, as trl would over those of one.

        A process need not have every figure: no micro-batch of judgements, no ranking loss. So all names are exchanged
        with their sums, once a step.
        """
        if self.args.world_size > 1:
            own = {name: (sum(values), len(values)) for name, values in self._metrics["train"].items()}
            everyone: list = [None] * self.args.world_size
            dist.all_gather_object(everyone, own)
            for name in sorted({name for of_rank in everyone for name in of_rank}):
                total, n = (sum(x) for x in zip(*(r.get(name, (0, 0)) for r in everyone), strict=True))
                # a running total of trl's, not a figure of a micro-batch
                self._metrics["train"][name] = [total if name == "num_tokens" else total / n] if n else []
            for name in [name for name, values in self._metrics["train"].items() if not values]:
                del self._metrics["train"][name]
        super().log(logs, start_time)


@contextlib.contextmanager
def loading_whole():
    """What is loaded inside is one model in this process, whatever shards those of the training."""
    from transformers.integrations import deepspeed

    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    env = {name: os.environ.pop(name) for name in names if name in os.environ}
    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        os.environ.update(env)
        deepspeed._hf_deepspeed_config_weak_ref = config


def trained_weights(trainer):
    """Yield (name, tensor) of every weight that learns: whole, float32, in main memory.

    All processes must go through it together, one weight after the other is gathered; only the first keeps it, the
    others get None. ZeRO's float32 weights are in its optimizer: those are taken, not the model's bfloat16 ones.
    """
    from torch.distributed.tensor import DTensor

    for name, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if not p.requires_grad:
            continue
        if trainer.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_fp32_param

            whole = safe_get_full_fp32_param(p)
        else:
            whole = p.full_tensor() if isinstance(p, DTensor) else p
        first = trainer.is_world_process_zero()
        yield name, whole.detach().to("cpu", torch.float32, copy=True) if first else None
