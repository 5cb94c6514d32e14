"""Starts and ends the tracker that `report_to` names; transformers' own callback sends it what the Trainer logs."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf
from transformers.integrations import get_reporting_integration_callbacks

from dpo_pipeline.distributed import is_main_process
from dpo_pipeline.record import RunRecord
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)
warn_once = functools.cache(log.warning)

TIMEOUT = 20  # seconds that a tracker may take to start, and again to send the rest at the end


@contextlib.contextmanager
def track(run: Run, record: RunRecord, trainer: Any) -> Iterator[None]:
    """Track a training under the project, group and name of its run; rank 0 does.

    The id is the manifest's `run_id` (MLflow gives its own, `mlflow_run_id`), so a resumed run goes on in its curves.
    An error of the tracker becomes one warning. A call that blocks between two steps does cost the training: wandb and
    MLflow send from a thread or process of their own, TensorBoard and Trackio write to the disk.
    """
    if run.report_to == "none" or not is_main_process():
        yield
        return
    (callback_class,) = get_reporting_integration_callbacks(run.report_to)
    callback = trainer.pop_callback(callback_class)
    with warn_on_error(run.report_to):
        start_tracker(run, record, trainer.args, callback)
        for event in ("on_train_begin", "on_log", "on_train_end"):
            setattr(callback, event, warn_on_error(run.report_to)(getattr(callback, event)))
        trainer.add_callback(callback)  # not reached where the tracker did not start
    is_complete = False
    try:
        yield
        is_complete = True
    finally:
        with warn_on_error(run.report_to):
            end_tracker(run.report_to, is_complete)


@contextlib.contextmanager
def warn_on_error(tracker: str) -> Iterator[None]:
    """Turn any error of a tracker into one warning."""
    try:
        yield
    except Exception as error:
        warn_once("%s failed (%s): the run goes on, and metrics.jsonl has all numbers", tracker, str(error))


def start_tracker(run: Run, record: RunRecord, args: Any, callback: Any) -> None:
    """Start a tracker, or set what transformers' callback starts it with."""
    name, group, run_id = record.folder.name, run.wandb.group or run.name, record.manifest["run_id"]
    if run.report_to == "wandb":
        start_wandb(run, record, {"name": name, "group": group, "id": run_id})
    elif run.report_to == "tensorboard":
        callback.logging_dir = str(record.folder / "tensorboard")
    elif run.report_to == "trackio":  # continues the run of the same name; the callback passes no group
        args.project, args.run_name = run.wandb.project, f"{group}-{name}-{run_id}"
    else:
        import mlflow

        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(TIMEOUT))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        mlflow.set_experiment(run.wandb.project)
        started = mlflow.start_run(record.manifest.get("mlflow_run_id"), run_name=name, tags={"group": group})
        record.save_manifest(mlflow_run_id=started.info.run_id)


def start_wandb(run: Run, record: RunRecord, names: dict[str, str]) -> None:
    """Start Weights & Biases: online, or in `wandb/` of the run folder where it cannot be reached."""
    import wandb

    timeouts = {"init_timeout": TIMEOUT, "finish_timeout": TIMEOUT, "finish_timeout_raises": True}
    options: dict[str, Any] = {
        **names,
        "project": run.wandb.project,
        "entity": run.wandb.entity,
        "resume": "allow",
        "dir": record.folder,
        "config": OmegaConf.to_container(OmegaConf.load(record.folder / "config.yaml")),
        "settings": wandb.Settings(**timeouts, console="off", silent=True),
    }
    try:
        if wandb.login(prompt=False):  # `init` alone would ask a terminal for a key
            wandb.init(**options)
            log.info("wandb: %s", wandb.run.url)
            return
        reason: Any = "not logged in: type `wandb login`"
    except Exception as error:
        reason = error
        wandb.teardown()  # wandb's service holds the id of a run that did not start
    log.warning("wandb cannot be reached (%s): type `wandb sync --sync-all` in %s later", reason, record.folder)
    wandb.init(**options, mode="offline")


def end_tracker(tracker: str, is_complete: bool) -> None:
    """Send what is left, for TIMEOUT seconds at most, and close the run; the other callbacks close theirs."""
    if tracker == "wandb":
        import wandb

        wandb.finish(exit_code=0 if is_complete else 1)
    elif tracker == "mlflow":
        import mlflow

        mlflow.end_run("FINISHED" if is_complete else "KILLED")
