"""Pairs of a row that holds several completions, each with a score or a rank."""

import math
from itertools import combinations

from dpo_pipeline.data.files import Row, to_number
from dpo_pipeline.data.report import filtered


def pair_completions(parts: Row, choice: str, min_gap: float) -> list[tuple[str, Row, Row]]:
    """The pairs of a row's `completions` by `scores` (more is better) or `ranks` (less is better).

    `choice`: best_worst, one pair, or all. Of each pair its place in the row, its two completions, and the marks of
    one that is left out: equal scores, or closer ones than `min_gap`. The first pair is best and worst; the best
    completion is chosen in the last one too, whose completion SFT learns.
    """
    completions, count = parts["completions"], len(parts["completions"])
    scores = [to_number(value) for value in parts["scores"] or ()] or [
        -to_number(rank) for rank in parts["ranks"] or ()
    ]
    if len(scores) != count or not all(map(math.isfinite, scores)):
        return [("", {"chosen": "", "rejected": ""}, {"problem": "not one number for each completion"})]
    if count < 2:
        return [("", {"chosen": "", "rejected": ""}, filtered("fewer than two completions"))]
    order = sorted(range(count), key=lambda i: -scores[i])
    places = [(0, count - 1), *combinations(range(1, count), 2), *((0, i) for i in range(1, count - 1))]
    pairs = []
    for chosen, rejected in ([order[i] for i in place] for place in places[: 1 if choice == "best_worst" else None]):
        gap = round(scores[chosen] - scores[rejected], 9)  # of decimal scores: 0.3 - 0.1 is 0.2
        marks = filtered(f"scores closer than {min_gap:g}") if gap < min_gap else {}
        marks = marks if gap else filtered("a tie (equal scores)")
        texts = {"chosen": completions[chosen], "rejected": completions[rejected]}
        pairs.append((f", completions {chosen + 1} and {rejected + 1}", texts, marks))
    return pairs
