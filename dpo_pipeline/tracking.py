"""Sends metrics.jsonl to a tracker while a run goes on, from a process of its own: no tracker can stop or slow a run.

transformers' own integrations call the tracker between two steps, where one that does not answer holds them up.
"""

import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpo_pipeline.config import Run
from dpo_pipeline.distributed import is_main_process
from dpo_pipeline.run_folder import metrics, read_json, write_json

log = logging.getLogger(__name__)

PATIENCE = 20  # seconds that a run waits, at its end, for what is still to be sent
Send = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def tracked(run: Run, folder: Path) -> Iterator[None]:
    """Have the tracker that `report_to` names follow the folder's metrics.jsonl, on rank 0; it says all to a log."""
    if run.report_to == "none" or not is_main_process():
        yield
        return
    said = folder / "tracker.log"
    call = [sys.executable, "-m", "dpo_pipeline.tracking", str(folder)]
    with said.open("a", encoding="utf-8") as output:
        # In a session of its own: Ctrl-C is for the run, whose end the tracker hears of by its closed input.
        options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": output, "stderr": output}
        process = subprocess.Popen(call, **options, start_new_session=True)
    try:
        yield
    finally:
        process.stdin.close()
        try:
            if process.wait(PATIENCE) != 0:
                log.warning("%s has failed, see %s: metrics.jsonl has all numbers", run.report_to, said)
        except subprocess.TimeoutExpired:
            process.kill()
            log.warning(
                "%s did not answer in %d s, see %s: metrics.jsonl has all numbers", run.report_to, PATIENCE, said
            )


def follow(folder: Path, ended: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that no tracker was sent, until the run has `ended` and all were read."""
    sent, at = read_json(folder / "tracker.json") or {"step": -1}, 0  # of the part that was interrupted
    while True:
        last, rows = ended(), metrics(folder)[at:]
        yield from (row for row in rows if row["step"] > sent["step"])
        if rows:
            at += len(rows)
            write_json(folder / "tracker.json", {"step": rows[-1]["step"]})
        if last:
            return
        time.sleep(1)


def wandb(config: dict[str, Any], folder: Path, name: str, run_id: str) -> tuple[Send, Callable[[], None]]:
    """Weights & Biases: online, or in `folder/wandb` for `wandb sync` where it cannot be reached."""
    import wandb

    given = config["wandb"]
    group = given["group"] or config["name"]
    options: dict[str, Any] = {
        **{"project": given["project"], "entity": given["entity"], "group": group, "name": name, "id": run_id},
        **{"resume": "allow", "dir": folder, "config": config, "settings": wandb.Settings(init_timeout=60)},
    }
    try:
        run = wandb.init(**options)
    except Exception as error:  # without a key, without a network: whatever it is, the numbers are kept
        print(f"wandb cannot be reached ({error}): kept in {folder}/wandb, type `wandb sync` later")
        run = wandb.init(**options, mode="offline")
    run.define_metric("*", step_metric="step")
    return lambda step, row: run.log({**row, "step": step}), run.finish


def tensorboard(config: dict[str, Any], folder: Path, name: str, run_id: str) -> tuple[Send, Callable[[], None]]:
    """TensorBoard: event files in `folder/tensorboard`."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(step: int, row: dict[str, float]) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, step)

    return send, writer.close


def trackio(config: dict[str, Any], folder: Path, name: str, run_id: str) -> tuple[Send, Callable[[], None]]:
    """Trackio, where its own settings say."""
    import trackio

    project, group = config["wandb"]["project"], config["wandb"]["group"] or config["name"]
    run = trackio.init(project=project, name=f"{name}-{run_id}", group=group, config=config, resume="allow")
    return lambda step, row: run.log(row, step=step), trackio.finish


def mlflow(config: dict[str, Any], folder: Path, name: str, run_id: str) -> tuple[Send, Callable[[], None]]:
    """MLflow at MLFLOW_TRACKING_URI; the server gives the run its id, which `folder/mlflow.json` keeps."""
    import mlflow

    mlflow.set_experiment(config["wandb"]["project"])
    kept = read_json(folder / "mlflow.json")
    run = mlflow.start_run(run_id=kept and kept["run_id"], run_name=name, tags={"group": config["name"]})
    write_json(folder / "mlflow.json", {"run_id": run.info.run_id})
    return lambda step, row: mlflow.log_metrics(row, step=step), mlflow.end_run


TRACKERS = {"wandb": wandb, "tensorboard": tensorboard, "trackio": trackio, "mlflow": mlflow}


def main(folder: Path) -> None:
    """What the tracker's process does: sends each line until the run that started it has ended or died."""
    import threading

    from omegaconf import OmegaConf

    config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    run_id = read_json(folder / "manifest.json")["run_id"]
    gone = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), gone.set()), daemon=True).start()
    send, finish = TRACKERS[config["report_to"]](config, folder, folder.name, run_id)
    for row in follow(folder, gone.is_set):
        numbers = {key: value for key, value in row.items() if key != "step"}
        send(row["step"], {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": numbers[k] for k in numbers})
    finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
