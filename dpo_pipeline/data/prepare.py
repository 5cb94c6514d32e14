"""What a stage works on, loaded and derived once: tokenizer, limits, rows as text and as token ids, data report."""

import dataclasses
import gc
import hashlib
import json
import logging
import shutil
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import load_from_disk
from pyarrow import parquet

from dpo_pipeline.content_hash import content_hash, tokenizer_hash
from dpo_pipeline.data import tokens
from dpo_pipeline.data.files import Row
from dpo_pipeline.data.messages import fix_date, is_trained
from dpo_pipeline.data.normalize import check_template, reply_key
from dpo_pipeline.data.report import count_rows, find_errors, find_warnings, kept_rows, print_report
from dpo_pipeline.data.splits import find_test_names, load_splits
from dpo_pipeline.data.token_table import LengthLimits, check_ids, tokenize
from dpo_pipeline.distributed import is_main_process, on_main_process, processes
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.locks import file_lock
from dpo_pipeline.models import LoadOptions, load_config, load_generation_config, load_options
from dpo_pipeline.schema import Run
from dpo_pipeline.tokenizer import load_tokenizer

log = logging.getLogger(__name__)

SPLITS = {"sft": ("train", "validation"), "dpo": ("train", "validation", "test")}
MARKS = ("reason", "kind", "cut", "tokens", "retokenized")  # what tokenizing fills in, beside counts of tokens


@dataclass
class Prepared:
    """What a stage works on, the same for training, `check=true`, evaluation and the data page.

    `dataset` is the config node of the set, `config` the base model's. `tables` hold token ids by split: `prompt_ids`
    and `completion_ids` (SFT), or `chosen_ids` and `rejected_ids` (DPO); their column `row` counts in `rows`. Rank 0
    alone has `rows` and `all_rows`, those that are not kept too. `report` is what `count_rows` makes of them.
    """

    stage: str
    columns: tuple[str, ...]
    config: Any
    tokenizer: Any
    eos_ids: list[int]
    limits: LengthLimits
    load_options: LoadOptions
    all_turns: bool = False  # sft_loss=all: the earlier replies of a prompt are learned too
    dataset: dict[str, Any] = field(default_factory=dict)
    chat_date: str = ""
    tables: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    all_rows: list[Row] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def context(self) -> int:
        """The tokens that the base model can read."""
        return self.config.get_text_config().max_position_embeddings

    def list_warnings(self) -> list[str]:
        """What a run on these rows warns of, a sentence each."""
        return find_test_names(self.dataset) + find_warnings(self.all_rows, self.limits.max, self.context)

    def list_errors(self) -> list[str]:
        """What would end a run on these rows, a sentence each."""
        return find_errors(self.all_rows, self.dataset["on_bad_row"], self.limits.max, self.context)


def prepare(run: Run, stage: str, splits: tuple[str, ...] | None = None, strict: bool = True) -> Prepared:
    """Load and tokenize the rows of a stage, by default all splits that it trains on or measures.

    Rank 0 does it, and the other ranks read its tables. Raises PipelineError where rows cannot be read, where none are
    left and, if `strict`, where too many are invalid or too long.
    """
    datasets.config.HF_DATASETS_CACHE = Path(run.root) / ".cache" / "datasets"  # HF_HOME may be read-only
    tokenizer, config = load_tokenizer(run.model), load_config(run.model)
    limits = LengthLimits.resolve(run.length, config.get_text_config().max_position_embeddings)
    eos_ids = tokens.eos_ids_of(tokenizer, load_generation_config(run.model, config))
    dataset, columns = stage_dataset(run, stage)
    date = fix_date(tokenizer, run.home, run.check)
    all_turns = stage == "sft" and run.sft_loss == "all"
    data = Prepared(stage, columns, config, tokenizer, eos_ids, limits, load_options(run), all_turns, dataset, date)

    def load_and_tokenize() -> tuple[dict[str, Path], dict[str, Any]]:
        gc.disable()  # rows and ids make no cycles, and collecting takes a seventh of the time
        try:
            data.all_rows = load_rows(run, stage, tokenizer, strict)
            data.rows = {split: kept_rows(data.all_rows, split) for split in SPLITS["dpo"]}
            data.tables = {split: cached_table(run, data, data.rows[split]) for split in splits or SPLITS[stage]}
        finally:
            gc.enable()
        data.report = count_rows(data.all_rows)
        if strict:
            check_report(data)
        name = "the embedded model" if run.model.builder else run.model.path
        check_ids(data.tables, data.tokenizer, config.get_text_config().vocab_size, name)
        tables = data.tables if processes() > 1 else {}
        folders = {name: Path(table.cache_files[0]["filename"]).parent for name, table in tables.items() if len(table)}
        return folders, data.report

    folders, data.report = on_main_process(load_and_tokenize)
    if not is_main_process():
        data.tables = {split: load_from_disk(folder) for split, folder in folders.items()}
    return data


