"""Run folders: where a run lies, what it is, and whether it is new, to be continued, done, or another one's place."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import socket
import sys
import time
import uuid
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpo_pipeline.config import CONF, Run
from dpo_pipeline.distributed import is_main_process, processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import git_state, versions
from dpo_pipeline.locks import in_use_message, this_process
from dpo_pipeline.models import adapter_base, is_adapter
from dpo_pipeline.naming import NOT_IDENTITY, TRACKED, loss_names

log = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".bin")
POINTS = "reward_kl_tracker.json"
NOT_OF_ROWS = r"(dataset|pairs)\.(.*\.)?(on_bad_row|sft_target)$"  # keys of a data set that decide no row of a stage


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """What a JSON file holds, or None where there is no such file; raises PipelineError where it is no JSON."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PipelineError(
            f"{path} is no JSON ({error}), it was edited or cut short: put it back, or move its folder away"
        ) from error


def content_hash(path: Path, endings: tuple[str, ...] = ("",)) -> str:
    """sha256 over the names and bytes of a file, or of the files of a folder with these endings, at any depth."""
    files = (
        [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(endings))
    )
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def identity(run: Run, stage: str) -> dict[str, Any]:
    """What decides the bytes of `final/`, flat: the part of the config that a stage reads, local paths by content.

    For `dpo` that includes the hash of the weights it starts from, where they are there yet.
    """
    fields = dict(getattr(run, stage))
    chosen = run.sft_best if stage == "sft" else run.dpo_best
    stops = stage == "dpo" and run.guard.action == "stop"
    choosing = {"eval_steps", "save_steps"} if chosen != "last" else {"eval_steps"} if stops else set()
    kept = {key: value for key, value in fields.items() if key not in NOT_IDENTITY - choosing}
    model = {key: getattr(run.model, key) for key in ("builder", "revision", "dtype", "attn_implementation")}
    parts: dict[str, Any] = {
        "model": model if run.model.builder else {**model, "path": by_content(run.model.path)},
        "lora": run.lora,
        "quantization": run.quantization,
        "precision": run.precision.mixed,
        "seed": run.seed,
        "global_size": run.batch.global_size,
        "length": dataclasses.asdict(run.length),
        "debug": run.debug,
        stage: kept,
    }
    if stage == "sft":
        parts |= {"pairs": run.dataset} if run.sft_dataset else {}  # whose held-out prompts it leaves out
        parts |= {"dataset": run.sft_dataset or run.dataset, "sft_target": run.sft_target, "sft_best": run.sft_best}
    else:
        parts |= {"dataset": run.dataset, "beta": run.beta, "reference": run.reference.mode, "policy": run.policy}
        parts["reference_path"] = by_content(run.reference.path, WEIGHTS)
        if run.policy == "sft" and run_state(run.sft_folder) == "done":
            parts["starting_policy"] = finished_sft(run)["final"]["sha256"]
        elif run.policy not in ("sft", "base"):
            policy = by_content(run.policy, (*WEIGHTS, "adapter_config.json"))
            base = by_content(adapter_base(run.policy), WEIGHTS) if is_adapter(run.policy) else None
            parts |= {"policy": "folder", "starting_policy": policy, "starting_base": base}
        if "sft" in loss_names(run):
            parts["micro_size"] = run.batch.micro_size  # TRL takes that term per token of each micro batch
        if chosen != "last":
            parts["dpo_best"] = chosen
        if stops:
            parts["guard"] = dataclasses.asdict(run.guard)
        if stops or chosen in TRACKED:
            parts["tracker"] = [run.evaluation.tracker_prompts, run.evaluation.max_new_tokens]
        if chosen == "reward":
            parts |= {"kl_budget": run.evaluation.kl_budget, "judge": [list(each) for each in run.judge.items()]}
    return {key: value for key, value in sorted(flat(parts).items()) if not re.match(NOT_OF_ROWS, key)} | {
        key: by_content(value)  # of a mixture each set has a path of its own
        for key, value in flat(parts).items()
        if re.match(r"(dataset|pairs)\.(sets\.[^.]+\.)?(test_)?path$", key)
    }


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict with dotted keys."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {key: value for k, v in node.items() for key, value in flat(v, f"{prefix}.{k}" if prefix else k).items()}


def by_content(path: str | None, endings: tuple[str, ...] = ("",)) -> str | None:
    """A hash of the files with these endings at a local path, or the path itself where nothing is (a hub id)."""
    local = Path(path).expanduser() if path else None
    return f"sha256:{content_hash(local, endings)}" if local and local.exists() else path


def weights_of(path: str | Path, revision: str | None) -> str:
    """What tells weights apart: a hash of those in a local folder (with its base's, of an adapter), or the hub id."""
    if not Path(path).is_dir():
        return f"{path}@{revision or 'main'}"
    own = content_hash(Path(path), WEIGHTS)
    return f"{own}+{weights_of(adapter_base(path), revision)}" if is_adapter(path) else own


