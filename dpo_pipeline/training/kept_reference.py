"""The reference after step 1, for measuring: what TRL keeps of it, else a copy in host memory."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from trl.trainer.utils import use_adapter

from dpo_pipeline.hardware import device
from dpo_pipeline.models import LoadOptions, is_adapter, load_policy, weights_outside_adapter
from dpo_pipeline.schema import Run
from dpo_pipeline.training.trainer import sharding

Reference = Callable[[Any], AbstractContextManager[Any]]  # policy -> context in which a model scores as the reference


def keep_reference(trainer: Any, run: Run, weights: str | Path, loading: LoadOptions) -> Reference | None:
    """Keep the reference of a trainer that has not trained yet; None on sharded weights of which TRL keeps none.

    TRL keeps a model of its own, a frozen adapter, or the base under a new adapter. Where the log-probs are cached and
    all weights are trained, or a continued adapter, each process keeps the trained weights of step 0 in host memory (4
    bytes each) and exchanges them with the policy's while the reference scores: no memory on the device, no disk. The
    two exchanges of an evaluation move each weight four times: measured on one CPU core, 2 s for each GB. For a cached
    `reference.path` it keeps that model, loaded once from `weights`.
    """
    if trainer.ref_model is not None:
        return lambda policy: contextlib.nullcontext(trainer.ref_model)
    is_inside = is_peft_model(trainer.model) and run.reference.path is None
    is_inside = is_inside and not weights_outside_adapter(trainer.model)
    if is_inside and ("ref" in trainer.model.peft_config or not is_adapter(weights)):
        return without_training_adapter
    if sharding(trainer):
        return None
    if run.reference.path:
        return partial(on_device, load_policy(weights, loading), loading.quantization is None)
    return partial(with_start_weights, [weight.to("cpu", copy=True) for weight in trained_weights(trainer.model)])


@contextlib.contextmanager
def without_training_adapter(policy: Any) -> Iterator[Any]:
    """The policy with TRL's frozen copy of its adapter, or without any."""
    with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
        yield policy


@contextlib.contextmanager
def on_device(reference: Any, is_movable: bool, policy: Any) -> Iterator[Any]:
    """A reference that waits in host memory; a quantized one stays on the device."""
    yield reference.to(device()) if is_movable else reference
    if is_movable:
        reference.to("cpu")


@contextlib.contextmanager
def with_start_weights(copies: list[Any], policy: Any) -> Iterator[Any]:
    """The policy with its weights of step 0."""
    exchange_weights(policy, copies)
    try:
        yield policy
    finally:
        exchange_weights(policy, copies)


def exchange_weights(model: Any, copies: list[Any]) -> None:
    """Exchange the trained weights of a model with copies in host memory, one tensor at a time."""
    for weight, copy in zip(trained_weights(model), copies, strict=True):
        current = weight.to("cpu", copy=True)
        weight.copy_(copy)
        copy.copy_(current)


def trained_weights(model: Any) -> list[Any]:
    """The tensors that training changes."""
    return [parameter.data for parameter in model.parameters() if parameter.requires_grad]
