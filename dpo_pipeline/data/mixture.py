"""Several data sets as one, each read by its own loader; `source` tells their rows apart."""

import random

from pydantic import PositiveFloat, PositiveInt, validate_call

from dpo_pipeline.data.sources import Row
from dpo_pipeline.data.splits import read_splits
from dpo_pipeline.errors import PipelineError


@validate_call
def load(
    sets: dict[str, Row],
    weights: dict[str, PositiveFloat] | None,
    rows: dict[str, PositiveInt] | None,
    seed: int,
    chat: bool,
    source: str,
) -> dict[str, list[Row]]:
    """Rows of all sets by split, with the set's name as source; those that are not drawn are `left_out`.

    With `weights` the train rows of the sets stand in that proportion, as many as the set that runs out first allows.
    `rows` is the most that is drawn of a set. All test rows of each set are kept, its own or held out by prompt.
    """
    if not sets:
        raise PipelineError("dataset.sets is empty: type +dataset@dataset.sets.hh=hh_rlhf for a set called hh")
    weights, row_limits = weights or {}, rows or {}
    for key, names in (("weights", weights), ("rows", row_limits)):
        for name in names:
            if name not in sets:
                raise PipelineError(f"dataset.{key}.{name}: there are only the sets {', '.join(sets)}")
    if weights and len(weights) < len(sets):
        missing = ", ".join(sorted(sets.keys() - weights.keys()))
        raise PipelineError(f"dataset.weights names no weight for {missing}: give one for every set, or none")
    parts = {name: read_splits(node, chat, name) for name, node in sets.items()}
    available = {name: [row for row in train if "left_out" not in row] for name, (train, _) in parts.items()}
    rows_per_weight = min((len(available[name]) / weight for name, weight in weights.items()), default=0)
    rng = random.Random(seed)
    splits: dict[str, list[Row]] = {"train": [], "test": []}
    for name, (train, test) in parts.items():
        count = round(rows_per_weight * weights[name]) if weights else len(available[name])
        sample = rng.sample(available[name], min(count, row_limits.get(name, count)))
        sampled = {id(row) for row in sample}
        for row in train:
            if id(row) not in sampled and "left_out" not in row:
                row["left_out"] = "not drawn"
        splits["train"] += train
        splits["test"] += test
    return splits