def finished_sft(run: Run) -> dict[str, Any]:
    """The manifest of the SFT that a DPO starts from; raises PipelineError where it is not done."""
    if run_state(run.sft_folder) == "done":
        return read_json(run.sft_folder / "manifest.json")
    raise PipelineError(
        f"there is no finished SFT in {run.sft_folder} ({run_state(run.sft_folder)}): run `make sft` or `python -m "
        "dpo_pipeline.sft` with the same arguments first, or start from the base model with policy=base"
    )


def run_state(folder: Path) -> str:
    """`none`, `running`, `done`, `interrupted` or `failed`; a run whose process is gone reads as interrupted."""
    status = read_json(folder / "status.json")
    if status is None:
        return "none"
    if status["state"] == "running" and not (status["host"] != socket.gethostname() or alive(status["pid"])):
        return "interrupted"
    return status["state"]


def alive(pid: int) -> bool:
    """Whether a process of this machine runs, other than this one."""
    if pid == os.getpid():
        return False
    if os.name == "nt":  # os.kill would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    complete = (place for place in (folder / "checkpoints").glob("checkpoint-*") if is_complete(place))
    return max(complete, key=lambda place: int(place.name.split("-")[1]), default=None)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: rank 0's last file is trainer_state.json, each rank's its own."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    saved = (file for ending in ("*.pt", "*.pth", "*.bin") for file in checkpoint.glob(ending))
    return all(zipfile.is_zipfile(file) for file in saved)  # torch's files are, and have their list at the end


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl; one that a kill cut short is none."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def loss_summary(folder: Path) -> str:
    """`loss 0.5231 at step 40`, or where there is none yet, `no step yet`."""
    losses = [(row["loss"], row["step"]) for row in metrics(folder) if "loss" in row]
    return f"loss {losses[-1][0]:.4f} at step {losses[-1][1]}" if losses else "no step yet"


def claim(run: Run, stage: str, folder: Path) -> tuple[dict[str, Any], str]:
    """The identity of a run, and `new`, `resume` or `done` for its folder, moved aside where it may be replaced.

    What is replaced lies in `aside` until the new run is done, so that broken input costs no finished one.
    """
    mine, status = identity(run, stage), read_json(folder / "status.json")
    if status is not None and status["state"] == "running":  # who holds the folder knows better, whatever the host
        write_json(folder / "status.json", {**status, "state": "interrupted"})
    decision = decide(folder, mine, run.overwrite)
    if decision == "resume":
        rollback_to_checkpoint(folder)
    elif run_state(folder) == "done":  # so nothing waits for it: a kill has left what it replaced
        shutil.rmtree(backup_path(folder), ignore_errors=True)
    if decision == "replace":
        print(
            f"replacing the {run_state(folder)} run in {folder}, kept in {backup_path(folder)} until the new one is "
            "done"
        )
        if backup_path(folder).exists():  # the run that was finished; what lies here only tried to replace it
            gone = backup_path(folder).with_name(f"{folder.name}.gone")  # whole, or not there: a part is nobody's run
            shutil.rmtree(gone, ignore_errors=True)
            folder.rename(gone)
            shutil.rmtree(gone)
        else:
            backup_path(folder).parent.mkdir(parents=True, exist_ok=True)
            folder.rename(backup_path(folder))
    return mine, decision


def rollback_to_checkpoint(folder: Path) -> None:
    """Leave of an interrupted run what it had at its newest complete checkpoint, from which it goes on."""
    # Else the trainer counts a torn one as the newest when it deletes old ones.
    for torn in (place for place in (folder / "checkpoints").glob("checkpoint-*") if not is_complete(place)):
        print(f"removing {torn}: it was not written to its end")
        (torn / "trainer_state.json").unlink(missing_ok=True)  # first: what a kill leaves is no checkpoint
        shutil.rmtree(torn)
    newest = newest_checkpoint(folder)
    step = int(newest.name.split("-")[1]) if newest else -1
    rows = [row for row in metrics(folder) if row["step"] <= step and "train_runtime" not in row]
    partial = folder / "metrics.jsonl.partial"
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(folder / "metrics.jsonl")
    if (points := read_json(folder / POINTS)) is not None:
        write_json(folder / POINTS, [point for point in points if point["step"] <= step])


def backup_path(folder: Path) -> Path:
    """Where a run waits that another one is replacing."""
    return folder.parent.parent / ".replaced" / folder.parent.name / folder.name


def decide(folder: Path, ours: dict[str, Any], overwrite: bool) -> str:
    """`new`, `resume`, `done` or `replace` for a run of this identity; touches nothing.

    Raises PipelineError where another run lies there that is worth keeping, or one that is still running.
    """
    manifest, found = read_json(folder / "manifest.json"), run_state(folder)
    if found == "running":
        raise PipelineError(in_use_message(folder, read_json(folder / "status.json")))
    if manifest is None:
        # What a kill before the first manifest leaves is none of anybody's.
        if folder.is_file() or (folder.is_dir() and any(file.suffix != ".partial" for file in folder.iterdir())):
            raise PipelineError(f"{folder} holds files but no run: choose another place with variant=, name= or root=")
        return "new"
    theirs = manifest["identity"]
    differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if not differing:
        return "done" if found == "done" else "resume"
    if overwrite or (found != "done" and newest_checkpoint(folder) is None):
        return "replace"
    listed = "; ".join(f"{key} is {theirs.get(key)} there, {ours.get(key)} here" for key in sorted(differing))
    typed = "sft_variant=NAME" if folder.parent.name == "sft" else "variant=NAME"
    raise PipelineError(
        f"{folder} holds another run ({listed}): keep both with {typed} or name=NAME, or replace that one with "
        "overwrite=true"
    )


