"""Which rows go together into a batch: those of similar length, so that little is padding.

An optimizer step keeps the rows that the random order gives it and its micro batches keep their size, so its gradient
is that of the plain order.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import Sampler
from trl import DPOTrainer

from dpo_pipeline.distributed import processes

BATCH_LOSSES = {"sft", "aot", "aot_unpaired"}  # of all tokens, or of the sorted pairs, of a micro batch


class SimilarLengths(Sampler):
    """The order of Accelerate's sampler, with the rows of each whole step by length, the longest first."""

    def __init__(self, lengths: np.ndarray, step_rows: int, seed: int):
        self.lengths, self.step_rows = lengths, step_rows
        self.order = SeedableRandomSampler(lengths, data_seed=seed)

    def __len__(self) -> int:
        return len(self.order)

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        order = np.array([*self.order])
        for start in range(0, len(order), self.step_rows):
            rows = order[start : start + self.step_rows]
            if len(rows) == self.step_rows:  # else its last micro batch is smaller, and its rows weigh more
                rows = rows[longest_first(self.lengths[rows])]
            yield from rows.tolist()


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """The numbers of the rows, the longest first."""
    return np.argsort(-lengths, kind="stable")


def token_counts(table: Any) -> dict[str, np.ndarray]:
    """Tokens in each row of every column of token ids."""
    names = [name for name in table.column_names if name.endswith("_ids")]
    columns = table.select_columns(names).with_format("arrow")[:]
    return {name: pc.list_value_length(columns[name]).to_numpy() for name in names}


def row_lengths(table: Any) -> np.ndarray:
    """Tokens that each row pads a batch to: all of an SFT row; else the prompt with its longest completion."""
    counts = token_counts(table)
    return counts.pop("prompt_ids", 0) + np.max([*counts.values()], axis=0)


def use_similar_lengths(trainer: Any) -> None:
    """Order rows as similar_lengths.py explains, in training and in the validation of pairs, where no loss changes by
    the rows beside a pair.
    """
    args = trainer.args
    is_of_pairs = isinstance(trainer, DPOTrainer)
    if is_of_pairs and BATCH_LOSSES & {*trainer.loss_types}:
        return
    if args.train_sampling_strategy == "random":
        step_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes()
        lengths = row_lengths(trainer.train_dataset)
        trainer._get_train_sampler = lambda table: SimilarLengths(lengths, step_rows, args.data_seed)
    if is_of_pairs and "weight" not in trainer.eval_dataset.column_names:
        trainer._get_eval_sampler = lambda table: longest_first(row_lengths(table)).tolist()
