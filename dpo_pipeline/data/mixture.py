"""Several data sets as one, each by its own loader, its rows told apart by `source`."""

import random
from typing import Any

from dpo_pipeline.data.splits import read_splits
from dpo_pipeline.errors import PipelineError, nearest


def load(
    sets: dict[str, dict[str, Any]],
    weights: dict[str, float] | None,
    rows: dict[str, int] | None,
    seed: int,
    chat: bool,
    source: str,
) -> dict[str, list[dict[str, Any]]]:
    """Rows of all sets, by split, each called after its set; those that are not drawn are `left_out`.

    Where there are `weights`, the train rows of each set stand in that proportion, as many as the set that runs out
    first allows; `rows` are at most drawn of one. Each set's test rows, its own or held out by prompt, all are.
    """
    if not sets:
        raise PipelineError(
            f"dataset.sets of this {source} is empty: type +dataset@dataset.sets.hh=hh_rlhf for a set called hh, and "
            "so on"
        )
    weights, rows = weights or {}, rows or {}
    for key, given in (("weights", weights), ("rows", rows)):
        if not isinstance(given, dict):
            raise PipelineError(f"dataset.{key}={given} is no mapping: type 'dataset.{key}={{{next(iter(sets))}: 2}}'")
        for name, value in given.items():
            if name not in sets:
                raise PipelineError(
                    f"dataset.{key}.{name} is none of its sets ({', '.join(sets)}){nearest(name, sets)}"
                )
            if not isinstance(value, int if key == "rows" else int | float) or not value > 0:
                raise PipelineError(f"dataset.{key}.{name}={value}: it must be a number larger than 0")
    if weights and len(weights) < len(sets):
        missing = ", ".join(name for name in sets if name not in weights)
        raise PipelineError(f"dataset.weights names no weight for {missing}: give one for every set, or none")
    rng = random.Random(seed)
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    parts = {name: read_splits(node, chat, name) for name, node in sets.items()}
    live = {name: [row for row in train if "left_out" not in row] for name, (train, _) in parts.items()}
    share = min((len(live[name]) / weight for name, weight in weights.items()), default=0)
    for name, (train, test) in parts.items():
        count = round(share * weights[name]) if weights else len(live[name])
        drawn = {id(row) for row in rng.sample(live[name], min(count, rows.get(name, count)))}
        left = (row if id(row) in drawn or "left_out" in row else {**row, "left_out": "not drawn"} for row in train)
        splits["train"].extend(left)
        splits["test"].extend(test)
    return splits
