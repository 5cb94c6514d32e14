"""Whether the disk holds what a run will write: before it trains, not at its first checkpoint."""

import shutil
from pathlib import Path

from dpo_pipeline.config import Run
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import gigabytes
from dpo_pipeline.training.starting_policy import StartingPolicy, new_adapter, on_meta


def check_disk_space(run: Run, stage: str, folder: Path, start: StartingPolicy) -> tuple[int, int]:
    """Bytes that a run will still write, and those that are free; raises PipelineError where they do not suffice.

    Counts `final/`, what is merged, and the checkpoints kept, one more while the oldest goes: trained weights in
    float32 and AdamW's two numbers for each, of one byte in 8 bits.
    """
    # Whatever the run starts from is of its base's size.
    model = on_meta(run, run.model.path, new_adapter(run, run.model.path))
    whole = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fields = getattr(run, stage)
    optimizer = 2 if "8bit" in fields["optim"] else 8
    kept = fields["save_total_limit"] or 10
    there = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    needed = max(0, (kept + 1) * trained * (4 + optimizer) - there) + 4 * trained
    needed += 4 * whole if start.into and not start.into.is_dir() else 0
    place = Path(run.root).expanduser().resolve()
    free = shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free
    if needed > free:
        raise PipelineError(
            f"the disk of {place} has {gigabytes(free)} left and this run writes up to {gigabytes(needed)}: free "
            f"some, name another disk by root=..., or keep fewer checkpoints by {stage}.save_total_limit=1"
        )
    return needed, free
