"""Runs the jobs of a multirun: a fresh process for each, as many at once as there are GPUs for.

Hydra's basic launcher runs them in one process, where the first that fails or leaks memory costs all others.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from dpo_pipeline import locks, run_folder
from dpo_pipeline.config import Run, compose_and_validate, sweep_in_ranks
from dpo_pipeline.distributed import processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import visible_gpus


@dataclass
class Job:
    """One job: what was typed for it, its run and folder, and its process with the GPUs it has while it runs."""

    typed: list[str]
    run: Run
    folder: Path
    log: Path
    state: str = "waiting"
    why: str = ""
    process: subprocess.Popen | None = None
    output: IO | None = None
    gpus: list[str] = field(default_factory=list)


class ProcessLauncher(Launcher):
    """Hydra's launcher of `-m`; the options are those of conf/hydra/launcher/processes.yaml."""

    def __init__(self, jobs: int | None, gpus_per_job: int, launch_file: str):
        self.at_once, self.gpus_per_job, self.launch_file = jobs, gpus_per_job, launch_file

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config, self.stage = hydra_context, config, Path(sys.argv[0]).stem

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run all jobs and say what became of each; a job that fails leaves the others running.

        Raises PipelineError before the first where they cannot all be run, and after the last where some did not end
        well, KeyboardInterrupt once all were stopped.
        """
        if processes() > 1:
            raise PipelineError(sweep_in_ranks())
        if self.stage not in ("sft", "dpo"):
            raise PipelineError(
                f"-m is for sft and dpo, which train: type `python -m dpo_pipeline.{self.stage}` without it"
            )
        self.common = set.intersection(*map(set, job_overrides))
        self.jobs = [self.job(list(typed)) for typed in job_overrides]
        self.check()
        self.free = visible_gpus()
        slots = self.slots(len(self.free))
        for job in self.jobs:
            if self.is_done(job):
                self.set_state(job, "done", "already")
        try:
            while todo := [job for job in self.jobs if job.state in ("waiting", "running", "elsewhere")]:
                for job in todo:
                    self.look_at(job, slots)
                time.sleep(0.2)
        except KeyboardInterrupt:
            self.stop()
            raise
        self.report()
        if unfinished := [job for job in self.jobs if job.state != "done"]:
            names = ", ".join(self.name(job) for job in unfinished)
            raise PipelineError(
                f"{len(unfinished)} of {len(self.jobs)} jobs did not end well ({names}): the same command runs these "
                "alone"
            )
        return [JobReturn(overrides=job.typed, status=JobStatus.COMPLETED) for job in self.jobs]

    def job(self, typed: list[str]) -> Job:
        """A job with its checked config; raises PipelineError as the same command alone would."""
        run = compose_and_validate(self.context.config_loader.load_sweep_config(self.config, typed))
        folder = run.sft_folder if self.stage == "sft" else run.dpo_folder
        log = Path(self.config.hydra.sweep.dir) / str(run.name) / self.stage / f"{folder.name}.log"
        return Job(typed, run, folder, log)

    def check(self) -> None:
        """Raise PipelineError for two jobs of one folder, and for an SFT that is missing."""
        for folder, count in Counter(job.folder for job in self.jobs).items():
            if count > 1:
                raise PipelineError(
                    f"{count} jobs would share {folder}: a value is typed twice, or variant= is one for all"
                )
        for job in self.jobs if self.stage == "dpo" else ():
            if job.run.policy == "sft" and run_folder.run_state(job.run.sft_folder) != "done":
                common = " ".join(item for item in job.typed if item in self.common)
                raise PipelineError(
                    f"there is no finished SFT in {job.run.sft_folder}, from which a job starts: type "
                    f"`python -m dpo_pipeline.sft {common}` before the sweep, or start from the base with policy=base"
                )

    def slots(self, gpus: int) -> int:
        """How many jobs run at once; raises PipelineError where there are not as many GPUs."""
        if gpus == 0 and self.gpus_per_job == 1:
            return self.at_once or 1
        at_once = self.at_once or max(1, gpus // self.gpus_per_job)
        if at_once * self.gpus_per_job > gpus:
            raise PipelineError(
                f"{at_once} job(s) at once of {self.gpus_per_job} GPU(s) each want {at_once * self.gpus_per_job}, and "
                f"{gpus} are visible: lower hydra.launcher.jobs or hydra.launcher.gpus_per_job"
            )
        file = Path(self.launch_file)
        if self.gpus_per_job > 1 and not file.is_file():
            raise PipelineError(f"hydra.launcher.launch_file={file}: there is no such file (from {Path.cwd()})")
        if self.gpus_per_job > 1 and "DEEPSPEED" in file.read_text(encoding="utf-8") and not find_spec("deepspeed"):
            raise PipelineError(f"{file} needs DeepSpeed, which is not installed: `pip install -e '.[deepspeed]'`")
        return at_once

    def is_done(self, job: Job) -> bool:
        """Whether there is nothing left to do, the comparison included; where its folder is refused it has failed."""
        try:
            decision = run_folder.decide(job.folder, run_folder.identity(job.run, self.stage), job.run.overwrite)
        except PipelineError as error:
            if locks.lock_owner(job.folder) is None:
                self.set_state(job, "failed", str(error))
            return False
        measured = all((job.folder / file).is_file() for file in ("eval.json", "validation.json"))
        return decision == "done" and (self.stage == "sft" or measured)

    def look_at(self, job: Job, slots: int) -> None:
        """Start a job where there is a place for it, and tell where one has ended."""
        if job.state == "running" and job.process.poll() is not None:
            job.output.close()
            self.free += job.gpus
            self.set_state(job, *self.outcome(job))
        elif job.state == "elsewhere" and locks.lock_owner(job.folder) is None:
            job.state = "waiting"
        elif job.state == "waiting" and sum(j.state in ("running", "elsewhere") for j in self.jobs) < slots:
            if who := locks.lock_owner(job.folder):  # of a sweep that was killed, or in another terminal
                self.set_state(job, "elsewhere", f"process {who['pid']} on {who['host']}, which is waited for")
            else:
                self.start(job)
                self.set_state(job, "running", f"its output: {job.log}")

    def start(self, job: Job) -> None:
        """Start a job's process, in a session of its own: a terminal's Ctrl-C is for us to pass on."""
        job.gpus, self.free = self.free[: self.gpus_per_job], self.free[self.gpus_per_job :]
        call, environment = [sys.executable], dict(os.environ)
        if job.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(job.gpus)
        if len(job.gpus) > 1:
            processes = ["--num_processes", str(len(job.gpus)), "--main_process_port", "0"]  # 0: any that is free
            call += ["-m", "accelerate.commands.launch", "--config_file", self.launch_file, *processes]
            environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "600"  # a large checkpoint takes longer than its 30 s
        # Else an experiment that is a sweep itself would start sweeps without end.
        call += ["-m", f"dpo_pipeline.{self.stage}", *job.typed, "hydra.mode=RUN"]
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.output = job.log.open("w", encoding="utf-8")
        options: dict[str, Any] = {"stdout": job.output, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        job.process = subprocess.Popen(call, env=environment, start_new_session=True, **options)

    def outcome(self, job: Job) -> tuple[str, str]:
        """The state in which a job has ended, and why."""
        code = job.process.returncode
        if code == 0:
            return "done", run_folder.loss_summary(job.folder)
        if code == 75 or (run_folder.run_state(job.folder) == "interrupted" and code > 0):
            return "interrupted", run_folder.loss_summary(job.folder)
        lines = [line.strip() for line in re.split(r"[\r\n]", job.log.read_text(encoding="utf-8")) if line.strip()]
        told = [line.partition("error: ")[2] for line in lines if "error: " in line] or lines[-1:]
        if code < 0:
            kind = signal.Signals(-code).name
            why = f"killed by {kind}" + (": by hand, or for want of memory" if kind == "SIGKILL" else "")
            return "failed", why
        return "failed", told[-1] if told else f"exit code {code}, without a word"

    def set_state(self, job: Job, state: str, detail: str) -> None:
        """Set a job's state, and print it in one line with what is still to come."""
        job.state, job.why = state, detail
        count = Counter(job.state for job in self.jobs)
        rest = ", ".join(f"{count[state]} {word}" for state, word in TO_COME.items() if count[state])
        place = f"[{self.jobs.index(job) + 1}/{len(self.jobs)}]"
        print(f"{place} {self.name(job)}: {state}, {detail}" + (f" ({rest})" if rest else ""), flush=True)

    def name(self, job: Job) -> str:
        """What tells a job from the others."""
        return " ".join(item for item in job.typed if item not in self.common) or job.folder.name

    def report(self) -> None:
        """The table of each name that was swept, with its plots."""
        from dpo_pipeline.evaluation import sweep_report

        failed = [job for job in self.jobs if job.state != "done"]
        for home in dict.fromkeys(job.run.home for job in self.jobs if self.stage == "dpo"):
            reasons = {job.folder.name: f"{job.state}: {job.why}" for job in failed if job.run.home == home}
            print("\n" + sweep_report.sweep_report(home, self.jobs[0].run.evaluation.kl_budget, reasons), flush=True)
            print(f"\nWritten: {home}/report/sweep.md, sweep.csv, sweep.png, reward_kl_frontier.png", flush=True)

    def stop(self) -> None:
        """Ask every job to stop at a checkpoint, and wait for it; a second Ctrl-C kills them."""
        running = [job for job in self.jobs if job.process is not None and job.process.poll() is None]
        print(f"stopping {len(running)} job(s) at a checkpoint: the same command goes on from there", flush=True)
        try:
            for job in running:
                job.process.terminate()
            for job in running:
                job.process.wait()
                self.set_state(job, *self.outcome(job))
        finally:
            for job in running:
                job.process.kill()


TO_COME = {"running": "running", "elsewhere": "elsewhere", "waiting": "to come"}
