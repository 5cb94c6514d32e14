"""What a stage works on, loaded and derived once: tokenizer, limits, rows as text and as token ids, data report."""

import dataclasses
import gc
import hashlib
import json
import logging
import shutil
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from pyarrow import compute

from dpo_pipeline.content_hash import content_hash
from dpo_pipeline.data import tokens
from dpo_pipeline.data.lengths import LengthLimits
from dpo_pipeline.data.normalize import prompt_key
from dpo_pipeline.data.report import DataReport
from dpo_pipeline.data.splits import load_splits
from dpo_pipeline.data.token_table import tokenize
from dpo_pipeline.data.tokens import eos_ids_of
from dpo_pipeline.distributed import is_main_process, on_main_process, processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.locks import file_lock
from dpo_pipeline.models import LoadOptions, load_config, load_generation_config, load_options, load_tokenizer
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)

Rows = dict[str, list[dict[str, Any]]]  # by split
SPLITS = {"sft": ("train", "validation"), "dpo": ("train", "validation", "test")}


@dataclass
class Prepared:
    """What a stage works on, the same for training, `check=true`, evaluation and the data page.

    `config` is the base model's. `tables` hold token ids by split: `prompt_ids` and `completion_ids` (SFT), or
    `chosen_ids` and `rejected_ids` (DPO); their column `row` counts in `rows`, which rank 0 alone has.
    """

    stage: str
    columns: tuple[str, ...]
    config: Any
    tokenizer: Any
    eos_ids: list[int]
    limits: LengthLimits
    load_options: LoadOptions
    tables: dict[str, Any] = field(default_factory=dict)
    rows: Rows = field(default_factory=dict)
    report: DataReport = field(default_factory=DataReport)

    @property
    def context(self) -> int:
        """The tokens that the base model can read."""
        return self.config.get_text_config().max_position_embeddings


def prepare(run: Run, stage: str, splits: tuple[str, ...] | None = None, strict: bool = True) -> Prepared:
    """Load and tokenize the rows of a stage, by default all splits that it trains on or measures.

    Rank 0 does it, and the other ranks read its tables. Raises PipelineError where rows cannot be read, where too
    many are invalid or too long, or where none are left; not for bad rows unless `strict`.
    """
    tokenizer, config = load_tokenizer(run.model), load_config(run.model)
    limits = LengthLimits.resolve(run.length, config.get_text_config().max_position_embeddings)
    eos_ids = eos_ids_of(tokenizer, load_generation_config(run.model, config))
    data = Prepared(stage, learned_columns(run, stage), config, tokenizer, eos_ids, limits, load_options(run))

    def load_and_tokenize() -> tuple[dict[str, Path], DataReport]:
        gc.disable()  # rows and ids make no cycles, and collecting takes a seventh of the time
        try:
            data.rows, data.report = load_rows(run, stage, tokenizer, strict)
            tokenize_splits(run, data, splits or SPLITS[stage], strict)
        finally:
            gc.enable()
        tables = data.tables if processes() > 1 else {}
        folders = {split: table_folder(table) for split, table in tables.items() if len(table)}
        return folders, data.report

    folders, report = on_main_process(load_and_tokenize)
    if not is_main_process():
        data.report = report
        data.tables = {split: load_from_disk(folder) for split, folder in folders.items()}
    return data


def learned_columns(run: Run, stage: str) -> tuple[str, ...]:
    """The columns of completions that a stage learns from."""
    return (str(run.sft_target),) if stage == "sft" else ("chosen", "rejected")


def load_rows(run: Run, stage: str, tokenizer: Any, strict: bool = True) -> tuple[Rows, DataReport]:
    """The rows of a stage by split, and the report on all rows that were read.

    They are messages where the set's `form` says so or the tokenizer has a chat template, else text.
    """
    dataset = (run.sft_dataset or run.dataset) if stage == "sft" else run.dataset
    is_chat = dataset["form"] == "messages" or (dataset["form"] == "auto" and bool(tokenizer.chat_template))
    # SFT on another set leaves out the prompts on which DPO is tested.
    held_out_set = run.dataset if dataset is run.sft_dataset else None
    return load_splits(dataset, learned_columns(run, stage), is_chat, run.debug, strict, held_out_set)


