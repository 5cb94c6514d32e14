"""The base model of the embedded task: a tokenizer and a small Llama, made in code and pretrained on plain text."""

import logging
import os
import random
import shutil
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dpo_pipeline.data import reviews
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.record import read_json, write_json

log = logging.getLogger(__name__)

CONTEXT = 256


def build(folder: str, hidden_size: int, layers: int, heads: int, steps: int, seed: int) -> None:
    """Make the base model in `folder`, unless it is there; some seconds on one core.

    It learns sentences of the task's words in no order and without the form of a prompt: enough for an adapter to
    learn on it, which on random weights it cannot. Raises PipelineError where one of other settings is there.
    """
    settings = {"hidden_size": hidden_size, "layers": layers, "heads": heads, "steps": steps, "seed": seed}
    existing = read_json(Path(folder) / "builder.json")
    if existing is not None and existing != settings:
        raise PipelineError(
            f"{folder} was made with other settings ({existing}, not {settings}): give this run a name=NAME"
        )
    if existing is not None:
        return
    if Path(folder).exists():
        raise PipelineError(f"{folder} holds something else than a base made here: give this run a name=NAME")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=3 * hidden_size,
        num_hidden_layers=layers, num_attention_heads=heads, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    if steps:
        pretrain(model, tokenizer, steps, seed)
    partial = f"{folder}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    write_json(Path(partial) / "builder.json", settings)
    try:
        os.replace(partial, folder)
    except OSError:  # another run of this name was faster
        shutil.rmtree(partial)


def pretrain(model: Any, tokenizer: Any, steps: int, seed: int) -> None:
    """Teach the model sentences, 64 a step."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    rng = random.Random(seed)
    for _ in tqdm(range(steps), desc="pretraining the tiny base", leave=False, disable=False):
        texts = [reviews.plain_text(rng) + tokenizer.eos_token for _ in range(64)]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    log.info("made the tiny base: %s parameters, loss %.2f", f"{model.num_parameters():,}", loss.item())


def word_tokenizer() -> Any:
    """A tokenizer with one token for each word of the task."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*special, *reviews.VOCABULARY])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **names)
