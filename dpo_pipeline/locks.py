"""Who works on a folder: locks of the system, which die with their holder."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dpo_pipeline.distributed import on_main_process
from dpo_pipeline.errors import PipelineError


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run's folder while this process lives, on rank 0 for all; raises PipelineError naming who holds it.

    By a lock of the system, which dies with its holder.
    """
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))

    def acquire() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=1)  # not at once: `holder` looks by taking it for a moment
        except Timeout:
            raise PipelineError(
                in_use_message(folder, json.loads(Path(lock.lock_file).read_text() or "null"))
            ) from None
        Path(lock.lock_file).write_text(json.dumps(this_process()), encoding="utf-8")

    on_main_process(acquire)
    try:
        yield
    finally:
        lock.release()


def this_process() -> dict[str, Any]:
    """What others are told of who holds a folder."""
    return {"pid": os.getpid(), "host": socket.gethostname()}


def in_use_message(folder: Path, holder: dict[str, Any] | None) -> str:
    """The sentence for a folder that another process holds; `holder` is None while that one is just starting."""
    who = f"process {holder['pid']} on {holder['host']}" if holder else "a process that has just started"
    return f"{folder} is in use by {who}: wait for it or end it"


def lock_owner(folder: Path) -> dict[str, Any] | None:
    """The process that holds a run's folder, or None where it is free."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    if not Path(lock.lock_file).exists():
        return None
    try:
        with lock.acquire(timeout=0):
            return None
    except Timeout:
        return json.loads(Path(lock.lock_file).read_text() or "null") or {"pid": "?", "host": "?"}


@contextlib.contextmanager
def file_lock(place: Path) -> Iterator[None]:
    """Wait until no other process is making what lies at `place`; the wait ends with the other's life too."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):
        yield
