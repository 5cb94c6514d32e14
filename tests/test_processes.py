"""Two processes give what one gives, write and print once, and stop together; and a launcher starts them."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import (
    _validate_launch_command,
    launch_command_parser,
    prepare_simple_launcher_cmd_env,
)
from accelerate.utils import DistributedType
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_pipeline import checkpoints, hardware, run_folder
from dpo_pipeline.cli import main
from dpo_pipeline.distributed import map_over_ranks, on_main_process
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.record import read_json, read_metrics
from dpo_pipeline.sft import run_sft
from dpo_pipeline.training import reference
from tests.commands import ROOT, launch, run, run_two_ranks
from tests.helpers import SMALL, train
from tests.ranks import FSDP2, LAUNCH, STAGES, two_ranks


@pytest.fixture(scope="module")
def typed(small):
    """The command line of the small task, in the folder that the other tests use."""
    return [*SMALL, f"root={small().root}", "name=small"]


@pytest.fixture(scope="module")
def dpo_of_one(small, sft):
    """The folder of a DPO of one process, 16 rows at once, and its reference log-probs."""
    tables, add_logps = [], reference.add_reference_logps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reference,
            "add_reference_logps",
            lambda dpo, *args: (add_logps(dpo, *args), tables.append(dpo.train_dataset)),
        )
        folder = train(small("lora=none", "variant=one-process"), "dpo")
    return folder, [tables[0][f"ref_{side}_logps"][:] for side in ("chosen", "rejected")]


def losses(folder: Path) -> list[float]:
    rows = [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]
    assert [step for step, _ in rows] == list(range(1, len(rows) + 1))
    return [loss for _, loss in rows]


def weights_apart(*folders: Path) -> float:
    """The largest difference between two policies' weights."""
    (file,) = {file.name for file in (folders[0] / "final").glob("*.safetensors")}
    first, second = (load_file(folder / "final" / file) for folder in folders)
    assert set(first) <= set(second)  # of FSDP tied weights are saved twice
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def check_equal(folder: Path, other: Path) -> None:
    """The same losses and weights; but for the last step, whose batch is not full: ranks fill it up, or split it."""
    assert run_folder.run_state(folder) == run_folder.run_state(other) == "done"
    expected, actual = losses(folder), losses(other)
    assert len(expected) == len(actual) == 16
    assert actual[:-1] == pytest.approx(expected[:-1], abs=5e-6)
    assert actual[-1] == pytest.approx(expected[-1], abs=0.1)
    assert weights_apart(folder, other) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_four_rows_one_by_one_are_four_rows_at_once(stage, small, sft):
    folders = []
    for micro in (1, 4):
        batch = ("batch.global_size=4", f"batch.micro_size={micro}", f"++{stage}.max_steps=6")
        key = "sft_variant" if stage == "sft" else "variant"
        folders.append(train(small("lora=none", *batch, f"{key}=micro-{micro}"), stage))
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), abs=1e-5)
    assert weights_apart(*folders) < 1e-5


@pytest.mark.slow
def test_two_ranks_of_sft_are_one_and_print_once(typed, sft):
    """Started by the launcher that `make sft GPUS=2` calls."""
    file = "launch/accelerate/ddp.yaml"
    call = ("accelerate.commands.launch", "--config_file", file, "--num_processes", "2", "-m", "dpo_pipeline.sft")
    done = launch(*call, *typed, "batch.micro_size=4", "sft_variant=two")
    assert done.returncode == 0
    check_equal(sft["none"], sft["none"].with_name("two"))
    lines = Counter(line for line in done.stdout.splitlines() if line.strip())
    assert set(lines.values()) == {1}
    assert "fp32 on cpu: batch of 16 rows = 4 at once x 2 process(es) x 2 accumulated" in lines


