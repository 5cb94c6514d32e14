"""Two processes give what one gives, write and print once, and stop together; and a launcher starts them."""

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
from accelerate.utils import DistributedType
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_pipeline import checkpoints, hardware, run_folder
from dpo_pipeline.cli import main
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.record import read_json, read_metrics
from dpo_pipeline.sft import run_sft
from dpo_pipeline.training import reference
from tests.helpers import SMALL
from tests.ranks import FSDP2, LAUNCH, ROOT, STAGES, TWO, commands_in_two_ranks, launched, two_ranks


@pytest.fixture(scope="module")
def typed(small):
    """The command line of the small task, in the folder that the other tests use."""
    return [*SMALL, f"root={small().root}", "name=small"]


@pytest.fixture(scope="module")
def one(small, sft):
    """What one process makes of each stage, 16 rows at once: its folder, and its reference log-probs."""
    made, cache = {}, reference.add_reference_logps

    def once(stage, lora):
        if (stage, lora) not in made:
            seen = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    reference,
                    "add_reference_logps",
                    lambda dpo, *args: (cache(dpo, *args), seen.append(dpo.train_dataset)),
                )
                if stage == "dpo":
                    run_dpo(run := small(f"lora={lora}", f"variant=one-{lora}"))
            folder = sft[lora] if stage == "sft" else run.dpo_folder
            logps = [seen[0][f"ref_{side}_logps"][:] for side in ("chosen", "rejected")] if seen else None
            made[stage, lora] = folder, logps
        return made[stage, lora]

    return once


def losses(folder: Path) -> list[float]:
    found = [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    return [loss for _, loss in found]


def weights_apart(*folders: Path) -> float:
    """The largest difference between two policies' weights."""
    (file,) = {file.name for file in (folders[0] / "final").glob("*.safetensors")}
    first, second = (load_file(folder / "final" / file) for folder in folders)
    assert set(first) <= set(second)  # of FSDP tied weights are saved twice
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def check_equal(folder: Path, other: Path) -> None:
    """The same losses and weights; but for the last step, whose batch is not full: ranks fill it up, or split it."""
    assert run_folder.run_state(folder) == run_folder.run_state(other) == "done"
    mine, theirs = losses(folder), losses(other)
    assert len(mine) == len(theirs) == 16
    assert mine[:-1] == pytest.approx(theirs[:-1], abs=5e-6)
    assert mine[-1] == pytest.approx(theirs[-1], abs=0.1)
    assert weights_apart(folder, other) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_four_rows_one_by_one_are_four_rows_at_once(stage, small, sft):
    folders = []
    for micro in (1, 4):
        batch = ("batch.global_size=4", f"batch.micro_size={micro}")
        variants = (f"sft_variant=micro-{micro}",) if stage == "sft" else (f"variant=micro-{micro}",)
        run = small("lora=none", *batch, f"++{stage}.max_steps=6", *variants)
        STAGES[stage](run)
        folders.append(run.sft_folder if stage == "sft" else run.dpo_folder)
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), abs=1e-5)
    assert weights_apart(*folders) < 1e-5


@pytest.mark.slow
def test_two_ranks_of_sft_are_one_and_print_once(typed, one):
    file = "launch/accelerate/ddp.yaml"
    call = ("accelerate.commands.launch", "--config_file", file, "--num_processes", "2", "-m", "dpo_pipeline.sft")
    done = launched(*call, *typed, "batch.micro_size=4", "sft_variant=two")
    assert done.returncode == 0
    folder, _ = one("sft", "none")
    check_equal(folder.parent / "two", folder)
    printed = Counter(line for line in done.stdout.splitlines() if line.strip())
    assert set(printed.values()) == {1}
    assert "fp32 on cpu: batch of 16 rows = 4 at once x 2 process(es) x 2 accumulated" in printed


@pytest.fixture(scope="module")
def two_of_dpo(typed, one, tmp_path_factory):
    """A DPO in two ranks: its process, what each rank saw, its folder, and that of one process with its reference."""
    folder, logps = one("dpo", "none")
    shutil.rmtree(folder.parents[2] / ".cache")  # of what one process has left there
    done, seen = two_ranks(tmp_path_factory.mktemp("seen"), "dpo", *typed, "variant=two")
    assert done.returncode == 0
    return done, seen, folder.parent / "two", folder, logps


