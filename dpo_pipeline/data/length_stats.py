"""Statistics of completions: spreads, what length or their first words alone tell, and what other limits would do.

Sizes are a DataFrame with the tokens of each row before any cut, end tokens counted: `prompt`, a column for each
completion, and `total`, the prompt with its longest completion, which `length.max` limits.
"""

import os
from typing import Any

import numpy as np

from dpo_pipeline.data.files import Row
from dpo_pipeline.data.token_table import LengthLimits
from dpo_pipeline.estimates import Estimate, accuracy

HEAD = 8  # characters that make an opening


def longer_chosen(sizes: Any) -> Estimate:
    """How often the chosen completion is the one with more tokens: the accuracy of a judge of length alone."""
    return accuracy((sizes["chosen"] - sizes["rejected"]).tolist())


def leading_block(rows: list[Row]) -> dict[str, Any] | None:
    """The opening that most tells chosen from rejected: its `text`, the `side` that has it, and an Estimate.

    The Estimate is the accuracy of a judge that prefers that side's completions for this opening alone.
    """
    import pandas as pd

    texts = pd.DataFrame({name: [row[name].lstrip() for row in rows] for name in ("chosen", "rejected")})
    heads = texts.apply(lambda column: column.str[:HEAD])
    counts = {name: heads[name].value_counts() for name in heads}
    differences = counts["chosen"].sub(counts["rejected"], fill_value=0).drop("", errors="ignore").abs()
    if differences.empty:  # no rows, or calls alone
        return None
    has_head = heads == differences.idxmax()
    side, other = sorted(heads, key=lambda name: -has_head[name].sum())
    text = os.path.commonprefix(texts.loc[has_head[side], side].tolist())  # noqa: RUF071 (text, not paths)
    return {"text": text, "side": side, **accuracy(has_head[side].astype(int).sub(has_head[other]).tolist())}


def summarize(values: Any) -> dict[str, float]:
    """The mean of some values, quantiles, and the largest."""
    quantiles = np.quantile(values, [0.05, 0.5, 0.95, 0.99, 1]).tolist()
    return {"mean": float(values.mean()), **dict(zip(("p5", "median", "p95", "p99", "max"), quantiles, strict=True))}


def apply_limits(sizes: Any, limits: LengthLimits) -> dict[str, int]:
    """What `limits.fit` makes of rows: kept, dropped and cut, and the tokens of an epoch over those kept.

    A prompt counts once for each of its completions. Lengths do not show completions that are equal once they are cut.
    """
    completions = sizes.drop(columns=["prompt", "total"])
    cut_prompt = (sizes["total"] > limits.max) & (sizes["prompt"] > limits.max_prompt)
    prompt = sizes["prompt"].mask(cut_prompt, limits.max_prompt)
    cut_completion = prompt + completions.max(axis=1) > limits.max
    dropped = (cut_prompt & (limits.prompt == "drop")) | (cut_completion & (limits.completion == "drop"))
    tokens = completions.clip(upper=limits.max - prompt, axis=0).sum(axis=1) + completions.shape[1] * prompt
    counts = {"kept": ~dropped, "dropped": dropped, "prompts_cut": cut_prompt & ~dropped}
    counts |= {"answers_cut": cut_completion & ~dropped, "tokens": tokens[~dropped]}
    return {"max": limits.max, **{name: int(values.sum()) for name, values in counts.items()}}


def candidate_limits(sizes: Any, current: int, least: int, context: int) -> list[int]:
    """Values of `length.max` to compare: the `current` one, the model's context, and powers of two from `least` on.

    Those go from about half the median row to where nothing is cut, even beyond the context.
    """
    longest, half = int(sizes["total"].max()), sizes["total"].median() / 2
    powers = {2**n for n in range(30) if max(half, least) <= 2**n < 2 * longest}
    return sorted(powers | {current, min(context, max(longest, current))})
