"""A run folder knows what it is: new, to be continued, done, or another one's."""

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo_pipeline import locks, run_folder
from dpo_pipeline.config import compose
from dpo_pipeline.dpo import claim
from dpo_pipeline.errors import PipelineError

SILENT = {"updated": "now", "step": 1, "error": None}


def lay(folder, state: str, identity: dict, checkpoint: bool = False, pid: int | None = None) -> None:
    status = {"state": state, "pid": pid or os.getpid(), "host": socket.gethostname(), **SILENT}
    run_folder.write_json(folder / "status.json", status)
    run_folder.write_json(folder / "manifest.json", {"identity": identity})
    if checkpoint:
        run_folder.write_json(folder / "checkpoints" / "checkpoint-5" / "trainer_state.json", {})


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_an_empty_place_is_new(tmp_path):
    assert run_folder.decide(tmp_path / "a", {"beta": 0.1}, overwrite=False) == "new"


@pytest.mark.parametrize(("state", "decision"), [("done", "done"), ("interrupted", "resume"), ("failed", "resume")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_same_identity_is_done_or_resumed_with_or_without_overwrite(state, decision, overwrite, tmp_path):
    lay(tmp_path, state, {"beta": 0.1}, checkpoint=True)
    assert run_folder.decide(tmp_path, {"beta": 0.1}, overwrite) == decision
    assert run_folder.newest_checkpoint(tmp_path)


def test_another_identity_is_refused_with_both_values_and_what_to_type(tmp_path):
    folder = tmp_path / "dpo" / "x"
    lay(folder, "done", {"beta": 0.1, "seed": 0})
    with pytest.raises(PipelineError, match=r"beta is 0.1 there, 0.3 here.*variant=NAME or name=NAME.*overwrite=true"):
        run_folder.decide(folder, {"beta": 0.3, "seed": 0}, overwrite=False)
    assert (folder / "manifest.json").is_file()


def test_another_identity_that_has_only_begun_is_refused_once_it_has_a_checkpoint(tmp_path):
    lay(tmp_path, "interrupted", {"beta": 0.1}, checkpoint=True)
    with pytest.raises(PipelineError, match="beta is 0.1 there"):
        run_folder.decide(tmp_path, {"beta": 0.3}, overwrite=False)


def test_another_identity_without_a_checkpoint_is_replaced(tmp_path):
    lay(tmp_path / "a", "failed", {"beta": 0.1})
    assert run_folder.decide(tmp_path / "a", {"beta": 0.3}, overwrite=False) == "replace"


def test_overwrite_replaces_another_identity(tmp_path):
    lay(tmp_path / "a", "done", {"beta": 0.1})
    assert run_folder.decide(tmp_path / "a", {"beta": 0.3}, overwrite=True) == "replace"
    assert (tmp_path / "a").is_dir()  # deciding touches nothing


def test_files_of_nobody_are_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(PipelineError, match="holds files but no run"):
        run_folder.decide(tmp_path, {"beta": 0.1}, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_run_whose_process_is_gone_reads_as_interrupted(tmp_path):
    lay(tmp_path, "running", {}, pid=dead_pid())
    assert run_folder.run_state(tmp_path) == "interrupted"


def test_a_run_whose_process_lives_is_in_use(tmp_path):
    lay(tmp_path, "running", {"beta": 0.1}, pid=os.getppid())
    with pytest.raises(PipelineError, match=f"in use by process {os.getppid()} on {socket.gethostname()}"):
        run_folder.decide(tmp_path, {"beta": 0.1}, overwrite=True)


def test_the_newest_checkpoint_is_the_newest_complete_one(tmp_path):
    for step in (9, 10):
        run_folder.write_json(tmp_path / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json", {})
    (tmp_path / "checkpoints" / "checkpoint-11").mkdir()
    assert run_folder.newest_checkpoint(tmp_path).name == "checkpoint-10"
    assert run_folder.newest_checkpoint(tmp_path / "nowhere") is None


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x.json"
    run_folder.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        run_folder.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    "typed",
    ["root=x", "name=x", "sft_variant=x", "overwrite=true", "report_to=wandb", "batch.micro_size=8",
     "sft.logging_steps=1", "sft.save_total_limit=5", "evaluation.pairs=7", "dpo.learning_rate=1", "beta=0.5"],
)  # fmt: skip
def test_what_cannot_change_the_weights_is_not_identity(typed):
    assert run_folder.identity(compose([typed]), "sft") == run_folder.identity(compose([]), "sft")


@pytest.mark.parametrize(
    "typed",
    ["seed=1", "lora=r8", "dataset.rows=99", "dataset.split_seed=1", "sft_target=chosen", "batch.global_size=32",
     "sft.learning_rate=1e-5", "++sft.max_grad_norm=2", "length.max=99", "precision=fp32", "debug=true",
     "model.builder.layers=1", "sft_best=last", "sft.eval_steps=7"],
)  # fmt: skip
def test_what_can_change_the_weights_is_identity(typed):
    assert run_folder.identity(compose([typed]), "sft") != run_folder.identity(compose([]), "sft")


def test_evaluating_more_often_is_identity_only_where_it_chooses_the_checkpoint():
    last = run_folder.identity(compose(["sft_best=last"]), "sft")
    assert run_folder.identity(compose(["sft_best=last", "sft.eval_steps=7"]), "sft") == last


def test_a_path_counts_by_what_lies_there(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("{}")
    found = [
        run_folder.identity(compose(["dataset=json", f"dataset.path={tmp_path}/{name}.jsonl"]), "sft")
        for name in ("a", "b")
    ]
    assert found[0] == found[1]
    (tmp_path / "b.jsonl").write_text("{} ")
    assert run_folder.identity(compose(["dataset=json", f"dataset.path={tmp_path}/b.jsonl"]), "sft") != found[0]


def test_dpo_before_sft_says_what_to_type(tmp_path):
    with pytest.raises(PipelineError, match="no finished SFT in .*`make sft`.*policy=base"):
        claim(compose([f"root={tmp_path}"]))


def test_a_run_that_is_replaced_is_kept_until_the_new_one_is_done(small, sft, tmp_path):
    from dpo_pipeline.sft import run_sft

    typed = [f"root={tmp_path}", "name=kept", "++sft.max_steps=2", "overwrite=true"]
    final = run_sft(small(*typed)) / "final" / "model.safetensors"
    before = final.read_bytes()
    for _ in range(2):  # the second time, what failed is replaced, and not the run that was kept
        with pytest.raises(PipelineError, match="no rows|need 16"):
            run_sft(small(*typed, "dataset.rows=2"))
        kept = tmp_path / "kept" / ".replaced" / "sft" / "full" / "final" / "model.safetensors"
        assert kept.read_bytes() == before
    assert run_sft(small(*typed, "seed=1")) == final.parents[1]
    assert final.read_bytes() != before
    assert not kept.exists()


HOLDS = """
import sys, time
from pathlib import Path
from dpo_pipeline import locks
with locks.run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_of_two_at_once_one_runs_and_the_other_says_who_until_that_one_is_gone(tmp_path):
    folder = tmp_path / "dpo" / "a"
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert locks.lock_owner(folder) == {"pid": holder.pid, "host": socket.gethostname()}
        told = f"{folder} is in use by process {holder.pid} on {socket.gethostname()}: wait for it or end it"
        with pytest.raises(PipelineError, match=told), locks.run_lock(folder):
            pass
        lay(folder, "running", {"beta": 0.1}, pid=holder.pid)
    finally:
        holder.kill()
        holder.wait()
    assert locks.lock_owner(folder) is None
    with locks.run_lock(folder):
        assert run_folder.run_state(folder) == "interrupted"


def test_a_running_of_another_host_is_nobody_s_for_who_holds_the_folder(tmp_path, monkeypatch):
    lay(tmp_path / "a", "running", {"beta": 0.1})
    status = run_folder.read_json(tmp_path / "a" / "status.json")
    run_folder.write_json(tmp_path / "a" / "status.json", {**status, "host": "node-that-burnt-down"})
    assert run_folder.run_state(tmp_path / "a") == "running"
    monkeypatch.setattr(run_folder, "identity", lambda *args: {"beta": 0.1})
    with locks.run_lock(tmp_path / "a"):
        assert run_folder.claim(SimpleNamespace(overwrite=False), "dpo", tmp_path / "a")[1] == "resume"


def saved_at(folder, step: int, files: dict[str, bytes]) -> Path:
    place = folder / "checkpoints" / f"checkpoint-{step}"
    place.mkdir(parents=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    return place


def test_torn_checkpoints_are_never_resumed_from_and_go_before_a_run_goes_on(tmp_path):
    saved = io.BytesIO()
    torch.save({"a": torch.ones(9)}, saved)
    whole = {"trainer_state.json": b"{}", "optimizer.pt": saved.getvalue(), "rng_state_1.pth": saved.getvalue()}
    kept = saved_at(tmp_path, 8, whole)
    torn = [
        saved_at(tmp_path, 10, {key: value for key, value in whole.items() if key != "trainer_state.json"}),
        saved_at(tmp_path, 11, {**whole, "trainer_state.json": b'{"epoch": 1'}),
        saved_at(tmp_path, 12, {**whole, "rng_state_1.pth": saved.getvalue()[:-30]}),
        saved_at(tmp_path, 13, {**whole, "optimizer.pt": b""}),
    ]
    assert run_folder.newest_checkpoint(tmp_path) == kept
    rows = [{"step": 7, "loss": 1}, {"step": 8, "loss": 1}, {"step": 8, "train_runtime": 1}, {"step": 9, "loss": 1}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 9, "lo')
    run_folder.rollback_to_checkpoint(tmp_path)
    assert kept.is_dir()
    assert not [place for place in torn if place.exists()]
    assert run_folder.metrics(tmp_path) == rows[:2]


def test_a_run_killed_before_its_first_status_or_manifest_is_whole_goes_on(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "manifest.json.7.partial").write_text('{"identi')
    assert run_folder.decide(folder, {"beta": 0.1}, overwrite=False) == "new"
    run_folder.write_json(folder / "manifest.json", {"identity": {"beta": 0.1}})
    assert run_folder.decide(folder, {"beta": 0.1}, overwrite=False) == "resume"


def test_the_manifest_is_written_before_the_status(small, tmp_path, monkeypatch):
    written, write = [], run_folder.write_json
    monkeypatch.setattr(
        run_folder, "write_json", lambda path, content: written.append(path.name) or write(path, content)
    )
    with run_folder.recorded_run(small(), "sft", tmp_path / "a", {}):
        assert written == ["manifest.json", "status.json"]


def test_another_number_of_processes_is_told_and_another_way_to_hold_weights_refused(small, tmp_path, caplog):
    run_folder.write_json(tmp_path / "a" / "manifest.json", {"seconds": 1.0, "world_size": 4, "sharded": None})
    with (
        caplog.at_level("INFO", logger="dpo_pipeline"),
        run_folder.recorded_run(small(), "sft", tmp_path / "a", {}) as record,
    ):
        assert "begun on 4 process(es), goes on on 1: the same global batch, not bit for bit" in caplog.text
        record.save_manifest(sharded=None)
        told = "was begun in whole copies and would go on in deepspeed on 2 processes: start it as then"
        with pytest.raises(PipelineError, match=told):
            record.save_manifest(sharded="deepspeed on 2 processes")


def test_what_a_kill_left_aside_never_costs_a_finished_run(tmp_path, monkeypatch):
    folder = tmp_path / "dpo" / "a"
    for at, beta in (
        (run_folder.backup_path(folder), 0.1),
        (folder, 0.3),
    ):  # 0.3 replaced 0.1, was done, and killed before that went
        lay(at, "done", {"beta": beta})
    monkeypatch.setattr(run_folder, "identity", lambda *args: {"beta": 0.5})
    run_folder.claim(SimpleNamespace(overwrite=True), "dpo", folder)
    assert run_folder.read_json(run_folder.backup_path(folder) / "manifest.json")["identity"] == {"beta": 0.3}
    assert not folder.exists()
    lay(folder, "failed", {"beta": 0.5})  # the new one failed; a third one tries
    monkeypatch.setattr(run_folder, "identity", lambda *args: {"beta": 0.7})
    run_folder.claim(SimpleNamespace(overwrite=True), "dpo", folder)
    assert run_folder.read_json(run_folder.backup_path(folder) / "manifest.json")["identity"] == {"beta": 0.3}
    assert not folder.exists()
