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

from dpo_pipeline.config import Run, instantiate_node
from dpo_pipeline.data import tokens
from dpo_pipeline.data.lengths import LengthLimits
from dpo_pipeline.data.report import DataReport
from dpo_pipeline.data.splits import load_splits, prompt_key
from dpo_pipeline.data.tokens import eos_ids_of, tokenize
from dpo_pipeline.distributed import on_main_process, processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.locks import file_lock
from dpo_pipeline.models import LoadOptions, load_config
from dpo_pipeline.run_folder import content_hash
from dpo_pipeline.training.starting_policy import load_options
from dpo_pipeline.training.trainer import sharding

log = logging.getLogger(__name__)


def prepare_base(run: Run) -> None:
    """Make the base model where it is one that code makes."""
    if run.model.builder:
        on_main_process(lambda: instantiate_node(run.model.builder, folder=run.model.path))


def load_rows(
    run: Run, stage: str, tokenizer: Any, strict: bool = True
) -> tuple[dict[str, list[dict[str, Any]]], DataReport]:
    """The rows that a stage learns from, by split, and the account of all that were read.

    As messages where the set's `form` says so, or the tokenizer has a chat template; else as text. Raises
    PipelineError where too many teach nothing, unless not `strict`.
    """
    node = (run.sft_dataset or run.dataset) if stage == "sft" else run.dataset
    chat = bool(tokenizer.chat_template) if node["form"] == "auto" else node["form"] == "messages"
    pairs = run.dataset if node is run.sft_dataset else None  # what DPO is tested on, its SFT has not seen
    return load_splits(node, learned_columns(run, stage), chat, run.debug, strict, pairs)


def learned_columns(run: Run, stage: str) -> tuple[str, ...]:
    """The columns that a stage learns from."""
    return (str(run.sft_target),) if stage == "sft" else ("chosen", "rejected")


def prepare_tables(run: Run, stage: str, tokenizer: Any, *splits: str) -> tuple[dict[str, Any], DataReport]:
    """The rows of a stage, loaded, told of and as token ids, and their account."""
    return prepare_tables_with_rows(run, stage, tokenizer, *splits)[:2]


def prepare_tables_with_rows(
    run: Run, stage: str, tokenizer: Any, *splits: str
) -> tuple[dict[str, Any], DataReport, dict[str, list[dict[str, Any]]]]:
    """What `prepared` gives, and the rows that the tables' column `row` counts, by split."""
    gc.disable()  # rows and ids make no cycles, and to look through them all for some is a seventh of the time
    try:
        rows, data_report = load_rows(run, stage, tokenizer)
        return tokenize_splits(run, stage, tokenizer, rows, data_report, *splits), data_report, rows
    finally:
        gc.enable()


def on_main_process_shared(run: Run, make: Callable[[], tuple[dict[str, Any], Any]]) -> tuple[dict[str, Any], Any]:
    """The tables and whatever else `make` gives, made by rank 0 alone; the tables reach the other ranks by disk."""

    def made() -> tuple[dict[str, Any], Any]:
        tables, other = make()
        places = {split: Path(table.cache_files[0]["filename"]).parent for split, table in tables.items()}
        return (tables if processes() == 1 else places), other

    tables, other = on_main_process(made)
    tables = {k: load_from_disk(v) for k, v in tables.items()} if processes() > 1 else tables
    return {k: table.remove_columns("row") for k, table in tables.items()}, other


