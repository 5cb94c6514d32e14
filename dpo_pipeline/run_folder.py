"""Run folders: the identity of a run, and whether its folder is new, to be resumed, done, or another run's."""

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_pipeline.checkpoints import TRACKER_FILE, newest_checkpoint, rollback_to_checkpoint
from dpo_pipeline.content_hash import WEIGHTS, data_hash, weights_hash
from dpo_pipeline.distributed import is_main_process, on_main_process, processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.formatting import mask_secrets
from dpo_pipeline.locks import lock_owner, run_lock
from dpo_pipeline.naming import is_identity
from dpo_pipeline.record import RunRecord, read_json, run_logging, start_record, write_json
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)

# What runs write in their folder: whatever else lies there is somebody's, and outlives the run.
RUN_FILES = (
    *("config.yaml", "manifest.json", "status.json", "metrics.jsonl", "train.log", TRACKER_FILE, "*.partial"),
    *("eval.json", "validation.json", "pairs.json", "samples.json", "pairs.parquet", "completions.parquet", "records"),
    *("checkpoints", "final", "export", "merged", "starting_policy", "reference", "tensorboard", "wandb", ".*.lock"),
)
DATA_PATHS = r"(sft_)?dataset\.(sets\.[^.]+\.)?(test_)?path"  # in a mixture each set has its own


@contextlib.contextmanager
def open_run(run: Run, stage: str) -> Iterator[RunRecord]:
    """Hold the folder of a run while its command works in it, and keep its record.

    The run ends as `done` with the block, or before that by `record.finish()`; an exception ends it as `failed`,
    KeyboardInterrupt as `interrupted`. The record of a finished run (`decision` is `done`) is read-only. With
    `check=true` nothing is locked or written, and `decision` says what the command would do.
    Raises PipelineError where another run or process has the folder, or the SFT of a DPO is missing.
    """
    folder = run.sft_folder if stage == "sft" else run.dpo_folder
    if run.check:
        with run_logging(None):
            yield RunRecord(folder, on_main_process(lambda: plan(run, stage, folder)[0]), read_only=True)
        return
    with run_lock(folder):
        with run_logging(None):
            record = on_main_process(lambda: claim(run, stage, folder))
        with run_logging(folder / "train.log"):
            if record.decision == "done":
                log.info("already done: %s", folder)
                yield record
                return
            if (earlier := record.manifest["world_size"]) != processes():
                log.info("resuming on %d process(es) a run that began on %d: not bit for bit", processes(), earlier)
            record.save_manifest(world_size=processes())
            try:
                yield record
            except BaseException as error:
                if not folder.is_dir():
                    raise PipelineError(f"{folder} was moved or deleted: type the same command again") from error
                with contextlib.suppress(OSError):  # of a full disk, which is the error to report
                    record.finish(error)
                if record.status["state"] == "interrupted":
                    point = newest_checkpoint(folder) or "the start"
                    log.info("interrupted: type the same command to go on from %s", point)
                raise
            record.finish()
            if is_main_process():
                remove_run(backup_path(folder), folder)


def claim(run: Run, stage: str, folder: Path) -> RunRecord:
    """Prepare a locked folder for its run, and start the record."""
    status = read_json(folder / "status.json", "state")
    if status is not None and status["state"] == "running":  # its process is gone, since the lock was free
        write_json(folder / "status.json", {**status, "state": "interrupted"})
    decision, fields = plan(run, stage, folder)
    if decision == "replace":
        state, backup = run_state(folder), backup_path(folder)
        log.info("replacing the %s run in %s, kept in %s until the new one is done", state, folder, backup)
        back_up(folder)
    if decision == "resume":
        rollback_to_checkpoint(folder)
    if decision == "done":
        remove_run(backup_path(folder), folder)  # left by a kill
        manifest = read_json(folder / "manifest.json", "identity")
        return RunRecord(folder, decision, manifest, read_json(folder / "status.json", "state"), read_only=True)
    folder.resolve().mkdir(parents=True, exist_ok=True)  # of a link: what it points to
    return start_record(run, stage, folder, decision, fields)


