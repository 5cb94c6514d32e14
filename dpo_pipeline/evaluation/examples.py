"""Successes and failures: where one policy is right or scores more than another, and where it is the other way."""

from collections.abc import Sequence
from typing import Any

from dpo_pipeline.data.normalize import prompt_to_text
from dpo_pipeline.formatting import format_number, one_line


def preference_flips(
    pairs: Sequence[dict[str, Any]], old: Sequence[float], new: Sequence[float], count: int
) -> dict[str, Any]:
    """The pairs that one policy prefers wrongly and the next rightly (`successes`), and the reverse (`failures`).

    `before` and `after` are each pair's margin in nats under the two, both against one reference or both against
    none. A margin of 0 is neither right nor wrong: `ties` counts the pairs with one. Of each side the number of all
    (`count`) and the `count` examples that changed most; `n` pairs in all.
    """
    rows = [
        (
            {"prompt": prompt_to_text(pair["prompt"]), "texts": {name: pair[name] for name in ("chosen", "rejected")}},
            *margins,
        )
        for pair, *margins in zip(pairs, old, new, strict=True)
    ]
    return {
        "quantity": "margin_nats",
        "n": len(rows),
        "ties": sum(0 in margins for _, *margins in rows),
        "successes": top_changes([row for row in rows if row[1] < 0 < row[2]], count),
        "failures": top_changes([row for row in rows if row[1] > 0 > row[2]], count),
    }


def largest_score_changes(
    samples: Sequence[dict[str, Any]],
    old: Sequence[float | None],
    new: Sequence[float | None],
    count: int,
    judge: str,
) -> dict[str, Any]:
    """The prompts whose completion gains most in a judge's score from one policy to the next, and that lose most.

    `samples` hold `prompt` and `completions` (text by policy), as generation_samples.json does. Of each side the
    number of all (`count`) and the `count` examples that changed most; `ties` scored the same, and of `unread` the
    judge gave nothing for one completion or both: they are not among the `n`.
    """
    rows = [
        ({"prompt": prompt_to_text(sample["prompt"]), "texts": sample["answers"]}, *scores)
        for sample, *scores in zip(samples, old, new, strict=True)
        if None not in scores
    ]
    return {
        "quantity": f"score.{judge}",
        "n": len(rows),
        "ties": sum(old == new for _, old, new in rows),
        "unread": len(samples) - len(rows),
        "successes": top_changes([row for row in rows if row[1] < row[2]], count),
        "failures": top_changes([row for row in rows if row[1] > row[2]], count),
    }


def top_changes(rows: list[tuple[dict[str, Any], float, float]], count: int) -> dict[str, Any]:
    """How many rows, and the `count` that changed most, each with its numbers; equal changes in the rows' order."""
    rows = sorted(rows, key=lambda row: -abs(row[2] - row[1]))
    return {"count": len(rows), "examples": [{**row, "before": old, "after": new} for row, old, new in rows[:count]]}


def changes_as_markdown(changes: dict[str, Any], old: str, new: str) -> str:
    """What `flipped` or `largest` found as Markdown, from the policy named `before` to the one named `after`."""
    quantity = changes["quantity"]
    flips = quantity == "margin_nats"
    heads = {
        "successes": f"wrong with {old}, right with {new}" if flips else f"{new} above {old} by {quantity}",
        "failures": f"right with {old}, wrong with {new}" if flips else f"{new} below {old} by {quantity}",
    }
    blocks = []
    for side, head in heads.items():
        blocks.append(f"**{head}: {changes[side]['count']} of {changes['n']}**")
        for example in changes[side]["examples"]:
            texts = [f"- {name}: {one_line(text)}" for name, text in example["texts"].items()]
            change = f"- {quantity}: {format_number(example['before'])} to {format_number(example['after'])}"
            blocks.append("\n".join([f"> {one_line(example['prompt'])}", "", change, *texts]))
    return "\n\n".join(blocks)
