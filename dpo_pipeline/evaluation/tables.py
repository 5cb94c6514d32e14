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
EXTRA_ROWS = {
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
COMPACT_KEYS = ("preference_accuracy", "margin_nats", "kl", "completion_tokens", "stop_rate")
MAX_COLUMNS = 4  # policies beside each other; more stand below each other
JUDGE_KEYS = re.compile(r"(score|win_rate|length_controlled_win_rate|elo)\.")
DETAIL_KEYS = re.compile(r"^length_controlled|\.t[\d.]+$")  # left out of compact tables


def comparison(
    policies: dict[str, Any],
    names: list[str],
    against: str,
    keys: dict[str, str] = ROWS,
    gaps: dict[str, str] | None = None,
    with_own: bool = True,
) -> str:
    """A Markdown table of estimates with their intervals, all against one reference.

    `against` is `base`, or `reference` for DPO's own; `with_own` adds what was measured of each policy by itself. A
    column for each policy; with more than four a line for each, with fewer quantities. `gaps` are policies without
    estimates, with the reason, on lines at the end.
    """
    is_compact = len(names) > MAX_COLUMNS or gaps is not None
    cells = [{**(policies[name]["own"] if with_own else {}), **policies[name]["against"][against]} for name in names]
    judge_keys = [key for key in dict.fromkeys(key for cell in cells for key in cell) if JUDGE_KEYS.match(key)]
    if is_compact:
        keys = {key: label for key, label in keys.items() if key in COMPACT_KEYS}
        judge_keys = [key for key in judge_keys if not DETAIL_KEYS.search(key)]
    lines = [["", *names]]
    for key, label in {**keys, **{key: label_of(key) for key in judge_keys}}.items():
        if any(key in cell for cell in cells):
            lines.append([label, *(format_estimate(cell[key]) if key in cell else "" for cell in cells)])
    if not is_compact:
        return markdown_table(lines)
    lines = [list(column) for column in zip(*lines, strict=True)]
    width = max(2, len(lines[0]))  # a gap needs a cell for its reason
    lines += [[name, reason] for name, reason in (gaps or {}).items()]
    return markdown_table([line + [""] * (width - len(line)) for line in lines])


def label_of(key: str) -> str:
    """A judge's estimate in words: `win_rate.truth.sft.t0.5` is `wins over sft by truth, temperature 0.5`."""
    kind, judge, *rest = key.split(".", 3)
    if kind in ("score", "elo"):
        return f"{'score' if kind == 'score' else 'Elo'} by {judge}" + (f", {rest[0]}" if rest else "")
    temperature = f", temperature {rest[1].removeprefix('t')}" if len(rest) > 1 else ""
    control = " at equal length" if kind.startswith("length") else ""
    return f"wins over {rest[0]} by {judge}{control}{temperature}"


def caption(policy: dict[str, Any], reference: str, beta: bool = True) -> str:
    """What a comparison is measured on, and against what; `beta` says whether to name it."""
    settings = policy["settings"]
    source = settings["prompts_file"] or policy["dataset"]
    sampling = f"temperature 1, at most {settings['max_new_tokens']} tokens"
    if settings["quantization"]:
        sampling += f", weights in {settings['quantization']['_target_'].split('.')[-1]}"
    return (
        f"All against {reference}: {settings['pairs']:,} test pairs and {settings['prompts']} sampled completions of "
        f"{source} ({sampling}), " + (f"beta {settings['beta']:g}, " if beta else "") + "95% intervals."
    )


def accuracy_by_subset(against: dict[str, Any]) -> str:
    """The accuracy of one policy by source, and by quarters of length difference (tokens) and reference margin (nats).

    Quarters also show the accuracy that the policy's rewards predict.
    """
    lines = [["pairs", "n", "accuracy", "predicted"]]
    if len(by_source := against["accuracy_by_source"]) > 1:
        lines += [[name, str(accuracy["n"]), format_estimate(accuracy), ""] for name, accuracy in by_source.items()]
    for label in ("length difference", "reference margin"):
        for quarter in against[f"accuracy_by_{label.replace(' ', '_')}"]:
            accuracy, predicted = quarter["accuracy"], quarter["predicted"]
            bounds = f"{label} {quarter['from']:.4g} to {quarter['to']:.4g}"
            lines.append([bounds, str(accuracy["n"]), format_estimate(accuracy), format_estimate(predicted)])
    return markdown_table(lines)


def pairwise_table(comparisons: list[dict[str, Any]]) -> str:
    """Every two policies by one judge: how often the first wins, and whether their scores differ."""
    lines = [["policy", "against", "wins", "difference", "p", "p, of all (Holm)"]]
    for row in comparisons:
        estimates = [format_estimate(row[key]) for key in ("win_rate", "difference")]
        lines.append([row["one"], row["other"], *estimates, f"{row['p']:.2g}", f"{row['p_adjusted']:.2g}"])
    return markdown_table(lines)


def best_of_n_table(result: dict[str, Any]) -> str:
    """Best-of-N: the scores of the picked completions as N grows, with the upper bound of their KL."""
    keys = [key for key in result["points"][0] if key.startswith("score.")]
    lines = [["N", "KL, at most, nats", *(label_of(key) for key in keys)]]
    for point in result["points"]:
        lines.append([str(point["n"]), f"{point['kl_bound']:.3f}", *(format_estimate(point[key]) for key in keys)])
    return markdown_table(lines)


def side_by_side(samples: list[dict[str, Any]], names: list[str], count: int = 3) -> str:
    """The first prompts for which all of these policies have a completion, with the completions below."""
    complete = [sample for sample in samples if all(name in sample["answers"] for name in names)]
    width = max(map(len, names))
    blocks = []
    for sample in complete[:count]:
        lines = [f"  {name.ljust(width)}  {one_line(sample['answers'][name])}" for name in names]
        blocks.append("\n".join([f"> {one_line(sample['prompt'])}", *lines]))
    return "\n\n".join(blocks)
