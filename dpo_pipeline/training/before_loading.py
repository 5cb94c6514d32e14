"""Checks that need no weights: they come before anything large is loaded, and are all that `check=true` does."""

import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

from dpo_pipeline.data.prepare import Prepared
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import gigabytes
from dpo_pipeline.models import empty_model, weights_outside_adapter
from dpo_pipeline.record import RunRecord
from dpo_pipeline.schema import Run
from dpo_pipeline.tokenizer import check_same_tokenizer
from dpo_pipeline.training.preflight import check_rows
from dpo_pipeline.training.starting_policy import StartingPolicy, new_adapter

log = logging.getLogger(__name__)

DEBUG_STEPS = 50
FEW_STEPS = 20
# Rates that published runs of 0.1 to 70 B parameters used, by stage and adapter: lowest, highest, source.
KNOWN_RATES = {
    "sft": (1e-6, 1e-4, "2e-5 in TRL's examples and Zephyr (arXiv:2310.16944), 5e-6 in Tulu 3"),
    "sft_lora": (2e-5, 2e-3, "1e-4 to 2e-4 in QLoRA (arXiv:2305.14314), 2e-4 in TRL's examples"),
    "dpo": (5e-8, 1e-5, "1e-6 in the DPO paper (arXiv:2305.18290), 5e-7 in Zephyr, 2e-7 to 5e-7 in Tulu 3"),
    "dpo_lora": (5e-7, 1e-4, "5e-6 in TRL's examples and Zephyr's QLoRA recipe, up to 5e-5 for small models"),
}


def check_before_loading(run: Run, data: Prepared, start: StartingPolicy, args: Any, record: RunRecord) -> None:
    """Check learning rate, rows and disk space; with `check`, log what the run would do."""
    stage, rows = data.stage, data.tables["train"]
    check_learning_rate(run, stage)
    check_rows(data)
    if run.policy != "sft" or Path(start.source).is_dir():  # with `check` the SFT may still be to come
        check_same_tokenizer(data.tokenizer, run.model, start.source)
    plan_steps(run, stage, args, len(rows))
    empty = empty_model(run.model, data.config, new_adapter(run, ""))  # of the size of any starting policy
    outside = weights_outside_adapter(empty)
    if stage == "dpo" and run.reference.mode == "adapter" and outside:
        raise PipelineError(
            f"reference=adapter leaves trained weights outside of the adapter switched on, such as {outside[0]}: "
            "type reference=cached, or lora.bias=none"
        )
    needed, free = check_disk_space(run, stage, record.folder, start, empty)
    if run.check:
        unit = "completions" if stage == "sft" else "pairs"
        size = f"writes up to {gigabytes(needed)} of {gigabytes(free)} free"
        log.info(
            "check: %s of %s on %d %s -> %s (%s); %s",
            *(stage.upper(), start, len(rows), unit, record.folder, record.decision, size),
        )


def check_learning_rate(run: Run, stage: str) -> None:
    """Warn of a learning rate ten times beyond those known to work for its stage and mode, or for this model."""
    mode = stage if run.lora is None else f"{stage}_lora"
    rate, model_rate = getattr(run, stage)["learning_rate"], getattr(run.model.learning_rate, mode)
    low, high, source = KNOWN_RATES[mode]
    if not min(low, model_rate) / 10 <= rate <= 10 * max(high, model_rate):
        trained = "with LoRA" if run.lora else "of every weight"
        log.warning(
            "%s.learning_rate=%g is far from what is known to work for %s %s: %g for this model, else %g to %g (%s)",
            *(stage, rate, stage.upper(), trained, model_rate, low, high, source),
        )


def plan_steps(run: Run, stage: str, args: Any, rows: int) -> None:
    """Log steps, epochs and warm-up, and warn where they are unusual; at most 50 steps where `debug` is set."""
    size, epoch = run.batch.global_size, math.ceil(rows / run.batch.global_size)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(epoch * args.num_train_epochs)
    if run.debug and steps > DEBUG_STEPS:
        steps = args.max_steps = DEBUG_STEPS
    if steps == 1:
        args.warmup_steps = 0
    warmup = args.get_warmup_steps(steps)
    log.info("%d steps of %d rows (epochs: %.3g), the first %d are warm-up", steps, size, steps / epoch, warmup)
    if run.debug:
        log.warning("debug=true: %d steps on %d rows show that it works, its numbers mean nothing", steps, rows)
    elif steps < FEW_STEPS:
        more = f"max_steps={FEW_STEPS}" if args.max_steps > 0 else f"num_train_epochs={math.ceil(FEW_STEPS / epoch)}"
        log.warning("only %d steps, which move little: type %s.%s or a smaller batch.global_size", steps, stage, more)
    if warmup > steps / 2:
        log.warning("warm-up takes %d of %d steps: type %s.warmup_steps=0.1", warmup, steps, stage)


def check_disk_space(run: Run, stage: str, folder: Path, start: StartingPolicy, empty: Any) -> tuple[int, int]:
    """Bytes that a run will still write, and bytes that are free; raises PipelineError where they do not suffice."""
    sizes = [(p.numel(), p.requires_grad) for p in empty.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained)
    fields = getattr(run, stage)
    optimizer_bytes = 2 if "8bit" in fields["optim"] else 8
    checkpoints = (fields["save_total_limit"] or 10) + 1
    written = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    needed = max(0, checkpoints * trained * (4 + optimizer_bytes) - written) + 4 * trained
    if start.merge_to and not start.merge_to.is_dir():
        needed += 4 * sum(size for size, _ in sizes)
    root = Path(run.root).resolve()
    for path in (root, folder.resolve()):
        place = next(each for each in (path, *path.parents) if each.exists())
        if not os.access(place, os.W_OK | os.X_OK):
            raise PipelineError(f"{place} cannot be written to: change its permissions, or type another root=")
    free = shutil.disk_usage(place).free
    if needed > free:
        raise PipelineError(
            f"the disk of {root} has {gigabytes(free)} left and this run writes up to {gigabytes(needed)}: free "
            f"some, name another disk by root=..., or keep fewer checkpoints by {stage}.save_total_limit=1"
        )
    return needed, free
