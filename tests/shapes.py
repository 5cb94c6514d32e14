"""Models of random weights and pairs of random words, of given sizes: what tests/gpu.py trains."""

import json
import math
import random
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_pipeline.data.reviews import VOCABULARY
from dpo_pipeline.training.tiny import word_tokenizer

SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
SHAPES = {"135M": (576, 1536, 30, 9, 3, 49152), "1.4B": (2048, 5632, 24, 16, 16, 50304)}
SHAPES |= {"7B": (4096, 11008, 32, 32, 32, 32000)}
TINY = (64, 128, 2, 2, 2, 256)  # in place of each of them on a CPU


def make_model(folder: Path, shape: tuple[int, ...], layers: int = 0) -> None:
    """Write a Llama of random bfloat16 weights, unless it is there; layers share their values: one is in memory."""
    if folder.exists():
        return
    tokenizer, place = word_tokenizer(), "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer.model_max_length = 2048
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = dict(zip(SIZES, shape, strict=True))
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    config = LlamaConfig(
        **sizes, **ends, max_position_embeddings=2048, tie_word_embeddings=sizes["hidden_size"] < 1000
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        parameters = dict(LlamaForCausalLM(config).named_parameters())
    values, files, generator = {}, {}, torch.Generator(place).manual_seed(0)
    for name, weight in parameters.items():
        layer, key = re.search(r"layers\.(\d+)", name), re.sub(r"layers\.\d+", "", name)
        files.setdefault(f"layer-{layer[1]}.safetensors" if layer else "rest.safetensors", {})[name] = key
        if key not in values:
            drawn = torch.randn(weight.shape, generator=generator, device=place, dtype=torch.bfloat16).mul(0.02).cpu()
            values[key] = drawn if weight.dim() > 1 else torch.ones_like(drawn)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file, keys in files.items():
        save_file({name: values[key] for name, key in keys.items()}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, keys in files.items() for name in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_pairs(file: Path, count: int, tokens: int, lengths: tuple[tuple[int, float], ...] = ()) -> None:
    """Write pairs of random words: half of the tokens for the prompt, half for each completion.

    `lengths` draws the words of prompt and completions instead, log-normal with these medians and sigmas, each of
    them at most that half.
    """
    rng = random.Random(0)
    with file.open("w") as output:
        for _ in range(count):
            words = [1 + int(rng.lognormvariate(math.log(median), sigma)) for median, sigma in lengths] or [tokens] * 3
            texts = [" ".join(rng.choices(VOCABULARY, k=min(size, tokens // 2 - 1))) for size in words]
            pair = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
            output.write(json.dumps(pair | {"prompt": f"{pair['prompt']}\n"}) + "\n")
