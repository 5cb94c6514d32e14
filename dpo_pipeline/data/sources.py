"""Reads the rows of a data set, from a local file or folder or from the hub, each with its origin.

Text stays text: the readers of `datasets` and pandas take dates and words such as None for values of other types.
"""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from dpo_pipeline.errors import PipelineError, explain_disk
from dpo_pipeline.formatting import one_line

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]  # each with its origin, such as `pairs.jsonl, line 3`

FILE_ENDINGS = (".json", ".jsonl", ".gz", ".csv", ".parquet")  # a path with one of these can only mean a file
FORM = "give one JSON object for each row: one on each line, or all in one list"
ROWS_AT_A_TIME = 1000


def read_source(
    path: str, data_dir: str | None = None, revision: str | None = None, splits: dict[str, str] | None = None
) -> dict[str, Rows]:
    """Rows of the splits `train` and, if there is one, `test`, one at a time; a single file is `train`.

    `path` is a local .json, .jsonl, .csv or .parquet file (or .gz), a local folder, or a hub id. `data_dir` is a
    folder in it, `revision` the hub's; `splits` names the set's own split for each of ours. Raises PipelineError
    if nothing can be read; for a broken row, when the reader reaches it.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return {"train": read_file(local, path)}
    looks_local = local.is_absolute() or path.startswith((".", "~")) or local.suffix in FILE_ENDINGS
    if not local.is_dir() and (looks_local or path.count("/") > 1):
        raise PipelineError(f"there is no file or folder {path} (from {Path.cwd()}): check the path")
    if (local / "config.json").is_file():
        raise PipelineError(f"{path} is a model, not a data set: type model.path={path} and dataset.path=...")
    label = f"{path}, folder {data_dir}" if data_dir else path
    dataset = load_dataset_splits(path, data_dir, revision, label)
    if splits is None:
        splits = {"test": "test"} if "test" in dataset else {}
    split_names = {"train": "train", **splits}
    for name in split_names.values():
        if name not in dataset:
            names = ", ".join(dataset)
            raise PipelineError(f"{label} has no split {name}, only {names}: type 'dataset.splits={{train: NAME}}'")
    return {split: read_dataset_rows(dataset[name], f"{label}, {name} row") for split, name in split_names.items()}


def load_dataset_splits(path: str, data_dir: str | None, revision: str | None, label: str) -> dict[str, Any]:
    """The splits of a folder or hub id as `datasets` reads them; raises PipelineError if it cannot."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    local = Path(path).expanduser()
    name = str(local) if local.is_dir() else path
    try:
        # Not verified: the card of a set of millions of rows has no sizes of the one folder that is read.
        return load_dataset(name, data_dir=data_dir, revision=revision, verification_mode="no_checks")
    except (DatasetNotFoundError, ConnectionError) as error:
        raise PipelineError(
            f"the data set {path} is neither a local path nor on the hub ({one_line(str(error))}): check the name and "
            "the network, run `hf auth login` for a gated one, or give a local copy by dataset.path=..."
        ) from error
    except (DatasetsError, OSError, EOFError, ValueError, RuntimeError, StopIteration) as error:
        if sentence := explain_disk(error):
            raise PipelineError(sentence) from error
        for file in sorted((local / (data_dir or "")).glob("*.json*")):
            for _ in read_file(file, str(file)):  # names the line, which `datasets` does not
                pass
        hint = "; without dataset.subsets or data_dir the files in the folder itself are read" if data_dir else ""
        raise unreadable(label, error.__cause__ or error, f"{FORM}, in a .jsonl file{hint}") from error


def read_dataset_rows(split: Any, label: str) -> Rows:
    """The rows of a `datasets.Dataset` as Python's own values."""
    for start in range(0, len(split), ROWS_AT_A_TIME):
        part = split.select(range(start, min(start + ROWS_AT_A_TIME, len(split))))
        for number, row in enumerate(part.to_list(), start):
            yield f"{label} {number}", row


def read_file(file: Path, path: str) -> Rows:
    """The rows of a file with their origins, in which it is called `path`; PipelineError names a broken line."""
    name, is_empty = file.name.removesuffix(".gz"), True
    if name.endswith(".parquet"):
        rows = read_parquet_rows(file, path)
    else:
        rows = (read_csv_rows if name.endswith(".csv") else read_json_rows)(read_lines(file, path), path)
    for origin, row in rows:
        if not isinstance(row, dict):
            raise PipelineError(f"{origin} holds {show_value(row)}, not an object: {FORM}")
        is_empty = False
        yield origin, row
    if is_empty:
        raise PipelineError(f"{path} is empty: {FORM}")


def read_lines(file: Path, path: str) -> Iterator[str]:
    """The lines of a text file. They end at \\n alone: text may hold other line breaks, such as U+2028."""
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise unreadable(path, f"line {number} is not UTF-8", "save it as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise unreadable(path, error, "it is cut short or no gzip file: fetch it again, or take .gz off") from error


def read_json_rows(lines: Iterator[str], path: str) -> Rows:
    """The objects of JSON text: one on each line, or all in one list."""
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("["):
            whole_list = parse_json(line + "".join(lines), path, number)
            yield from ((f"{path}, row {index}", row) for index, row in enumerate(whole_list, 1))
        elif line.strip():
            yield f"{path}, line {number}", parse_json(line.rstrip("\r\n"), path, number)


def parse_json(text: str, path: str, first_line: int) -> Any:
    """The value of JSON text that begins at the file's line `first_line`."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # fails for half of a surrogate pair
        return value
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, f"{error.msg}, at character {error.colno}"
    except (ValueError, RecursionError) as error:
        line, reason = first_line, str(error)
    raise unreadable(path, f"line {line} is no JSON ({reason})", FORM)


def read_csv_rows(lines: Iterator[str], path: str) -> Rows:
    """The rows of comma-separated values below a line of column names."""
    csv.field_size_limit(2**31 - 1)  # in characters; the default is 131,072
    # Strict: a quote that is never closed would take all lines behind it into one field.
    reader = csv.DictReader(lines, strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise PipelineError(f"{path}: two of its columns have one name ({', '.join(names)}): rename one")
        for row in reader:
            if None in row or None in row.values():  # more fields than names, or fewer
                raise csv.Error(f"not {len(names)} fields, as there are column names")
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        remedy = "put a field that holds a comma, a quote or a line break between double quotes"
        raise unreadable(path, f"line {reader.line_num} is no CSV: {error}", remedy) from error


def read_parquet_rows(file: Path, path: str) -> Rows:
    """The rows of a Parquet file."""
    from pyarrow import ArrowInvalid, parquet

    try:
        batches = parquet.ParquetFile(file).iter_batches(ROWS_AT_A_TIME)
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
    except (ArrowInvalid, OSError) as error:
        raise unreadable(path, error, "fetch it again") from error


def check_text(value: Any, label: str) -> str:
    """The value, if it is text; raises PipelineError otherwise."""
    if not isinstance(value, str):
        raise PipelineError(f"{label} is {show_value(value)}, not text: correct it or take it out")
    return value


def show_value(value: Any) -> str:
    """A value as JSON writes it, cut to a few words."""
    return one_line(json.dumps(value, default=str), 60)


def unreadable(path: str, reason: str | BaseException, remedy: str) -> PipelineError:
    """The error for a file or folder whose rows cannot be read."""
    sentence = one_line(str(reason)) or type(reason).__name__
    return PipelineError(f"{path} cannot be read as a data set: {sentence}: {remedy}")