@pytest.mark.slow
def test_two_ranks_of_dpo_are_one(two_of_dpo):
    _, seen, folder, other, logps = two_of_dpo
    check_equal(folder, other)
    logged = [[line for line in read_metrics(each) if "eval_rewards/margins" in line][:-1] for each in (folder, other)]
    for name in ("margins", "accuracies"):  # the last batch of validation pairs is not full: ranks fill it up
        means = [[line[f"eval_rewards/{name}"] for line in lines] for lines in logged]
        assert len(means[0]) > 5
        assert means[0] == pytest.approx(means[1], abs=1e-5)
    for rank in seen:
        for side, expected in zip(rank["reference"], logps, strict=True):
            assert side == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_two_ranks_read_one_config_and_prepare_the_data_once(two_of_dpo):
    _, seen, folder, *_ = two_of_dpo
    assert seen[0]["run"] == seen[1]["run"]
    assert seen[0]["run"]["variant"] == folder.name
    assert [rank["tokenized"] for rank in seen] == [3, 0]  # train, validation, test
    assert read_json(folder / "manifest.json")["world_size"] == 2
    entries = [entry for entry in (folder.parents[2] / ".cache" / "data").iterdir() if entry.is_dir()]
    tables = [load_from_disk(entry) for entry in entries]
    assert sum("chosen_ids" in table.column_names for table in tables) == 3
    assert not [entry for entry in entries if entry.suffix == ".partial"]


@pytest.mark.slow
def test_rank_0_alone_writes_and_prints(two_of_dpo):
    done, _, folder, *_ = two_of_dpo
    files = (file for file in folder.parents[2].rglob("*") if file.is_file())
    of_rank_1 = {file.name for file in files if file.stat().st_mode & 0o002}
    assert of_rank_1 == {"rng_state_1.pth"}  # its own random state, of each checkpoint
    for told in ("fp32 on cpu", "DPO of", "preflight: reference", "All against the base", "Results:", "DPO done"):
        assert done.stdout.count(told) == 1
    assert "measuring dpo/two" in done.stderr


@pytest.mark.slow
def test_no_rank_gives_up_while_rank_0_prepares(two_of_dpo):
    day = 24 * 60 * 60
    assert [rank["timeout"] for rank in two_of_dpo[1]] == [day, day]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "sent"), [("sft", "rank SIGUSR1"), ("dpo", "launcher SIGTERM")])
def test_a_signal_stops_both_ranks_at_one_step_and_the_command_goes_on(stage, sent, typed, one, tmp_path):
    other, _ = one(stage, "r8")
    folder = other.parent / "stopped"
    call = (stage, *typed, "lora=r8", f"{'sft_variant' if stage == 'sft' else 'variant'}=stopped")
    done, seen = two_ranks(tmp_path, *call, SIGNAL=sent)
    assert done.returncode != 0
    assert seen[0]["step"] == seen[1]["step"] < 16
    assert read_json(folder / "status.json")["state"] == "interrupted"
    assert checkpoints.newest_checkpoint(folder).name == f"checkpoint-{seen[0]['step']}"
    assert done.stdout.count("interrupted: type the same command to go on from") == 1
    done, seen = two_ranks(tmp_path, *call)
    assert done.returncode == 0
    check_equal(folder, other)


