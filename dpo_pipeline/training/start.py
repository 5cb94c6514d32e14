"""What a stage starts from: tokenizer, rows, starting policy and reference."""

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

from dpo_pipeline.config import Run, build
from dpo_pipeline.data.splits import load_splits
from dpo_pipeline.data.tokens import Lengths, end_tokens, tokenize
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.policies import is_adapter, load_config, load_policy
from dpo_pipeline.training.arguments import weights_dtype

log = logging.getLogger(__name__)


def prepare_base(run: Run) -> None:
    """Make the base model where it is one that code makes."""
    if run.model.builder:
        build(run.model.builder, folder=run.model.path)


def load_rows(run: Run, stage: str) -> dict[str, list[dict]]:
    """The rows that a stage learns from, as text or messages, by split."""
    node = (run.sft_dataset or run.dataset) if stage == "sft" else run.dataset
    return load_splits(node, answers(run, stage), run.debug)


def answers(run: Run, stage: str) -> tuple[str, ...]:
    """The columns that a stage learns from."""
    return (str(run.sft_target),) if stage == "sft" else ("chosen", "rejected")


def tokenized(run: Run, stage: str, tokenizer: Any, rows: dict[str, list[dict]], *splits: str) -> dict[str, Any]:
    """The rows of a stage as token ids, by split: `answer_ids` for SFT, `chosen_ids` and `rejected_ids` for DPO."""
    ends, lengths = ends_and_lengths(run, tokenizer)
    ids = {split: tokenize(rows[split], answers(run, stage), tokenizer, ends, lengths) for split in splits}
    if stage == "sft":
        ids = {split: table.rename_column(f"{run.sft_target}_ids", "answer_ids") for split, table in ids.items()}
    return ids


def ends_and_lengths(run: Run, tokenizer: Any) -> tuple[list[int], Lengths]:
    """The ids that end an answer, and the limits of length, for the base model of a run."""
    from transformers import GenerationConfig

    config = load_config(run.model)
    try:
        generation = GenerationConfig.from_pretrained(run.model.path, revision=run.model.revision)
    except OSError:  # a model without generation_config.json
        generation = GenerationConfig.from_model_config(config)
    context = config.get_text_config().max_position_embeddings
    return end_tokens(tokenizer, generation), Lengths.of(run.length.max, run.length.max_prompt, context)


def new_adapter(run: Run) -> Any:
    """The config of an adapter to be made on the base, which it names with its revision; None without one."""
    return build(run.lora, revision=run.model.revision) if run.lora else None


def starting_policy(run: Run) -> Any:
    """What DPO trains, before step 1: the SFT policy or the base, on the CPU.

    Raises PipelineError where the SFT policy and `lora` do not go together.
    """
    dtype = weights_dtype(run)
    if run.policy == "base":
        return load_policy(run.model.path, run.model, dtype, trainable=True)
    final = run.sft_folder / "final"
    if is_adapter(final) != (run.lora is not None):
        given, wanted = ("an adapter", "lora=r16 or another") if is_adapter(final) else ("a full model", "lora=none")
        raise PipelineError(f"{final} is {given}: continue it with {wanted}, as its SFT had, or train another SFT")
    return load_policy(final, run.model, dtype, trainable=True)


def frozen_reference(run: Run) -> Any:
    """A second copy of the starting policy that nothing trains, for reference=frozen; else None.

    Raises PipelineError where reference=adapter has no adapter.
    """
    if run.reference.mode == "adapter" and run.lora is None:
        raise PipelineError("reference=adapter needs an adapter: set lora=r16, or reference=frozen or cached")
    if run.reference.mode != "frozen":
        return None
    path = run.model.path if run.policy == "base" else run.sft_folder / "final"
    loaded = load_policy(path, run.model, weights_dtype(run)).requires_grad_(False)
    # TRL puts its loss head on the model itself, which a PEFT wrapper would hide; the adapter's layers are inside.
    return loaded.get_base_model() if is_adapter(path) else loaded


def limit_steps(run: Run, args: Any, rows: int) -> None:
    """At most 50 steps where `debug` is set."""
    planned = args.max_steps if args.max_steps > 0 else math.ceil(rows / run.batch.global_size) * args.num_train_epochs
    if run.debug and planned > 50:
        args.max_steps = 50


def facts(trainer: Any, rows: dict[str, Any], starting: str | Path) -> dict[str, Any]:
    """What the manifest tells of a run: its rows with their fingerprint, what it starts from, what it trains."""
    parameters = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    return {
        "rows": {split: len(table) for split, table in rows.items()},
        "data_fingerprint": {split: fingerprint(table) for split, table in rows.items()},
        "starting_policy": str(starting),
        "parameters": sum(n for n, _ in parameters),
        "trainable_parameters": sum(n for n, trained in parameters if trained),
        "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
        "device": str(trainer.args.device),
    }


def fingerprint(table: Any) -> str:
    """sha256 of the token ids of a table of rows."""
    return hashlib.sha256(json.dumps(table.to_dict(), sort_keys=True).encode()).hexdigest()
