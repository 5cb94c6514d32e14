"""Locks of the operating system, released when their holder dies: on a run folder, and on a file that many write."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dpo_pipeline.distributed import on_main_process
from dpo_pipeline.errors import PipelineError


@contextlib.contextmanager
def file_lock(path: Path, timeout: float = -1) -> Iterator[Path]:
    """Hold the lock of a path, and give its lock file; raises filelock.Timeout after `timeout` seconds (-1: never)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock"), timeout) as lock:
        yield Path(lock.lock_file)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, on rank 0 for all; raises PipelineError that names the other holder."""
    with contextlib.ExitStack() as stack:

        def acquire() -> None:
            try:
                lock_file = stack.enter_context(file_lock(folder, timeout=1))  # lock_owner() may hold it for a moment
            except Timeout:
                raise PipelineError(f"{folder} is in use by {lock_owner(folder)}: wait for it or end it") from None
            lock_file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")

        on_main_process(acquire)
        yield


def lock_owner(folder: Path) -> str | None:
    """`process PID on HOST`, which holds the lock of a run folder, or None."""
    lock_file = folder.with_name(f".{folder.name}.lock")
    if not lock_file.exists():
        return None
    try:
        with file_lock(folder, timeout=0.1):  # not at once: another process may be looking too
            return None
    except Timeout:
        return lock_file.read_text(encoding="utf-8") or "a process that has just started"
