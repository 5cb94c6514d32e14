"""A run folder is new, to be resumed, done, or another run's; its lock alone tells whether a run is alive."""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
from collections import Counter

import pytest

from dpo_pipeline import checkpoints, content_hash, locks, record, run_folder
from dpo_pipeline.config import compose
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.record import read_json, write_json
from dpo_pipeline.run_folder import backup_path, open_run
from dpo_pipeline.sft import run_sft


def lay(folder, state: str, identity: dict, checkpoint: bool = False, **status) -> None:
    write_json(folder / "status.json", {"state": state, "step": 1, "error": None, **status})
    write_json(folder / "manifest.json", {"identity": identity})
    if checkpoint:
        write_json(folder / "checkpoints" / "checkpoint-5" / "trainer_state.json", {})


def raise_in(run, error: BaseException | None, decision: str) -> None:
    """Raise an error, if any, in an SFT's folder, after a look at what was decided about it."""
    with open_run(run, "sft") as found:
        assert found.decision == decision
        assert run_folder.run_state(run.sft_folder) == ("done" if decision == "done" else "running")
        if error is not None:
            raise error


HERE, OTHER = {"beta": 0.1}, {"beta": 0.3}
ANOTHER = r"beta is 0.1 there, 0.3 here.*variant=NAME or name=NAME.*overwrite=true"


@pytest.mark.parametrize(
    ("state", "checkpoint", "identity", "overwrite", "decision"),
    [
        ("none", False, HERE, False, "new"),
        *(("done", True, HERE, overwrite, "done") for overwrite in (False, True)),
        *(
            (state, True, HERE, overwrite, "resume")
            for state in ("interrupted", "failed")
            for overwrite in (False, True)
        ),
        ("running", False, HERE, False, "resume"),  # nobody holds its lock, whatever host and process it names
        ("done", False, OTHER, False, ANOTHER),
        ("interrupted", True, OTHER, False, ANOTHER),
        ("failed", False, OTHER, False, "replace"),
        ("done", True, OTHER, True, "replace"),
    ],
)
def test_a_place_is_new_done_resumed_replaced_or_refused(state, checkpoint, identity, overwrite, decision, tmp_path):
    folder = tmp_path / "dpo" / "x"
    if state != "none":
        lay(folder, state, HERE, checkpoint, host="elsewhere", pid=os.getppid())
    before = sorted(tmp_path.rglob("*"))
    if decision == ANOTHER:
        with pytest.raises(PipelineError, match=ANOTHER):
            run_folder.decide(folder, identity, overwrite)
    else:
        assert run_folder.decide(folder, identity, overwrite) == decision
    assert sorted(tmp_path.rglob("*")) == before  # deciding touches nothing


def test_files_of_nobody_are_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(PipelineError, match="holds files but no run"):
        run_folder.decide(tmp_path, {"beta": 0.1}, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_running_with_a_lock_holder_is_in_use(tmp_path):
    lay(tmp_path / "a", "running", {"beta": 0.1})
    assert run_folder.run_state(tmp_path / "a") == "interrupted"
    with locks.run_lock(tmp_path / "a"):
        assert run_folder.run_state(tmp_path / "a") == "running"
        with pytest.raises(PipelineError, match=f"in use by process {os.getpid()} on {socket.gethostname()}"):
            run_folder.decide(tmp_path / "a", {"beta": 0.1}, overwrite=True)


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}


def test_what_cannot_change_the_weights_is_not_identity():
    typed = ["root=x", "name=x", "sft_variant=x", "overwrite=true", "report_to=wandb", "batch.micro_size=8",
             "sft.logging_steps=1", "sft.save_total_limit=5", "evaluation.pairs=7", "dpo.learning_rate=1",
             "beta=0.5", "overlay=[PPO:x]"]  # fmt: skip
    assert run_folder.identity(compose(typed), "sft") == run_folder.identity(compose([]), "sft")


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


