"""What policies refuse, whether it depends on the group in a prompt, and on which examples they gained or lost."""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from dpo_pipeline import estimates
from dpo_pipeline.data.normalize import prompt_to_text
from dpo_pipeline.evaluation.measure import Comparison
from dpo_pipeline.evaluation.summary import SIDES, changes_against, mean_of

EXAMPLES = 20  # pairs and completions that changed most, in results.json


def safety(lines: pd.DataFrame) -> dict[str, Any]:
    """Estimates of one policy's completions for prompts whose `label` is safe or unsafe (XSTest, arXiv:2308.01263).

    `refusal_unsafe` and `over_refusal_safe`: shares of completions that refuse (1, in part 0.5, not 0), with Wilson's
    interval; `score.<judge>.safe` and `.unsafe`: mean scores of the other judges; `unread`: for each judge how many
    completions have no readable result and are left out. What has no row is left out.
    """
    results: dict[str, Any] = {"unread": {}}
    for column in [column for column in lines if column.startswith("score.")]:
        judge = column.removeprefix("score.")
        results["unread"][judge] = int(lines[column].isna().sum())
        for label, values in lines.dropna(subset=column).groupby("label")[column]:
            key = f"{column}.{label}"
            if judge == "refusal":
                key = {"unsafe": "refusal_unsafe", "safe": "over_refusal_safe"}[label]
            is_share = judge == "refusal"
            results[key] = estimates.proportion(values.tolist()) if is_share else mean_of(column, values)
    return results


def bias(lines: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """How scores and length differ between groups over the same templates; `refusal` is a share, others are means.

    `groups`: the estimate of each; `against_rest`: each group minus the mean of the others, paired by template;
    `largest`: the two groups furthest apart (the higher first) and their paired difference; `templates`: how many have
    a value for every group (the mean of several), without which nothing is compared; `unread`: how many completions
    have no readable value.
    """
    results: dict[str, dict[str, Any]] = {}
    for column in [column for column in lines if column.startswith("score.") or column == "tokens"]:
        table = lines.pivot_table(index="template", columns="group", values=column, sort=False)
        table = table.reindex(columns=lines["group"].unique()).dropna()
        name = "completion_tokens" if column == "tokens" else column.removeprefix("score.")
        results[name] = {"templates": len(table), "unread": int(lines[column].isna().sum())}
        if len(table):
            low, *_, high = table.mean().sort_values(kind="stable").index
            estimate = estimates.proportion if name == "refusal" else partial(mean_of, column)
            rest = {group: table.drop(columns=group).mean(axis=1) for group in table}
            results[name] |= {
                "groups": {group: estimate(table[group].tolist()) for group in table},
                "against_rest": {group: estimates.mean((table[group] - rest[group]).tolist()) for group in table},
                "largest": {"groups": [high, low], "difference": estimates.mean((table[high] - table[low]).tolist())},
            }
    return results


def notable_changes(comparison: Comparison) -> dict[str, Any]:
    """For each policy with an SFT policy to beat: pairs whose preference flipped, samples whose score changed most.

    Margins are against the base; without a base there are no flips, since the policy to beat is the reference itself.
    """
    changes: dict[str, Any] = {}
    shown = {policy.name for policy in comparison.shown_policies}
    for policy in comparison.shown_policies:
        if policy.sft not in shown - {policy.name, "base"} or policy.name == "base":
            continue
        names = (policy.sft, policy.name)
        changes[policy.name] = {"before": policy.sft}
        if comparison.base:
            margins = [changes_against(comparison, name, comparison.base)[1] for name in names]
            frame = pd.DataFrame(comparison.eval_set.rows)[["prompt", *SIDES]]
            frame = frame.assign(before=margins[0], after=margins[1])
            changes[policy.name]["pairs"] = largest_changes("margin_nats", frame, SIDES)
        before, after = (comparison.samples(name).set_index("row") for name in names)
        texts = pd.DataFrame({"prompt": after["prompt"], policy.sft: before["text"], policy.name: after["text"]})
        for key in [column for column in after if column.startswith("score.")]:
            frame = texts.assign(before=before[key], after=after[key])
            if frame[["before", "after"]].notna().any().all():
                changes[policy.name][key] = largest_changes(key, frame, names)
    return changes


def largest_changes(quantity: str, frame: pd.DataFrame, texts: Any, count: int = EXAMPLES) -> dict[str, Any]:
    """The `successes`, which gain in a quantity from `before` to `after`, and the `failures`, which lose.

    Of `margin_nats` only flips count: a pair is wrong below 0, right above it, and a tie if either margin is 0. Equal
    scores are a tie. Each side has the number of all, and the `count` examples that changed most, with their prompt
    and the columns `texts`. `unread` have no value, and are not among the `n`.
    """
    lines = frame.dropna(subset=["before", "after"])
    before, after = lines["before"], lines["after"]
    is_tie, direction = before == after, after - before
    if quantity == "margin_nats":
        is_tie, direction = (before == 0) | (after == 0), np.sign(after) - np.sign(before)
    result: dict[str, Any] = {"quantity": quantity, "n": len(lines), "ties": int(is_tie.sum())}
    result["unread"] = len(frame) - len(lines)
    lines = lines.assign(direction=direction, size=(after - before).abs())[~is_tie]
    lines = lines.sort_values("size", ascending=False, kind="stable")
    for side, mask in (("successes", lines["direction"] > 0), ("failures", lines["direction"] < 0)):
        examples = [
            {
                "prompt": prompt_to_text(line["prompt"]),
                "texts": {name: line[name] for name in texts},
                "before": line["before"],
                "after": line["after"],
            }
            for line in lines[mask][:count].to_dict("records")
        ]
        result[side] = {"count": int(mask.sum()), "examples": examples}
    return result
