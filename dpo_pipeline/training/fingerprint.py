"""A policy is recognised by the log-probs of two training rows: SFT's, when DPO starts from it."""

import logging
from typing import Any

import numpy as np

from dpo_pipeline.data.prepare import Prepared
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.logprobs import completion_logprobs

log = logging.getLogger(__name__)


def policy_fingerprint(trainer: Any, data: Prepared) -> dict[str, Any]:
    """Two training rows to recognise a policy by, with their log-probs in nats before training."""
    table = data.tables["train"]
    column = "chosen_ids" if "chosen_ids" in table.column_names else "completion_ids"
    prompts, completions = [ids[-256:] for ids in table["prompt_ids"][:2]], [ids[:256] for ids in table[column][:2]]
    return {"prompts": prompts, "answers": completions, "before": probe_logprobs(trainer, prompts, completions)}


def probe_logprobs(trainer: Any, prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
    """The log-prob of each completion under the policy, without autocast, as anybody loads it."""
    return [float(row.sum()) for row in completion_logprobs(trainer.model, prompts, completions, len(prompts))]


def check_start(trainer: Any, fingerprint: dict[str, Any], is_exact: bool, source: Any) -> None:
    """Raise PipelineError where the starting policy is not what SFT ended with, by the `fingerprint` that SFT left."""
    before, after = np.array(fingerprint["before"]), np.array(fingerprint["after"])
    logprobs = np.array(probe_logprobs(trainer, fingerprint["prompts"], fingerprint["answers"]))
    sft_change, from_sft, from_base = (
        np.abs(gap).sum() for gap in (after - before, after - logprobs, before - logprobs)
    )
    if sft_change == 0:
        raise PipelineError(f"the SFT policy {source} is the bare base, its training changed nothing: train it again")
    limit = sum(map(len, fingerprint["answers"])) * (1e-3 if trainer.model.dtype.itemsize == 4 else 0.02)
    if from_sft >= from_base or (is_exact and from_sft > limit):
        raise PipelineError(
            f"the starting policy is not what SFT ended with ({source}): the log-probs that SFT recorded differ by "
            f"{from_sft:.3g} nats, those of its base by {from_base:.3g}: its weights or its adapter were not loaded"
        )
    if from_sft > sft_change / 4:
        log.warning(
            "in its new precision the starting policy is %.3g nats from SFT, which moved %.3g", from_sft, sft_change
        )
    log.info(
        "preflight: the starting policy is %s, %.3g nats from its base, %.2g from what SFT ended with",
        *(source, from_base, from_sft),
    )