HOW = [
    *(("sft", f"lora={lora}") for lora in ("none", "r8")),
    *(("dpo", f"lora=none reference={mode}") for mode in ("cached", "frozen")),
    *(("dpo", f"lora=r8 reference={mode}") for mode in ("cached", "frozen", "adapter")),
    ("dpo", "lora=r8 sft_variant=full reference=adapter"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_have_the_gradients_and_losses_of_one(kind, typed, small, sft, tmp_path):
    short = ("evaluation.pairs=4", "evaluation.prompts=1")
    commands, folders = [], []
    for stage, how in HOW:
        key, tail = "sft_variant" if stage == "sft" else "variant", re.sub(r"\W", "-", how)
        overrides = (*how.split(), f"++{stage}.max_steps=2", *short)
        run = small(*overrides, f"{key}=short-{kind}-{tail}")
        STAGES[stage](run)
        folders.append(run.sft_folder if stage == "sft" else run.dpo_folder)
        commands.append((stage, *typed, *overrides, f"{key}={kind}-{tail}"))
    done, seen = commands_in_two_ranks(tmp_path, commands, **(FSDP2 if kind == "fsdp2" else {}))
    assert done.returncode == 0
    for folder, ranks in zip(folders, seen, strict=True):
        check_gradients(kind, folder, folder.with_name(folder.name.removeprefix("short-")), ranks)


def check_gradients(kind: str, folder: Path, other: Path, ranks: list[dict]) -> None:
    """Two ranks made what one process made, in whole copies (ddp) or in halves (fsdp2)."""
    assert read_json(other / "manifest.json")["sharded"] == ("fsdp" if kind == "fsdp2" else None)
    for rank in ranks:
        assert bool(rank["parts"]) == (kind == "fsdp2")
        assert not rank["parts"] or min(rank["parts"]) == max(rank["parts"]) == 0.5
    assert losses(other) == pytest.approx(losses(folder), abs=5e-6), other
    norms = [[row["grad_norm"] for row in read_metrics(each) if "loss" in row] for each in (folder, other)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4), other
    assert weights_apart(folder, other) < 1e-4, other
    AutoModelForCausalLM.from_pretrained(other / "final")  # complete, as anybody loads it


@pytest.mark.slow
def test_a_sharded_run_that_was_stopped_goes_on_and_in_whole_copies_it_is_refused(typed, small, sft, tmp_path):
    whole, stopped = small("sft_variant=whole-fsdp"), ("sft", *typed, "sft_variant=stopped-fsdp")
    STAGES["sft"](whole)
    done, seen = two_ranks(tmp_path, *stopped, SIGNAL="launcher SIGINT", **FSDP2)
    assert done.returncode != 0
    folder = whole.sft_folder.with_name("stopped-fsdp")
    assert checkpoints.newest_checkpoint(folder).name == f"checkpoint-{seen[1]['step']}"
    refused = launched(*TWO, "-m", "dpo_pipeline.sft", *stopped[1:], "batch.micro_size=4")
    assert f"{folder} began with sharded=fsdp and cannot resume" in refused.stderr
    done, _ = two_ranks(tmp_path, *stopped, **FSDP2)
    assert done.returncode == 0
    check_equal(whole.sft_folder, folder)


def test_fsdp_without_gpus_is_refused_and_quantized_in_parts_too(small, sft, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(PipelineError, match="FSDP needs GPUs: .*ddp.yaml"):
        run_sft(small("sft_variant=no-fsdp"))
    with pytest.raises(PipelineError, match="quantized weights cannot be sharded: start it with .*ddp.yaml"):
        run_sft(small("lora=r8", "quantization=nf4", "sft_variant=no-nf4"))


@pytest.mark.slow
def test_accelerate_starts_the_command_on_one_device(typed):
    file = "launch/accelerate/single_gpu.yaml"
    call = ("accelerate.commands.launch", "--config_file", file, "-m", "dpo_pipeline.sft")
    done = launched(*call, *typed, "sft_variant=accelerate", "++sft.max_steps=2")
    assert done.returncode == 0
    (root,) = (item.removeprefix("root=") for item in typed if item.startswith("root="))
    folder = Path(root) / "small" / "sft" / "accelerate"
    manifest = read_json(folder / "manifest.json")
    assert (run_folder.run_state(folder), manifest["world_size"], manifest["precision"]) == ("done", 1, "fp32")


@pytest.mark.slow
def test_two_ranks_tell_an_error_once(typed, sft):
    done = launched(*TWO, "-m", "dpo_pipeline.dpo", *typed, "variant=wrong", "++dpo.lerning_rate=1")
    assert done.returncode != 0
    assert done.stderr.count("error: dpo.lerning_rate is no field of trl.DPOConfig: did you mean learning_rate") == 1
    assert "/dpo_pipeline/" not in done.stderr


@pytest.mark.slow
def test_any_error_of_rank_0_ends_the_other_ranks_without_a_traceback(typed, tmp_path):
    (tmp_path / "small" / "sft").parent.mkdir()
    (tmp_path / "small" / "sft").write_text("a file where the folder of all SFTs has to be")
    call = [item for item in typed if not item.startswith("root=")]
    done = launched(*TWO, "-m", "dpo_pipeline.sft", *call, f"root={tmp_path}")
    assert done.returncode != 0
    assert done.stderr.count(f"error: {tmp_path}/small/sft cannot be made") == 1
    assert "/dpo_pipeline/" not in done.stderr


RAISES = """
import os, sys
from pathlib import Path
from dpo_pipeline.distributed import map_over_ranks, on_main_process

class Unpicklable(Exception):
    def __init__(self, text, second):
        super().__init__(text)

def fail(error):
    raise error

lines = []
for error in (KeyError("a key"), Unpicklable("of two", 2), KeyboardInterrupt()):
    try:
        on_main_process(lambda: fail(error))
    except BaseException as caught:
        lines.append(f"{type(caught).__name__} {caught}")
lines.append(str(on_main_process(lambda: os.environ["RANK"])))
lines.append(str(map_over_ranks(lambda rows: [10 * row for row in rows], 5)))
Path(sys.argv[1], os.environ["RANK"]).write_text("\\n".join(lines))
"""


@pytest.mark.slow
def test_results_and_errors_of_rank_0_reach_every_rank(tmp_path):
    (tmp_path / "raises.py").write_text(RAISES)
    assert launched(*TWO, str(tmp_path / "raises.py"), str(tmp_path)).returncode == 0
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


@pytest.mark.parametrize("target", ["sft", "dpo"])
def test_make_starts_as_many_processes_as_gpus_are_asked_for(target):
    for gpus, start_of_call in (
        ("GPUS=4", "accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 4 -m"),
        *(("GPUS=1", "python -m"), ("GPUS=", "python -m")),
    ):
        call = ["make", "-n", target, gpus, "ARGS=beta=0.3", "PYTHON=python3"]
        plan = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert f"/bin/{start_of_call} dpo_pipeline.{target} beta=0.3" in plan


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


def test_make_check_looks_at_both_stages():
    call = ["make", "-n", "check", "ARGS=beta=0.3", "PYTHON=python3"]
    plan = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"-m dpo_pipeline.sft beta=0.3 check=true && .*-m dpo_pipeline.dpo beta=0.3 check=true", plan)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_sweep_under_a_launcher_is_refused(rank, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", rank), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["dpo.py", "-m", "beta=0.1,0.3"])
    monkeypatch.setattr("dpo_pipeline.cli.time.sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as ended:
        main(run_dpo)
    told = (
        "error: a sweep would run whole in each of the 2 processes of its launcher: type `python -m dpo_pipeline.dpo "
        "-m beta=0.1,0.3` without the launcher"
    )
    assert ended.value.code == (told if rank == "0" else 1)


@pytest.fixture
def gpu(monkeypatch):
    """Makes this machine one with a card: `gpu("T4", (7, 5), bf16=False)`."""

    def become(name, capability, bf16=True, count=1, kernels=("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")):
        for attribute, value in (
            *(("is_available", True), ("device_count", count), ("get_device_name", name)),
            *(("get_device_capability", capability), ("get_arch_list", list(kernels)), ("is_bf16_supported", bf16)),
        ):
            monkeypatch.setattr(torch.cuda, attribute, lambda *args, value=value, **options: value)

    return become


@pytest.mark.parametrize(
    ("name", "capability"),
    [("T4", (7, 5)), ("A100", (8, 0)), ("L4", (8, 9)), ("H100", (9, 0)), ("B200", (10, 0)), ("RTX 5090", (12, 0))],
)
def test_a_card_that_the_build_has_kernels_for_passes(name, capability, gpu):
    gpu(name, capability)
    hardware.check_device("dpo_pipeline.sft")


def test_a_card_without_kernels_is_told_with_the_build_that_has_them(gpu):
    gpu("V100", (7, 0))
    with pytest.raises(PipelineError, match=r"V100 has compute capability 7\.0.*sm_75, .*torch==[\d.]+ .*/whl/cu126"):
        hardware.check_device("dpo_pipeline.sft")
    gpu("V100", (7, 0), kernels=["sm_75", "compute_60"])
    hardware.check_device("dpo_pipeline.sft")
    gpu("MI300X", (9, 4), kernels=["gfx942"])  # AMD's names are no capabilities
    hardware.check_device("dpo_pipeline.sft")


def test_several_gpus_in_one_process_are_told_what_to_type(gpu, monkeypatch):
    gpu("A100", (8, 0), count=4)
    with pytest.raises(PipelineError) as told:
        hardware.check_device("dpo_pipeline.dpo")
    for typed in (
        "`accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 4 -m dpo_pipeline.dpo ...`",
        *("make ... GPUS=4", "CUDA_VISIBLE_DEVICES=0"),
    ):
        assert typed in str(told.value)
    monkeypatch.setenv("WORLD_SIZE", "4")
    hardware.check_device("dpo_pipeline.dpo")


@pytest.mark.parametrize(("stage", "command"), STAGES.items())
def test_a_command_looks_at_the_device_before_it_loads_anything(stage, command, gpu, small, sft):
    gpu("A100", (8, 0), count=4)
    with pytest.raises(PipelineError, match=f"4 GPUs are visible .*-m dpo_pipeline.{stage}"):
        command(small("variant=devices", "sft_variant=devices" if stage == "sft" else "sft_variant=full"))


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
