"""The prompt of a pair goes through the model once: one row `[prompt | chosen | rejected]` in place of two.

TRL's batch holds two rows for each pair, [2B, T]. Around the layers of a model it becomes [B, L], and hidden states
become [2B, T] again, so all that TRL makes of them stays TRL's. The positions of both completions start behind the
prompt, and neither sees the other: each mask that the model asks transformers for, causal or of a sliding window, is
made by position and without the other completion. What a layer carries from token to token beside attention, such as a
recurrent state, would differ: log-probs are compared before training.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from dpo_pipeline.errors import PipelineError
from dpo_pipeline.training.pair_logps import policy_logps, tolerance
from dpo_pipeline.training.similar_lengths import row_lengths, token_counts

log = logging.getLogger(__name__)

MIN_SAVED = 0.1  # share of all positions that sharing must save, since its mask costs something too; ours


@dataclass
class SharedRows:
    """Where the tokens of a batch of pairs lie in rows that share the prompt."""

    source: torch.Tensor  # [B, L]: the number of each token in the flattened batch
    target: torch.Tensor  # [2B, T]: the number of each token in the flattened shared rows
    positions: torch.Tensor  # [B, L]
    part: torch.Tensor  # [B, L]: 0 in the prompt, 1 in chosen, 2 in rejected
    is_token: torch.Tensor  # [B, L]: 0 in padding


def share_prompts(attention_mask: torch.Tensor, completion_mask: torch.Tensor) -> SharedRows:
    """The shared rows of a batch that is padded on the right, chosen rows first: both masks are [2B, T]."""
    pairs, width = len(attention_mask) // 2, attention_mask.shape[1]
    ends = attention_mask.sum(1)
    prompt = (ends - completion_mask.sum(1))[:pairs, None]
    chosen_end, rejected_end = ends[:pairs, None], ends[pairs:, None]
    shift = chosen_end - prompt  # a rejected token lies that much further right than in its own row
    column = torch.arange(int((rejected_end + shift).max()), device=ends.device)
    part = (column >= prompt).long() + (column >= chosen_end)
    positions = torch.where(part == 2, column - shift, column)
    is_token = (column < rejected_end + shift).long()
    positions = positions * is_token
    row = torch.arange(pairs, device=ends.device)[:, None]
    source = (row + pairs * (part == 2)) * width + positions
    column = torch.arange(width, device=ends.device)
    in_rejected = torch.where(column < prompt, column, column + shift)
    target = torch.cat([column.expand(pairs, -1), in_rejected]) * attention_mask + row.repeat(2, 1) * len(part[0])
    return SharedRows(source, target, positions, part, is_token)


def make_mask(rows: SharedRows, make_plain_mask: Callable, **arguments: Any) -> Any:
    """What `make_plain_mask` of transformers makes, by position and without the other completion of the pair."""
    sees = arguments.pop("mask_function")

    def mask_function(batch, head, query, key):
        parts = rows.part[batch, query], rows.part[batch, key]
        is_visible = (parts[1] == 0) | (parts[0] == parts[1])
        return is_visible & sees(batch, head, rows.positions[batch, query], rows.positions[batch, key])

    arguments |= {"attention_mask": rows.is_token.bool(), "allow_is_causal_skip": False}
    return make_plain_mask(mask_function=mask_function, **arguments)


def is_worthwhile(rows: SharedRows) -> bool:
    """Whether shared rows save enough positions."""
    return rows.source.numel() <= (1 - MIN_SAVED) * rows.target.numel()


@contextlib.contextmanager
def prompts_shared(models: list[Any], batch: dict[str, Any]) -> Iterator[None]:
    """Within it these models take TRL's batch of pairs in shared rows, where that saves enough."""
    rows = share_prompts(batch["attention_mask"], batch["completion_mask"])
    with contextlib.ExitStack() as stack:
        for model in models if is_worthwhile(rows) else ():
            layers = (model.get_base_model() if is_peft_model(model) else model).base_model
            mask_name = layers.config.get_text_config()._attn_implementation
            plain_mask = ALL_MASK_ATTENTION_FUNCTIONS[mask_name]
            stack.callback(ALL_MASK_ATTENTION_FUNCTIONS.__setitem__, mask_name, plain_mask)
            share = partial(share_inputs, rows, mask_name, partial(make_mask, rows, plain_mask))
            split = partial(split_outputs, rows, mask_name, plain_mask)
            stack.callback(layers.register_forward_pre_hook(share, with_kwargs=True).remove)
            stack.callback(layers.register_forward_hook(split).remove)
        yield


def share_inputs(
    rows: SharedRows, mask_name: str, make_mask: Callable, layers: Any, args: tuple, inputs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """The inputs of a model's layers in shared rows; from here on transformers makes masks by `make_mask`."""
    ALL_MASK_ATTENTION_FUNCTIONS[mask_name] = make_mask
    ids = inputs["input_ids"].flatten()[rows.source]
    return args, inputs | {"input_ids": ids, "attention_mask": rows.is_token, "position_ids": rows.positions}


def split_outputs(
    rows: SharedRows, mask_name: str, make_mask: Callable, layers: Any, args: tuple, outputs: Any
) -> None:
    """Put the hidden states of shared rows back into two rows for each pair, and masks back to `make_mask`."""
    ALL_MASK_ATTENTION_FUNCTIONS[mask_name] = make_mask
    outputs.last_hidden_state = outputs.last_hidden_state.flatten(0, 1)[rows.target]


def check_shared_prefix(trainer: Any, choice: str) -> bool:
    """Whether prompts are shared in training: asked for, and equal in log-probs on a long and a short pair.

    Raises PipelineError where they cannot be shared and `choice` is on.
    """
    if choice == "off":
        return False
    fault = find_fault(trainer)
    if fault and choice == "on":
        raise PipelineError(f"training.shared_prefix=on: {fault}: type training.shared_prefix=off")
    log.info("preflight: %s", f"prompts are not shared: {fault}" if fault else "each prompt is read once for its pair")
    return fault is None


def find_fault(trainer: Any) -> str | None:
    """Why prompts cannot be shared, if they cannot."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "the weights are sharded"
    if trainer.aux_loss_enabled:
        return "the auxiliary loss of the experts counts each token of the batch"
    table = trainer.train_dataset
    rows = [token_counts(table)["prompt_ids"].argmax(), row_lengths(table).argmin()]
    batch = trainer._prepare_inputs(trainer.data_collator([table[int(row)] for row in rows]))
    if not is_worthwhile(share_prompts(batch["attention_mask"], batch["completion_mask"])):
        return "prompts are too short for a gain"
    name = trainer.accelerator.unwrap_model(trainer.model).config.model_type
    plain, trainer.shares_prompts = policy_logps(trainer, batch), True
    try:
        gaps = (policy_logps(trainer, batch) - plain).abs()
    except Exception as error:  # whatever a model raises at rows it does not know
        return f"{name} does not take them ({type(error).__name__}: {error})"
    finally:
        trainer.shares_prompts = False
    worst = int((gaps / tolerance(trainer, batch, 40)).argmax())
    if not gaps[worst] <= tolerance(trainer, batch, 40)[worst]:
        return f"a log-prob of {name} differs by {gaps[worst]:.3g} nats"
    return None
