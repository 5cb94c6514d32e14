"""Results as Markdown."""

import re
from typing import Any

from dpo_pipeline.formatting import format_estimate, markdown_table, one_line

ROWS = {
    "preference_accuracy": "preference accuracy",
    "margin": "margin (with beta)",
    "margin_nats": "margin_nats",
    "kl": "KL from samples, nats",
    "kl_per_token": "KL per token, nats",
    "perplexity_chosen": "perplexity of chosen",
    "completion_tokens": "completion length, tokens",
    "stop_rate": "stop rate",
}
MORE = {
    "length_normalised_accuracy": "length-normalised accuracy",
    "reward_chosen": "reward of chosen",
    "reward_rejected": "reward of rejected",
    "logprob_change_chosen_per_token": "log-prob change of chosen, per token",
    "logprob_change_rejected_per_token": "log-prob change of rejected, per token",
    "repetition": "repetition, 3-grams",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "refusal_unsafe": "refusal of unsafe prompts",
    "over_refusal_safe": "over-refusal of safe prompts",
}
FEW = (
    "preference_accuracy",
    "margin_nats",
    "kl",
    "completion_tokens",
    "stop_rate",
)  # of many policies, beside the scores
COLUMNS = 4  # policies beside each other; more stand below each other


def comparison(
    policies: dict[str, Any],
    names: list[str],
    against: str,
    keys: dict[str, str] = ROWS,
    gaps: dict[str, str] | None = None,
    with_own: bool = True,
) -> str:
    """A Markdown table of estimates with their intervals, all against one reference.

    `against` is `base`, or `reference` for DPO's own; `alone`: with what was measured of each policy by itself. A
    column for each; of more than four a line for each, with fewer numbers, and below them the `gaps`: policies without
    any, and why.
    """
    below = len(names) > COLUMNS or gaps is not None
    own = [policies[name]["own"] if with_own else {} for name in names]
    cells = [{**each, **policies[name]["against"][against]} for each, name in zip(own, names, strict=True)]
    judged = [key for key in dict.fromkeys(key for cell in cells for key in cell) if JUDGED.match(key)]
    if below:
        keys = {key: label for key, label in keys.items() if key in FEW}
        judged = [key for key in judged if not re.search(r"^length_controlled|\.t[\d.]+$", key)]
    rows = {**keys, **{key: label_of(key) for key in judged}}
    lines = [
        [label, *(format_estimate(cell[key]) if key in cell else "" for cell in cells)] for key, label in rows.items()
    ]
    lines = [["", *names], *(each for each in lines if any(each[1:]))]
    if not below:
        return markdown_table(lines)
    head, *lines = ([*each, *[""] * (2 - len(each))] for each in zip(*lines, strict=True))
    return markdown_table(
        [head, *lines, *([name, why, *[""] * (len(head) - 2)] for name, why in (gaps or {}).items())]
    )


JUDGED = re.compile(r"(score|win_rate|length_controlled_win_rate|elo)\.")


def label_of(key: str) -> str:
    """A judge's estimate in words: `win_rate.truth.sft.t0.5` is `wins over sft by truth, temperature 0.5`."""
    kind, judge, *rest = key.split(".", 3)
    if kind in ("score", "elo"):
        return f"{'score' if kind == 'score' else 'Elo'} by {judge}" + (f", {rest[0]}" if rest else "")
    at = f", temperature {rest[1].removeprefix('t')}" if len(rest) > 1 else ""
    equal = " at equal length" if kind.startswith("length") else ""
    return f"wins over {rest[0]} by {judge}{equal}{at}"


def caption(policy: dict[str, Any], reference: str, beta: bool = True) -> str:
    """What a comparison was measured on, and against what."""
    s = policy["settings"]
    weights = f", weights in {s['quantization']['_target_'].split('.')[-1]}" if s["quantization"] else ""
    return (
        f"All against {reference}: {s['pairs']:,} test pairs and {s['prompts']} sampled completions of "
        f"{s['prompts_file'] or policy['dataset']} (temperature 1, at most {s['max_new_tokens']} tokens{weights}), "
        + (f"beta {s['beta']:g}, " if beta else "")
        + "95% intervals."
    )


def accuracy_by_subset(against: dict[str, Any]) -> str:
    """The accuracy of one policy by source, by length difference in tokens and by the reference's own margin in nats.

    Beside it, where there are quarters, what the policy's rewards predict.
    """
    rows = [["pairs", "n", "accuracy", "predicted"]]
    by_source = against["accuracy_by_source"]
    rows += [[name, str(e["n"]), format_estimate(e), ""] for name, e in by_source.items() if len(by_source) > 1]
    for label in ("length difference", "reference margin"):
        for part in against[f"accuracy_by_{label.replace(' ', '_')}"]:
            of = f"{label} {part['from']:.4g} to {part['to']:.4g}"
            rows.append(
                [of, str(part["accuracy"]["n"]), format_estimate(part["accuracy"]), format_estimate(part["predicted"])]
            )
    return markdown_table(rows)


def pairwise_table(comparisons: list[dict[str, Any]]) -> str:
    """Any two policies by one judge: how often one wins, and whether they differ."""
    rows = [["policy", "against", "wins", "difference", "p", "p, of all (Holm)"]]
    for each in comparisons:
        numbers = [f"{each[key]:.2g}" for key in ("p", "p_adjusted")]
        rows.append(
            [
                each["one"],
                each["other"],
                format_estimate(each["win_rate"]),
                format_estimate(each["difference"]),
                *numbers,
            ]
        )
    return markdown_table(rows)


def best_of_n_table(result: dict[str, Any]) -> str:
    """Best-of-N: what the picked completions score as N grows, with the bound of their KL."""
    keys = [key for key in result["points"][0] if key.startswith("score.")]
    rows = [["N", "KL, at most, nats", *(label_of(key) for key in keys)]]
    rows += [
        [str(p["n"]), f"{p['kl_bound']:.3f}", *(format_estimate(p[key]) for key in keys)] for p in result["points"]
    ]
    return markdown_table(rows)


def side_by_side(samples: list[dict[str, Any]], names: list[str], count: int = 3) -> str:
    """The first prompts that all of these policies answered, with their completions under them."""
    complete = [sample for sample in samples if all(name in sample["answers"] for name in names)][:count]
    width = max(len(name) for name in names)
    blocks = [
        "\n".join(
            [
                f"> {one_line(sample['prompt'])}",
                *(f"  {n.ljust(width)}  {one_line(sample['answers'][n])}" for n in names),
            ]
        )
        for sample in complete
    ]
    return "\n\n".join(blocks)
