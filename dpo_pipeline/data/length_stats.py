"""What rows teach besides what they are meant to: their lengths, the bias of length, overlap, repeats, leakage."""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_pipeline.data.lengths import LengthLimits
from dpo_pipeline.data.normalize import prompt_to_text
from dpo_pipeline.estimates import Estimate, accuracy


@dataclass(frozen=True)
class Sizes:
    """Tokens of rows before any cut, end tokens counted: of each prompt, and of each completion (completions, rows).

    `row` is a row's place among those loaded, `overlap` that of its two completions (none where there is one).
    """

    row: np.ndarray
    prompt: np.ndarray
    completions: np.ndarray
    overlap: np.ndarray

    @property
    def total(self) -> np.ndarray:
        """Tokens of each prompt with its longest completion: what `length.max` limits."""
        return self.prompt + self.completions.max(0)


def measure_sizes(encoded: Iterable[tuple[int, list[int], list[list[int]]]], completions: int) -> Sizes:
    """The sizes of rows that come as (place, ids of the prompt, ids of each of the `completions` completions)."""
    row, prompt, shares = array("i"), array("i"), array("d")
    lengths = [array("i") for _ in range(completions)]
    for place, prompt_ids, completion_ids in encoded:
        row.append(place)
        prompt.append(len(prompt_ids))
        for length, ids in zip(lengths, completion_ids, strict=True):
            length.append(len(ids))
        if completions == 2:
            shares.append(overlap(*completion_ids))
    return Sizes(*(np.array(column) for column in (row, prompt, lengths, shares)))


def overlap(first: Sequence[int], second: Sequence[int]) -> float:
    """The share of their tokens that two completions have in common in any order, without the end token of each.

    Dice's coefficient of two bags of tokens: 0 where they share none, 1 where one is the other in some order.
    """
    first, second = first[:-1], second[:-1]
    return 2 * (Counter(first) & Counter(second)).total() / max(1, len(first) + len(second))


def longer_chosen(sizes: Sizes) -> Estimate:
    """How often the chosen completion is the one with more tokens: the accuracy of a judge of length alone."""
    return accuracy((sizes.completions[0] - sizes.completions[1]).tolist())


def summarize(values: np.ndarray) -> dict[str, float]:
    """The mean of some values, quantiles, and the largest."""
    quantiles = np.quantile(values, [0.05, 0.5, 0.95, 0.99, 1]).tolist()
    return {"mean": float(values.mean()), **dict(zip(("p5", "median", "p95", "p99", "max"), quantiles, strict=True))}


def apply_limits(sizes: Sizes, lengths: LengthLimits) -> dict[str, int]:
    """What `lengths.fit` makes of rows: kept, dropped and cut, and the tokens of an epoch over those kept.

    A prompt counts once for each of its completions. Not seen in lengths: completions that are the same once they are
    cut.
    """
    prompt, completions, longest = sizes.prompt, sizes.completions, sizes.completions.max(0)
    wide = (prompt + longest > lengths.max) & (prompt > lengths.max_prompt)
    prompt = np.where(wide, lengths.max_prompt, prompt)
    long = prompt + longest > lengths.max
    kept = ~(wide if lengths.prompt == "drop" else np.zeros_like(wide)) & ~(long & (lengths.completion == "drop"))
    read = (
        np.where(long, np.minimum(completions, lengths.max - prompt), completions).sum(0) + len(completions) * prompt
    )
    counts = {"kept": kept, "dropped": ~kept, "prompts_cut": kept & wide, "answers_cut": kept & long}
    return {"max": lengths.max, **{k: int(v.sum()) for k, v in counts.items()}, "tokens": int(read[kept].sum())}


def candidate_limits(sizes: Sizes, current: int, least: int, context: int) -> list[int]:
    """What may be asked of `length.max`: what is set `now`, the model's context, and powers of two from `least` on.

    Those go from about half the median row to where nothing is cut, be it beyond the context.
    """
    longest, half = int(sizes.total.max()), np.median(sizes.total) / 2
    powers = {2**n for n in range(30) if max(half, least) <= 2**n < 2 * longest}
    return sorted(powers | {current, min(context, max(longest, current))})


def rows_at_quantiles(sizes: Sizes, row_numbers: Sequence[int], quantiles: Iterable[float]) -> list[tuple[int, int]]:
    """Where among the rows `kept` those at these quantiles of length are, each with its tokens before any cut.

    These are of the prompt and of all completions. Of no rows there are none.
    """
    where = np.searchsorted(sizes.row, row_numbers)
    order = np.argsort(sizes.total[where], kind="stable")
    found = [int(order[int(share * (len(order) - 1))]) for share in quantiles if len(order)]
    return [(i, int(sizes.prompt[where[i]] + sizes.completions[:, where[i]].sum())) for i in found]


def count_repeats(rows: Sequence[dict[str, Any]], completions: tuple[str, ...]) -> dict[str, int]:
    """How many prompts differ among rows, and how many rows say what another one did but for case and spaces."""
    said = Counter(
        tuple(normalize_text(text) for text in (prompt_to_text(row["prompt"]), *map(row.get, completions)))
        for row in rows
    )
    return {"prompts": len({prompt for prompt, *_ in said}), "alike": len(rows) - len(said)}


def leaked_prompts(train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> list[str]:
    """The origins of the held-out rows whose prompt is one of train's but for case and spaces."""
    known = {normalize_text(prompt_to_text(row["prompt"])) for row in train}
    return [row["origin"] for row in held_out if normalize_text(prompt_to_text(row["prompt"])) in known]


def normalize_text(text: str) -> str:
    """A text in lower case, with single spaces."""
    return " ".join(text.casefold().split())
