"""Per-token log-probs of given completions under a model: the only place that computes them for measuring."""

from typing import Any

from tqdm.auto import tqdm


def completion_logprobs(
    model: Any, prompts: list[list[int]], completions: list[list[int]], batch_size: int, label: str | None = None
) -> list[Any]:
    """Log pi(token | prompt, completion so far) in nats, for every token of each completion.

    Takes token ids, returns one float64 CPU tensor of shape [completion tokens] for each row, in the order given. A
    row's values do not depend on the others beside it, up to the rounding of the model's dtype; softmax is taken in
    float32. `label` names a progress bar.
    """
    import torch

    lengths = [len(p) + len(a) for p, a in zip(prompts, completions, strict=True)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    results: list[Any] = [None] * len(lengths)
    bar = tqdm(total=len(lengths), desc=label, leave=False, disable=label is None)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = max(lengths[i] for i in rows)
            ids = torch.zeros(len(rows), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for line, i in enumerate(rows):
                ids[line, : lengths[i]] = torch.tensor(prompts[i] + completions[i])
                mask[line, : lengths[i]] = 1
            ids, mask = ids.to(model.device), mask.to(model.device)
            with torch.inference_mode():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                for line, i in enumerate(rows):
                    # The token at t is predicted at t - 1.
                    at = slice(len(prompts[i]) - 1, lengths[i] - 1)
                    token_logprobs = logits[line, at].float().log_softmax(-1)
                    chosen = ids[line, len(prompts[i]) : lengths[i], None]
                    results[i] = token_logprobs.gather(-1, chosen)[:, 0].double().cpu()
            bar.update(len(rows))
    finally:
        bar.close()
        model.train(was_training)
    return results