def test_a_model_folder_counts_by_its_weight_files_alone(tmp_path):
    def identity(name: str = "a"):
        return run_folder.identity(compose(["model=path", f"model.path={tmp_path}/{name}"]), "sft")["model.path"]

    for name in ("a", "b"):
        (tmp_path / name / "checkpoint-5").mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_bytes(b"one")
    before = identity()
    (tmp_path / "a" / "README.md").write_text("a card")
    (tmp_path / "a" / "checkpoint-5" / "model.safetensors").write_bytes(b"another")
    assert identity() == before == identity("b")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"two")
    assert identity() != before


def test_an_adapter_counts_by_its_config_and_its_base_too(tmp_path):
    def identity(**config):
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        return run_folder.identity(compose([f"policy={tmp_path}/adapter"]), "dpo")["policy"]

    for name in ("adapter", "base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    base = str(tmp_path / "base")
    before = identity(base_model_name_or_path=base, r=8)
    assert identity(base_model_name_or_path=base, r=16) != before
    (tmp_path / "base" / "model.safetensors").write_bytes(b"other")
    assert identity(base_model_name_or_path=base, r=8) != before


def test_a_default_dpo_run_reads_each_weights_file_once_for_its_hash(small, sft, monkeypatch):
    files, digest = Counter(), hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: files.update([file.name]) or digest(file, name))
    content_hash.file_hash.cache_clear()
    run = small("variant=hashes", "++dpo.max_steps=2")
    run_dpo(run)
    weights = {str(file): count for file, count in files.items() if str(file).endswith(content_hash.WEIGHTS)}
    assert set(weights.values()) == {1}
    assert str(run.dpo_folder / "final" / "model.safetensors") in weights


@pytest.mark.parametrize(
    ("typed", "label"),
    [
        ("dpo.eval_steps=7", ""),
        ("dpo.eval_steps=7 dpo_best=loss", "-dpo.eval_steps_7-dpo_best_loss"),
        ("guard.kl_max=5", ""),
        ("guard.kl_max=5 guard.action=stop", "-guard.action_stop-guard.kl_max_5"),
        ("model.micro_size=2 model.trust_remote_code=true wandb.project=x", ""),
        ("sft.learning_rate=1", ""),
        ("sft_variant=x", "-sft_variant_x"),
        ("model.learning_rate.dpo=1e-5", "-model.learning_rate.dpo_1e-05"),
    ],
)
def test_folder_names_hold_the_keys_of_the_identity(typed, label):
    assert compose(typed.split()).variant == f"sigmoid-beta0.1-seed0{label}"
    plain, changed = (run_folder.identity(compose(overrides), "dpo") for overrides in ([], typed.split()))
    assert (plain != changed) == bool(label)


def test_dpo_before_sft_says_what_to_type(tmp_path):
    with (
        pytest.raises(PipelineError, match="no finished SFT in .*`make sft`.*policy=base"),
        open_run(compose([f"root={tmp_path}"]), "dpo"),
    ):
        pass


def test_check_decides_and_writes_nothing(tmp_path):
    for stage, decision in (("sft", "new"), ("dpo", "its SFT is still to come")):
        with open_run(compose([f"root={tmp_path}", "check=true"]), stage) as run:
            assert run.decision == decision
            run.save_manifest(seconds=1)
            run.save_status(step=1)
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_logged_as_done_and_left_as_it_is(small, sft):
    run = small()
    files = [run.sft_folder / name for name in ("status.json", "manifest.json", "config.yaml")]
    before = [file.read_bytes() for file in files]
    with pytest.raises(RuntimeError):
        raise_in(run, RuntimeError(), "done")
    assert [file.read_bytes() for file in files] == before
    assert f"already done: {run.sft_folder}" in (run.sft_folder / "train.log").read_text()


