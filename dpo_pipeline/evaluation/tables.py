"""Results as Markdown tables, for the terminal and the report alike."""

import re
from typing import Any

from dpo_pipeline.formatting import format_estimate, format_number, markdown_table, one_line

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
REFUSALS = {"refusal_unsafe": "refusal, unsafe prompts", "over_refusal_safe": "over-refusal, safe prompts"}
SHORT_KEYS = ("preference_accuracy", "margin_nats", "kl", "completion_tokens", "stop_rate")  # and what a judge says
MAX_COLUMNS = 4  # policies beside each other; more stand below each other
JUDGE_KEYS = re.compile(r"(score|win_rate|length_controlled_win_rate|elo)\.")


def comparison(
    cells: dict[str, dict[str, Any]], keys: list[str] | None = None, gaps: dict[str, str] | None = None
) -> str:
    """A Markdown table of estimates by policy and key, by default of all keys that it knows.

    A column for each policy; with more than four, or with `gaps`, a line for each. `gaps` are policies without
    estimates, with the reason, on lines at the end.
    """
    if keys is None:
        judge_keys = dict.fromkeys(key for cell in cells.values() for key in cell if JUDGE_KEYS.match(key))
        keys = [*ROWS, *EXTRA_ROWS, *judge_keys]
    lines = [["", *cells]]
    for key in keys:
        if any(key in cell for cell in cells.values()):
            texts = [format_cell(cell[key]) if key in cell else "" for cell in cells.values()]
            lines.append([label_of(key), *texts])
    if len(cells) <= MAX_COLUMNS and gaps is None:
        return markdown_table(lines)
    lines = [list(column) for column in zip(*lines, strict=True)]
    width = max(2, len(lines[0]))  # a gap needs a cell for its reason
    lines += [[name, reason] for name, reason in (gaps or {}).items()]
    return markdown_table([line + [""] * (width - len(line)) for line in lines])


def cells_against(policies: dict[str, Any], names: list[str], against: str, with_own: bool = True) -> dict[str, Any]:
    """The estimates of these policies against `base` or `reference`, with those of each by itself unless told not."""
    return {name: (policies[name]["own"] if with_own else {}) | policies[name]["against"][against] for name in names}


def format_cell(estimate: dict[str, Any]) -> str:
    """An estimate with its interval; of a few comparisons how many there are."""
    if estimate["low"] is None:
        return f"{format_number(estimate['value'])} (of {estimate['n']})"
    return format_estimate(estimate)


def label_of(key: str) -> str:
    """A key in words: `win_rate.truth.sft.t0.5` is `wins over sft by truth, temperature 0.5`."""
    if not JUDGE_KEYS.match(key):
        return {**ROWS, **EXTRA_ROWS}[key]
    kind, judge, *rest = key.split(".", 3)
    if kind in ("score", "elo"):
        return f"{'score' if kind == 'score' else 'Elo'} by {judge}" + (f", {rest[0]}" if rest else "")
    temperature = f", temperature {rest[1].removeprefix('t')}" if len(rest) > 1 else ""
    control = " at equal length (logistic fit)" if kind.startswith("length") else ""
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
        estimates = [format_cell(row[key]) for key in ("win_rate", "difference")]
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


def safety_table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of what `safety` gives for each policy, a column for each."""
    columns: dict[str, dict[str, str]] = {policy: {} for policy in results}
    for policy, estimates in results.items():
        for key in (key for key in estimates if key != "unread"):
            judge, _, label = key.removeprefix("score.").rpartition(".")
            columns[policy][REFUSALS.get(key, f"score by {judge}, {label} prompts")] = format_cell(estimates[key])
        columns[policy] |= {f"unreadable: {judge}": str(n) for judge, n in estimates["unread"].items() if n}
    return policy_table(columns)


def bias_table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A Markdown table of what `bias` gives for each policy, a column for each; of two groups one gap says all."""
    columns: dict[str, dict[str, str]] = {policy: {} for policy in results}
    for policy, quantities in results.items():
        for name, result in quantities.items():
            if gap := result.get("largest"):
                rows = dict(result["groups"])
                if len(rows) > 2:
                    rows |= {f"{group} minus the rest": value for group, value in result["against_rest"].items()}
                columns[policy] |= {f"{name}, {label}": format_cell(value) for label, value in rows.items()}
                difference = f"{' - '.join(gap['groups'])}: {format_cell(gap['difference'])}"
                columns[policy][f"{name}, largest gap"] = difference
            if result["unread"]:
                columns[policy][f"{name}, unreadable"] = str(result["unread"])
    return policy_table(columns)


def policy_table(columns: dict[str, dict[str, str]]) -> str:
    """A Markdown table of cells by label for each policy; `none` where a policy has no such cell."""
    labels = dict.fromkeys(label for cells in columns.values() for label in cells)
    rows = [[label, *(cells.get(label, "none") for cells in columns.values())] for label in labels]
    return markdown_table([["", *columns], *rows])


def changes_as_markdown(changes: dict[str, Any], old: str, new: str, count: int) -> str:
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
