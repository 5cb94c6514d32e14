"""Results as Markdown, for the terminal and the report alike."""

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
    "refusal_unsafe": "refusal, unsafe prompts",
    "over_refusal_safe": "over-refusal, safe prompts",
}
SHORT_KEYS = ("preference_accuracy", "margin_nats", "kl", "completion_tokens", "stop_rate")  # and what a judge says
MAX_COLUMNS = 4  # policies beside each other; more stand below each other
JUDGE_KEYS = re.compile(r"(score|noise_floor|win_rate|length_controlled_win_rate|elo)\.")


def comparison(
    cells: dict[str, dict[str, Any]], keys: list[str] | None = None, gaps: dict[str, str] | None = None
) -> str:
    """A Markdown table of estimates by policy and key, by default of all keys that it knows.

    A column for each policy; with more than four, or with `gaps`, a line for each. `gaps` are policies without
    estimates, with the reason, on lines at the end.
    """
    known = [
        *ROWS,
        *EXTRA_ROWS,
        *dict.fromkeys(key for cell in cells.values() for key in cell if JUDGE_KEYS.match(key)),
    ]
    keys = known if keys is None else keys
    labelled = {name: {label_of(key): cell[key] for key in keys if key in cell} for name, cell in cells.items()}
    labels = [label for label in map(label_of, keys) if any(label in cell for cell in labelled.values())]
    if len(cells) <= MAX_COLUMNS and gaps is None:
        return column_table(labelled, labels)
    lines = [{"": name, **{label: cell.get(label, "") for label in labels}} for name, cell in labelled.items()]
    lines += [{"": name, (labels or ["reason"])[0]: reason} for name, reason in (gaps or {}).items()]
    return line_table(lines)


def column_table(cells: dict[str, dict[str, Any]], labels: list[str] | None = None) -> str:
    """A Markdown table with a column for each policy, of estimates or texts by label."""
    labels = list(dict.fromkeys(label for cell in cells.values() for label in cell)) if labels is None else labels
    rows = [[label, *(format_cell(cell.get(label, "")) for cell in cells.values())] for label in labels]
    return markdown_table([["", *cells], *rows])


def line_table(lines: list[dict[str, Any]]) -> str:
    """A Markdown table with a line for each dict, of estimates, numbers or texts by column."""
    columns = list(dict.fromkeys(column for line in lines for column in line))
    return markdown_table([columns, *([format_cell(line.get(column, "")) for column in columns] for line in lines)])


def format_cell(value: Any) -> str:
    """An estimate with its interval, or of a few comparisons with their number; a p; a text as it is."""
    if isinstance(value, float):
        return f"{value:.2g}"
    if not isinstance(value, dict):
        return str(value)
    if value["low"] is None:
        return f"{format_number(value['value'])} (of {value['n']})"
    return format_estimate(value)


def cells_against(policies: dict[str, Any], names: list[str], against: str, with_own: bool = True) -> dict[str, Any]:
    """The estimates of these policies against `base` or `reference`, `with_own` those of each by itself too."""
    return {name: (policies[name]["own"] if with_own else {}) | policies[name]["against"][against] for name in names}


def label_of(key: str) -> str:
    """A key in words: `win_rate.truth.sft.t0.5` is `wins over sft by truth, temperature 0.5`."""
    if not JUDGE_KEYS.match(key):
        return {**ROWS, **EXTRA_ROWS}[key]
    kind, judge, *rest = key.split(".", 3)
    if kind in (words := {"score": "score", "elo": "Elo", "noise_floor": "wins over itself (noise floor)"}):
        return f"{words[kind]} by {judge}"
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
    """The accuracy by source, and by quarters of length difference (tokens) and reference margin (nats).

    Quarters also show the accuracy that the policy's rewards predict.
    """
    lines: list[dict[str, Any]] = []
    if len(by_source := against["accuracy_by_source"]) > 1:
        lines += [{"pairs": name, "n": each["n"], "accuracy": each} for name, each in by_source.items()]
    for label in ("length difference", "reference margin"):
        for quarter in against[f"accuracy_by_{label.replace(' ', '_')}"]:
            bounds = f"{label} {quarter['from']:.4g} to {quarter['to']:.4g}"
            estimates = {key: quarter[key] for key in ("accuracy", "predicted")}
            lines.append({"pairs": bounds, "n": quarter["accuracy"]["n"], **estimates})
    return line_table(lines)


def pairwise_table(comparisons: list[dict[str, Any]]) -> str:
    """Every two policies by one judge: how often the first wins, and whether their scores differ."""
    columns = {"one": "policy", "other": "against", "win_rate": "wins", "difference": "difference", "p": "p"}
    columns["p_adjusted"] = "p, of all (Holm)"
    return line_table([{label: row[key] for key, label in columns.items()} for row in comparisons])


def best_of_n_table(result: dict[str, Any]) -> str:
    """Best-of-N: the scores of the picked completions as N grows, with the upper bound of their KL."""
    lines = []
    for point in result["points"]:
        scores = {label_of(key): value for key, value in point.items() if key.startswith("score.")}
        lines.append({"N": point["n"], "KL, at most, nats": f"{point['kl_bound']:.3f}", **scores})
    return line_table(lines)


def safety_table(results: dict[str, dict[str, Any]]) -> str:
    """What `safety` gives for each policy, a column for each."""
    cells: dict[str, dict[str, Any]] = {}
    for policy, estimates in results.items():
        cells[policy] = {f"unreadable: {judge}": n for judge, n in estimates["unread"].items() if n}
        for key in (key for key in estimates if key != "unread"):
            judge, _, label = key.removeprefix("score.").rpartition(".")
            cells[policy][EXTRA_ROWS.get(key, f"score by {judge}, {label} prompts")] = estimates[key]
    return column_table(cells)


def bias_table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """What `bias` gives for each policy, a column for each; of two groups one gap says all."""
    cells: dict[str, dict[str, Any]] = {policy: {} for policy in results}
    for policy, quantities in results.items():
        for name, result in quantities.items():
            if gap := result.get("largest"):
                rows = dict(result["groups"])
                if len(rows) > 2:
                    rows |= {f"{group} minus the rest": value for group, value in result["against_rest"].items()}
                rows["largest gap"] = f"{' - '.join(gap['groups'])}: {format_cell(gap['difference'])}"
                cells[policy] |= {f"{name}, {label}": value for label, value in rows.items()}
            if result["unread"]:
                cells[policy][f"{name}, unreadable"] = result["unread"]
    return column_table(cells)


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


def side_by_side(samples: list[dict[str, Any]], names: list[str], count: int) -> str:
    """The first prompts for which all of these policies have a completion, with the completions below."""
    complete = [sample for sample in samples if all(name in sample["answers"] for name in names)]
    width, blocks = max(map(len, names)), []
    for sample in complete[:count]:
        lines = [f"  {name.ljust(width)}  {one_line(sample['answers'][name])}" for name in names]
        blocks.append("\n".join([f"> {one_line(sample['prompt'])}", *lines]))
    return "\n\n".join(blocks)
