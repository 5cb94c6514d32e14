"""The checkpoints of a run: which are complete, and how an interrupted run goes back to the newest of them."""

import json
import logging
import re
import shutil
import zipfile
from pathlib import Path

from dpo_pipeline.record import read_json, read_metrics, write_json

log = logging.getLogger(__name__)

TRACKER_FILE = "reward_kl_tracker.json"
CHECKPOINT = r"checkpoint-\d+"


def rollback_to_checkpoint(folder: Path) -> None:
    """Bring an interrupted run back to its newest complete checkpoint."""
    complete = checkpoints(folder)
    # The trainer would count any other `checkpoint-*` as the newest when it deletes old ones.
    for path in set((folder / "checkpoints").glob("checkpoint-*")) - set(complete):
        if path.is_symlink() or not path.is_dir() or not re.fullmatch(CHECKPOINT, path.name):
            log.warning("%s is no checkpoint of this run: it is now called other-%s", path, path.name)
            path.rename(path.with_name(f"other-{path.name}"))
            continue
        log.warning("removing %s: it is incomplete or damaged", path)
        (path / "trainer_state.json").unlink(missing_ok=True)  # first: so a kill leaves no complete checkpoint
        shutil.rmtree(path)
    newest = newest_checkpoint(folder)
    step = int(newest.name.split("-")[1]) if newest else -1
    rows = [row for row in read_metrics(folder) if row["step"] <= step and "train_runtime" not in row]
    partial = folder / "metrics.jsonl.partial"
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(folder / "metrics.jsonl")
    if (points := read_json(folder / TRACKER_FILE)) is not None:
        write_json(folder / TRACKER_FILE, [point for point in points if point["step"] <= step])


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    return max(checkpoints(folder), key=lambda path: int(path.name.split("-")[1]), default=None)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, in no order; folders of its own, no links."""
    paths = (path for path in (folder / "checkpoints").glob("checkpoint-*") if re.fullmatch(CHECKPOINT, path.name))
    return [path for path in paths if not path.is_symlink() and is_complete(path)]


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end and can be opened: rank 0 writes trainer_state.json last.

    Each rank writes its own files. Of a file of torch the structure is read, of safetensors the header, which names
    the length of the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for file in checkpoint.rglob("*"):
            if file.suffix == ".safetensors":
                with safe_open(file, "np"):
                    pass
            elif file.suffix in (".pt", ".pth", ".bin"):
                with zipfile.ZipFile(file) as content:
                    content.read(next(name for name in content.namelist() if name.endswith("data.pkl")))
    except (OSError, ValueError, zipfile.BadZipFile, StopIteration, SafetensorError):
        return False
    return True
