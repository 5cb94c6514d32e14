"""Several data sets as one, each read by its own loader; `source` tells their rows apart."""

import random

from pydantic import PositiveFloat, PositiveInt, validate_call

from dpo_pipeline.data.files import Row
from dpo_pipeline.data.report import FILTERED, drop_all_but, kept_rows
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
    """Rows of all sets by split, with the set's name as source; those that are not drawn have a `reason`.

    With `weights` the train rows of the sets stand in that proportion, as many as the set that runs out first allows.
    `rows` is the most that is drawn of a set. All test rows of each set are kept, its own or held out by prompt.
    """
    if not sets:
        raise PipelineError("dataset.sets is empty: type +dataset@dataset.sets.hh=hh_rlhf for a set called hh")
    weights, row_limits = weights or {}, rows or {}
    for key, names in (("weights", weights), ("rows", row_limits)):
        if unknown := ", ".join(names.keys() - sets.keys()):
            raise PipelineError(f"dataset.{key}.{unknown}: there are only the sets {', '.join(sets)}")
    if weights and (missing := ", ".join(sorted(sets.keys() - weights.keys()))):
        raise PipelineError(f"dataset.weights names no weight for {missing}: give one for every set, or none")
    parts = {name: read_splits(node, chat, name) for name, node in sets.items()}
    available = {name: kept_rows(train) for name, (train, _) in parts.items()}
    rows_per_weight = min((len(available[name]) / weight for name, weight in weights.items()), default=0)
    rng = random.Random(seed)
    for name, set_rows in available.items():
        count = round(rows_per_weight * weights[name]) if weights else len(set_rows)
        drop_all_but(set_rows, min(count, row_limits.get(name, count)), rng, "not drawn", FILTERED)
    return {split: [row for part in parts.values() for row in part[i]] for i, split in enumerate(("train", "test"))}
