"""Weights of pairs in DPO's loss.

The loss of an optimizer step is sum(weight * loss) / sum(weight) over all its pairs, those of its other micro batches
and processes too; the loss of any other batch, as in validation, is the same over its own pairs.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from dpo_pipeline.errors import PipelineError
from dpo_pipeline.naming import loss_names
from dpo_pipeline.schema import Run
from dpo_pipeline.training.similar_lengths import BATCH_LOSSES


def check_weights(run: Run, table: Any) -> None:
    """Raise PipelineError where rows have weights, and a loss of the run has none of each pair to weigh."""
    if "weight" in table.column_names and (losses := BATCH_LOSSES & set(loss_names(run))):
        raise PipelineError(
            f"the rows have weights, and {'+'.join(sorted(losses))} has no loss of each pair to weigh: type "
            "loss=sigmoid, or leave weight out, as by 'dataset.columns={prompt: A, chosen: B, rejected: C}'"
        )


def collate_weights(collate: Callable, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch as TRL collates it, with the `weight` of each pair where rows have one."""
    weights = {"weight": torch.tensor([row["weight"] for row in rows])} if "weight" in rows[0] else {}
    return collate(rows) | weights


def weigh_outputs(model: Any, factors: Any, stack: contextlib.ExitStack, **inputs: Any) -> Any:
    """The outputs of a model from which TRL computes losses that are multiplied by these factors, one for each pair.

    With `use_weighting` (WPO, arXiv:2406.11827) it multiplies the loss of a pair by the exp of the mean, over the
    tokens of each of its two completions, of `log_probs - log_sum_sq_probs`.
    """
    outputs = model(**inputs)
    zero = outputs.log_probs.detach() if outputs.log_sum_sq_probs is None else outputs.log_sum_sq_probs
    outputs.log_sum_sq_probs = zero - factors.log().repeat(2)[:, None] / 2
    # TRL multiplies in place, and the relu of hinge keeps its result for the backward pass: copies are kept instead.
    stack.enter_context(torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept_copy: kept_copy))
    return outputs
