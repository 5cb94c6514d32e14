"""Statistics of a data set's rows: their lengths, the bias of length, overlap, repeats, leakage."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_pipeline.data.lengths import LengthLimits
from dpo_pipeline.data.normalize import Prompt, prompt_to_text
from dpo_pipeline.data.sources import Row
from dpo_pipeline.estimates import Estimate, accuracy


@dataclass(frozen=True)
class Sizes:
    """Tokens of rows before any cut, end tokens counted: of each prompt, and of each completion (completions, rows).

    `row` is a row's number among those loaded, `overlap` that of its two completions (empty for single ones).
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
    """The sizes of rows that come as (number, ids of the prompt, ids of each of the `completions` completions)."""
    numbers, prompts, lengths, overlaps = [], [], [], []
    for number, prompt_ids, completion_ids in encoded:
        numbers.append(number)
        prompts.append(len(prompt_ids))
        lengths.append([len(ids) for ids in completion_ids])
        if completions == 2:
            overlaps.append(overlap(*completion_ids))
    return Sizes(np.array(numbers), np.array(prompts), np.array(lengths).T, np.array(overlaps))


def overlap(first: Sequence[int], second: Sequence[int]) -> float:
    """The share of their tokens that two completions have in common in any order, without the end token of each.

    Dice's coefficient of two bags of tokens: 0 if they share none, 1 if one is the other in some order.
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


def apply_limits(sizes: Sizes, limits: LengthLimits) -> dict[str, int]:
    """What `limits.fit` makes of rows: kept, dropped and cut, and the tokens of an epoch over those kept.

    A prompt counts once for each of its completions. Lengths do not show completions that are equal once they are cut.
    """
    completions, longest = sizes.completions, sizes.completions.max(0)
    cut_prompt = (sizes.total > limits.max) & (sizes.prompt > limits.max_prompt)
    prompt = np.where(cut_prompt, limits.max_prompt, sizes.prompt)
    cut_completion = prompt + longest > limits.max
    dropped = (cut_prompt & (limits.prompt == "drop")) | (cut_completion & (limits.completion == "drop"))
    lengths = np.where(cut_completion, np.minimum(completions, limits.max - prompt), completions)
    tokens = lengths.sum(0) + len(completions) * prompt
    return {
        "max": limits.max,
        "kept": int((~dropped).sum()),
        "dropped": int(dropped.sum()),
        "prompts_cut": int((cut_prompt & ~dropped).sum()),
        "answers_cut": int((cut_completion & ~dropped).sum()),
        "tokens": int(tokens[~dropped].sum()),
    }


def candidate_limits(sizes: Sizes, current: int, least: int, context: int) -> list[int]:
    """Values of `length.max` to compare: the `current` one, the model's context, and powers of two from `least` on.

    Those go from about half the median row to where nothing is cut, even beyond the context.
    """
    longest, half = int(sizes.total.max()), np.median(sizes.total) / 2
    powers = {2**n for n in range(30) if max(half, least) <= 2**n < 2 * longest}
    return sorted(powers | {current, min(context, max(longest, current))})


def rows_at_quantiles(sizes: Sizes, row_numbers: Sequence[int], quantiles: Iterable[float]) -> list[tuple[int, int]]:
    """The places in `row_numbers` of the rows at these quantiles of length, each with the row's tokens before any cut.

    Tokens are those of the prompt and of all completions. Without rows the list is empty.
    """
    places = np.searchsorted(sizes.row, row_numbers)
    order = np.argsort(sizes.total[places], kind="stable")
    tokens = sizes.prompt[places] + sizes.completions[:, places].sum(0)
    picks = [int(order[int(quantile * (len(order) - 1))]) for quantile in quantiles if len(order)]
    return [(pick, int(tokens[pick])) for pick in picks]


def count_repeats(rows: Sequence[Row], columns: tuple[str, ...]) -> dict[str, int]:
    """How many prompts differ among rows, and how many rows equal another one but for case and spaces."""
    texts = {tuple(normalize_text(row[name]) for name in ("prompt", *columns)) for row in rows}
    return {"prompts": len({prompt for prompt, *_ in texts}), "alike": len(rows) - len(texts)}


def leaked_prompts(train: Sequence[Row], held_out: Sequence[Row]) -> list[str]:
    """The origins of the held-out rows whose prompt is one of train's but for case and spaces."""
    prompts = {normalize_text(row["prompt"]) for row in train}
    return [row["origin"] for row in held_out if normalize_text(row["prompt"]) in prompts]


def normalize_text(text: Prompt) -> str:
    """A text, or messages as text, in lower case and with single spaces."""
    return " ".join(prompt_to_text(text).casefold().split())
