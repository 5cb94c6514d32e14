"""Trackers: what reaches them, and that none of them stops a run."""

import json
import logging
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import wandb
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import WandbCallback

from dpo_pipeline import record
from dpo_pipeline.sft import run_sft
from dpo_pipeline.training import tracking
from dpo_pipeline.training.callbacks import Metrics
from tests.helpers import train


@pytest.fixture(autouse=True)
def no_account(monkeypatch, tmp_path):
    """No key and no settings of whoever runs the tests, and a wandb session of the test's own."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "3")
    monkeypatch.setattr(tracking, "TIMEOUT", 5)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def track(tmp_path):
    """Tracks nothing but one log of a loss: `track("wandb")`; the callback, and the seconds of the end."""
    (tmp_path / "config.yaml").write_text("beta: 0.1")
    record = SimpleNamespace(folder=tmp_path, manifest={"run_id": f"id{time.time_ns()}"})

    def run(report_to: str, callback, before_end=lambda: None) -> SimpleNamespace:
        trained = SimpleNamespace(callbacks=[], args=TrainingArguments(str(tmp_path / "checkpoints"), use_cpu=True))
        trainer = SimpleNamespace(
            pop_callback=lambda kind: callback, add_callback=trained.callbacks.append, args=trained.args
        )
        names = SimpleNamespace(project="a-project", entity=None, group=None)
        with tracking.track(SimpleNamespace(report_to=report_to, name="mine", wandb=names), record, trainer):
            for each in trained.callbacks:
                each.on_log(trained.args, TrainerState(), None, model=None, logs={"loss": 0.5})
            before_end()
            begin = time.monotonic()
        trained.seconds, trained.folder, trained.id = time.monotonic() - begin, tmp_path, record.manifest["run_id"]
        return trained

    return run


def offline_runs(folder) -> list:
    return sorted((folder / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_without_a_key_keeps_a_dpo_run_with_name_group_id_and_all_numbers(small, sft, caplog):
    run = small(
        *("variant=offline", "report_to=wandb", "wandb.project=a-project", "wandb.group=a-group"),
        *("++dpo.max_steps=3", "dpo.eval_steps=2", "evaluation.tracker_prompts=4", "++dpo.weight_decay=0.125"),
    )
    train(run, "dpo")
    assert "wandb cannot be reached (not logged in: type `wandb login`): type `wandb sync" in caplog.text
    (file,) = offline_runs(run.dpo_folder)
    content, run_id = file.read_bytes(), record.read_json(run.dpo_folder / "manifest.json")["run_id"]
    assert file.stem == f"run-{run_id}"
    names = ("train/loss", "train/margins_nats", "eval/margins_nats", "eval/kl", "eval/reward", "weight_decay")
    for text in ("offline", "a-group", "a-project", run_id, *names):
        assert text.encode() in content
    rows = record.read_metrics(run.dpo_folder)
    losses = [row[key] for row in rows for key in ("loss", "eval_loss", "eval_kl") if key in row]
    assert len(losses) == 8
    assert all(json.dumps(loss).encode() in content for loss in losses)
    margins = [(row["margins_nats"], row["rewards/margins"]) for row in rows if "margins_nats" in row]
    assert len(margins) == 3
    assert all(nats == pytest.approx(margin / run.beta) for nats, margin in margins)


def test_a_resumed_run_has_the_id_of_its_first_part(small, monkeypatch):
    run = small("lora=none", "sft_variant=resumed", "report_to=wandb", "++sft.max_steps=4")
    step_end = Metrics.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_sft(run)
    time.sleep(1)  # the folder's name holds the second
    run_sft(run)
    run_id = record.read_json(run.sft_folder / "manifest.json")["run_id"]
    assert [file.stem for file in offline_runs(run.sft_folder)] == [f"run-{run_id}"] * 2
    assert b"eval/perplexity" in offline_runs(run.sft_folder)[1].read_bytes()
    assert run_id != record.read_json(run_sft(small("lora=none")) / "manifest.json")["run_id"]


class WandbServer(BaseHTTPRequestHandler):
    """Answers what wandb asks at the start of a run, and keeps what it is sent; answers nothing once it hangs."""

    def do_POST(self):
        self.server.received += self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.is_hanging.wait(0):
            time.sleep(30)
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        bucket = {"id": "b", "name": "run", "displayName": "run", "project": project, "historyLineCount": 0}
        viewer = {"id": "u", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}
        answer = {"viewer": viewer, "model": None, "upsertBucket": {"bucket": bucket, "inserted": True}}
        body = json.dumps({"data": answer}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Silent."""


def test_a_server_that_stops_answering_holds_up_the_end_of_a_run_for_some_seconds(track, monkeypatch, caplog):
    with ThreadingHTTPServer(("127.0.0.1", 0), WandbServer) as server:
        server.received, server.is_hanging, server.daemon_threads = b"", threading.Event(), True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        run = track("wandb", WandbCallback(), server.is_hanging.set)
        server.shutdown()
    assert len(run.callbacks) == 1
    assert not offline_runs(run.folder)
    assert b"upsertBucket" in server.received
    assert tracking.TIMEOUT <= run.seconds < 3 * tracking.TIMEOUT
    assert "wandb failed (Timed out finishing run.): the run goes on, and metrics.jsonl has all numbers" in caplog.text


def test_a_server_that_never_answers_keeps_the_run_offline(track, monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:  # it takes connections
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        begin = time.monotonic()
        run = track("wandb", WandbCallback())
        assert time.monotonic() - begin < 30
    (file,) = offline_runs(run.folder)
    wandb.teardown()  # which waits for wandb's own process to write
    assert b"train/loss" in file.read_bytes()
    assert "wandb failed" not in caplog.text
    assert "wandb cannot be reached (Failed to authenticate" in caplog.text


def test_a_tracker_that_raises_is_warned_of_once_and_the_run_goes_on(track, monkeypatch, caplog):
    def fail(*args, **options):
        raise OSError("no disk")

    callback = WandbCallback()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(callback, "on_log", fail)
        assert track("wandb", callback, lambda: callback.on_log()).callbacks == [callback]
        assert caplog.text.count("wandb failed (no disk)") == 1
    tracking.warn_once.cache_clear()
    caplog.clear()
    monkeypatch.setattr(wandb, "init", fail)
    assert track("wandb", WandbCallback()).callbacks == []  # it has not started, so nothing is sent to it
    assert "wandb failed (no disk)" in caplog.text


def test_tensorboard_and_trackio_are_given_a_place_and_a_name_that_a_resume_finds_again(track):
    callback = TrainerCallback()
    run = track("tensorboard", callback)
    assert callback.logging_dir == str(run.folder / "tensorboard")
    run = track("trackio", TrainerCallback())
    assert run.args.project == "a-project"
    assert run.args.run_name == f"mine-{run.folder.name}-{run.id}"