@pytest.mark.parametrize(
    ("error", "state"),
    [(None, "done"), (KeyboardInterrupt(), "interrupted"), (ValueError("broken\nat a line"), "failed")],
)
def test_the_status_says_how_a_run_ended(error, state, small, tmp_path, caplog):
    run = small(f"root={tmp_path}")
    caplog.set_level("INFO", logger="dpo_pipeline")
    with contextlib.nullcontext() if error is None else pytest.raises(type(error)):
        raise_in(run, error, "new")
    status = read_json(run.sft_folder / "status.json")
    assert (status["state"], status["error"]) == (state, "broken" if state == "failed" else None)
    assert ("type the same command to go on from the start" in caplog.text) == (state == "interrupted")


def test_the_seconds_of_a_part_are_without_those_of_parts_inside_it(tmp_path, monkeypatch, caplog):
    clock = iter([10.0, 11.0, 13.0, 17.0, 18.0, 20.0, 25.0])
    monkeypatch.setattr(record.time, "monotonic", lambda: next(clock))
    run = record.RunRecord(tmp_path, "new", started=9.0)
    validate = run.timed("validation")(lambda: None)
    with run.timed("training"):
        validate()
        validate()
    caplog.set_level("INFO", "dpo_pipeline")
    run.log_seconds()
    parts = {"validation": 3.0, "training": 7.0, "imports and the rest": 6.0}
    assert read_json(tmp_path / "manifest.json")["seconds_by_part"] == parts
    assert [line.split("|")[1:4] for line in caplog.messages[0].replace(" ", "").splitlines()[3:]] == [
        ["validation", "3.0", "19%"],
        ["training", "7.0", "44%"],
        ["importsandtherest", "6.0", "38%"],
    ]
    assert caplog.messages[1] == "overhead beside training: 56% of 16 s"


def test_a_run_that_is_replaced_is_kept_until_the_new_one_is_done(small, sft, tmp_path):
    typed = [f"root={tmp_path}", "name=kept", "++sft.max_steps=2", "overwrite=true"]
    final = run_sft(small(*typed)) / "final" / "model.safetensors"
    before = final.read_bytes()
    for _ in range(2):  # the second time, what failed is replaced, and not the run that was kept
        with pytest.raises(PipelineError, match="no rows|dataset.rows=2"):
            run_sft(small(*typed, "dataset.rows=2"))
        kept = tmp_path / "kept" / ".replaced" / "sft" / "full" / "final" / "model.safetensors"
        assert kept.read_bytes() == before
    assert run_sft(small(*typed, "seed=1")) == final.parents[1]
    assert final.read_bytes() != before
    assert not kept.exists()


@pytest.mark.parametrize("is_link", [False, True])
def test_what_no_run_wrote_outlives_a_run_that_is_replaced(is_link, small, tmp_path):
    runs = [small(f"root={tmp_path}/outputs", "overwrite=true", f"seed={seed}") for seed in range(4)]
    folder, scratch = runs[0].sft_folder, tmp_path / "scratch" / "x"
    if is_link:
        folder.parent.mkdir(parents=True)
        folder.symlink_to(scratch)  # a scratch that was cleared
    for run, notes in zip(runs, "abc", strict=False):  # of which the last attempt fails
        with pytest.raises(ValueError, match="broken") if notes == "c" else contextlib.nullcontext():
            raise_in(run, ValueError("broken") if notes == "c" else None, "new" if notes == "a" else "replace")
        with (folder / "notes.txt").open("a") as file:
            file.write(notes)
        (folder / "checkpoints" / "other-checkpoint-5").mkdir(parents=True)
        (folder / "final").mkdir()
    for decision in ("replace", "done"):
        raise_in(runs[3], None, decision)
        assert sorted(file.read_text() for file in folder.glob("*notes.txt")) == ["ab", "c"]
        assert (folder / "other-checkpoint-5").is_dir()
        assert not backup_path(folder).exists()
        assert not (folder / "final").exists()
    assert folder.is_symlink() == is_link
    assert (scratch / "manifest.json").is_file() == is_link


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
        assert locks.lock_owner(folder) == f"process {holder.pid} on {socket.gethostname()}"
        message = f"{folder} is in use by process {holder.pid} on {socket.gethostname()}: wait for it or end it"
        with pytest.raises(PipelineError, match=message), locks.run_lock(folder):
            pass
        lay(folder, "running", {"beta": 0.1})
        assert run_folder.run_state(folder) == "running"
    finally:
        holder.kill()
        holder.wait()
    assert locks.lock_owner(folder) is None
    assert run_folder.run_state(folder) == "interrupted"


