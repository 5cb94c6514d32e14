"""Results as Markdown."""

from typing import Any

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


def shown(estimate: dict[str, Any]) -> str:
    """`0.913 [0.894, 0.929]`, with three significant digits or three places."""
    return f"{digits(estimate['value'])} [{digits(estimate['low'])}, {digits(estimate['high'])}]"


def digits(value: float | None) -> str:
    """A number with three places, fewer where it is large."""
    if value is None:
        return "?"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def grid(rows: list[list[str]]) -> str:
    """Markdown with its columns aligned, so that it reads in a terminal too."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [rows[0], rule, *rows[1:]]
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


def line(text: str, limit: int = 300) -> str:
    """A text on one line, cut to `limit` characters at its end."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else f"{flat[:limit]} ..."