@dataclass
class RunRecord:
    """What a run writes of itself while it goes on; only the main process writes."""

    folder: Path
    manifest: dict[str, Any]
    status: dict[str, Any]

    def save_status(self, **changes: Any) -> None:
        self.status.update(changes, updated=datetime.now(UTC).isoformat(timespec="seconds"))
        if is_main_process():
            write_json(self.folder / "status.json", self.status)

    def save_manifest(self, **facts: Any) -> None:
        """Add facts; raises PipelineError where a resumed run was begun in another precision, or otherwise sharded."""
        ways = {"precision": "type precision={}", "sharded": "start it as then: the same launch file and processes"}
        for key in set(ways) & set(facts) & set(self.manifest):
            if self.manifest[key] != facts[key]:
                raise PipelineError(
                    f"{self.folder} was begun in {self.manifest[key] or 'whole copies'} and would go on in "
                    f"{facts[key] or 'whole copies'}: {ways[key].format(self.manifest[key])}, or keep both with "
                    "variant= or sft_variant="
                )
        self.manifest.update(facts)
        if is_main_process():
            write_json(self.folder / "manifest.json", self.manifest)


@contextlib.contextmanager
def recorded_run(run: Run, stage: str, folder: Path, ours: dict[str, Any]) -> Iterator[RunRecord]:
    """Keep the folder's config, manifest, status and log while a run goes on.

    The status ends as `done`, as `interrupted` (KeyboardInterrupt), or as `failed` with the error's first line.
    """
    from omegaconf import OmegaConf

    started = time.monotonic()
    # Of the part that was interrupted.
    before = read_json(folder / "manifest.json") or {"seconds": 0.0, "world_size": processes()}
    manifest = {
        "run_id": uuid.uuid4().hex[:12],  # what a tracker knows it by, the same when it goes on
        **before,
        "stage": stage,
        "command": ["python", "-m", f"dpo_pipeline.{stage}", *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(CONF.parent),
        "versions": versions(),
        "machine": {"platform": platform.platform(), "host": socket.gethostname()},
        "seed": run.seed,
        "world_size": processes(),
        "identity": ours,
    }
    status = {"state": "running", "step": 0, "error": None, **this_process()}
    record = RunRecord(folder, manifest, status)
    record.save_manifest()  # first: a folder without it is nobody's run
    record.save_status()
    if is_main_process():
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(run)), encoding="utf-8")
    with run_logging(folder / "train.log"):
        if before["world_size"] != processes():
            there, here = before["world_size"], processes()
            log.info("begun on %d process(es), goes on on %d: the same global batch, not bit for bit", there, here)
        try:
            yield record
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            told = None if stopped else (str(error).strip() or type(error).__name__).splitlines()[0]
            with contextlib.suppress(OSError):  # of a full disk, which is what is to be told
                record.save_manifest(seconds=round(before["seconds"] + time.monotonic() - started, 1))
                record.save_status(state="interrupted" if stopped else "failed", error=told)
            if stopped:
                found = newest_checkpoint(folder) or "the start"
                log.info("interrupted: type the same command to go on from %s", found)
            raise
        record.save_manifest(seconds=round(before["seconds"] + time.monotonic() - started, 1))
        record.save_status(state="done")
        if is_main_process():
            shutil.rmtree(backup_path(folder), ignore_errors=True)
        log.info("%s done in %.0f s: %s", stage.upper(), manifest["seconds"], folder / "final")


@contextlib.contextmanager
def run_logging(file: Path | None) -> Iterator[None]:
    """Show our messages on the screen, and keep them with every library's warnings in `file`; rank 0 alone does."""
    ours = logging.getLogger("dpo_pipeline")
    handlers: list[tuple[logging.Logger, logging.Handler]] = []
    if is_main_process():
        handlers = [
            (ours, logging.StreamHandler(sys.stdout)),
            (logging.getLogger("py.warnings"), logging.StreamHandler()),
        ]
        if file is not None:
            kept = logging.FileHandler(file, encoding="utf-8")
            # The libraries' loggers do not hand their messages up, so each is listened to.
            libraries = ("py.warnings", "transformers", "trl", "peft", "accelerate", "datasets")
            handlers += [(ours, kept), *((logging.getLogger(name), kept) for name in libraries)]
        for logger, handler in handlers:
            logger.addHandler(handler)
    logging.captureWarnings(True)
    before = ours.level
    ours.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    try:
        yield
    finally:
        ours.setLevel(before)
        logging.captureWarnings(False)
        for logger, handler in handlers:
            logger.removeHandler(handler)
            handler.close()