@pytest.mark.slow
def test_two_ranks_of_dpo_are_one_and_rank_0_alone_prepares_writes_and_prints(typed, dpo_of_one, tmp_path):
    folder, logps = dpo_of_one
    shutil.rmtree(folder.parents[2] / ".cache")  # of what one process has left there
    done, [facts] = two_ranks(tmp_path, ("dpo", *typed, "variant=two-ranks"))
    assert done.returncode == 0
    other = folder.with_name("two-ranks")
    check_equal(folder, other)
    logged = [[line for line in read_metrics(each) if "eval_rewards/margins" in line][:-1] for each in (folder, other)]
    for name in ("margins", "accuracies"):  # the last batch of validation pairs is not full: ranks fill it up
        means = [[line[f"eval_rewards/{name}"] for line in lines] for lines in logged]
        assert len(means[0]) > 5
        assert means[0] == pytest.approx(means[1], abs=1e-5)
    for rank in facts:
        for side, expected in zip(rank["reference"], logps, strict=True):
            assert side == pytest.approx(expected, abs=1e-4)
        assert rank["timeout"] == 24 * 60 * 60  # none gives up while rank 0 prepares
    assert facts[0]["run"] == facts[1]["run"]
    assert facts[0]["run"]["variant"] == "two-ranks"
    assert [rank["tokenized"] for rank in facts] == [3, 0]  # train, validation, test
    assert read_json(other / "manifest.json")["world_size"] == 2
    entries = [entry for entry in (folder.parents[2] / ".cache" / "data").iterdir() if entry.is_dir()]
    tables = [load_from_disk(entry) for entry in entries]
    assert sum("chosen_ids" in table.column_names for table in tables) == 3
    assert not [entry for entry in entries if entry.suffix == ".partial"]

    files = (file for file in folder.parents[2].rglob("*") if file.is_file())
    assert {file.name for file in files if file.stat().st_mode & 0o002} == {"rng_state_1.pth"}  # rank 1's
    for text in ("fp32 on cpu", "DPO of", "preflight: reference", "All against the base", "Report:", "DPO done"):
        assert done.stdout.count(text) == 1
    assert "measuring dpo/two-ranks" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "sent"), [("sft", "rank SIGUSR1"), ("dpo", "launcher SIGTERM")])
def test_a_signal_stops_both_ranks_at_one_step_and_the_command_goes_on(stage, sent, typed, small, sft, tmp_path):
    whole = sft["r8"] if stage == "sft" else train(small("lora=r8", "variant=one-r8"), "dpo")
    folder = whole.with_name("stopped")
    command = (stage, *typed, "lora=r8", f"{'sft_variant' if stage == 'sft' else 'variant'}=stopped")
    done, [facts] = two_ranks(tmp_path, command, SIGNAL=sent)
    assert done.returncode != 0
    assert facts[0]["step"] == facts[1]["step"] < 16
    assert read_json(folder / "status.json")["state"] == "interrupted"
    assert checkpoints.newest_checkpoint(folder).name == f"checkpoint-{facts[0]['step']}"
    assert done.stdout.count("interrupted: type the same command to go on from") == 1
    done, _ = two_ranks(tmp_path, command, COMPARES="no")
    assert done.returncode == 0
    check_equal(whole, folder)


SETTINGS = [
    *(("sft", f"lora={lora}") for lora in ("none", "r8")),
    *(("dpo", f"lora=none reference={mode}") for mode in ("cached", "frozen")),
    *(("dpo", f"lora=r8 reference={mode}") for mode in ("cached", "adapter")),
    ("dpo", "lora=r8 sft_variant=full reference=adapter"),
]


def short_run(stage: str, setting: str, name: str) -> tuple[str, ...]:
    """The overrides of two steps of a setting, in a variant of their own."""
    key = "sft_variant" if stage == "sft" else "variant"
    return (*setting.split(), f"++{stage}.max_steps=2", f"{key}={name}-{re.sub(r'[^a-z0-9]', '-', setting)}")


@pytest.fixture(scope="module")
def short_runs(small, sft):
    """The folders of two steps of each setting in one process."""
    return [train(small(*short_run(stage, setting, "one")), stage) for stage, setting in SETTINGS]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_have_the_gradients_and_losses_of_one(kind, typed, short_runs, tmp_path):
    """In whole copies (ddp), and in halves (fsdp2)."""
    commands = [(stage, *typed, *short_run(stage, setting, kind)) for stage, setting in SETTINGS]
    done, facts = two_ranks(tmp_path, *commands, COMPARES="no", **(FSDP2 if kind == "fsdp2" else {}))
    assert done.returncode == 0
    for folder, ranks in zip(short_runs, facts, strict=True):
        other = folder.with_name(folder.name.replace("one", kind, 1))
        assert read_json(other / "manifest.json")["sharded"] == ("fsdp" if kind == "fsdp2" else None)
        assert [set(rank["parts"]) for rank in ranks] == [{0.5} if kind == "fsdp2" else set()] * 2
        assert losses(other) == pytest.approx(losses(folder), abs=5e-6), other
        norms = [[row["grad_norm"] for row in read_metrics(each) if "loss" in row] for each in (folder, other)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-4), other
        assert weights_apart(folder, other) < 1e-4, other
        AutoModelForCausalLM.from_pretrained(other / "final")  # complete, as anybody loads it


