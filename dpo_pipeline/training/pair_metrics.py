"""What is logged of the validation pairs: means over all of them, not of batches."""

from typing import Any

import numpy as np

from dpo_pipeline.estimates import accuracy

# What TRL gathers of each pair, in its order.
PAIR_METRICS = "rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected".split()


def pair_metrics(gathered: Any) -> dict[str, float]:
    """The means of PAIR_METRICS over all validation pairs, whatever their batches; a tie counts half in accuracy."""
    values = dict(zip(PAIR_METRICS, gathered.predictions, strict=True))
    means = {name: float(np.mean(value, dtype=float)) for name, value in values.items()}
    return means | {"rewards/accuracies": accuracy(values["rewards/margins"].tolist())["value"]}
