"""Batched completions from a policy, each the same whatever is sampled beside it."""

import hashlib
import json
from typing import Any

from tqdm.auto import tqdm


def sample(
    model: Any,
    prompts: list[list[int]],
    eos_ids: list[int],
    pad: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    temperature: float = 1.0,
    draws: int = 1,
    label: str | None = None,
    synced: bool = False,
) -> list[list[int]]:
    """`draws` completions for each prompt, one prompt after the other, as token ids.

    The last token is one of `ends` unless `max_new_tokens` came first. Drawn from the policy's own distribution at
    `temperature` (0: its likeliest token), with no top-k, top-p or penalty, whatever the model's generation config
    says: so at 1 a completion's log-prob is that of its draw. The random numbers of a completion follow from `seed`,
    its prompt and its number alone, so it is the same in any batch, in any process and beside any others, and two
    policies completion with the same numbers; no other random state is touched. `synced`: the weights lie in parts,
    and all processes sample the same prompts together. `label` names a progress bar.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    rows = sorted(
        ((i * draws + draw, prompt, draw) for i, prompt in enumerate(prompts) for draw in range(draws)),
        key=lambda row: len(row[1]),
    )
    completions: list[list[int]] = [[] for _ in rows]
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos_ids, pad_token_id=pad, use_cache=True
    )
    bar = tqdm(total=len(rows), desc=label, leave=False, disable=label is None)
    was_training, own = model.training, model.generation_config
    model.eval()
    try:
        # `generate` fills what a config leaves open from the model's own, penalties included.
        model.generation_config = plain
        with torch.inference_mode():
            for start in range(0, len(rows), batch_size):
                batch = rows[start : start + batch_size]
                width = max(len(prompt) for _, prompt, _ in batch)
                ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for _, prompt, _ in batch])
                mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for _, prompt, _ in batch])
                draw = InverseCdfProcessor(
                    [uniform_draws(seed, p, d, max_new_tokens) for _, p, d in batch], width, temperature
                )
                out = model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    logits_processor=LogitsProcessorList([draw] if temperature else []),
                    synced_gpus=synced,
                )
                for (place, _, _), completion in zip(batch, out[:, width:].tolist(), strict=True):
                    stop = next((at + 1 for at, token in enumerate(completion) if token in eos_ids), len(completion))
                    completions[place] = completion[:stop]
                bar.update(len(batch))
    finally:
        model.generation_config = own
        model.train(was_training)
        bar.close()
    return completions


def uniform_draws(seed: int, prompt: list[int], draw: int, count: int) -> Any:
    """The random numbers in [0, 1) that a completion is drawn with, float64: one for each of its tokens."""
    import torch

    digest = hashlib.sha256(json.dumps([seed, draw, prompt]).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


class InverseCdfProcessor:
    """A logits processor that leaves one token a row: where the row's number falls in its cumulated probabilities.

    `generate` draws with one random state for a whole batch, so that a completion would hang on those beside it.
    """

    def __init__(self, rows: list[Any], width: int, temperature: float):
        import torch

        self.numbers, self.width, self.temperature = torch.stack(rows), width, temperature

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        precise = torch.float32 if scores.device.type == "mps" else torch.float64  # which has no other
        below = (scores.to(precise) / self.temperature).softmax(-1).cumsum(-1)
        number = self.numbers[:, input_ids.shape[1] - self.width, None].to(scores.device, precise)
        # Their sum may miss 1 by rounding; the last token of all is not to be had so.
        token = torch.searchsorted(below, number * below[:, -1:], right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)
