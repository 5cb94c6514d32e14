"""Summed log-probs of a batch of pairs under policy and reference, by the trainer's own forward."""

from typing import Any

import torch


def reference_logps(trainer: Any, batch: dict[str, Any]) -> Any:
    """Summed log-probs [chosen..., rejected...] of a batch under the reference, in nats, by the trainer's forward."""
    return torch.cat(trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)).double()


def policy_logps(trainer: Any, batch: dict[str, Any]) -> Any:
    """`reference_logps` of the policy."""
    reference = trainer.ref_model
    trainer.ref_model = trainer.model  # so that TRL switches no adapter off
    try:
        return reference_logps(trainer, batch)
    finally:
        trainer.ref_model = reference


def tolerance(trainer: Any, batch: dict[str, Any], roundings: int) -> Any:
    """How far log-probs [chosen..., rejected...] of one policy may differ: 0.001 nats, or so many roundings of the
    dtype for the square root of the completion's tokens.
    """
    mixed = torch.bfloat16 if trainer.args.bf16 else torch.float16 if trainer.args.fp16 else trainer.model.dtype
    tokens = batch["completion_mask"].sum(-1).double()
    return (roundings * torch.finfo(mixed).eps * tokens.sqrt()).clamp(min=1e-3)
