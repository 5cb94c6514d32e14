"""Successes and failures: examples on which one policy is better than another, and on which it is worse."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_pipeline.data.normalize import prompt_to_text
from dpo_pipeline.evaluation.measure import SAMPLES, Measurements
from dpo_pipeline.formatting import format_number, one_line

EXAMPLES = 20  # pairs and samples that changed most, in results.json


def notable_changes(measurements: Measurements, scores: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For each policy with an SFT policy to beat: pairs whose preference flipped, samples whose score changed most.

    `scores` are by policy and judge. Margins are against the base; without a base there are no flips, since the policy
    to beat is the reference itself.
    """
    base, pairs = measurements.base, measurements.pairs
    changes: dict[str, Any] = {}
    for policy in measurements.shown_policies:
        names = (policy.sft, policy.name)
        if policy.sft is None or policy.sft == policy.name or "base" in names:
            continue
        changes[policy.name] = {"before": policy.sft}
        if base:
            texts = [
                {"prompt": row["prompt"], "texts": {"chosen": row["chosen"], "rejected": row["rejected"]}}
                for row in measurements.eval_set.rows
            ]
            margins = {name: np.subtract(pairs[name]["chosen"], pairs[name]["rejected"]) for name in (*names, base)}
            old_values, new_values = ((margins[name] - margins[base]).tolist() for name in names)
            changes[policy.name]["pairs"] = largest_changes("margin_nats", texts, old_values, new_values)
        completions = [measurements.completions[name, SAMPLES] for name in names]
        texts = [
            {"prompt": old.prompt, "texts": {policy.sft: old.text, policy.name: new.text}}
            for old, new in zip(*completions, strict=True)
        ]
        for judge, new_scores in scores.get(policy.name, {}).items():
            if old_scores := scores.get(policy.sft, {}).get(judge):
                key = f"score.{judge}"
                changes[policy.name][key] = largest_changes(key, texts, old_scores, new_scores)
    return changes


def largest_changes(
    quantity: str,
    texts: Sequence[dict[str, Any]],
    old_values: Sequence[float | None],
    new_values: Sequence[float | None],
    count: int = EXAMPLES,
) -> dict[str, Any]:
    """The `successes`, which gain in a quantity from one policy to the next, and the `failures`, which lose.

    Of `margin_nats` only flips count: a pair is wrong below 0, right above it, and a tie if either margin is 0. Equal
    scores are a tie. `texts` hold a prompt and its texts by name. Each side has the number of all, and the `count`
    examples that changed most. `unread` have a value that is None, and are not among the `n`. Raises ValueError for
    lists of different lengths.
    """
    rows = []
    for example, old, new in zip(texts, old_values, new_values, strict=True):
        if old is not None and new is not None:
            rows.append({**example, "prompt": prompt_to_text(example["prompt"]), "before": old, "after": new})
    if quantity == "margin_nats":
        ties = [row for row in rows if 0 in (row["before"], row["after"])]
        successes = [row for row in rows if row["before"] < 0 < row["after"]]
        failures = [row for row in rows if row["before"] > 0 > row["after"]]
    else:
        ties = [row for row in rows if row["before"] == row["after"]]
        successes = [row for row in rows if row["before"] < row["after"]]
        failures = [row for row in rows if row["before"] > row["after"]]
    result: dict[str, Any] = {
        "quantity": quantity,
        "n": len(rows),
        "ties": len(ties),
        "unread": len(texts) - len(rows),
    }
    for side, side_rows in (("successes", successes), ("failures", failures)):
        examples = sorted(side_rows, key=lambda row: -abs(row["after"] - row["before"]))[:count]
        result[side] = {"count": len(side_rows), "examples": examples}
    return result


def changes_as_markdown(changes: dict[str, Any], old: str, new: str, count: int = EXAMPLES) -> str:
    """Changes from the policy `old` to `new` as Markdown, with at most `count` examples a side."""
    quantity = changes["quantity"]
    heads = {"successes": f"{new} above {old} by {quantity}", "failures": f"{new} below {old} by {quantity}"}
    if quantity == "margin_nats":
        heads = {"successes": f"wrong with {old}, right with {new}", "failures": f"right with {old}, wrong with {new}"}
    blocks = []
    for side, head in heads.items():
        blocks.append(f"**{head}: {changes[side]['count']} of {changes['n']}**")
        for example in changes[side]["examples"][:count]:
            change = f"- {quantity}: {format_number(example['before'])} to {format_number(example['after'])}"
            texts = [f"- {name}: {one_line(text)}" for name, text in example["texts"].items()]
            blocks.append("\n".join([f"> {one_line(example['prompt'])}", "", change, *texts]))
    return "\n\n".join(blocks)