def test_a_stale_running_is_resumed_by_the_process_that_takes_the_lock(small, tmp_path):
    run = small(f"root={tmp_path}")
    lay(run.sft_folder, "running", run_folder.identity(run, "sft"), host="node-that-burnt-down", pid=os.getppid())
    with open_run(run, "sft") as record:
        assert record.decision == "resume"
    assert run_folder.run_state(run.sft_folder) == "done"


def test_metrics_behind_the_checkpoint_are_cut_before_a_run_goes_on(tmp_path):
    write_json(tmp_path / "checkpoints" / "checkpoint-8" / "trainer_state.json", {})
    (tmp_path / "checkpoints" / "checkpoint-10").mkdir()  # torn before its state was written
    rows = [{"step": 7, "loss": 1}, {"step": 8, "loss": 1}, {"step": 8, "train_runtime": 1}, {"step": 9, "loss": 1}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 9, "lo')
    checkpoints.rollback_to_checkpoint(tmp_path)
    assert [place.name for place in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-8"]
    assert record.read_metrics(tmp_path) == rows[:2]


def test_a_run_killed_before_its_first_status_or_manifest_is_whole_goes_on(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "manifest.json.7.partial").write_text('{"identi')
    assert run_folder.decide(folder, {"beta": 0.1}, overwrite=False) == "new"
    write_json(folder / "manifest.json", {"identity": {"beta": 0.1}})
    assert run_folder.decide(folder, {"beta": 0.1}, overwrite=False) == "resume"


def test_the_manifest_is_written_before_the_status(small, tmp_path, monkeypatch):
    written, write = [], record.write_json
    monkeypatch.setattr(record, "write_json", lambda path, content: written.append(path.name) or write(path, content))
    with open_run(small(f"root={tmp_path}"), "sft"):
        assert written[:2] == ["manifest.json", "status.json"]


def test_another_number_of_processes_is_logged_and_other_sharding_refused(small, tmp_path, caplog):
    run = small(f"root={tmp_path}")
    earlier = {"seconds": 100.0, "world_size": 4, "sharded": None, "identity": run_folder.identity(run, "sft")}
    write_json(run.sft_folder / "manifest.json", earlier)
    with caplog.at_level("INFO", logger="dpo_pipeline"), open_run(run, "sft") as found:
        assert "resuming on 1 process(es) a run that began on 4: not bit for bit" in caplog.text
        found.save_manifest(sharded=None)
        with pytest.raises(PipelineError, match="sharded=None .*sharded=deepspeed on 2 processes.*launch file"):
            found.save_manifest(sharded="deepspeed on 2 processes")
    manifest = read_json(run.sft_folder / "manifest.json")
    assert manifest["world_size"] == 1
    assert 100 <= manifest["seconds"] < 200


def test_what_a_kill_left_aside_never_costs_a_finished_run(small, tmp_path):
    run = small(f"root={tmp_path}", "overwrite=true")
    folder = run.sft_folder
    # 0.3 replaced 0.1 and was done, and a kill came before 0.1 was deleted.
    for place, beta in ((backup_path(folder), 0.1), (folder, 0.3)):
        lay(place, "done", {"beta": beta})
    for _ in range(2):  # the second attempt replaces the first, which failed
        with pytest.raises(ValueError, match="broken"):
            raise_in(run, ValueError("broken"), "replace")
        assert read_json(backup_path(folder) / "manifest.json")["identity"] == {"beta": 0.3}
        write_json(folder / "manifest.json", {"identity": {"beta": 0.5}})
