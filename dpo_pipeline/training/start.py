"""What a stage learns from: its base, its rows as text and as token ids, and what the manifest tells of them."""

import dataclasses
import gc
import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from pyarrow import compute

from dpo_pipeline.config import Run, build
from dpo_pipeline.data import tokens
from dpo_pipeline.data.account import Account
from dpo_pipeline.data.lengths import Lengths
from dpo_pipeline.data.splits import key, load_splits
from dpo_pipeline.data.tokens import end_tokens, tokenize
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.locks import alone
from dpo_pipeline.machine import processes, together
from dpo_pipeline.policies import Loading, load_config
from dpo_pipeline.runs import content_hash
from dpo_pipeline.training.handoff import loading
from dpo_pipeline.training.trainer import sharded

log = logging.getLogger(__name__)


def prepare_base(run: Run) -> None:
    """Make the base model where it is one that code makes."""
    if run.model.builder:
        together(lambda: build(run.model.builder, folder=run.model.path))


def load_rows(
    run: Run, stage: str, tokenizer: Any, strict: bool = True
) -> tuple[dict[str, list[dict[str, Any]]], Account]:
    """The rows that a stage learns from, by split, and the account of all that were read.

    As messages where the set's `form` says so, or the tokenizer has a chat template; else as text. Raises
    PipelineError where too many teach nothing, unless not `strict`.
    """
    node = (run.sft_dataset or run.dataset) if stage == "sft" else run.dataset
    chat = bool(tokenizer.chat_template) if node["form"] == "auto" else node["form"] == "messages"
    pairs = run.dataset if node is run.sft_dataset else None  # what DPO is tested on, its SFT has not seen
    return load_splits(node, answers(run, stage), chat, run.debug, strict, pairs)


def answers(run: Run, stage: str) -> tuple[str, ...]:
    """The columns that a stage learns from."""
    return (str(run.sft_target),) if stage == "sft" else ("chosen", "rejected")


def prepared(run: Run, stage: str, tokenizer: Any, *splits: str) -> tuple[dict[str, Any], Account]:
    """The rows of a stage, loaded, told of and as token ids, and their account."""
    return prepared_with_rows(run, stage, tokenizer, *splits)[:2]


def prepared_with_rows(
    run: Run, stage: str, tokenizer: Any, *splits: str
) -> tuple[dict[str, Any], Account, dict[str, list[dict[str, Any]]]]:
    """What `prepared` gives, and the rows that the tables' column `row` counts, by split."""
    gc.disable()  # rows and ids make no cycles, and to look through them all for some is a seventh of the time
    try:
        rows, account = load_rows(run, stage, tokenizer)
        return tokenized(run, stage, tokenizer, rows, account, *splits), account, rows
    finally:
        gc.enable()


def made_once(run: Run, make: Callable[[], tuple[dict[str, Any], Any]]) -> tuple[dict[str, Any], Any]:
    """The tables and whatever else `make` gives, made by rank 0 alone; the tables reach the other ranks by disk."""

    def made() -> tuple[dict[str, Any], Any]:
        tables, other = make()
        places = {split: Path(table.cache_files[0]["filename"]).parent for split, table in tables.items()}
        return (tables if processes() == 1 else places), other

    tables, other = together(made)
    tables = {k: load_from_disk(v) for k, v in tables.items()} if processes() > 1 else tables
    return {k: table.remove_columns("row") for k, table in tables.items()}, other


def tokenized(
    run: Run,
    stage: str,
    tokenizer: Any,
    rows: dict[str, list[dict[str, Any]]],
    account: Account,
    *splits: str,
    strict: bool = True,
) -> dict[str, Any]:
    """The rows of a stage as token ids, by split: `answer_ids` for SFT, `chosen_ids` and `rejected_ids` for DPO.

    They are kept on disk for the runs to come, by all that they depend on. Tells the account, with what the limits of
    length have dropped and cut; raises PipelineError where that is more than half, unless not `strict`.
    """
    ends, lengths = ends_and_lengths(run, tokenizer)
    names = answers(run, stage)
    code = [content_hash(Path(tokens.__file__).parent, (".py",)), *map(version, ("tokenizers", "transformers"))]
    how = [tokenizer_hash(tokenizer), ends, dataclasses.astuple(lengths), stage, names, code]
    ids = {}
    for split in splits:

        def make(split: str = split) -> Any:
            table = tokenize(rows[split], names, tokenizer, ends, lengths)
            return table.rename_column(f"{names[0]}_ids", "answer_ids") if stage == "sft" else table

        digest = hashlib.sha256(json.dumps(how).encode())
        for row in rows[split]:
            digest.update("\0".join((key(row), *(row[name] for name in (*names, "source", "origin")), "")).encode())
        place = Path(run.root) / ".cache" / "data" / digest.hexdigest()
        if run.check:  # which leaves nothing
            ids[split] = make()
        else:
            with alone(place):
                table = there(place)
                ids[split] = saved(make(), place) if table is None else table
        account.hear(json.loads(ids[split].info.description))
        account.keep(split, [rows[split][i] for i in ids[split].data.column("row").to_pylist()])
    if strict:
        tell(run, account)
    for split in ("train", "validation"):
        if strict and split in ids and not len(ids[split]):
            raise PipelineError(f"no rows are left for {split}, {account.fitted} were longer than length.max or empty")
    check_ids(run, tokenizer, ids)
    return ids


