"""Successes and failures: where one policy is right or scores more than another, and where it is the other way."""

from collections.abc import Sequence
from typing import Any

from dpo_pipeline.data.shape import words
from dpo_pipeline.printing import digits, line


def flipped(
    pairs: Sequence[dict[str, Any]], before: Sequence[float], after: Sequence[float], count: int
) -> dict[str, Any]:
    """The pairs that one policy prefers wrongly and the next rightly (`successes`), and the reverse (`failures`).

    `before` and `after` are each pair's margin in nats under the two, both against one reference or both against
    none. A margin of 0 is neither right nor wrong: `ties` counts the pairs with one. Of each side the number of all
    (`count`) and the `count` examples that changed most; `n` pairs in all.
    """
    rows = [
        ({"prompt": words(pair["prompt"]), "texts": {name: pair[name] for name in ("chosen", "rejected")}}, *margins)
        for pair, *margins in zip(pairs, before, after, strict=True)
    ]
    return {
        "quantity": "margin_nats",
        "n": len(rows),
        "ties": sum(0 in margins for _, *margins in rows),
        "successes": most([row for row in rows if row[1] < 0 < row[2]], count),
        "failures": most([row for row in rows if row[1] > 0 > row[2]], count),
    }


def largest(
    samples: Sequence[dict[str, Any]],
    before: Sequence[float | None],
    after: Sequence[float | None],
    count: int,
    judge: str,
) -> dict[str, Any]:
    """The prompts whose answer gains most in a judge's score from one policy to the next, and that lose most.

    `samples` hold `prompt` and `answers` (text by policy), as generation_samples.json does. Of each side the number of
    all (`count`) and the `count` examples that changed most; `ties` scored the same, and of `unread` the judge gave
    nothing for one answer or both: they are not among the `n`.
    """
    rows = [
        ({"prompt": words(sample["prompt"]), "texts": sample["answers"]}, *scores)
        for sample, *scores in zip(samples, before, after, strict=True)
        if None not in scores
    ]
    return {
        "quantity": f"score.{judge}",
        "n": len(rows),
        "ties": sum(old == new for _, old, new in rows),
        "unread": len(samples) - len(rows),
        "successes": most([row for row in rows if row[1] < row[2]], count),
        "failures": most([row for row in rows if row[1] > row[2]], count),
    }


def most(rows: list[tuple[dict[str, Any], float, float]], count: int) -> dict[str, Any]:
    """How many rows, and the `count` that changed most, each with its numbers; equal changes in the rows' order."""
    rows = sorted(rows, key=lambda row: -abs(row[2] - row[1]))
    return {"count": len(rows), "examples": [{**row, "before": old, "after": new} for row, old, new in rows[:count]]}


def notable_text(found: dict[str, Any], before: str, after: str) -> str:
    """What `flipped` or `largest` found as Markdown, from the policy named `before` to the one named `after`."""
    quantity = found["quantity"]
    flips = quantity == "margin_nats"
    heads = {
        "successes": f"wrong with {before}, right with {after}" if flips else f"{after} above {before} by {quantity}",
        "failures": f"right with {before}, wrong with {after}" if flips else f"{after} below {before} by {quantity}",
    }
    blocks = []
    for side, head in heads.items():
        blocks.append(f"**{head}: {found[side]['count']} of {found['n']}**")
        for example in found[side]["examples"]:
            texts = [f"- {name}: {line(text)}" for name, text in example["texts"].items()]
            change = f"- {quantity}: {digits(example['before'])} to {digits(example['after'])}"
            blocks.append("\n".join([f"> {line(example['prompt'])}", "", change, *texts]))
    return "\n\n".join(blocks)
