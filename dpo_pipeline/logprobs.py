"""Per-token log-probs of given completions under a model: the only place that computes them for measuring."""

import contextlib
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm

from dpo_pipeline.distributed import is_main_process


@contextlib.contextmanager
def inference(model: Any) -> Iterator[None]:
    """Puts the model in eval mode without gradients, and in its earlier mode at the end."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def completion_logprobs(
    model: Any, prompts: list[list[int]], completions: list[list[int]], batch_size: int, label: str | None = None
) -> list[Any]:
    """Log pi(token | prompt, completion so far) in nats, for every token of each completion.

    Takes token ids, returns one float64 CPU tensor of shape [completion tokens] for each row, in the given order. A
    row's values do not depend on the rows beside it, up to the rounding of the model's dtype; softmax is taken in
    float32. `label` names a progress bar, which rank 0 shows.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor(p + c) for p, c in zip(prompts, completions, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    results: list[Any] = [None] * len(rows)
    head = model.get_output_embeddings()
    with (
        inference(model),
        tqdm(total=len(rows), desc=label, leave=False, disable=label is None or not is_main_process()) as bar,
    ):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids = pad_sequence([rows[i] for i in batch], batch_first=True).to(model.device)
            mask = pad_sequence([torch.ones_like(rows[i]) for i in batch], batch_first=True).to(model.device)
            scored = [torch.arange(len(rows[i]) - 1) >= len(prompts[i]) - 1 for i in batch]
            is_scored = pad_sequence(scored, batch_first=True).to(model.device)
            # The token at position t is predicted at t - 1; the head reads the hidden states of those positions alone.
            with head.register_forward_pre_hook(lambda _, inputs, mask=is_scored: (inputs[0][:, :-1][mask],)):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            token_logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:][is_scored][:, None])
            lengths = [len(completions[i]) for i in batch]
            for i, row in zip(batch, token_logprobs[:, 0].double().cpu().split(lengths), strict=True):
                results[i] = row
            bar.update(len(batch))
    return results
