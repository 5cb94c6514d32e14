"""Log-probs of the pairs under the reference, computed once for all runs that share it: betas, losses and seeds.

TRL's own pass computes them and caches them beside the token table. We add a key (TRL's lacks precision and
`ld_alpha`, and changes with a new adapter's seed), a lock, rows in order of length (as they lie, dialogues take twice
the padding), and a second pass where the cached file is damaged.
"""

import contextlib
import json
import logging
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model, patch_environment
from trl import DPOTrainer

from dpo_pipeline.distributed import on_main_process, processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.locks import file_lock
from dpo_pipeline.models import LoadOptions
from dpo_pipeline.training.memory import random_state_kept
from dpo_pipeline.training.pair_logps import reference_logps, tolerance
from dpo_pipeline.training.similar_lengths import longest_first, row_lengths

log = logging.getLogger(__name__)


def reference_key(weights_hash: str, options: LoadOptions, args: Any) -> str:
    """What reference log-probs depend on beside the rows: weights, how they are held and multiplied, `ld_alpha`."""
    return json.dumps(
        [weights_hash, str(options.dtype), options.quantization, args.bf16, args.fp16, args.ld_alpha], sort_keys=True
    )


def add_reference_logps(trainer: Any, key: str) -> None:
    """Give every row `ref_chosen_logps` and `ref_rejected_logps`: sums over completion tokens, in nats.

    The tables come from `load_from_disk`. Of two jobs at once one computes and the other waits. Lets go of the frozen
    adapter copy or the reference model. Raises PipelineError where rows computed again differ.
    """
    tables = (trainer.train_dataset, trainer.eval_dataset)
    folders = [Path(table.cache_files[0]["filename"]).parent for table in tables]
    trainer._precompute_model_hash = key
    with contextlib.ExitStack() as stack:
        on_main_process(lambda: stack.enter_context(file_lock(folders[0] / "reference")))
        try:
            is_correct = run_reference_pass(trainer, *tables)
        except (ValueError, OSError, KeyError):  # what pyarrow and datasets raise at a damaged file
            is_correct = False
        if not is_correct:
            log.warning("cached reference log-probs in %s are damaged or wrong: computed again", folders[0])
            on_main_process(lambda: [file.unlink() for each in folders for file in each.glob("cache-*.arrow")])
            if not run_reference_pass(trainer, *tables):
                raise PipelineError("reference log-probs change when computed again: type reference=frozen")
    trainer.ref_model = None
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft_model(model) and "ref" in model.peft_config:
        model.delete_adapter("ref")


def run_reference_pass(trainer: Any, train: Any, validation: Any) -> bool:
    """Read or compute the log-probs of both tables; whether three training rows, computed again, have the same."""
    read = rows_to_read(trainer, len(train))
    trainer.train_dataset = rows = with_reference_logps(trainer, train, "train", read)
    trainer.eval_dataset = with_reference_logps(trainer, validation, "validation", np.arange(len(validation)))
    sample = [rows[int(read[i])] for i in (0, len(read) // 2, len(read) - 1)]
    batch = trainer._prepare_inputs(trainer.data_collator(sample))
    cached_logps = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]).double()
    # Other rows beside them make another padding, and more rounding than within one batch.
    return bool(((reference_logps(trainer, batch) - cached_logps).abs() <= tolerance(trainer, batch, 40)).all())


def rows_to_read(trainer: Any, rows: int) -> np.ndarray:
    """The numbers of the rows that training reads, ascending; not all where `max_steps` is less than an epoch."""
    args = trainer.args
    count = args.max_steps * args.gradient_accumulation_steps * args.per_device_train_batch_size * processes()
    if not 0 < count < rows:
        return np.arange(rows)
    with random_state_kept():
        sampler = trainer.get_train_dataloader().batch_sampler
        batches = sampler if processes() == 1 else sampler.batch_sampler  # of all ranks
        return np.sort(list(islice(chain.from_iterable(batches), count)))


def with_reference_logps(trainer: Any, table: Any, name: str, rows: np.ndarray) -> Any:
    """The table with the log-probs of these rows by TRL's pass, which takes the longest first; NaN for the others."""
    order = rows[longest_first(row_lengths(table)[rows])]
    with trainer.args.main_process_first(local=False):  # one process writes the sorted table
        by_length = table.select(order).flatten_indices()
    with random_state_kept(), patch_environment(TQDM_DISABLE=""):  # a long pass shows its bar
        by_length = DPOTrainer._precompute_ref_logps(trainer, by_length, name, trainer.args.per_device_eval_batch_size)
    if len(rows) == len(table):
        return by_length.select(np.argsort(order))
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        values = np.full(len(table), np.nan)
        values[order] = by_length[column]
        table = table.add_column(column, values)
    return table
