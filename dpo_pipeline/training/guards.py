"""Stops a run that learns nothing or has lost its weights, and names the likely cause."""

import math
from typing import Any

from transformers import TrainerCallback

from dpo_pipeline.errors import OneRankError

FIRST_STEPS = 3  # without any gradient in all of them nothing is trained; later a hinge may rest
OVERFLOWS = 10  # in a row; fp16's loss scale starts high and skips some steps
SETTLED = 10  # steps after warm-up by which weights must have moved


class NumericalGuard(TrainerCallback):
    """Raises OneRankError for a loss or gradient that is no number, for no gradient, and for weights that rest.

    transformers puts an average in the place of a loss that is none, and trains on.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.overflows, self.still = trainer, 0, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.begun = state.global_step
        self.looked = False
        self.before = sample_weights(model)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        import torch

        step = state.global_step + 1
        if not math.isfinite(self.trainer._tr_loss):
            raise OneRankError(
                f"the loss is no number at step {step}: the learning rate {args.learning_rate:g} is too high, or a "
                "row overflows this precision: lower it tenfold, or type precision=bf16 or fp32"
            )
        if self.trainer.is_deepspeed_enabled:  # holds gradients and weights in places of its own
            return
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        norm = float(gather_tensor(norm))
        self.overflows = 0 if math.isfinite(norm) else self.overflows + 1
        if self.overflows > (OVERFLOWS - 1 if args.fp16 else 0):
            raise OneRankError(
                f"the gradient is no number at step {step}, {self.overflows} time(s) in a row: the learning rate "
                f"{args.learning_rate:g} is too high, or the model overflows in this precision: lower it tenfold, or "
                "type precision=bf16 or fp32"
            )
        self.still = self.still + 1 if norm == 0 else 0
        if self.still == step == min(FIRST_STEPS, state.max_steps):
            raise OneRankError(
                f"no weight has a gradient in the first {self.still} steps: the model is frozen, or policy and "
                "reference are one model; check lora.target_modules and reference="
            )

    def on_step_end(self, args, state, control, model=None, **kwargs):
        warmup = args.get_warmup_steps(state.max_steps)
        last = min(max(warmup, self.begun) + SETTLED, state.max_steps)
        if self.trainer.is_deepspeed_enabled:
            return
        if self.looked or state.global_step < last or last <= warmup or self.overflows:
            return
        self.looked = True
        if all(before.equal(now) for before, now in zip(self.before, sample_weights(model), strict=True)):
            raise OneRankError(
                f"no weight has moved in {last - self.begun} steps: the learning rate {args.learning_rate:g} is too "
                "small for these weights to notice: raise it, or hold them in float32 by model.dtype=auto"
            )


def sample_weights(model: Any) -> list[Any]:
    """The first thousand numbers of each tensor that is trained."""
    return [gather_tensor(p.detach()).flatten()[:1000].clone() for p in model.parameters() if p.requires_grad]


def gather_tensor(tensor: Any) -> Any:
    """A tensor that FSDP may hold in parts."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