def plan(run: Run, stage: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """What is to be done with the folder of a run, and the run's identity; writes nothing."""
    if stage == "dpo" and run.policy == "sft":
        if run.check and run_state(run.sft_folder) != "done":
            return "its SFT is still to come", {}
        check_sft_fits(run)
    fields = identity(run, stage)
    return decide(folder, fields, run.overwrite), fields


def decide(folder: Path, fields: dict[str, Any], overwrite: bool) -> str:
    """`new`, `resume`, `done` or `replace` for a run with the identity `fields`; writes nothing.

    Raises PipelineError where the folder holds another run that is worth keeping, or one that is running.
    """
    manifest, state = read_json(folder / "manifest.json", "identity"), run_state(folder)
    if state == "running":
        raise PipelineError(f"{folder} is in use by {lock_owner(folder)}: wait for it or end it")
    if manifest is None:
        # A kill before the first manifest leaves a partial file.
        if folder.is_file() or (folder.is_dir() and any(file.suffix != ".partial" for file in folder.iterdir())):
            raise PipelineError(f"{folder} holds files but no run: choose another place with variant=, name= or root=")
        return "new"
    if not (changes := differences(manifest["identity"], fields)):
        return "done" if state == "done" else "resume"
    if overwrite or (state != "done" and newest_checkpoint(folder) is None):
        return "replace"
    key = "sft_variant" if folder.parent.name == "sft" else "variant"
    raise PipelineError(
        f"{folder} holds another run ({'; '.join(changes.values())}): keep both with {key}=NAME or name=NAME, or "
        "replace that one with overwrite=true"
    )


def differences(existing: dict[str, Any], fields: dict[str, Any]) -> dict[str, str]:
    """The keys in which two identities differ, each with a phrase of both values."""
    keys = [key for key in sorted({**existing, **fields}) if existing.get(key) != fields.get(key)]
    return {key: f"{key} is {existing.get(key)} there, {fields.get(key)} here" for key in keys}


def back_up(folder: Path) -> None:
    """Move a run aside until the one that replaces it is done."""
    backup = backup_path(folder)
    trash = backup.with_name(f"{backup.name}.trash")
    for leftover in (trash, backup) if run_state(folder) == "done" else (trash,):
        remove_run(leftover, folder)  # left by a kill
    backup.parent.mkdir(parents=True, exist_ok=True)
    # Of several attempts to replace a run, that run is kept.
    folder.resolve().rename(trash if backup.exists() else backup)
    remove_run(trash, backup)


def backup_path(folder: Path) -> Path:
    """Where a run lies while another one replaces it: on the same disk, so beside what a link points to."""
    if folder.is_symlink():
        return folder.resolve().with_name(f".replaced-{folder.resolve().name}")
    return folder.parent.parent / ".replaced" / folder.parent.name / folder.name


def remove_run(folder: Path, successor: Path) -> None:
    """Delete the folder of a run, and move what no run wrote to the one behind it, beside what has its name there."""
    for path in [*folder.glob("*"), *folder.glob("checkpoints/other-*")]:
        if any(path.match(pattern) for pattern in RUN_FILES):
            continue
        place = successor / path.name
        while place.exists():
            place = place.with_name(f"replaced-{place.name}")
        log.info("%s was written by no run: it is now %s", path, place)
        path.rename(place)
    shutil.rmtree(folder, ignore_errors=True)


def run_state(folder: Path) -> str:
    """`none`, `running`, `done`, `interrupted` or `failed`; `running` only while a process holds the folder's lock."""
    status = read_json(folder / "status.json", "state")
    if status is None:
        return "none"
    return "interrupted" if status["state"] == "running" and lock_owner(folder) is None else status["state"]


def finished_sft(run: Run) -> dict[str, Any]:
    """The manifest of the SFT that a DPO starts from; raises PipelineError where it is not done."""
    if (state := run_state(run.sft_folder)) != "done":
        raise PipelineError(
            f"there is no finished SFT in {run.sft_folder} ({state}): run `make sft` or `python -m dpo_pipeline.sft` "
            "with the same arguments first, or start from the base model with policy=base"
        )
    return read_json(run.sft_folder / "manifest.json", "identity")


def check_sft_fits(run: Run) -> None:
    """Log in which settings the SFT of a DPO differs; raise PipelineError where it is missing or of another base."""
    changes = differences(finished_sft(run)["identity"], identity(run, "sft"))
    base = ("model.path", "model.builder", "model.revision")
    if phrases := [changes[key] for key in changes if key.startswith(base)]:
        raise PipelineError(
            f"{run.sft_folder} was trained from another base model ({'; '.join(phrases)}): give the same model="
        )
    # DPO reports another adapter or quantization itself.
    if phrases := [changes[key] for key in changes if not key.startswith(("lora", "quantization"))]:
        log.info("note: the SFT in %s was made with other settings: %s", run.sft_folder, "; ".join(phrases))


def identity(run: Run, stage: str) -> dict[str, Any]:
    """The config keys that can change `final/`, flat, with local data and weights by their content.

    The identity of a DPO from an SFT holds the hash of that SFT's weights, once it is finished.
    """
    fields = {key: value for key, value in sorted(flatten(run.model_dump()).items()) if is_identity(key, run, stage)}
    for key in [key for key in fields if key.startswith("model.learning_rate.")]:
        del fields[key]  # it is resolved into sft.learning_rate and dpo.learning_rate
    for key in [key for key in fields if re.fullmatch(DATA_PATHS, key)]:
        fields[key] = data_hash(fields[key])
    fields["model.chat_template"] = data_hash(run.model.chat_template)
    if run.model.builder:
        del fields["model.path"]  # where the built model lies
    for key in ("model.path", "policy", "reference.path"):
        if fields.get(key) not in (None, "sft", "base"):
            fields[key] = weights_hash(fields[key], endings=(*WEIGHTS, "adapter_config.json"))
    if is_identity("judge", run, stage):
        fields["judge"] = [name for name in run.judge if name != "common"]  # the first one chooses
    if stage == "dpo" and run.policy == "sft" and run_state(run.sft_folder) == "done":
        fields["starting_policy"] = finished_sft(run)["final"]["sha256"]
    return fields


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as a flat one with dotted keys, without secrets: it is written and printed."""
    if not isinstance(node, dict):
        return {prefix: mask_secrets(node) if isinstance(node, str) else node}
    fields = {}
    for key, value in node.items():
        fields |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return fields
