"""Batched answers from a policy."""

from typing import Any

from tqdm.auto import tqdm


def sample(
    model: Any,
    prompts: list[list[int]],
    ends: list[int],
    pad: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    temperature: float = 1.0,
    label: str | None = None,
) -> list[list[int]]:
    """One answer for each prompt, as token ids; the last is one of `ends` unless `max_new_tokens` came first.

    Drawn from the policy's own distribution at `temperature`, with no top-k, top-p or penalty, whatever the model's
    generation config says: so an answer's log-prob is that of its draw. The random state of the caller is kept.
    """
    import torch
    from transformers import GenerationConfig

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    plain = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=ends, pad_token_id=pad,
    )  # fmt: skip
    bar = tqdm(total=len(prompts), desc=label, leave=False, disable=label is None)
    was_training, own = model.training, model.generation_config
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        # `generate` fills what a config leaves open from the model's own, penalties included.
        model.generation_config = plain
        with torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(seed)
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                width = max(len(prompts[i]) for i in rows)
                ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in rows])
                mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
                out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
                for i, answer in zip(rows, out[:, width:].tolist(), strict=True):
                    stop = next((at + 1 for at, token in enumerate(answer) if token in ends), len(answer))
                    answers[i] = answer[:stop]
                bar.update(len(rows))
    finally:
        model.generation_config = own
        model.train(was_training)
        bar.close()
    return answers
