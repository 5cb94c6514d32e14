"""The files that a run keeps about itself: config, manifest, status, metrics and log."""

import contextlib
import json
import logging
import os
import platform
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dpo_pipeline.config import CONF
from dpo_pipeline.distributed import is_main_process, processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.formatting import EscapingFormatter, markdown_table, mask_secrets
from dpo_pipeline.hardware import git_state, versions
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a JSON file atomically."""
    write_file(path, (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, *keys: str) -> Any:
    """The content of a JSON file, or None where it does not exist.

    Raises PipelineError where it is not JSON, or not a dict with all of `keys`, if any are given.
    """
    return parse_state(path, path.read_text(encoding="utf-8"), *keys) if path.is_file() else None


def parse_state(path: Path, text: str, *keys: str) -> Any:
    """What a text from a file means; raises PipelineError as `read_json` does."""
    try:
        content = json.loads(text)
        for key in keys:
            content[key]
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise PipelineError(f"{path} is not what a run wrote ({reason}): restore it, or move it away") from error
    return content


@dataclass
class RunRecord:
    """What a run writes about itself; rank 0 alone writes, and nobody where the record is `read_only`.

    `decision` is `new`, `resume` or `replace` for a run that trains, and `done` for one that is finished.
    """

    folder: Path
    decision: str
    manifest: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    read_only: bool = False
    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)  # by part of the run, of this process

    def save_status(self, **changes: Any) -> None:
        self.status.update(changes, updated=timestamp())
        self.write("status.json", self.status)

    def save_manifest(self, **facts: Any) -> None:
        """Add facts; raises PipelineError where a run resumes in another precision, or sharded in another way."""
        remedies = {"precision": "type precision={}", "sharded": "use the same launch file and number of processes"}
        for key in [key for key in remedies if key in facts and key in self.manifest]:
            before, after = self.manifest[key], facts[key]
            if before != after:
                raise PipelineError(
                    f"{self.folder} began with {key}={before} and cannot resume with {key}={after}: "
                    f"{remedies[key].format(before)}, or keep both with variant= or sft_variant="
                )
        self.manifest.update(facts)
        self.write("manifest.json", self.manifest)

    def write(self, name: str, content: dict[str, Any]) -> None:
        if is_main_process() and not self.read_only:
            write_json(self.folder / name, content)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of a block to a part of the run, without those of parts inside it; also a decorator."""
        began, before = time.monotonic(), sum(self.seconds.values())
        yield
        inside = sum(self.seconds.values()) - before
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - began - inside

    def log_seconds(self) -> None:
        """Log where the seconds of this process went, and keep them in the manifest."""
        rest = time.monotonic() - self.started - sum(self.seconds.values())
        parts = {part: round(value, 2) for part, value in (self.seconds | {"imports and the rest": rest}).items()}
        self.save_manifest(seconds_by_part=parts)
        total = sum(parts.values())
        rows = [[part, f"{value:.1f}", f"{value / total:.0%}"] for part, value in parts.items()]
        log.info("\n%s", markdown_table([["part of the run", "seconds", "share"], *rows]))
        log.info("overhead beside training: %.0f%% of %.0f s", 100 * (1 - parts["training"] / total), total)

    def finish(self, error: BaseException | None = None) -> None:
        """End a run that is still running: as done, interrupted (by KeyboardInterrupt), or failed with this error."""
        if self.status["state"] != "running":
            return
        seconds = self.manifest["seconds"] + time.monotonic() - self.started  # with the parts before interruptions
        self.save_manifest(seconds=round(seconds, 1))
        if error is None:
            self.save_status(state="done")
            log.info("%s done in %.0f s: %s", self.manifest["stage"].upper(), seconds, self.folder / "final")
        elif isinstance(error, KeyboardInterrupt):
            self.save_status(state="interrupted")
        else:
            sentence = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.save_status(state="failed", error=mask_secrets(sentence))


def start_record(run: Run, stage: str, folder: Path, decision: str, identity: dict[str, Any]) -> RunRecord:
    """Write manifest, status and config of a run that begins or resumes."""
    earlier = read_json(folder / "manifest.json", "identity") or {}
    manifest = {
        "run_id": uuid.uuid4().hex[:12],  # its id in a tracker, the same after a resume
        "seconds": 0.0,
        "world_size": processes(),
        **earlier,
        "stage": stage,
        "command": ["python", "-m", f"dpo_pipeline.{stage}", *map(mask_secrets, sys.argv[1:])],
        "started": timestamp(),
        "git": git_state(CONF.parent),
        "versions": versions(),
        "machine": {"platform": platform.platform(), "host": socket.gethostname()},
        "seed": run.seed,
        "identity": identity,
    }
    # Process and host are information for people: the lock alone tells whether a run is alive.
    status = {"state": "running", "step": 0, "error": None, "pid": os.getpid(), "host": socket.gethostname()}
    record = RunRecord(folder, decision, manifest, status)
    record.save_manifest()  # first: a folder without a manifest belongs to no run
    record.save_status()
    config = mask_secrets(OmegaConf.to_yaml(OmegaConf.create(run.model_dump())))
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    return record


def timestamp() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics.jsonl; a kill may have cut the last one short."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return [parse_state(file, line, "step") for line in lines if line.endswith("\n")]


@contextlib.contextmanager
def run_logging(file: Path | None) -> Iterator[None]:
    """Show the messages of this package on the screen, and write them with every library's warnings to `file`.

    Rank 0 alone does; on other ranks only errors pass.
    """
    package, warnings = logging.getLogger("dpo_pipeline"), logging.getLogger("py.warnings")
    handlers: list[tuple[logging.Logger, logging.Handler]] = []
    if is_main_process():
        handlers = [(package, logging.StreamHandler(sys.stdout)), (warnings, logging.StreamHandler())]
    if is_main_process() and file is not None:
        to_file = logging.FileHandler(file, encoding="utf-8")
        # The libraries' loggers do not propagate, so each gets the handler.
        names = ("py.warnings", "dpo_pipeline", "transformers", "trl", "peft", "accelerate", "datasets")
        handlers += [(logging.getLogger(name), to_file) for name in names]
    for logger, handler in handlers:
        handler.setFormatter(EscapingFormatter())
        logger.addHandler(handler)
    logging.captureWarnings(True)
    level = package.level
    package.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)
        logging.captureWarnings(False)
        for logger, handler in handlers:
            logger.removeHandler(handler)
            handler.close()
