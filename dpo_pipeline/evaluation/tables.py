"""Results as Markdown."""

from typing import Any

from dpo_pipeline.printing import grid, line, shown

ROWS = {
    "preference_accuracy": "preference accuracy",
    "margin": "margin (with beta)",
    "margin_nats": "margin_nats",
    "kl": "KL from samples, nats",
    "kl_per_token": "KL per token, nats",
    "perplexity_chosen": "perplexity of chosen",
    "answer_tokens": "answer length, tokens",
    "stop_rate": "stop rate",
}


def comparison(results: dict[str, Any], names: list[str], against: str) -> str:
    """A Markdown table of estimates with their intervals: a column for each policy, all against one reference.

    `against` is `base`, or `reference` for DPO's own.
    """
    policies = [results["policies"][name] for name in names]
    cells = [{**policy["own"], **policy["against"][against]} for policy in policies]
    rows = {**ROWS, **{key: f"score by {key.removeprefix('score.')}" for key in cells[0] if key.startswith("score.")}}
    lines = [[label, *(shown(cell[key]) for cell in cells)] for key, label in rows.items()]
    return grid([["", *names], *lines])


def caption(policy: dict[str, Any], reference: str) -> str:
    """What a comparison was measured on, and against what."""
    s = policy["settings"]
    return (
        f"All against {reference}: {s['pairs']:,} test pairs and {s['prompts']} sampled answers of "
        f"{policy['dataset']} (temperature 1, at most {s['max_new_tokens']} tokens), "
        f"beta {s['beta']:g}, 95% intervals."
    )


def side_by_side(samples: list[dict[str, Any]], names: list[str], count: int = 3) -> str:
    """The first prompts that all of these policies answered, with their answers under them."""
    complete = [sample for sample in samples if all(name in sample["answers"] for name in names)][:count]
    width = max(len(name) for name in names)
    blocks = [
        "\n".join(
            [f"> {line(sample['prompt'])}", *(f"  {n.ljust(width)}  {line(sample['answers'][n])}" for n in names)]
        )
        for sample in complete
    ]
    return "\n\n".join(blocks)
