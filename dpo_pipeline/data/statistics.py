"""What rows teach besides what they are meant to: their lengths, the bias of length, overlap, repeats, leakage."""

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_pipeline.data.lengths import Lengths
from dpo_pipeline.data.shape import words
from dpo_pipeline.estimates import Estimate, accuracy


@dataclass(frozen=True)
class Sizes:
    """Tokens of rows before any cut, end tokens counted: of each prompt, and of each answer (answers, rows).

    `row` is a row's place among those loaded, `overlap` that of its two answers (none where there is one).
    """

    row: np.ndarray
    prompt: np.ndarray
    answers: np.ndarray
    overlap: np.ndarray

    @property
    def together(self) -> np.ndarray:
        """Tokens of each prompt with its longest answer: what `length.max` limits."""
        return self.prompt + self.answers.max(0)


def sizes(found: Iterable[tuple[int, list[int], list[list[int]]]], answers: int) -> Sizes:
    """The sizes of rows that come as (place, ids of the prompt, ids of each of the `answers` answers)."""
    row, prompt, shares = array("i"), array("i"), array("d")
    lengths = [array("i") for _ in range(answers)]
    for place, prompt_ids, answer_ids in found:
        row.append(place)
        prompt.append(len(prompt_ids))
        for length, ids in zip(lengths, answer_ids, strict=True):
            length.append(len(ids))
        if answers == 2:
            shares.append(overlap(*answer_ids))
    return Sizes(*(np.array(column) for column in (row, prompt, lengths, shares)))


def overlap(one: Sequence[int], other: Sequence[int]) -> float:
    """The share of their tokens that two answers have in common in any order, without the end token of each.

    Dice's coefficient of two bags of tokens: 0 where they share none, 1 where one is the other in some order.
    """
    one, other = one[:-1], other[:-1]
    return 2 * (Counter(one) & Counter(other)).total() / max(1, len(one) + len(other))


def longer_chosen(sizes: Sizes) -> Estimate:
    """How often the chosen answer is the one with more tokens: the accuracy of a judge of length alone."""
    return accuracy((sizes.answers[0] - sizes.answers[1]).tolist())


def spread(values: np.ndarray) -> dict[str, float]:
    """The mean of some values, quantiles, and the largest."""
    quantiles = np.quantile(values, [0.05, 0.5, 0.95, 0.99, 1]).tolist()
    return {"mean": float(values.mean()), **dict(zip(("p5", "median", "p95", "p99", "max"), quantiles, strict=True))}


def under(sizes: Sizes, lengths: Lengths) -> dict[str, int]:
    """What `lengths.fit` makes of rows: kept, dropped and cut, and the tokens of an epoch over those kept.

    A prompt counts once for each of its answers. Not seen in lengths: answers that are the same once they are cut.
    """
    prompt, answers, longest = sizes.prompt, sizes.answers, sizes.answers.max(0)
    wide = (prompt + longest > lengths.max) & (prompt > lengths.max_prompt)
    prompt = np.where(wide, lengths.max_prompt, prompt)
    long = prompt + longest > lengths.max
    kept = ~(wide if lengths.prompt == "drop" else np.zeros_like(wide)) & ~(long & (lengths.answer == "drop"))
    read = np.where(long, np.minimum(answers, lengths.max - prompt), answers).sum(0) + len(answers) * prompt
    counts = {"kept": kept, "dropped": ~kept, "prompts_cut": kept & wide, "answers_cut": kept & long}
    return {"max": lengths.max, **{k: int(v.sum()) for k, v in counts.items()}, "tokens": int(read[kept].sum())}


def candidates(sizes: Sizes, now: int, least: int, context: int) -> list[int]:
    """What may be asked of `length.max`: what is set `now`, the model's context, and powers of two from `least` on.

    Those go from about half the median row to where nothing is cut, be it beyond the context.
    """
    longest, half = int(sizes.together.max()), np.median(sizes.together) / 2
    powers = {2**n for n in range(30) if max(half, least) <= 2**n < 2 * longest}
    return sorted(powers | {now, min(context, max(longest, now))})


def at(sizes: Sizes, kept: Sequence[int], quantiles: Iterable[float]) -> list[tuple[int, int]]:
    """Where among the rows `kept` those at these quantiles of length are, each with its tokens before any cut.

    These are of the prompt and of all answers. Of no rows there are none.
    """
    where = np.searchsorted(sizes.row, kept)
    order = np.argsort(sizes.together[where], kind="stable")
    found = [int(order[int(share * (len(order) - 1))]) for share in quantiles if len(order)]
    return [(i, int(sizes.prompt[where[i]] + sizes.answers[:, where[i]].sum())) for i in found]


def repeats(rows: Sequence[dict[str, Any]], answers: tuple[str, ...]) -> dict[str, int]:
    """How many prompts differ among rows, and how many rows say what another one did but for case and spaces."""
    said = Counter(tuple(bare(text) for text in (words(row["prompt"]), *map(row.get, answers))) for row in rows)
    return {"prompts": len({prompt for prompt, *_ in said}), "alike": len(rows) - len(said)}


def leaked(train: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]]) -> list[str]:
    """The origins of the held-out rows whose prompt is one of train's but for case and spaces."""
    known = {bare(words(row["prompt"])) for row in train}
    return [row["origin"] for row in held if bare(words(row["prompt"])) in known]


def bare(text: str) -> str:
    """A text in lower case, with single spaces."""
    return " ".join(text.casefold().split())
