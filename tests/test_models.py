"""Eight families of models, tiny and untrained, go from SFT to DPO: each trains what it should and loads back so."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from dpo_pipeline.base_model import base_model
from dpo_pipeline.config import compose
from dpo_pipeline.data.report import kept_rows
from dpo_pipeline.data.splits import load_splits
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.models import load_config, load_generation_config
from dpo_pipeline.sft import run_sft
from dpo_pipeline.training.merge import add_older_keys
from dpo_pipeline.training.tiny import CONTEXT, word_tokenizer
from tests.helpers import train

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
GATED = {"intermediate_size": 64, "num_key_value_heads": 2}
LLAMA = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"

# By transformers' model type: what its config takes beside SIZES, the tokens that begin, end and pad a text in the
# published tokenizer (None: there is none), and every linear layer of one block, which an adapter is to train.
FAMILIES = {
    "llama": (GATED, ("<s>", "</s>", None), LLAMA),
    "gpt2": ({}, (None, "</s>", None), "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    "gpt_neox": (
        {"intermediate_size": 64},
        (None, "</s>", None),
        "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
    ),
    "opt": (
        {"ffn_dim": 64, "word_embed_proj_dim": 32},
        ("</s>", "</s>", "<pad>"),
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
    ),
    "phi": (
        GATED,
        (None, "</s>", None),
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense mlp.fc1 mlp.fc2",
    ),
    "mistral": (GATED | {"sliding_window": 24}, ("<s>", "</s>", None), LLAMA),
    "gemma3_text": (
        GATED | {"head_dim": 16, "sliding_window": 24, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
        ("<s>", "</s>", "<pad>"),
        LLAMA,
    ),
    "qwen3": (GATED | {"head_dim": 16}, (None, "</s>", "<pad>"), LLAMA),
}


def layers(family: str) -> int:
    """As few as make 20 linear layers: from there on PEFT names them by their last part, as it does at real sizes."""
    return math.ceil(20 / len(FAMILIES[family][2].split())) if family in FAMILIES else 2


def save_base(folder, family: str):
    """A model of random weights, biases included, with its tokenizer; the tokenizer as it was saved."""
    from tokenizers import processors
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    options, (begin, end, pad), _ = FAMILIES.get(family, ({}, ("<s>", "</s>", "<pad>"), ""))
    words = word_tokenizer().backend_tokenizer
    front = [(begin, words.token_to_id(begin))] if begin else []
    words.post_processor = processors.TemplateProcessing(single=f"{begin or ''} $A".strip(), special_tokens=front)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=begin or end, eos_token=end, pad_token=pad, unk_token="<unk>"
    )
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {**SIZES, "vocab_size": len(tokenizer), "num_hidden_layers": layers(family)}
    config = AutoConfig.for_model(family, **sizes, **special, **options)
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def logprobs(model, tokenizer, rows: list[dict], completion: str) -> tuple[list[float], list[int]]:
    """The summed log-prob of each row's completion, end token included, and its tokens; one row at a time."""
    sums, tokens = [], []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(row["prompt"] + row[completion])["input_ids"] + [tokenizer.eos_token_id]])
        with torch.inference_mode():
            given = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        of_completion = given.gather(-1, ids[0, len(prompt) :, None])
        sums.append(float(of_completion.sum()))
        tokens.append(len(of_completion))
    return sums, tokens


