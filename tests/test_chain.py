"""The two commands on the embedded task, as typed: they learn, say so with intervals, and print nothing else."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.commands import run

pytestmark = pytest.mark.slow

TYPED = (
    *("model.builder.hidden_size=64", "model.builder.layers=2", "model.builder.steps=100", "sft.learning_rate=5e-3"),
    *("dataset.rows=900", "batch.global_size=16", "evaluation.pairs=100", "evaluation.prompts=40"),
    *("evaluation.max_new_tokens=24", "evaluation.tracker_prompts=8", "dpo.learning_rate=8e-4"),
)
NO_NETWORK = """
import socket
def refuse(self, address):
    raise AssertionError(f"the network was touched: {address}")
socket.socket.connect = socket.socket.connect_ex = refuse
"""


def check_seconds(seconds, metrics, shown):
    """Every part of a run took time, and what the trainer counts as evaluation is not among that of training."""
    parts = {"data", "model and trainer", "preflight", "reference pass", "training", "validation", "tracker", "saving"}
    assert set(seconds) == {*parts, "comparison", "report", "imports and the rest"}
    assert all(value > 0 for value in seconds.values())
    logs = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert seconds["validation"] > sum(line.get("eval_runtime", 0) for line in logs) - 0.05
    in_training = sum(seconds[name] for name in ("training", "validation", "tracker"))
    train_runtime = logs[-1]["train_runtime"]
    assert seconds["training"] < train_runtime < in_training + seconds["saving"] + 0.05
    total = sum(seconds.values())
    overhead = 100 * (1 - seconds["training"] / total)
    assert f"overhead beside training: {overhead:.0f}% of {total:.0f} s" in shown


def test_two_commands_align_the_tiny_model_and_a_third_finds_it_done(tmp_path, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TQDM_DISABLE"):
        monkeypatch.delenv(name)
    sft = run("dpo_pipeline.sft", f"root={tmp_path}", *TYPED)
    # From the first import on, and without a network.
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    call = [sys.executable, "-m", "dpo_pipeline.dpo", f"root={tmp_path}", *TYPED]
    dpo = subprocess.run(call, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    for done in (sft, dpo):
        assert done.returncode == 0, done.stderr
        assert "the network was touched" not in done.stdout + done.stderr
        assert "arn" not in done.stderr.replace("learn", ""), done.stderr  # warn, Warning
        assert "training: 100%" in done.stderr
    home = tmp_path / "tiny-reviews"
    policies = json.loads((home / "results.json").read_text())["policies"]
    variant = next(name for name in policies if name.startswith("dpo/"))
    assert list(policies) == ["base", "sft/full", variant]

    base = policies["base"]["against"]["base"]
    assert base["preference_accuracy"]["value"] == 0.5
    assert {base[key][bound] for key in ("margin", "margin_nats", "kl") for bound in ("value", "low", "high")} == {0.0}

    own = policies[variant]["against"]["reference"]
    assert own["preference_accuracy"]["low"] > 0.6
    assert own["margin_nats"]["low"] > 0
    assert own["margin"]["value"] == pytest.approx(0.1 * own["margin_nats"]["value"])
    assert 0 < own["kl"]["low"] < own["kl"]["high"] < 20
    reward = {name: policies[name]["own"]["score.truth"] for name in policies}
    assert reward[variant]["low"] > reward["sft/full"]["high"]
    perplexity = {name: policies[name]["own"]["perplexity_chosen"] for name in policies}
    assert perplexity["sft/full"]["high"] < perplexity["base"]["low"]

    samples = json.loads((home / "generation_samples.json").read_text())
    assert len(samples) == 40
    assert set(samples[0]["answers"]) == set(policies)
    for text in (
        "| preference accuracy",
        "All against the base model: 100 test pairs",
        f"{variant} is better than sft/full by truth: difference ",
        "> film",
    ):
        assert text in dpo.stdout

    shown = dpo.stdout[dpo.stdout.index(f"\n{variant} is better") + 1 : dpo.stdout.index("\n| part of the run")]
    assert len(shown.splitlines()) <= 40
    report = (home / "report" / "report.md").read_text()
    assert "## Against DPO's own reference, sft/full" in report
    assert {"index.html", "training_curves.png", "reward_kl_frontier.png"} <= set(os.listdir(home / "report"))

    train_log = home / variant / "train.log"
    assert "| preference accuracy" in train_log.read_text()
    assert "warning: " not in dpo.stdout
    assert re.search(rf"^\| {variant} \| \d+ +\| [1-9]\d* s ", report, flags=re.MULTILINE)  # in the table of costs
    status = json.loads((home / variant / "status.json").read_text())
    assert (status["state"], status["error"]) == ("done", None)
    manifest = json.loads((home / variant / "manifest.json").read_text())
    assert manifest["rows"]["train"] == 749
    assert manifest["peak_memory_bytes"] > 1e8
    assert {"command", "git", "versions", "seed", "data_fingerprint", "world_size", "seconds"} <= set(manifest)
    check_seconds(manifest["seconds_by_part"], home / variant / "metrics.jsonl", dpo.stdout)

    again = run("dpo_pipeline.dpo", f"root={tmp_path}", *TYPED)
    assert again.stdout.startswith("already done: ")
    assert json.loads((home / "results.json").read_text())["policies"] == policies
