"""Runs the jobs of a sweep (`-m`): a process for each job, as many at once as there are GPUs for.

Hydra's basic launcher runs all jobs in one process, where the first failure or memory leak ends the others.
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.dpo_pipeline.job import Job, stop_at_checkpoint
from omegaconf import DictConfig

from dpo_pipeline.config import validate
from dpo_pipeline.distributed import processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import visible_gpus
from dpo_pipeline.locks import lock_owner
from dpo_pipeline.run_folder import finished_sft

UNFINISHED = {"running": "running", "elsewhere": "elsewhere", "waiting": "to come"}  # states, as a line calls them


class ProcessLauncher(Launcher):
    """Hydra's launcher of `-m`; the options are those of conf/hydra/launcher/processes.yaml."""

    def __init__(self, jobs: int | None, gpus_per_job: int, launch_file: str):
        self.max_jobs, self.gpus_per_job, self.launch_file = jobs, gpus_per_job, launch_file

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config, self.stage = hydra_context, config, Path(sys.argv[0]).stem

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run all jobs and print what became of each; one that fails leaves the others running.

        Raises PipelineError before the first job where not all can run, and at the end where some did not finish.
        Ctrl-C, or an error in here, stops the running jobs at a checkpoint.
        """
        self.shared = set.intersection(*map(set, job_overrides))
        self.jobs = [self.make_job(list(overrides)) for overrides in job_overrides]
        self.free_gpus = visible_gpus()
        self.check()
        slots = self.count_slots(len(self.free_gpus), self.gpus_per_job)
        try:
            for job in self.jobs:
                self.skip_finished(job)
            while any(job.state in UNFINISHED for job in self.jobs):
                for job in self.jobs:
                    self.advance(job, slots)
                time.sleep(0.2)
        finally:
            self.stop()
        self.report()
        if failed := [self.label(job) for job in self.jobs if job.state != "done"]:
            count = f"{len(failed)} of {len(self.jobs)} jobs did not finish"
            raise PipelineError(f"{count} ({', '.join(failed)}): the same command runs only these")
        return [JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED) for job in self.jobs]

    def make_job(self, overrides: list[str]) -> Job:
        """A job with its validated config; raises PipelineError as the same command alone would."""
        cfg = self.context.config_loader.load_sweep_config(self.config, overrides)
        run = validate(cfg, cfg.hydra)
        variant = run.sft_variant if self.stage == "sft" else run.variant
        log_file = Path(self.config.hydra.sweep.dir) / str(run.name) / self.stage / f"{variant}.log"
        return Job(self.stage, overrides, run, log_file)

    def check(self) -> None:
        """Raise PipelineError where the jobs cannot be run as a sweep."""
        if processes() > 1:
            overrides = " ".join(item for item in sys.argv[1:] if item not in ("-m", "--multirun"))
            raise PipelineError(
                f"a sweep would run whole in each of the {processes()} processes of its launcher: type `python -m "
                f"dpo_pipeline.{self.stage} -m {overrides}` without the launcher"
            )
        if self.stage not in ("sft", "dpo"):
            raise PipelineError(f"-m is for sft and dpo: type {self.stage} without it")
        for folder, count in Counter(job.folder for job in self.jobs).items():
            if count > 1:
                raise PipelineError(f"{count} jobs would share {folder}: a value is twice, or variant= is one for all")
        for job in self.jobs:
            if self.stage == "dpo" and job.run.policy == "sft":
                finished_sft(job.run)

    def count_slots(self, gpus: int, size: int) -> int:
        """How many jobs of `size` GPUs run at once; raises PipelineError where there are too few GPUs."""
        slots = self.max_jobs or max(1, gpus // size)
        if slots * size > gpus and (gpus or size > 1):
            raise PipelineError(
                f"{slots} job(s) at once of {size} GPU(s) each want {slots * size}, and {gpus} are visible: lower "
                "hydra.launcher.jobs or hydra.launcher.gpus_per_job"
            )
        return slots

    def skip_finished(self, job: Job) -> None:
        try:
            if job.is_finished():
                self.set_state(job, "done", "already")
        except PipelineError as error:
            self.set_state(job, "failed", str(error))

    def advance(self, job: Job, slots: int) -> None:
        """Start a job where a slot is free, and notice where one has ended."""
        if job.state == "running" and job.process.poll() is not None:
            self.free_gpus += job.gpus
            self.set_state(job, *job.outcome())
        elif job.state == "elsewhere" and lock_owner(job.folder) is None:
            job.state = "waiting"
        elif job.state == "waiting" and sum(each.state in ("running", "elsewhere") for each in self.jobs) < slots:
            if owner := lock_owner(job.folder):  # of another sweep, or left by one that was killed
                self.set_state(job, "elsewhere", f"{owner}, which is waited for")
                return
            gpus, self.free_gpus = self.free_gpus[: self.gpus_per_job], self.free_gpus[self.gpus_per_job :]
            job.start(gpus, self.launch_file)
            self.set_state(job, "running", f"its output: {job.log_file}")

    def set_state(self, job: Job, state: str, reason: str) -> None:
        """Set the state of a job, and print it in one line with the number of unfinished jobs."""
        job.state, job.reason = state, reason
        count = Counter(each.state for each in self.jobs)
        rest = ", ".join(f"{count[each]} {word}" for each, word in UNFINISHED.items() if count[each])
        place = f"[{self.jobs.index(job) + 1}/{len(self.jobs)}]"
        print(f"{place} {self.label(job)}: {state}, {reason}" + (f" ({rest})" if rest else ""), flush=True)

    def label(self, job: Job) -> str:
        """The overrides that a job does not share with all others."""
        return " ".join(item for item in job.overrides if item not in self.shared) or job.folder.name

    def report(self) -> None:
        """Print and write the report of each name that DPO was swept over."""
        from dpo_pipeline.record import run_logging
        from dpo_pipeline.report.build import report_or_warn

        failed = [job for job in self.jobs if job.state != "done"]
        for home, run in {job.run.home: job.run for job in self.jobs if self.stage == "dpo"}.items():
            reasons = {job.folder.name: f"{job.state}: {job.reason}" for job in failed if job.run.home == home}
            with run_logging(None):
                report_or_warn(run, failed=reasons)

    def stop(self) -> None:
        """Stop the running jobs at a checkpoint."""
        running = [job for job in self.jobs if job.state == "running"]
        stop_at_checkpoint([job.process for job in running])
        for job in running:
            self.set_state(job, *job.outcome())
