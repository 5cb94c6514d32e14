"""Every road from SFT to DPO starts at the reference, and ends in a folder that anybody's from_pretrained loads."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from dpo_pipeline import record, run_folder
from dpo_pipeline.config import compose
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.models import load_options, load_policy
from dpo_pipeline.sft import run_sft
from dpo_pipeline.training.merge import merge
from dpo_pipeline.training.starting_policy import load_start, resolve_starting_policy
from tests.helpers import SMALL, build, train
from tests.test_models import save_base

ROADS = {
    "full -> full": ("lora=none", ("cached", "frozen")),
    "LoRA -> LoRA": ("lora=r8", ("cached", "adapter", "frozen")),
    "base -> full": ("lora=none policy=base", ("cached", "frozen")),
    "base -> LoRA": ("lora=r8 policy=base", ("cached", "adapter", "frozen")),
    "full -> LoRA": ("lora=r8 sft_variant=full", ("cached", "adapter", "frozen")),
    "LoRA -> other LoRA": ("lora=r16 sft_variant=r8", ("cached", "adapter", "frozen")),
    "LoRA -> full": ("lora=none sft_variant=r8", ("cached", "frozen")),
    "QLoRA -> QLoRA": ("lora=r8 quantization=nf4", ("cached", "adapter", "frozen")),
    "QLoRA -> full": ("lora=none sft_variant=r8-nf4", ("cached",)),
    "8-bit LoRA -> itself": ("lora=r8 quantization=int8", ("adapter",)),
    "full -> QLoRA": ("lora=r8 quantization=nf4 sft_variant=full", ("frozen",)),
    "anybody's model -> full": ("lora=none policy={none}/final", ("cached",)),
    "anybody's model -> LoRA": ("lora=r8 policy={none}/final", ("adapter",)),
    "anybody's adapter -> itself": ("lora=r8 policy={r8}/final", ("cached", "frozen")),
    "anybody's adapter -> other LoRA": ("lora=r16 policy={r8}/final", ("adapter",)),
    "anybody's adapter -> full": ("lora=none policy={r8}/final", ("cached",)),
}
MERGED = {
    "LoRA -> other LoRA",
    "LoRA -> full",
    "QLoRA -> full",
    "anybody's adapter -> other LoRA",
    "anybody's adapter -> full",
}
STEPS = ("++dpo.max_steps=4", "dpo.learning_rate=1e-3")


SFT_FIRST = {  # what a road starts from, beside the fixture's two
    "QLoRA -> QLoRA": "lora=r8 quantization=nf4",
    "QLoRA -> full": "lora=r8 quantization=nf4",
    "8-bit LoRA -> itself": "lora=r8 quantization=int8",
}


def named_base(run) -> str | None:
    """The base that the adapter of a finished DPO names; None where it is a whole model."""
    config = record.read_json(run.dpo_folder / "final" / "adapter_config.json")
    return config and config["base_model_name_or_path"]


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def road_run(road: str, mode: str, small, sft):
    variant = f"variant={re.sub(r'[^A-Za-z0-9]', '_', road)}-{mode}"
    return small(*ROADS[road][0].format(**sft).split(), f"reference={mode}", variant, *STEPS)


@pytest.mark.parametrize("road", ROADS)
def test_a_road_starts_at_its_reference_and_all_reference_modes_agree(road, small, sft):
    modes = ROADS[road][1]
    if road in SFT_FIRST:
        run_sft(small(*SFT_FIRST[road].split(), "++sft.max_steps=4"))
    losses = {}
    for mode in modes:
        run = road_run(road, mode, small, sft)
        train(run, "dpo")
        log = [row for row in metrics(run.dpo_folder) if "loss" in row]
        assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "margins_nats"):
            assert log[0][key] == pytest.approx(0, abs=1e-5)
        losses[mode] = [row["loss"] for row in log]
        assert abs(losses[mode][-1] - math.log(2)) > 1e-4  # the policy has moved
        manifest = record.read_json(run.dpo_folder / "manifest.json")
        starting = {"base": run.model.path, "sft": run.sft_folder / "final"}.get(run.policy, run.policy)
        assert manifest["starting_policy"] == str(starting)
        assert manifest["reference"] == f"{starting} ({mode})"
        whole = manifest["trainable_parameters"] == manifest["parameters"]
        assert whole == (run.lora is None)
        assert manifest["final"]["reload_difference_nats"] < 1e-5
        assert not any((run.dpo_folder / "final").glob("ref*"))
        merged = (run.sft_folder if run.policy == "sft" else run.dpo_folder) / "merged"
        assert (f"{merged}" == f"{named_base(run)}") == (road in MERGED and run.lora is not None)
        assert (merged / "model.safetensors").is_file() >= (road in MERGED)
    for mode in modes[1:]:
        assert losses[mode] == pytest.approx(losses[modes[0]], abs=1e-5)


@pytest.mark.parametrize("lora", ["none", "r8"])
def test_the_sft_policy_is_not_the_base(lora, small, sft):
    run = small(f"lora={lora}")
    ids = torch.tensor([[1, 5, 9, 20]])
    base = load_policy(run.model.path, load_options(run))
    policy = load_policy(sft[lora] / "final", load_options(run))
    assert (base(ids).logits - policy(ids).logits).abs().max() > 0.01


LOAD = """
import json, sys, torch
from transformers import BitsAndBytesConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import AutoPeftModelForCausalLM
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
logits = []
for folder, is_adapter, is_quantized in json.loads(sys.argv[1]):
    auto = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    quantized = {"quantization_config": nf4, "device_map": {"": "cpu"}} if is_quantized else {}
    model = auto.from_pretrained(folder, **quantized).train()  # no dropout; bitsandbytes packs in eval
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logits.append(model(tokenizer("film : the wild river . review :", return_tensors="pt").input_ids).logits)
torch.save(logits, "logits.pt")
"""


@pytest.mark.slow
def test_final_loads_with_plain_libraries_from_another_directory(small, sft, tmp_path):
    runs = [road_run(road, ROADS[road][1][0], small, sft) for road in (*list(ROADS)[:7], "full -> QLoRA")]
    folders = [(train(run, "dpo") / "final").resolve() for run in runs]  # trained by the roads, or here
    kinds = [(run.lora is not None, run.quantization is not None) for run in runs]
    facts = [(str(folder), *kind) for folder, kind in zip(folders, kinds, strict=True)]
    subprocess.run([sys.executable, "-c", LOAD, json.dumps(facts)], cwd=tmp_path, check=True, capture_output=True)
    for final, run, logits in zip(folders, runs, torch.load(tmp_path / "logits.pt"), strict=True):
        policy = load_policy(final, load_options(run))
        ids = AutoTokenizer.from_pretrained(final)("film : the wild river . review :", return_tensors="pt").input_ids
        assert torch.equal(logits, policy(ids).logits)
        weights = (
            {"adapter_config.json", "adapter_model.safetensors"} if run.lora else {"config.json", "model.safetensors"}
        )
        names = {file.name for file in final.iterdir()}
        assert {*weights, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} == names


@pytest.mark.parametrize(
    "typed",
    ["quantization=nf4", "quantization=nf4 precision=bf16", "quantization=int8 precision=bf16", "precision=bf16"],
)
@pytest.mark.parametrize("policy", ["base", "{r8}/final"])
def test_an_adapter_trains_in_float32_and_starts_as_it_was_saved_whatever_it_lies_on(
    typed, policy, small, sft, tmp_path
):
    from safetensors.torch import load_file

    run = small("lora=r8", *typed.split(), f"policy={policy.format(**sft)}")
    dpo = build(run, "dpo", tmp_path).trainer
    trained = {name: weight for name, weight in dpo.model.named_parameters() if weight.requires_grad}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    if policy != "base":
        saved = load_file(sft["r8"] / "final" / "adapter_model.safetensors")
        assert len(saved) == len(trained)
        for name, weight in saved.items():
            assert torch.equal(trained[name.replace(".weight", ".default.weight")], weight)


def test_a_policy_with_another_chat_template_than_its_base_is_refused(small, sft, tmp_path):
    folder = tmp_path / "policy"
    shutil.copytree(sft["none"] / "final", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(PipelineError, match="another chat template than that of the base .*in both"):
        run_dpo(small(f"policy={folder}", "variant=templated"))


@pytest.mark.parametrize("lora", ["none", "r8"])
def test_a_run_in_16_bits_loads_back_as_it_was_trained(lora, small):
    run = small(f"lora={lora}", "precision=bf16", "sft_variant=bf16-" + lora, "++sft.max_steps=4")
    run_sft(run)
    manifest = record.read_json(run.sft_folder / "manifest.json")
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
    from dpo_pipeline.training import saving

    run = small("lora=r8", "variant=broken", *STEPS)
    bare = load_policy(run.model.path, load_options(run))
    monkeypatch.setattr(saving, "load_policy", lambda *args, **options: bare)  # as if the adapter had not been loaded
    with pytest.raises(PipelineError, match="does not load back as it was trained"):
        run_dpo(run)
    assert run_folder.run_state(run.dpo_folder) == "failed"


def test_an_sft_of_another_base_is_refused_and_of_other_settings_told(small, sft, capsys):
    with pytest.raises(PipelineError, match="trained from another base model"):
        run_dpo(small("model.builder.layers=1", "variant=other"))
    with pytest.raises(PipelineError, match="base/model was made with other settings.*name=NAME"):
        run_sft(small("model.builder.layers=1", "sft_variant=other"))
    train(small("sft.learning_rate=7e-4", "variant=told", "++dpo.max_steps=1"), "dpo")
    assert "was made with other settings: sft.learning_rate is" in capsys.readouterr().out


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """Composes a DPO from a base with biases, which `lora.bias` trains beside the adapter."""
    folder = tmp_path_factory.mktemp("biased")
    save_base(folder, "gpt2")
    typed = [item for item in (*SMALL, *STEPS) if not item.startswith(("model.builder", "evaluation.tracker"))]
    typed += ["model=path", f"model.path={folder}", f"root={folder}", "policy=base", "lora=r8"]
    return lambda *more: compose([*typed, *more])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_adapter_is_no_reference_where_other_weights_are_trained(bias, biased):
    with pytest.raises(PipelineError, match="reference=adapter .*bias: type reference=cached"):
        run_dpo(biased(f"lora.bias={bias}", "reference=adapter", "check=true"))


def test_kl_at_step_0_and_later_is_against_the_biases_of_step_0_too(biased):
    typed = ("lora.bias=all", "evaluation.tracker_prompts=4", "dpo.eval_steps=2")
    points = {}
    for mode in ("cached", "frozen"):
        train(run := biased(*typed, f"reference={mode}", f"variant=biased-{mode}"), "dpo")
        points[mode] = [point["kl"] for point in record.read_json(run.dpo_folder / "reward_kl_tracker.json")]
    assert points["cached"][0] == pytest.approx(0, abs=1e-6)
    assert points["cached"] == pytest.approx(points["frozen"], abs=1e-5)


@pytest.mark.parametrize("named", ["/gone/model", "nobody/gone-model"])
def test_an_adapter_whose_base_is_gone_is_trained_on_the_one_that_is_given(named, small, sft, tmp_path, caplog):
    folder = tmp_path / "adapter"
    shutil.copytree(sft["r8"] / "final", folder)
    config = record.read_json(folder / "adapter_config.json")
    record.write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": named})
    run = small("lora=r8", f"policy={folder}", f"variant=gone-{named[:2].strip('/')}", "++dpo.max_steps=2")
    train(run, "dpo")
    assert f"names the base {named}, not here: model.path={run.model.path} is taken for it" in caplog.text
    assert named_base(run) == run.model.path
    assert f"fine-tuned version of `{run.model.path}`" in (run.dpo_folder / "final" / "README.md").read_text()


def test_an_adapter_on_a_base_that_was_saved_quantized_is_merged(small, sft, tmp_path):
    run = small("lora=r8", "quantization=nf4")
    model = load_policy(run.model.path, load_options(run))
    model.save_pretrained(tmp_path / "nf4")
    adapter = tmp_path / "final"
    shutil.copytree(sft["r8"] / "final", adapter)
    config = record.read_json(adapter / "adapter_config.json")
    record.write_json(adapter / "adapter_config.json", config | {"base_model_name_or_path": f"{tmp_path}/nf4"})
    merge(adapter, tmp_path / "merged", load_options(small("lora=none")))
    config = record.read_json(tmp_path / "merged" / "config.json")
    assert "quantization_config" not in config
    assert torch.isfinite(load_policy(tmp_path / "merged", load_options(small())).lm_head.weight).all()


def test_dpo_starts_from_a_model_of_the_hub_and_names_the_folder_of_an_adapter(small, sft, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, lora in (("model", "none"), ("adapter", "r8")):
        repository = tmp_path / f"models--user--{name}"
        shutil.copytree(sft[lora] / "final", repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
    run = small("policy=user/model")
    start = resolve_starting_policy(run, "dpo")
    assert (start.source, start.merge_to, start.is_adapter) == ("user/model", None, False)
    assert run_folder.identity(run, "dpo")["policy"] == "user/model@main"
    assert run.variant.startswith("sigmoid-beta0.1-model-seed0")
    weights, expected = (
        load_start(run, each).state_dict() for each in (start, resolve_starting_policy(small(), "dpo"))
    )
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    folder = tmp_path / "models--user--adapter" / "snapshots" / "abc"
    with pytest.raises(PipelineError, match=f"policy=user/adapter is an adapter.*type policy={folder}"):
        resolve_starting_policy(small("policy=user/adapter", "lora=r8"), "dpo")