@pytest.mark.slow
def test_a_sharded_run_that_was_stopped_goes_on_and_in_whole_copies_it_is_refused(typed, sft, tmp_path):
    command = ("sft", *typed, "sft_variant=stopped-fsdp")
    done, [facts] = two_ranks(tmp_path, command, SIGNAL="both SIGINT", **FSDP2)
    assert done.returncode != 0
    folder = sft["none"].with_name("stopped-fsdp")
    assert checkpoints.newest_checkpoint(folder).name == f"checkpoint-{facts[1]['step']}"
    done, _ = two_ranks(tmp_path, command)
    assert f"{folder} began with sharded=fsdp and cannot resume" in done.stderr
    done, _ = two_ranks(tmp_path, command, **FSDP2)
    assert done.returncode == 0
    check_equal(sft["none"], folder)


def test_fsdp_without_gpus_is_refused_and_quantized_in_parts_too(small, sft, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(PipelineError, match="FSDP needs GPUs: .*ddp.yaml"):
        run_sft(small("sft_variant=no-fsdp"))
    with pytest.raises(PipelineError, match="quantized weights cannot be sharded: start it with .*ddp.yaml"):
        run_sft(small("lora=r8", "quantization=nf4", "sft_variant=no-nf4"))


@pytest.mark.slow
def test_accelerate_starts_the_command_on_one_device(typed, small):
    """With the variables that `accelerate launch` sets."""
    options = ["--config_file", str(LAUNCH / "single_gpu.yaml"), "-m", "dpo_pipeline.sft"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args([*options, "sft_variant=accelerate"]))
    call, variables = prepare_simple_launcher_cmd_env(args)
    done = run(*call[2:], *typed, "++sft.max_steps=2", **variables)
    assert done.returncode == 0
    folder = small("sft_variant=accelerate").sft_folder
    manifest = read_json(folder / "manifest.json")
    assert (run_folder.run_state(folder), manifest["world_size"], manifest["precision"]) == ("done", 1, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("++dpo.lerning_rate=1", "dpo.lerning_rate is no field of trl.DPOConfig"),  # each rank finds it
        ("root={folder} policy=base", "{folder}/small/dpo cannot be made"),  # rank 0 alone
    ],
)
def test_an_error_of_a_rank_is_told_once_and_ends_both(typed, sentence, small, sft, tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "dpo").write_text("a file where the folder of all DPOs has to be")
    overrides = [*SMALL, f"root={small().root}", "name=small", *typed.format(folder=tmp_path).split()]
    done = run_two_ranks("dpo_pipeline.dpo", *overrides, "variant=wrong")
    assert done.returncode != 0
    assert done.stderr.count(f"error: {sentence.format(folder=tmp_path)}") == 1
    assert "/dpo_pipeline/" not in done.stderr


class Unpicklable(Exception):
    def __init__(self, text, second):
        super().__init__(text)


def share_results(folder: Path) -> None:
    """What a rank gets of results and errors of rank 0, written to a file."""

    def fail(error):
        raise error

    lines = []
    for error in (KeyError("a key"), Unpicklable("of two", 2), KeyboardInterrupt()):
        try:
            on_main_process(lambda error=error: fail(error))
        except BaseException as caught:
            lines.append(f"{type(caught).__name__} {caught}")
    lines.append(str(on_main_process(lambda: os.environ["RANK"])))
    lines.append(str(map_over_ranks(lambda rows: [10 * row for row in rows], 5)))
    (folder / os.environ["RANK"]).write_text("\n".join(lines))


@pytest.mark.slow
def test_results_and_errors_of_rank_0_reach_every_rank(tmp_path):
    assert run_two_ranks("tests.test_processes", str(tmp_path)).returncode == 0
    lines = [(tmp_path / rank).read_text().splitlines() for rank in ("0", "1")]
    assert lines[0] == ["KeyError 'a key'", "Unpicklable of two", "KeyboardInterrupt ", "0", "[0, 10, 20, 30, 40]"]
    assert lines[1] == [lines[0][0], "PipelineError Unpicklable: of two", *lines[0][2:]]


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("single_gpu", DistributedType.NO),
        ("ddp", DistributedType.MULTI_GPU),
        ("fsdp2", DistributedType.FSDP),
        ("zero2", DistributedType.DEEPSPEED),
        ("zero3", DistributedType.DEEPSPEED),
    ],
)
def test_accelerate_reads_each_launch_file_and_finds_no_precision_in_it(file, kind):
    config = load_config_from_file(str(LAUNCH / f"{file}.yaml"))
    assert config.distributed_type == kind
    assert config.mixed_precision is None
    assert not config.use_cpu


