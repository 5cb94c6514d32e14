"""Log-probs of the pairs under the reference, computed once for all runs that share it: betas, losses, seeds.

TRL's own precomputing is keyed by every training argument, so that each beta computes them anew.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from dpo_pipeline import locks, run_folder
from dpo_pipeline.config import Run
from dpo_pipeline.distributed import is_main_process, on_main_process
from dpo_pipeline.models import LoadOptions

log = logging.getLogger(__name__)

Values = dict[str, torch.Tensor]  # `train.ref_chosen_logps` ...: sums over a completion's tokens, in nats


def cache_path(run: Run, weights: str | Path, loading: LoadOptions, tables: dict[str, str], args: Any) -> Path:
    """Where the log-probs of a reference lie: a function of what they depend on, and of nothing else.

    That is its weights, the token ids of the rows (`tables`: the fingerprint of each split, which the tokenizer, its
    template and the limits of length have made), how weights are held and multiplied, and `ld_alpha`.
    """
    key = {
        "weights": run_folder.weights_of(weights, run.model.revision),
        "rows": tables,
        "dtype": str(loading.dtype),
        "quantization": loading.quantization,
        "mixed": [args.bf16, args.fp16],
        "ld_alpha": args.ld_alpha,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return Path(run.root) / ".cache" / "reference" / digest


def add_reference_logps(trainer: Any, place: Path, allowed: Any) -> None:
    """Give every row its log-probs under the reference: the policy before step 1, or a model given to the trainer.

    By the trainer's own forward, so that a first reward is exactly 0; read from `place` where a run has left them and
    a few rows computed again agree within `allowed(trainer, batch)`, in nats. With a continued adapter the reference
    is TRL's frozen copy of it, which is then let go, as is a model.
    """
    with contextlib.ExitStack() as held:

        def find_cached() -> Values | None:
            held.enter_context(locks.file_lock(place))  # of two jobs at once, one computes
            return read_cache(place, trainer)

        values = on_main_process(find_cached)
        if values is not None and not spot_check(trainer, values, allowed):
            if is_main_process():
                log.warning("reference log-probs in %s are not those of this reference: computed anew", place)
            values = None
        if values is None:
            values = {
                f"{split}.{column}": torch.tensor(numbers)
                for split, rows in splits(trainer).items()
                for column, numbers in compute_reference_logps(trainer, rows, f"reference on {split}").items()
            }
            on_main_process(lambda: write_cache(place, values))
        elif is_main_process():
            log.info("reference log-probs of %d pairs: read from %s", len(trainer.train_dataset), place)
    trainer.train_dataset, trainer.eval_dataset = (
        with_columns(rows, {name: values[f"{split}.{name}"].tolist() for name in COLUMNS})
        for split, rows in splits(trainer).items()
    )
    trainer.ref_model = None
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft_model(model) and "ref" in model.peft_config:
        model.delete_adapter("ref")


COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def splits(trainer: Any) -> dict[str, Any]:
    """The rows that need a reference."""
    return {"train": trainer.train_dataset, "validation": trainer.eval_dataset}


def compute_reference_logps(trainer: Any, rows: Any, label: str | None = None) -> dict[str, list[float]]:
    """The columns of these rows, by forwards of all processes; the longest rows first, which pads least."""
    lengths = [len(p) + max(len(c), len(r)) for p, c, r in zip(*(rows[n][:] for n in IDS), strict=True)]
    order = sorted(range(len(rows)), key=lengths.__getitem__, reverse=True)
    size = trainer.args.per_device_eval_batch_size
    batches = DataLoader(rows.select(order), batch_size=size, collate_fn=trainer.data_collator)
    reference = trainer.ref_model or trainer.model
    values: dict[str, list[float]] = {column: [] for column in COLUMNS}
    off = not (label and is_main_process())
    for batch in tqdm(trainer.accelerator.prepare(batches), desc=label, leave=False, disable=off):
        both = trainer.accelerator.gather_for_metrics(trainer.compute_ref_log_probs(reference, batch))
        for column, numbers in zip(COLUMNS, both, strict=True):
            values[column].extend(numbers.tolist())
    at = {row: i for i, row in enumerate(order)}
    return {column: [numbers[at[i]] for i in range(len(rows))] for column, numbers in values.items()}


IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def with_columns(rows: Any, columns: dict[str, list[float]]) -> Any:
    """The rows with more columns."""
    for name, numbers in columns.items():
        rows = rows.add_column(name, numbers)
    return rows


def spot_check(trainer: Any, values: Values, allowed: Any) -> bool:
    """Whether the first, middle and last training pair, computed again, have these log-probs."""
    count = len(trainer.train_dataset)
    few = sorted({0, count // 2, count - 1})
    rows = trainer.train_dataset.select(few)
    again = compute_reference_logps(trainer, rows)
    off = torch.tensor([again[name] for name in COLUMNS]) - torch.stack([values[f"train.{n}"][few] for n in COLUMNS])
    return bool((off.abs().flatten() <= allowed(trainer, trainer.data_collator(list(rows)))).all())


def read_cache(place: Path, trainer: Any) -> Values | None:
    """What an earlier run left, or None where there is nothing, or where it is damaged."""
    file = place / "logps.safetensors"
    if not file.is_file():
        return None
    try:
        values = load_file(file)
        if all(values[f"{s}.{n}"].shape == (len(rows),) for s, rows in splits(trainer).items() for n in COLUMNS):
            return values
    except (SafetensorError, OSError, KeyError):
        pass
    log.warning("reference log-probs in %s are damaged: computed anew", place)
    return None


def write_cache(place: Path, values: Values) -> None:
    """Put log-probs at `place`, whole or not at all."""
    partial = place.with_suffix(".partial")
    for folder in (partial, place):
        shutil.rmtree(folder, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(values, partial / "logps.safetensors")
    partial.rename(place)