def check_report(data: Prepared) -> None:
    """Log what became of the rows; raises PipelineError where too many are cut or dropped, or none are left."""
    log.info("rows by source\n%s", print_report(data.report, data.all_rows))
    for sentence in data.list_warnings():
        log.warning("%s", sentence)
    for sentence in data.list_errors():
        raise PipelineError(sentence)
    for split in ("train", "validation"):
        if split in data.tables and not len(data.tables[split]):
            raise PipelineError(f"no rows are left for {split}: all were longer than length.max, or empty: raise it")


def stage_dataset(run: Run, stage: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config node of the data set that a stage learns from, and the columns of its completions."""
    if stage == "sft":
        return run.sft_dataset or run.dataset, (str(run.sft_target),)
    return run.dataset, ("chosen", "rejected")


def load_rows(run: Run, stage: str, tokenizer: Any, strict: bool = True) -> list[Row]:
    """Every row of a stage, with its split, and why it is not kept; messages for a chat model, else text."""
    dataset, columns = stage_dataset(run, stage)
    is_chat = dataset["form"] == "messages" or (dataset["form"] == "auto" and bool(tokenizer.chat_template))
    # SFT on another set leaves out the prompts on which DPO is tested.
    held_out_set = run.dataset if dataset is run.sft_dataset else None
    rows = load_splits(dataset, columns, is_chat, run.debug, strict, held_out_set)
    all_turns = stage == "sft" and run.sft_loss == "all"
    if is_chat:
        check_template(rows, str(tokenizer.chat_template), ("weight", "train") if all_turns else ())
    elif all_turns:
        raise PipelineError(
            "sft_loss=all needs a chat model, whose rows are messages: type model=..., or sft_loss=last"
        )
    return rows


def cached_table(run: Run, data: Prepared, rows: list[Row]) -> Any:
    """The token table of these rows, from `<root>/.cache/data` where an earlier run left it, else made and saved."""

    def make_table() -> Any:
        table = tokenize(rows, data.columns, data.tokenizer, data.eos_ids, data.limits, data.all_turns)
        return table.rename_column(f"{data.columns[0]}_ids", "completion_ids") if data.stage == "sft" else table

    if run.check:  # which leaves nothing behind
        return make_table()
    folder = Path(run.root) / ".cache" / "data" / table_key(data, rows)
    names = [*MARKS, *(f"{name}_tokens" for name in ("prompt", *data.columns))]
    with file_lock(folder):
        try:
            table, marks = load_from_disk(folder), parquet.read_table(folder / "rows.parquet").to_pylist()
        except (OSError, ValueError):  # there is none, or a damaged one
            table, partial = make_table(), folder.with_suffix(".partial")
            if not len(table):  # which `datasets` cannot read
                return table
            for leftover in (partial, folder):
                shutil.rmtree(leftover, ignore_errors=True)
            table.save_to_disk(partial)
            marks = pa.table({name: [row.get(name) for row in rows] for name in names})
            parquet.write_table(marks, partial / "rows.parquet")
            partial.rename(folder)
            return load_from_disk(folder)
    for row, marks_of_row in zip(rows, marks, strict=True):
        row |= marks_of_row
    return table


def table_key(data: Prepared, rows: list[Row]) -> str:
    """sha256 of all that a token table depends on: rows, tokenizer, date, end tokens, limits, and the code."""
    code = [content_hash(Path(tokens.__file__).parent, (".py",)), *map(version, ("tokenizers", "transformers"))]
    limits = dataclasses.astuple(data.limits)
    settings = [tokenizer_hash(data.tokenizer), data.chat_date, data.eos_ids, limits, data.stage, data.columns, code]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for row in rows:
        texts = [reply_key(row, name) for name in data.columns]
        tools = json.dumps(row["tools"]) if "tools" in row else ""
        marks = [is_trained(message) for message in row["prompt"]] if data.all_turns else row.get("weight", "")
        digest.update("\0".join((row["key"], str(marks), *texts, tools, row["source"], row["origin"], "")).encode())
    return digest.hexdigest()
