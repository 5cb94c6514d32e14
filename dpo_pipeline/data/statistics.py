"""Statistics of rows: spreads, what length or first words alone tell, repeats, and what other limits would do.

Sizes are a DataFrame with the tokens of each row before any cut, end tokens counted: `prompt`, a column for each
completion, and `total`, the prompt with its longest completion, which `length.max` limits.
"""

import os
import re
from collections import Counter
from typing import Any

import numpy as np

from dpo_pipeline.data.files import Row
from dpo_pipeline.data.normalize import prompt_to_text
from dpo_pipeline.data.token_table import LengthLimits
from dpo_pipeline.estimates import accuracy

HEAD = 8  # characters that make an opening
ROLE_TEXT = re.compile(r"\n\n(Human|Assistant|User):|### (Instruction|Response)|<\|\w+\|>|\[/?INST\]|<start_of_turn>")
LIST_TEXT = re.compile(r"\s*\[.*\]\s*$|\s*\{.*\}\s*$", re.DOTALL)
LEAST_REPEAT = 20  # characters of a prompt from which on a completion that begins with it repeats it


def summarize(values: Any) -> dict[str, float]:
    """The mean of some values, quantiles, and the largest."""
    quantiles = np.quantile(values, [0.05, 0.5, 0.95, 0.99, 1]).tolist()
    return {"mean": float(values.mean()), **dict(zip(("p5", "median", "p95", "p99", "max"), quantiles, strict=True))}


def leading_block(rows: list[Row]) -> dict[str, Any] | None:
    """The opening that most tells chosen from rejected: its `text`, the `side` that has it, and an Estimate.

    That is the accuracy of a judge that prefers that side's completions for this opening alone.
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


def overlap(first: list[int], second: list[int]) -> float:
    """Dice's coefficient of the tokens of two completions, in any order and without end tokens: 1 if all agree."""
    first, second = first[:-1], second[:-1]
    return 2 * (Counter(first) & Counter(second)).total() / max(1, len(first) + len(second))


def find_repeats(rows: dict[str, list[Row]], columns: tuple[str, ...]) -> dict[str, Any]:
    """What is equal but for case and spaces, of rows by split.

    `repeats`: how many prompts of train differ, and how many of its rows equal another; `leaked`: where other splits
    have a prompt of train, by split.
    """

    def fold(value: Any) -> str:
        return " ".join(prompt_to_text(value).casefold().split())

    texts = {tuple(fold(row[name]) for name in ("prompt", *columns)) for row in rows["train"]}
    prompts = {prompt for prompt, *_ in texts}
    leaked = {
        split: [row["origin"] for row in rows[split] if fold(row["prompt"]) in prompts]
        for split in rows
        if split != "train"
    }
    return {"repeats": {"prompts": len(prompts), "alike": len(rows["train"]) - len(texts)}, "leaked": leaked}


def odd_completions(rows: list[Row], columns: tuple[str, ...]) -> dict[str, list[str]]:
    """The origins of rows with a completion that is probably no text as meant, by what is odd about it."""
    odd: dict[str, list[str]] = {"hold role or template text": [], "are a list or an object": []}
    odd |= {"begin with their prompt": [], "follow a prompt without a space": []}
    for row in rows:
        prompt, texts = row["prompt"], [row[name] for name in columns]
        question = (prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt else "").strip()
        tests = (
            any(ROLE_TEXT.search(text) for text in texts),
            any(LIST_TEXT.match(text) for text in texts),
            len(question) >= LEAST_REPEAT and any(text.strip().startswith(question) for text in texts),
            isinstance(prompt, str) and prompt[-1:].isalnum() and any(text[:1].isalnum() for text in texts),
        )
        for origins, is_odd in zip(odd.values(), tests, strict=True):
            origins += [row["origin"]] * is_odd
    return odd


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
