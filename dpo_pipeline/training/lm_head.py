"""TRL's LM head where there is no GPU: on completion tokens alone, by plain torch.

There TRL puts every position through its head, so that shapes stay equal for compilers, and computes each part of the
vocabulary twice, which saves memory.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import linear
from trl.trainer import utils as trl_utils

MAX_LOGITS = 2**28  # numbers, 1 GiB of float32; more go through TRL's parts
trl_head = trl_utils._ChunkedLogProbFunction


def use_plain_head() -> None:
    """From now on TRL's trainers compute log-probs by `score_tokens`."""
    trl_utils._use_triton = lambda device: True  # the branch in which TRL leaves prompts out
    trl_utils._ChunkedLogProbFunction = SimpleNamespace(apply=score_tokens)


def score_tokens(
    hidden: Any, weight: Any, bias: Any, targets: Any, temperature: float, chunk_size: int,
    softcap: float | None, logit_scale: float, outputs: tuple[str, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """TRL's `_ChunkedLogProbFunction`: log-probs of `targets` in nats, and of each token the statistics in `outputs`.

    `hidden` is [tokens, width]. Only log-probs have a gradient; the others are logged.
    """
    if hidden.device.type not in ("cpu", "mps") or len(hidden) * len(weight) > MAX_LOGITS:
        return trl_head.apply(
            hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
        )  # fmt: skip
    logits = linear(hidden, weight, bias).float() * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    all_logprobs = logits.log_softmax(-1)
    logprobs = all_logprobs.gather(-1, targets[:, None])[:, 0]
    with torch.no_grad():
        statistics = {
            "entropy": lambda: -(all_logprobs.exp() * all_logprobs).sum(-1),
            "log_sum_sq_probs": lambda: (2 * all_logprobs).logsumexp(-1),
            "mean_logits": lambda: logits.mean(-1),
            "is_top1": lambda: logits.argmax(-1) == targets,
        }
        return logprobs, *(compute() if name in outputs else None for name, compute in statistics.items())