def tokenize_splits(
    run: Run,
    stage: str,
    tokenizer: Any,
    rows: dict[str, list[dict[str, Any]]],
    data_report: DataReport,
    *splits: str,
    strict: bool = True,
) -> dict[str, Any]:
    """The rows of a stage as token ids, by split: `completion_ids` for SFT, `chosen_ids` and `rejected_ids` for DPO.

    They are kept on disk for the runs to come, by all that they depend on. Tells the account, with what the limits of
    length have dropped and cut; raises PipelineError where that is more than half, unless not `strict`.
    """
    eos_ids, lengths = ends_and_lengths(run, tokenizer)
    names = learned_columns(run, stage)
    code = [content_hash(Path(tokens.__file__).parent, (".py",)), *map(version, ("tokenizers", "transformers"))]
    how = [tokenizer_hash(tokenizer), eos_ids, dataclasses.astuple(lengths), stage, names, code]
    ids = {}
    for split in splits:

        def make(split: str = split) -> Any:
            table = tokenize(rows[split], names, tokenizer, eos_ids, lengths)
            return table.rename_column(f"{names[0]}_ids", "completion_ids") if stage == "sft" else table

        digest = hashlib.sha256(json.dumps(how).encode())
        for row in rows[split]:
            digest.update(
                "\0".join((prompt_key(row), *(row[name] for name in (*names, "source", "origin")), "")).encode()
            )
        place = Path(run.root) / ".cache" / "data" / digest.hexdigest()
        if run.check:  # which leaves nothing
            ids[split] = make()
        else:
            with file_lock(place):
                table = load_cached_table(place)
                ids[split] = save_table(make(), place) if table is None else table
        data_report.merge(json.loads(ids[split].info.description))
        data_report.keep(split, [rows[split][i] for i in ids[split].data.column("row").to_pylist()])
    if strict:
        report_data(run, data_report)
    for split in ("train", "validation"):
        if strict and split in ids and not len(ids[split]):
            raise PipelineError(
                f"no rows are left for {split}, {data_report.rows_measured} were longer than length.max or empty"
            )
    check_ids(run, tokenizer, ids)
    return ids


def report_data(run: Run, data_report: DataReport) -> None:
    """Print what became of the rows of a stage; raises PipelineError where more than half are cut or dropped."""
    log.info("rows by source\n%s", data_report.table())
    for sentence in data_report.warnings(context_length(run)):
        log.warning("%s", sentence)
    for sentence in data_report.errors(context_length(run)):
        raise PipelineError(sentence)


def context_length(run: Run) -> int:
    """The tokens that the base model of a run can read."""
    return load_config(run.model).get_text_config().max_position_embeddings


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what a tokenizer saves, its chat template included, but for how it padded last."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if (file := Path(folder) / "tokenizer.json").is_file():
            file.write_text(json.dumps({**json.loads(file.read_text()), "padding": None, "truncation": None}))
        return content_hash(Path(folder))


def load_cached_table(place: Path) -> Any:
    """The table of token ids that an earlier run left at `place`, or None."""
    try:
        return load_from_disk(place)
    except (OSError, ValueError):  # none, or damaged
        return None


def save_table(table: Any, place: Path) -> Any:
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


def ends_and_lengths(run: Run, tokenizer: Any) -> tuple[list[int], LengthLimits]:
    """The ids that end a completion, and the limits of length, for the base model of a run."""
    from transformers import GenerationConfig

    config = load_config(run.model)
    try:
        generation = GenerationConfig.from_pretrained(run.model.path, revision=run.model.revision)
    except OSError:  # a model without generation_config.json
        generation = GenerationConfig.from_model_config(config)
    return eos_ids_of(tokenizer, generation), LengthLimits.resolve(run.length, context_length(run))


def eval_settings(run: Run, tokenizer: Any) -> dict[str, Any]:
    """What `evaluation.material` takes beside the rows: how much is measured of the policies of a run, and how.

    Raises PipelineError where a completion would leave no room for its prompt.
    """
    settings, tokens = run.evaluation, context_length(run)
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
        "eos_ids": ends_and_lengths(run, tokenizer)[0],
        "seed": run.dataset["split_seed"],
        "loading": load_options(run),
        "batch_size": run.batch.micro_size,
    }


def limit_steps(run: Run, args: Any, rows: int) -> None:
    """At most 50 steps where `debug` is set."""
    planned = args.max_steps if args.max_steps > 0 else math.ceil(rows / run.batch.global_size) * args.num_train_epochs
    if run.debug and planned > 50:
        args.max_steps = 50


def manifest_facts(
    trainer: Any, rows: dict[str, Any], data_report: DataReport, starting: str | Path, options: LoadOptions
) -> dict[str, Any]:
    """What the manifest tells of a run: its rows with their account, what it starts from, what it trains."""
    parameters = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    return {
        "rows": {split: len(table) for split, table in rows.items()},
        **data_report.as_json(),
        "examples": dict(data_report.examples),
        "data_fingerprint": {split: fingerprint(table) for split, table in rows.items()},
        "starting_policy": str(starting),
        "parameters": sum(n for n, _ in parameters),
        "trainable_parameters": sum(n for n, trained in parameters if trained),
        "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
        "device": str(trainer.args.device),
        "sharded": sharding(trainer),
        "loading": {"dtype": str(options.dtype).removeprefix("torch."), "quantization": options.quantization},
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
