"""Every road from SFT to DPO starts at the reference, and ends in a folder that anybody's from_pretrained loads."""

import json
import math
import subprocess
import sys

import pytest
import torch

from dpo_pipeline import runs
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.policies import load_policy
from dpo_pipeline.sft import run_sft
from dpo_pipeline.training.handoff import loading

ROADS = {
    "full -> full": ("lora=none", ("cached", "frozen")),
    "LoRA -> LoRA": ("lora=r8", ("cached", "adapter", "frozen")),
    "base -> full": ("lora=none policy=base", ("cached", "frozen")),
    "base -> LoRA": ("lora=r8 policy=base", ("cached", "adapter", "frozen")),
}
STEPS = ("++dpo.max_steps=4", "dpo.learning_rate=1e-3")


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("road", ROADS)
def test_a_road_starts_at_its_reference_and_all_reference_modes_agree(road, small, sft):
    typed, modes = ROADS[road]
    losses = {}
    for mode in modes:
        run = small(*typed.split(), f"reference={mode}", *STEPS)
        run_dpo(run)
        log = [row for row in metrics(run.dpo_folder) if "loss" in row]
        assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "margins_nats"):
            assert log[0][key] == pytest.approx(0, abs=1e-5)
        losses[mode] = [row["loss"] for row in log]
        assert abs(losses[mode][-1] - math.log(2)) > 1e-4  # the policy has moved
        manifest = runs.read_json(run.dpo_folder / "manifest.json")
        starting = run.model.path if run.policy == "base" else run.sft_folder / "final"
        assert manifest["starting_policy"] == str(starting)
        assert manifest["reference"] == f"{starting} ({mode})"
        whole = manifest["trainable_parameters"] == manifest["parameters"]
        assert whole == (run.lora is None)
    for mode in modes[1:]:
        assert losses[mode] == pytest.approx(losses[modes[0]], abs=1e-5)


@pytest.mark.parametrize("lora", ["none", "r8"])
def test_the_sft_policy_is_not_the_base(lora, small, sft):
    run = small(f"lora={lora}")
    ids = torch.tensor([[1, 5, 9, 20]])
    base = load_policy(run.model.path, loading(run))
    policy = load_policy(sft[lora] / "final", loading(run))
    assert (base(ids).logits - policy(ids).logits).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("typed", ["lora=none", "lora=r8", "lora=r8 policy=base"])
def test_final_loads_with_plain_libraries_from_another_directory(typed, small, sft, tmp_path):
    run = small(*typed.split(), *STEPS, "variant=" + typed.replace("=", "").replace(" ", "-"))
    run_dpo(run)
    final = (run.dpo_folder / "final").resolve()
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "folder, adapter = sys.argv[1], sys.argv[2] == 'True'\n"
        "auto = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM\n"
        "model = auto.from_pretrained(folder).eval()\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "ids = tokenizer('film : the wild river . review :', return_tensors='pt').input_ids\n"
        "torch.save(model(ids).logits, sys.argv[3])"
    )
    out = tmp_path / "logits.pt"
    call = [sys.executable, "-c", code, str(final), str(run.lora is not None), str(out)]
    subprocess.run(call, cwd=tmp_path, check=True, capture_output=True)
    ours = load_policy(final, loading(run))
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(final)("film : the wild river . review :", return_tensors="pt").input_ids
    assert torch.equal(torch.load(out), ours(ids).logits)
    assert runs.read_json(run.dpo_folder / "manifest.json")["final"]["reload_difference_nats"] < 1e-5
    assert not (final / "ref").exists()
    expected = (
        {"adapter_config.json", "adapter_model.safetensors"} if run.lora else {"config.json", "model.safetensors"}
    )
    found = {file.name for file in final.iterdir()}
    assert {*expected, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} == found


@pytest.mark.parametrize("lora", ["none", "r8"])
def test_a_run_in_16_bits_loads_back_as_it_was_trained(lora, small):
    run = small(f"lora={lora}", "precision=bf16", "sft_variant=bf16-" + lora, "++sft.max_steps=4")
    run_sft(run)
    manifest = runs.read_json(run.sft_folder / "manifest.json")
    assert manifest["precision"] == "bf16"
    assert manifest["final"]["reload_difference_nats"] < 1e-5


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("++dpo.sync_ref_model=true lora=none", "TRL refuses this combination: .*sync_ref_model"),
        ("evaluation.max_new_tokens=255 lora=none", "leaves no room for a prompt in the model's context of 256"),
    ],
)
def test_a_road_that_is_not_there_is_refused(typed, sentence, small, sft):
    with pytest.raises(PipelineError, match=sentence):
        run_dpo(small(*typed.split(), "variant=refused"))


def test_a_policy_that_does_not_load_back_as_trained_is_refused(small, sft, monkeypatch, tmp_path):
    from dpo_pipeline.training import trainer

    run = small("lora=r8", "variant=broken", *STEPS)
    bare = load_policy(run.model.path, loading(run))
    monkeypatch.setattr(trainer, "load_policy", lambda *args, **options: bare)  # as if the adapter had not been loaded
    with pytest.raises(PipelineError, match="does not load back as it was trained"):
        run_dpo(run)
    assert runs.state(run.dpo_folder) == "failed"


def test_an_sft_of_another_base_is_refused_and_of_other_settings_told(small, sft, capsys):
    with pytest.raises(PipelineError, match="trained from another base model"):
        run_dpo(small("model.builder.layers=1", "variant=other"))
    with pytest.raises(PipelineError, match="base/model was made with other settings.*name=NAME"):
        run_sft(small("model.builder.layers=1", "sft_variant=other"))
    run_dpo(small("sft.learning_rate=7e-4", "variant=told", *STEPS))
    assert "was made with other settings: sft.learning_rate was" in capsys.readouterr().out