def logged(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", ["none", "r8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_from_sft_to_dpo(family, lora, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    tokenizer = save_base(tmp_path / "base", family)
    run = compose(
        ["model=path", f"model.path={tmp_path}/base", f"root={tmp_path}", f"lora={lora}", "dataset.rows=64",
         "batch.global_size=8", "++sft.max_steps=2", "++dpo.max_steps=2", "dpo.logging_steps=1",
         "sft.learning_rate=3e-3", "dpo.learning_rate=3e-3", "evaluation.pairs=8", "evaluation.prompts=2",
         "evaluation.max_new_tokens=8", "sft.eval_steps=2", "dpo.eval_steps=2",
         f"model.activation_checkpointing={lora != 'none'}"]  # as the options of 1B and more have it
    )  # fmt: skip
    run_sft(run)
    if lora == "none":
        results = run_dpo(run)["policies"]
        assert all(policy["against"]["base"]["margin_nats"]["n"] == 8 for policy in results.values())
    else:
        train(run, "dpo")

    log = logged(run.dpo_folder)
    first = next(row for row in log if "loss" in row)  # the tracker's first point comes before
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)

    final = {"base": tmp_path / "base", "sft": run.sft_folder / "final", "dpo": run.dpo_folder / "final"}
    file = "model.safetensors" if run.lora is None else "adapter_model.safetensors"
    weights = {name: load_file(folder / file) for name, folder in final.items() if (folder / file).is_file()}
    for before, after in (("sft", "dpo"), *([("base", "sft")] if run.lora is None else [])):
        assert set(weights[before]) == set(weights[after])
        for name in weights[before]:
            assert not torch.equal(weights[before][name], weights[after][name]), (name, before, after)

    if run.lora is not None:
        linears = FAMILIES[family][2].split()
        adapter = json.loads((final["dpo"] / "adapter_config.json").read_text())
        assert set(adapter["target_modules"]) == {path.split(".")[-1] for path in linears}
        assert adapter["modules_to_save"] is None
        trained = {re.fullmatch(r".*?\.(\d+)\.(.+)\.lora_[AB]\.weight", name).groups() for name in weights["dpo"]}
        assert trained == {(str(layer), path) for layer in range(layers(family)) for path in linears}

    # Log-probs of the validation rows: by the policy in training, as logged, and by what plain libraries load.
    auto = AutoModelForCausalLM if run.lora is None else AutoPeftModelForCausalLM
    loaded = {name: auto.from_pretrained(final[name], dtype=torch.float32).eval() for name in ("sft", "dpo")}
    rows = kept_rows(load_splits(run.dataset, ("chosen", "rejected", "demonstration"), False), "validation")
    for side in ("chosen", "rejected"):
        sums, _ = logprobs(loaded["dpo"], tokenizer, rows, side)
        seen = [row[f"eval_logps/{side}"] for row in log if f"eval_logps/{side}" in row]
        assert sum(sums) / len(sums) == pytest.approx(seen[-1], abs=1e-3)
    sums, tokens = logprobs(loaded["sft"], tokenizer, rows, "demonstration")
    seen = [row["eval_perplexity"] for row in logged(run.sft_folder) if "eval_perplexity" in row]
    assert math.exp(-sum(sums) / sum(tokens)) == pytest.approx(min(seen), rel=1e-4)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {  # RoPE that differs from every default
    "llama": {"rope_theta": 5e5, **LLAMA3, "original_max_position_embeddings": 16},
    "qwen3": {"rope_theta": 1e6, "rope_type": "default"},
    "phi": {"rope_theta": 3e4, "rope_type": "default", "partial_rotary_factor": 0.5},
    "gemma3_text": {
        "full_attention": {"rope_theta": 7e5, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 3e4, "rope_type": "default"},
    },
}
LOAD = """
import sys, torch, transformers
assert transformers.__version__.startswith("4.57"), transformers.__version__
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.additional_special_tokens == ["<unk>"], tokenizer.additional_special_tokens
    expected = torch.load(folder + "/logits.pt")
    gap = float((model(torch.arange(40)[None]).logits.detach() - expected).abs().max())
    assert gap < 1e-4, (folder, gap)
"""


def saved_with_rope(folder, family: str):
    """A folder as a run saves it, of a model with its RoPE in ROPES, and its logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_base(folder, family)
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=["<unk>"])
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.rope_parameters = json.loads(json.dumps(ROPES[family]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)  # with frequencies of that config
    add_older_keys(folder)
    return plain


@pytest.mark.parametrize("family", ROPES)
def test_keys_for_older_libraries_change_nothing_for_this_one(family, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = saved_with_rope(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = ROPES[family].get("full_attention", ROPES[family])
    assert config["rope_theta"] == whole["rope_theta"]
    assert config.get("rope_scaling", {}).get("rope_type") == (
        None if family in ("qwen3", "phi") else whole["rope_type"]
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters == plain.config.rope_parameters
    ids = torch.arange(40)[None]
    assert torch.equal(again(ids).logits, plain(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).extra_special_tokens == ["<unk>"]


@pytest.mark.slow
def test_what_is_saved_gives_the_same_logits_in_transformers_4_57(tmp_path):
    packages = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2")
    call = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", f"{tmp_path}/old", *packages]
    if subprocess.run(call, capture_output=True).returncode:
        pytest.skip("transformers 4.57 cannot be installed here")
    for family in ROPES:
        plain = saved_with_rope(tmp_path / family, family)
        torch.save(plain.eval()(torch.arange(40)[None]).logits.detach(), tmp_path / family / "logits.pt")
    call = [sys.executable, "-c", LOAD, *(str(tmp_path / family) for family in ROPES)]
    done = subprocess.run(call, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": f"{tmp_path}/old"})
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"eos_token_id": [2, 99999]}', [2]),
        ('{"eos_token_id": 2}', [2]),
        ('{"eos_token_id": 99999}', None),
        ("{", None),
    ],
)
def test_end_tokens_of_the_generation_config_are_those_that_the_model_knows(content, expected, tmp_path, caplog):
    save_base(tmp_path, "gpt2")
    (tmp_path / "generation_config.json").write_text(content)
    model = compose(["model=path", f"model.path={tmp_path}"]).model
    if content == "{":
        with pytest.raises(PipelineError, match="generation_config.json is not readable .*repair it"):
            load_generation_config(model, load_config(model))
        return
    assert load_generation_config(model, load_config(model)).eos_token_id == expected
    assert ("end tokens [99999] are left out" in caplog.text) == ("99999" in content)


def test_the_embedded_base_is_trained_by_one_thread(small):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with base_model(small("name=unseen", "check=true")):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