def tokenize_splits(run: Run, data: Prepared, splits: tuple[str, ...], strict: bool) -> None:
    """Fill in the tables of these splits and what the length limits did to their rows, and log the report."""
    report = data.report
    for split in splits:
        table = data.tables[split] = cached_table(run, data, data.rows[split])
        report.add_table(split, table, data.rows[split])
    if strict:
        log_report(report, data.context)
        for split in ("train", "validation"):
            if split in splits and not len(data.tables[split]):
                raise PipelineError(
                    f"no rows are left for {split}: {report.rows_measured} were longer than length.max, or empty"
                )
    check_vocabulary(run.model.path, data)


def cached_table(run: Run, data: Prepared, rows: list[dict[str, Any]]) -> Any:
    """The token table of these rows, from `<root>/.cache/data` where an earlier run left it, else made and saved."""

    def make_table() -> Any:
        table = tokenize(rows, data.columns, data.tokenizer, data.eos_ids, data.limits)
        if data.stage == "sft":
            table = table.rename_column(f"{data.columns[0]}_ids", "completion_ids")
        return table

    if run.check:  # which leaves nothing behind
        return make_table()
    folder = Path(run.root) / ".cache" / "data" / table_key(data, rows)
    with file_lock(folder):
        table = load_cached_table(folder)
        return save_table(make_table(), folder) if table is None else table


def table_key(data: Prepared, rows: list[dict[str, Any]]) -> str:
    """sha256 of all that a token table depends on: rows, tokenizer, end tokens, limits, and the code."""
    code = [content_hash(Path(tokens.__file__).parent, (".py",)), *map(version, ("tokenizers", "transformers"))]
    limits = dataclasses.astuple(data.limits)
    settings = [tokenizer_hash(data.tokenizer), data.eos_ids, limits, data.stage, data.columns, code]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for row in rows:
        texts = [row[name] for name in (*data.columns, "source", "origin")]
        digest.update("\0".join((prompt_key(row), *texts, "")).encode())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what a tokenizer saves, its chat template included, except for its last padding."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if (file := Path(folder) / "tokenizer.json").is_file():
            file.write_text(json.dumps({**json.loads(file.read_text()), "padding": None, "truncation": None}))
        return content_hash(Path(folder))


def load_cached_table(folder: Path) -> Any:
    """The token table that an earlier run left in `folder`, or None where there is none, or a damaged one."""
    try:
        return load_from_disk(folder)
    except (OSError, ValueError):
        return None


def save_table(table: Any, folder: Path) -> Any:
    """Save a table whole or not at all, and read it from `folder`; `datasets` cannot read one without rows."""
    if not len(table):
        return table
    partial = folder.with_suffix(".partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    table.save_to_disk(partial)
    partial.rename(folder)
    return load_from_disk(folder)


def table_folder(table: Any) -> Path:
    """The folder that a table was read from."""
    return Path(table.cache_files[0]["filename"]).parent


def log_report(report: DataReport, context: int) -> None:
    """Log what became of the rows; raises PipelineError where more than half are cut or dropped."""
    log.info("rows by source\n%s", report.table())
    for sentence in report.warnings(context):
        log.warning("%s", sentence)
    for sentence in report.errors(context):
        raise PipelineError(sentence)


def check_vocabulary(model: str, data: Prepared) -> None:
    """Raise PipelineError where rows hold a token that the base model has no embedding for: torch would crash."""
    size = data.config.get_text_config().vocab_size
    largest = data.tokenizer.pad_token_id
    for table in data.tables.values():
        for name in ids_columns(table):
            largest = max(largest, compute.max(compute.list_flatten(table.data.column(name))).as_py() or 0)
    if largest >= size:
        token = data.tokenizer.convert_ids_to_tokens(largest)
        raise PipelineError(
            f"the rows hold token {largest} ({token!r}), and the base {model} knows {size} tokens: give the tokenizer "
            "that it was trained with"
        )


def table_fingerprint(table: Any) -> str:
    """sha256 of the token ids of a table."""
    digest = hashlib.sha256()
    for name in ids_columns(table):
        column = table.data.column(name)
        for numbers in (compute.list_value_length(column), compute.list_flatten(column)):
            digest.update(numbers.to_numpy().tobytes())
    return digest.hexdigest()


def ids_columns(table: Any) -> list[str]:
    """The columns of a table that hold token ids."""
    return sorted(name for name in table.column_names if name.endswith("_ids"))