MAKE = {  # what is typed behind make, and what is called
    "sft GPUS=4": "accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 4 -m dpo_pipeline.sft b",
    "dpo GPUS=1": "python -m dpo_pipeline.dpo beta=0.3",
    "dpo GPUS=": "python -m dpo_pipeline.dpo beta=0.3",
    "check": "python -m dpo_pipeline.sft beta=0.3 check=true && .*/bin/python -m dpo_pipeline.dpo beta=0.3 check=true",
}


@pytest.mark.parametrize("typed", MAKE)
def test_make_starts_as_many_processes_as_gpus_are_asked_for(typed):
    call = ["make", "-n", *typed.split(), "ARGS=beta=0.3", "PYTHON=python3"]
    plan = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(f"/bin/{MAKE[typed]}", plan)


def test_make_says_what_deepspeed_needs(tmp_path):
    if find_spec("deepspeed"):
        pytest.skip("deepspeed is here")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / ".installed").touch()
    call = ["make", "dpo", "LAUNCH=zero2", "GPUS=2", f"VENV={tmp_path}"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "error: LAUNCH=zero2 needs DeepSpeed, which is not installed: " in done.stdout
    assert "Traceback" not in done.stderr


def test_a_launch_file_that_says_a_precision_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # what Accelerate makes of it
    monkeypatch.setattr(sys, "argv", ["dpo"])
    with pytest.raises(SystemExit, match="mixed_precision: fp16: take that out"):
        main(run_dpo)


KERNELS = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")


@pytest.fixture
def gpu(monkeypatch):
    """Makes this machine one with a card: `gpu("T4", (7, 5), bf16=False)`."""

    def become(name, capability, bf16=True, count=1, kernels=KERNELS):
        for attribute, value in (
            *(("is_available", True), ("device_count", count), ("get_device_name", name)),
            *(("get_device_capability", capability), ("get_arch_list", list(kernels)), ("is_bf16_supported", bf16)),
        ):
            monkeypatch.setattr(torch.cuda, attribute, lambda *args, value=value, **options: value)

    return become


@pytest.mark.parametrize(
    ("name", "capability", "kernels", "is_refused"),
    [
        *(("T4", (7, 5), KERNELS, False), ("RTX 5090", (12, 0), KERNELS, False), ("V100", (7, 0), KERNELS, True)),
        *(("L4", (8, 9), KERNELS, False), ("V100", (7, 0), ["sm_75", "compute_60"], False)),
        ("MI300X", (9, 4), ["gfx942"], False),  # AMD's names are no capabilities
    ],
)
def test_a_card_without_kernels_is_refused_with_the_build_that_has_them(name, capability, kernels, is_refused, gpu):
    gpu(name, capability, kernels=kernels)
    message = r"V100 has compute capability 7\.0.*sm_75, .*torch==[\d.]+ .*/whl/cu126"
    with pytest.raises(PipelineError, match=message) if is_refused else contextlib.nullcontext():
        hardware.check_device("dpo_pipeline.sft")


@pytest.mark.parametrize(("stage", "command"), STAGES.items())
def test_several_gpus_in_one_process_are_told_before_anything_is_loaded(stage, command, gpu, small, sft, monkeypatch):
    gpu("A100", (8, 0), count=4)
    remedy = f"accelerate launch .*ddp.yaml --num_processes 4 -m dpo_pipeline.{stage}.*GPUS=4.*CUDA_VISIBLE_DEVICES=0"
    with pytest.raises(PipelineError, match=f"4 GPUs are visible .*{remedy}"):
        command(small("variant=devices", "sft_variant=devices" if stage == "sft" else "sft_variant=full"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    hardware.check_device(f"dpo_pipeline.{stage}")


PRECISIONS = {
    "T4": {"auto": "fp16", "fp16": "fp16", "bf16": None, "fp32": "fp32"},
    "A100": {"auto": "bf16", "fp16": "fp16", "bf16": "bf16", "fp32": "fp32"},
    "cpu": {"auto": "fp32", "fp16": None, "bf16": "bf16", "fp32": "fp32"},
    "mps": {"auto": "fp32", "fp16": "fp16", "bf16": None, "fp32": "fp32"},
}


@pytest.mark.parametrize("card", PRECISIONS)
def test_each_device_computes_in_what_it_can(card, gpu, monkeypatch):
    if card in ("T4", "A100"):
        gpu(card, (7, 5) if card == "T4" else (8, 0), bf16=card == "A100")
    if card == "mps":
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for asked, given in PRECISIONS[card].items():
        if given is None:
            with pytest.raises(PipelineError, match=rf"^precision={asked}.*type precision="):
                hardware.mixed_precision(asked)
        else:
            assert hardware.mixed_precision(asked) == given


if __name__ == "__main__":
    share_results(Path(sys.argv[1]))
