"""Trackers: what reaches them, and that none of them stops or slows a run."""

import json
import logging
import socket
import subprocess
import time

import pytest

from dpo_pipeline import run_folder, tracking
from dpo_pipeline.sft import run_sft

SHORT = ("++sft.max_steps=4", "sft.logging_steps=2")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No key and no settings of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))


def test_wandb_without_a_key_keeps_the_run_for_later_with_name_group_and_id(small):
    run = small("lora=none", "sft_variant=wandb", "report_to=wandb", "wandb.project=mine", *SHORT)
    folder = run_sft(run)
    assert run_folder.run_state(folder) == "done"
    told = (folder / "tracker.log").read_text()
    assert "wandb cannot be reached" in told
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    kept, manifest = file.read_bytes(), run_folder.read_json(folder / "manifest.json")
    for text in ("mine", "wandb", "small", manifest["run_id"], "train/loss", "eval/perplexity"):
        assert text.encode() in kept
    for row in run_folder.metrics(folder):
        assert not [value for key, value in row.items() if "loss" in key and json.dumps(value).encode() not in kept]
    summary = next((folder / "wandb").glob("offline-run-*/files/wandb-summary.json"), None)
    assert summary is None or json.loads(summary.read_text())["step"] == 4  # it was finished


def test_the_id_is_the_same_when_a_run_goes_on_and_another_for_another_run(small, tmp_path):
    ids = []
    for state, folder in (("interrupted", "a"), ("interrupted", "a"), ("interrupted", "b")):
        run = small(f"root={tmp_path}")
        with pytest.raises(KeyboardInterrupt), run_folder.recorded_run(run, "sft", tmp_path / folder, {}):
            raise KeyboardInterrupt
        assert run_folder.run_state(tmp_path / folder) == state
        ids.append(run_folder.read_json(tmp_path / folder / "manifest.json")["run_id"])
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.slow
def test_a_server_that_hangs_neither_stops_nor_slows_a_run(small, monkeypatch):
    monkeypatch.setattr(tracking, "PATIENCE", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:  # it takes connections, and never completions
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        run = small("lora=none", "sft_variant=hangs", "report_to=wandb", *SHORT)
        folder = run_sft(run)
    assert run_folder.run_state(folder) == "done"
    assert "wandb did not answer in 2 s" in (folder / "train.log").read_text()
    steps = [row for row in run_folder.metrics(folder) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 4]
    processes = subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout
    assert f"dpo_pipeline.tracking {folder}" not in processes


def test_a_tracker_that_fails_is_told_and_the_run_goes_on(small, tmp_path, monkeypatch, caplog):
    run = small(f"root={tmp_path}", "report_to=wandb")
    tmp_path.joinpath("run").mkdir()  # without a manifest: its process fails at once
    with caplog.at_level(logging.WARNING, logger="dpo_pipeline"), tracking.tracked(run, tmp_path / "run"):
        time.sleep(0.1)
    assert f"{run.report_to} has failed, see {tmp_path}/run/tracker.log" in caplog.text
    assert "Error" in (tmp_path / "run" / "tracker.log").read_text()


def test_lines_are_sent_once_though_the_file_is_cut_back_and_grows_again(tmp_path, monkeypatch):
    file, eos_ids = tmp_path / "metrics.jsonl", iter([False, False, True])

    def grow(*steps: int) -> None:
        file.write_text("".join(json.dumps({"step": s, "loss": s}) + "\n" for s in steps) + '{"step": 99, "lo')

    grow(1, 2, 3)
    grow(1, 2)
    monkeypatch.setattr(tracking.time, "sleep", lambda seconds: grow(1, 2, 3, 4))
    assert [row["step"] for row in tracking.follow(tmp_path, lambda: next(eos_ids))] == [1, 2, 3, 4]
    grow(1, 2, 3)  # the run goes on from step 3, and comes to 4 again
    eos_ids = iter([False, True])
    monkeypatch.setattr(tracking.time, "sleep", lambda seconds: grow(1, 2, 3, 4, 5))
    assert [row["step"] for row in tracking.follow(tmp_path, lambda: next(eos_ids))] == [5]
