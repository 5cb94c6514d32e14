"""One job of a sweep: its command in a process of its own, and what became of it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from dpo_pipeline.config import Run
from dpo_pipeline.locks import lock_owner
from dpo_pipeline.record import read_metrics
from dpo_pipeline.run_folder import plan, run_state


@dataclass
class Job:
    """The overrides of a job, its run and files, and its process and GPUs while it runs.

    `state` is `waiting`, `elsewhere` (another process has its folder), `running`, `done`, `interrupted` or `failed`.
    """

    stage: str
    overrides: list[str]
    run: Run
    log_file: Path
    state: str = "waiting"
    reason: str = ""
    process: subprocess.Popen | None = None
    gpus: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.run.sft_folder if self.stage == "sft" else self.run.dpo_folder

    def is_finished(self) -> bool:
        """Whether the run is done and compared; raises PipelineError where its folder holds another run."""
        if lock_owner(self.folder) is not None or plan(self.run, self.stage, self.folder)[0] != "done":
            return False
        return self.stage == "sft" or all((self.folder / f).is_file() for f in ("eval.json", "validation.json"))

    def start(self, gpus: list[str], launch_file: str) -> None:
        """Start the process, in a session of its own: a terminal's Ctrl-C must not reach it past the launcher."""
        self.gpus, call, environment = gpus, [sys.executable], dict(os.environ)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        if len(gpus) > 1:
            options = ["--num_processes", str(len(gpus)), "--main_process_port", "0"]  # 0: any that is free
            call += ["-m", "accelerate.commands.launch", "--config_file", launch_file, *options]
            environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "600"  # a large checkpoint takes more than its 30 s
        # Without hydra.mode, an experiment that is a sweep itself would start sweeps without end.
        call += ["-m", f"dpo_pipeline.{self.stage}", *self.overrides, "hydra.mode=RUN"]
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("wb") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(call, env=environment, start_new_session=True, **streams)

    def outcome(self) -> tuple[str, str]:
        """The state in which the process ended, and its loss or the reason."""
        code = self.process.returncode
        if code == 0:
            return "done", loss_summary(self.folder)
        if code == 75 or (code > 0 and run_state(self.folder) == "interrupted"):
            return "interrupted", loss_summary(self.folder)
        if code < 0:
            name = signal.Signals(-code).name
            return "failed", f"killed by {name}" + " (by hand, or out of memory)" * (name == "SIGKILL")
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
        errors = [line.partition("error: ")[2] for line in lines if "error: " in line] or lines
        return "failed", errors[-1] if errors else f"exit code {code} without output"


def stop_at_checkpoint(processes: list[subprocess.Popen]) -> None:
    """Have jobs stop at a checkpoint, and wait for them; a second Ctrl-C kills them."""
    if not processes:
        return
    try:
        for process in processes:
            process.terminate()
        with contextlib.suppress(OSError):  # the output may be closed
            print(f"stopping {len(processes)} job(s) at a checkpoint: type the same command to resume", flush=True)
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.kill()


def loss_summary(folder: Path) -> str:
    """`loss 0.5231 at step 40`, or `no step yet`."""
    losses = [(row["loss"], row["step"]) for row in read_metrics(folder) if "loss" in row]
    return f"loss {losses[-1][0]:.4f} at step {losses[-1][1]}" if losses else "no step yet"
