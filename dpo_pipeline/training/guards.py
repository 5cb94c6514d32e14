"""Stops a run that trains nothing or has lost its weights, and names the likely cause."""

import math
from typing import Any

from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from dpo_pipeline.errors import PipelineError

OVERFLOW_STEPS = 20  # fp16's loss scale starts at 2**16 and halves with each step that overflows
MAX_BETA = 10.0  # papers use 0.01 to 1
SETTLED_STEPS = 10  # steps after warm-up by which weights must have moved


class NumericalGuard(TrainerCallback):
    """Raises PipelineError for a NaN loss, NaN or zero gradients, or weights that do not move.

    Reads `loss` (the mean since the last log) and `grad_norm` as the Trainer logs them on all ranks, so it adds no
    synchronization to a step, and a fault shows at the next log. Each checkpoint is preceded by a log.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.first_norms: list[float] | None = [] if state.global_step == 0 else None
        self.overflow_start: int | None = None
        warmup = args.get_warmup_steps(state.max_steps)
        self.check_step = min(max(warmup, state.global_step) + SETTLED_STEPS, state.max_steps)
        # DeepSpeed holds the weights in places of its own.
        can_check = self.check_step > warmup and not self.trainer.is_deepspeed_enabled
        self.start_weights = sample_weights(model) if can_check else None
        self.start_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        step, norm = state.global_step, logs.get("grad_norm")
        beta = vars(self.trainer).get("beta", 0.0)
        remedy = (
            f"beta={beta:g} saturates the loss, or overflows: type beta=0.1"
            if beta > MAX_BETA
            else f"the learning rate {args.learning_rate:g} is too high, or the model overflows in this precision: "
            "lower it tenfold, or type precision=bf16 or fp32"
        )
        if not math.isfinite(logs.get("loss", 0.0)):
            raise PipelineError(f"the loss is {logs['loss']} by step {step}: {remedy}")
        if norm is None:
            return
        if math.isfinite(norm):
            self.overflow_start = None
        else:
            self.overflow_start = step if self.overflow_start is None else self.overflow_start
            if not args.fp16 or step >= self.overflow_start + OVERFLOW_STEPS:
                raise PipelineError(f"the gradient norm is {norm} from step {self.overflow_start} to {step}: {remedy}")
        if self.first_norms is not None and len(self.first_norms) < 2:  # later a hinge loss may rest
            self.first_norms.append(norm)
            if self.first_norms == [0.0, 0.0]:
                frozen = "the model is frozen, or is its own reference: check lora.target_modules and reference="
                cause = remedy if beta > MAX_BETA else frozen
                raise PipelineError(f"the gradients are zero in the first {step} steps: {cause}")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        control.should_log |= control.should_save  # no checkpoint of NaN weights
        if self.start_weights is None or state.global_step < self.check_step:
            return
        if self.trainer.accelerator.optimizer_step_was_skipped:  # an overflow of fp16
            return
        pairs = zip(self.start_weights, sample_weights(model), strict=True)
        self.start_weights = None
        if all(start.equal(weights) for start, weights in pairs):
            raise PipelineError(
                f"no weight has moved in {state.global_step - self.start_step} steps: the learning rate "
                f"{args.learning_rate:g} is too small for these weights: raise it, or type model.dtype=auto"
            )


def sample_weights(model: Any) -> list[Any]:
    """The first thousand numbers of each tensor that is trained, gathered where FSDP shards it."""
    tensors = [p.detach() for p in model.parameters() if p.requires_grad]
    whole = [tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return [tensor.flatten()[:1000].clone() for tensor in whole]
