"""Batched sampling from a policy; a completion does not depend on the others in its batch."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessorList

from dpo_pipeline.distributed import is_main_process
from dpo_pipeline.logprobs import inference, run_in_batches


def sample(
    model: Any,
    prompts: list[list[int]],
    eos_ids: list[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int | None,
    seed: int,
    temperature: float = 1.0,
    draws: int = 1,
    label: str | None = None,
    synced: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[list[int]]:
    """`draws` completions for each prompt, one prompt after the other, as token ids; empty ones after a stop.

    The last token is one of `eos_ids`, unless `max_new_tokens` is reached first. Tokens are drawn from the policy's
    own distribution at `temperature` (0: the likeliest token), without top-k, top-p or penalty: at temperature 1 the
    log-prob of a completion is that of its draw. The random numbers depend on `seed`, prompt and draw alone, so that
    all policies sample with the same ones. `synced`: the weights are sharded, and all processes sample the same
    prompts together. `label` names a progress bar. `batch_size` and `should_stop` as in `run_in_batches`.
    """
    rows = [(prompt, draw) for prompt in prompts for draw in range(draws)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    completions: list[list[int]] = [[] for _ in rows]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos_ids, pad_token_id=pad_id, use_cache=True
    )
    bar = tqdm(total=len(rows), desc=label, leave=False, disable=label is None or not is_main_process())

    def complete(batch: list[int]) -> None:
        outputs = generate_batch(model, [rows[i] for i in batch], seed, temperature, synced)
        for i, completion in zip(batch, outputs, strict=True):
            completions[i] = completion
        bar.update(len(batch))

    with inference(model), generation_config(model, config), bar:
        tokens = max(map(len, prompts), default=0) + max_new_tokens
        run_in_batches(complete, order, batch_size, model, tokens, 1, should_stop)
    return completions


@contextlib.contextmanager
def generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Replaces the model's own config, from which `generate` takes what another leaves open, penalties included."""
    earlier, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = earlier


def generate_batch(
    model: Any, rows: list[tuple[list[int], int]], seed: int, temperature: float, synced: bool
) -> list[list[int]]:
    """The completion of each row, a prompt and the number of its draw, up to its first end token."""
    config = model.generation_config
    prompts = [torch.tensor(prompt) for prompt, _ in rows]
    ids = pad_sequence(prompts, batch_first=True, padding_value=config.pad_token_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    width, processors = ids.shape[1], LogitsProcessorList()
    if temperature:
        numbers = torch.stack([uniform_draws(seed, *row, config.max_new_tokens) for row in rows])
        processors.append(InverseCdfProcessor(numbers, width, temperature))
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        logits_processor=processors,
        synced_gpus=synced,
    )
    completions = output[:, width:].tolist()
    for completion in completions:
        end = next((i for i, token in enumerate(completion) if token in config.eos_token_id), len(completion))
        del completion[end + 1 :]
    return completions


def uniform_draws(seed: int, prompt: list[int], draw: int, count: int) -> torch.Tensor:
    """The random numbers in [0, 1) that a completion is drawn with, float64: one for each of its tokens."""
    digest = hashlib.sha256(json.dumps([seed, draw, prompt]).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


class InverseCdfProcessor:
    """A logits processor that leaves one token a row: where its random number falls in its cumulative distribution.

    `numbers` are [rows, new tokens], `width` is the length of the padded prompts. `generate` would draw a whole batch
    with one random state, so that a completion would depend on the others.
    """

    def __init__(self, numbers: torch.Tensor, width: int, temperature: float):
        self.numbers, self.width, self.temperature = numbers, width, temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        precise = torch.float32 if scores.device.type == "mps" else torch.float64  # MPS has no float64
        cumulative = (scores.to(precise) / self.temperature).softmax(-1).cumsum(-1)
        number = self.numbers[:, input_ids.shape[1] - self.width, None].to(scores.device, precise)
        # The last sum may differ from 1 by a rounding; the clamp keeps the index in the vocabulary.
        token = torch.searchsorted(cumulative, number * cumulative[:, -1:], right=True)
        token = token.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)
