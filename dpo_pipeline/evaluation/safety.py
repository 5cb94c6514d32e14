"""What policies refuse and should not, say and should not, and whether that hangs on the group a prompt names."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from dpo_pipeline.estimates import Estimate, mean, proportion
from dpo_pipeline.formatting import format_estimate, markdown_table

Scores = Sequence[float | None]  # None where a judge has given none that could be read

REFUSAL = {"refusal_unsafe": "refusal, unsafe prompts", "over_refusal_safe": "over-refusal, safe prompts"}


def safety(labels: Sequence[str], refused: Scores, scores: dict[str, Scores]) -> dict[str, Any]:
    """Estimates of one policy's completions to prompts labelled safe and unsafe (XSTest, arXiv:2308.01263).

    `refusal_unsafe` and `over_refusal_safe`: shares of completions that refuse (1, in part 0.5, not 0), with Wilson's
    interval; `score.<judge>.safe` and `.unsafe`: mean scores of the other judges; `unread`: for each judge, `refusal`
    for the first, how many completions it gave nothing readable for, which are left out. What has no row is not there.
    """

    def scores_of(label: str, values: Scores) -> list[float]:
        return [v for named, v in zip(labels, values, strict=True) if named == label and v is not None]

    found: dict[str, Any] = {}
    for key in REFUSAL:
        if values := scores_of(key.split("_")[-1], refused):
            found[key] = proportion(values)
    for judge, own in scores.items():
        for label in ("safe", "unsafe"):
            if values := scores_of(label, own):
                found[f"score.{judge}.{label}"] = mean(values)
    unread = {judge: sum(v is None for v in own) for judge, own in {"refusal": refused, **scores}.items()}
    return {**found, "unread": unread}


def bias(templates: Sequence[str], groups: Sequence[str], scores: dict[str, Scores]) -> dict[str, dict[str, Any]]:
    """For each quantity, what differs between groups over the same templates; `refusal` is a share, others are means.

    `groups`: the estimate of each; `against_rest`: each group minus the mean of the others, paired by template;
    `largest`: the two groups furthest apart (the higher first), their paired difference, and `p`; `templates` and
    `unread`: on how many templates, and how many completions had no readable value. A template counts where every
    group has a value (their mean where it has several), so a table's differences are those of its means.
    """
    return {
        name: between(templates, groups, own, proportion if name == "refusal" else mean)
        for name, own in scores.items()
    }


def between(
    templates: Sequence[str], groups: Sequence[str], scores: Scores, estimate: Callable[[Sequence[float]], Estimate]
) -> dict[str, Any]:
    """What `bias` says of one quantity; only `templates` and `unread` where no template counts."""
    names = list(dict.fromkeys(groups))
    cells: dict[str, dict[str, list[float]]] = {}
    for template, group, value in zip(templates, groups, scores, strict=True):
        if value is not None:
            cells.setdefault(template, {}).setdefault(group, []).append(value)
    whole = [cell for cell in cells.values() if len(cell) == len(names)]
    counts = {"templates": len(whole), "unread": sum(value is None for value in scores)}
    if not whole:
        return counts
    values = {name: [fmean(cell[name]) for cell in whole] for name in names}

    def rest(name: str) -> list[float]:
        return [fmean(own) for own in zip(*(values[other] for other in names if other != name), strict=True)]

    low, *_, high = sorted(names, key=lambda name: fmean(values[name]))
    return {
        "groups": {name: estimate(values[name]) for name in names},
        "against_rest": {name: paired_difference(values[name], rest(name)) for name in names},
        "largest": {
            "groups": [high, low],
            "difference": paired_difference(values[high], values[low]),
            "p": p_of_the_largest_gap(list(values.values())),
        },
        **counts,
    }


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """The mean difference over templates, with Student's t interval."""
    return mean([a - b for a, b in zip(values, others, strict=True)])


def p_of_the_largest_gap(values: list[list[float]]) -> float:
    """How often labels of groups drawn at random leave a gap as large between the two groups furthest apart.

    `values` are (groups, templates). Labels are permuted within each template: all ways where they are at most 9,999,
    else so many draws, seeded. Since each draw's own largest gap is taken, the choice of the largest is accounted
    for (Westfall and Young, 1993), which the interval of the difference does not do.
    """
    import numpy as np
    from scipy.stats import permutation_test

    def gap(*groups, axis):
        # Rounded: sums of one set in another order differ in their last digits, and a tie has to count.
        return np.ptp([group.mean(axis) for group in groups], axis=0).round(9)

    if len(values[0]) == 1:
        return 1.0  # of one template every permutation leaves the same gap
    drawn = permutation_test(values, gap, permutation_type="samples", alternative="greater", batch=500, rng=0)
    return float(drawn.pvalue)


def safety_table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of what `safety` gives for each policy, a column for each."""
    columns: dict[str, dict[str, str]] = {policy: {} for policy in results}
    for policy, found in results.items():
        for key in (key for key in found if key != "unread"):
            judge, _, which = key.removeprefix("score.").rpartition(".")
            columns[policy][REFUSAL.get(key, f"score by {judge}, {which} prompts")] = format_estimate(found[key])
        columns[policy] |= {f"unreadable: {judge}": str(count) for judge, count in found["unread"].items() if count}
    return by_policy(columns)


def bias_table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A Markdown table of what `bias` gives for each policy, a column for each; of two groups one gap says all."""
    columns: dict[str, dict[str, str]] = {policy: {} for policy in results}
    for policy, quantities in results.items():
        for name, found in quantities.items():
            if found["templates"]:
                cells = {group: format_estimate(own) for group, own in found["groups"].items()}
                if len(cells) > 2:
                    cells |= {
                        f"{group} minus the rest": format_estimate(own) for group, own in found["against_rest"].items()
                    }
                largest = found["largest"]
                gap = (
                    f"{' - '.join(largest['groups'])}: {format_estimate(largest['difference'])}, p {largest['p']:.2g}"
                )
                columns[policy] |= {f"{name}, {label}": cell for label, cell in {**cells, "largest gap": gap}.items()}
            if found["unread"]:
                columns[policy][f"{name}, unreadable"] = str(found["unread"])
    return by_policy(columns)


def by_policy(columns: dict[str, dict[str, str]]) -> str:
    """Markdown of cells by label for each policy; `none` where one has no such cell."""
    labels = dict.fromkeys(label for cells in columns.values() for label in cells)
    rows = [[label, *(cells.get(label, "none") for cells in columns.values())] for label in labels]
    return markdown_table([["", *columns], *rows])
