"""Per-token log-probs of given completions under a model: the only place that computes them for measuring."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.auto import tqdm

from dpo_pipeline.distributed import is_main_process

MAX_ROWS = 256  # at once: with more a GPU is hardly faster


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


def run_in_batches(
    run: Callable[[list[int]], None],
    order: list[int],
    batch_size: int | None,
    model: Any,
    tokens: int,
    scored: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Call `run` with the numbers of `order`, `batch_size` at a time, until all are done or `should_stop` says so.

    None: as many rows of `tokens` tokens, `scored` of them with logits, as a third of the GPU's free memory holds,
    and half as many after an error for want of memory. A row is counted as keys and values of all layers, and logits
    with their softmax as float64.
    """
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    rows, start = batch_size, 0
    if batch_size is None:
        config = model.config.get_text_config()
        size = 2 * tokens * config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
        size += 3 * 8 * scored * config.vocab_size
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        rows = max(1, min(MAX_ROWS, len(order), free // 3 // size))
    while start < len(order) and not should_stop():
        try:
            run(order[start : start + rows])
            start += rows
        except RuntimeError as error:
            if batch_size or rows == 1 or not should_reduce_batch_size(error):
                raise
            rows //= 2


def completion_logprobs(
    model: Any,
    prompts: list[list[int]],
    completions: list[list[int]],
    batch_size: int | None,
    label: str | None = None,
) -> list[Any]:
    """Log pi(token | prompt, completion so far) in nats, for every token of each completion.

    Takes token ids, returns one float64 CPU tensor of shape [completion tokens] for each row, in the given order. A
    row's values do not depend on the rows beside it, up to the rounding of the model's dtype; softmax is taken in
    float32. `batch_size` as in `run_in_batches`; `label` names a progress bar, which rank 0 shows.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor(p + c) for p, c in zip(prompts, completions, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    results: list[Any] = [None] * len(rows)
    head = model.get_output_embeddings()
    bar = tqdm(total=len(rows), desc=label, leave=False, disable=label is None or not is_main_process())

    def score(batch: list[int]) -> None:
        ids = pad_sequence([rows[i] for i in batch], batch_first=True).to(model.device)
        mask = pad_sequence([torch.ones_like(rows[i]) for i in batch], batch_first=True).to(model.device)
        scored = [torch.arange(len(rows[i]) - 1) >= len(prompts[i]) - 1 for i in batch]
        is_scored = pad_sequence(scored, batch_first=True).to(model.device)
        # The token at position t is predicted at t - 1; the head reads the hidden states of those positions alone.
        with head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :-1][is_scored],)):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        token_logprobs = logits.float().log_softmax(-1).gather(-1, ids[:, 1:][is_scored][:, None])
        lengths = [len(completions[i]) for i in batch]
        for i, row in zip(batch, token_logprobs[:, 0].double().cpu().split(lengths), strict=True):
            results[i] = row
        bar.update(len(batch))

    with inference(model), bar:
        longest = (max(map(len, each), default=0) for each in (rows, completions))
        run_in_batches(score, order, batch_size, model, *longest)
    return results