def tell(run: Run, account: Account) -> None:
    """Print what became of the rows of a stage; raises PipelineError where more than half are cut or dropped."""
    log.info("rows by source\n%s", account.table())
    for sentence in account.doubts(context(run)):
        log.warning("%s", sentence)
    for sentence in account.stops(context(run)):
        raise PipelineError(sentence)


def context(run: Run) -> int:
    """The tokens that the base model of a run can read."""
    return load_config(run.model).get_text_config().max_position_embeddings


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what a tokenizer saves, its chat template included, but for how it padded last."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if (file := Path(folder) / "tokenizer.json").is_file():
            file.write_text(json.dumps({**json.loads(file.read_text()), "padding": None, "truncation": None}))
        return content_hash(Path(folder))


def there(place: Path) -> Any:
    """The table of token ids that an earlier run left at `place`, or None."""
    try:
        return load_from_disk(place)
    except (OSError, ValueError):  # none, or damaged
        return None


def saved(table: Any, place: Path) -> Any:
    """A table, put at `place` for the runs to come, and read from there; `datasets` cannot read one without rows."""
    if not len(table):
        return table
    partial = place.with_suffix(".partial")
    for folder in (partial, place):
        shutil.rmtree(folder, ignore_errors=True)
    table.save_to_disk(partial)
    partial.rename(place)
    return load_from_disk(place)


def check_ids(run: Run, tokenizer: Any, tables: dict[str, Any]) -> None:
    """Raise PipelineError where rows hold a token that the base has no embedding for, at which torch stops."""
    size = load_config(run.model).get_text_config().vocab_size
    columns = (table.data.column(name) for table in tables.values() for name in ids_columns(table))
    found = [compute.max(compute.list_flatten(column)).as_py() or 0 for column in columns]
    if (largest := max(tokenizer.pad_token_id, *found)) >= size:
        raise PipelineError(
            f"the rows hold token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and the base "
            f"{run.model.path} knows {size} tokens: give the tokenizer that it was trained with"
        )


def ends_and_lengths(run: Run, tokenizer: Any) -> tuple[list[int], Lengths]:
    """The ids that end an answer, and the limits of length, for the base model of a run."""
    from transformers import GenerationConfig

    config = load_config(run.model)
    try:
        generation = GenerationConfig.from_pretrained(run.model.path, revision=run.model.revision)
    except OSError:  # a model without generation_config.json
        generation = GenerationConfig.from_model_config(config)
    return end_tokens(tokenizer, generation), Lengths.of(run.length, context(run))


def measuring(run: Run, tokenizer: Any) -> dict[str, Any]:
    """What `evaluation.material` takes beside the rows: how much is measured of the policies of a run, and how.

    Raises PipelineError where an answer would leave no room for its prompt.
    """
    settings, tokens = run.evaluation, context(run)
    if settings.max_new_tokens > tokens - 2:
        raise PipelineError(
            f"evaluation.max_new_tokens={settings.max_new_tokens} leaves no room for a prompt in the model's context "
            f"of {tokens} tokens: lower it"
        )
    return {
        "pairs": min(settings.pairs, 100) if run.debug else settings.pairs,
        "prompts": min(settings.prompts, 8) if run.debug else settings.prompts,
        "room": tokens - settings.max_new_tokens,
        "max_new_tokens": settings.max_new_tokens,
        "dataset": run.dataset_name,
        "tokenizer": tokenizer,
        "ends": ends_and_lengths(run, tokenizer)[0],
        "seed": run.dataset["split_seed"],
        "loading": loading(run),
        "batch_size": run.batch.micro_size,
    }


def limit_steps(run: Run, args: Any, rows: int) -> None:
    """At most 50 steps where `debug` is set."""
    planned = args.max_steps if args.max_steps > 0 else math.ceil(rows / run.batch.global_size) * args.num_train_epochs
    if run.debug and planned > 50:
        args.max_steps = 50


def facts(trainer: Any, rows: dict[str, Any], account: Account, starting: str | Path, how: Loading) -> dict[str, Any]:
    """What the manifest tells of a run: its rows with their account, what it starts from, what it trains."""
    parameters = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    return {
        "rows": {split: len(table) for split, table in rows.items()},
        **account.as_json(),
        "examples": dict(account.examples),
        "data_fingerprint": {split: fingerprint(table) for split, table in rows.items()},
        "starting_policy": str(starting),
        "parameters": sum(n for n, _ in parameters),
        "trainable_parameters": sum(n for n, trained in parameters if trained),
        "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
        "device": str(trainer.args.device),
        "sharded": sharded(trainer),
        "loading": {"dtype": str(how.dtype).removeprefix("torch."), "quantization": how.quantization},
    }


def fingerprint(table: Any) -> str:
    """sha256 of the token ids of a table of rows."""
    digest = hashlib.sha256()
    for name in ids_columns(table):
        column = table.data.column(name)
        for numbers in (compute.list_value_length(column), compute.list_flatten(column)):
            digest.update(numbers.to_numpy().tobytes())
    return digest.hexdigest()


def ids_columns(table: Any) -> list[str]:
    """The columns of a table that hold token ids."""
    return sorted(name for name in table.column_names if name.endswith("_ids"))
