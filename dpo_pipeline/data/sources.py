"""Reads a data set's rows, from a local file or folder or from the hub, each with its origin."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dpo_pipeline.errors import PipelineError, explain_disk

ENDINGS = (".json", ".jsonl", ".gz", ".csv", ".parquet")  # of what can only be meant as a file
FORM = "give one JSON object for each row: one on each line, or all in one list"
Rows = Iterator[tuple[str, dict[str, Any]]]  # each with its origin, such as `pairs.jsonl, line 3`


def read_source(
    path: str, data_dir: str | None = None, revision: str | None = None, splits: dict[str, str] | None = None
) -> dict[str, Rows]:
    """Rows of the splits `train` and `test`, as far as there are, one at a time; a single file is `train`.

    `path` is a local .json, .jsonl, .csv or .parquet file (or .gz), a local folder or a hub id; `data_dir` a folder in
    it, `revision` the hub's; `splits` names the set's own split for each of ours. Raises PipelineError where nothing
    can be read there; for a broken row, when it is come to.
    """
    local = Path(path).expanduser()
    if splits is not None and not (isinstance(splits, dict) and {"train"} <= set(splits) <= {"train", "test"}):
        raise PipelineError(
            f"dataset.splits={splits} does not say which of the set's own splits are train and test: type "
            "'dataset.splits={train: NAME, test: NAME}'"
        )
    if local.is_file():
        return {"train": read_file(local, path)}
    if not local.is_dir() and (
        local.is_absolute() or path.startswith((".", "~")) or local.suffix in ENDINGS or path.count("/") > 1
    ):
        raise PipelineError(f"there is no file or folder {path} (from {Path.cwd()}): check the path")
    if (local / "config.json").is_file():
        raise PipelineError(
            f"{path} is a model, not a data set: give that by model.path=, and the pairs by dataset.path="
        )
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    where = f"{path}, folder {data_dir}" if data_dir else path
    try:
        # Unverified: of a set of millions of rows one may read a folder, whose sizes its card does not tell.
        name, options = (str(local) if local.is_dir() else path), {"data_dir": data_dir, "revision": revision}
        found = load_dataset(name, verification_mode="no_checks", **options)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise PipelineError(
            f"the data set {path} is neither a local path nor to be had from the hub ({first_line(error)}): "
            "check the name and the network, `hf auth login` for a gated one, or give a local copy by dataset.path=..."
        ) from error
    except (DatasetsError, OSError, EOFError, ValueError, RuntimeError) as error:
        if sentence := explain_disk(error):
            raise PipelineError(sentence) from error
        for file in sorted((local / (data_dir or "")).glob("*.json*")):
            for _ in read_file(file, str(file)):  # names the line, which datasets does not
                pass
        reason = first_line(error.__cause__ or error)
        if "corresponds to no data" in reason:
            reason = "it holds no rows"
        elif reason == "Couldn't cast":
            reason = "the columns of its files are not the same"
        fix = (
            "; without dataset.subsets or data_dir the files that lie in the folder itself are read"
            if data_dir
            else ""
        )
        raise PipelineError(
            f"{where} cannot be read as a data set: {reason}: {FORM}, in a .jsonl file{fix}"
        ) from error
    names = splits or {name: name for name in ("train", "test") if name in found}
    for name in map(str, names.values()):
        if name not in found:
            raise PipelineError(
                f"{where} has no split {name} (found {', '.join(found)}): name its own by dataset.splits"
            )
    if "train" not in names:
        listed = ", ".join(found)
        raise PipelineError(f"{where} has no split train (found {listed}): type 'dataset.splits={{train: NAME}}'")
    return {ours: rows_of(found[theirs], f"{where}, {theirs} row") for ours, theirs in names.items()}


def rows_of(split: Any, label: str) -> Rows:
    """The rows of a `datasets` split, a thousand at a time."""
    for start in range(0, len(split), 1000):
        for i, row in enumerate(split.select(range(start, min(start + 1000, len(split)))).to_list(), start):
            yield f"{label} {i}", row


def read_file(file: Path, path: str) -> Rows:
    """The rows of a file with their origins; raises PipelineError that names the line."""
    name = file.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        yield from parquet_rows(file, path)
        return
    empty = True
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for origin, row in csv_rows(stream, path) if name.endswith(".csv") else json_rows(stream, path):
                if not isinstance(row, dict):
                    raise PipelineError(f"{origin} holds {json_type(row)}, not an object: {FORM}")
                empty = False
                yield origin, row
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PipelineError(
            f"{path} cannot be read as a data set: it cannot be unpacked ({error}), it is cut short or no gzip file: "
            "fetch it again, or take .gz off its name"
        ) from error
    if empty:
        raise PipelineError(f"{path} is empty: {FORM}")


def json_rows(stream: IO[bytes], path: str) -> Rows:
    """The objects of JSON text: one on each line, or all in one list."""
    # Lines end at \n alone: text may hold other line breaks, such as U+2028, as they are.
    for i, line in enumerate(stream, 1):
        text = decode_line(line, path, i)
        if text.lstrip().startswith("["):
            rest = [decode_line(other, path, j) for j, other in enumerate(stream, i + 1)]
            for j, row in enumerate(parse_json("".join([text, *rest]), path, i), 1):
                yield f"{path}, row {j}", row
        elif text.strip():
            yield f"{path}, line {i}", parse_json(text.rstrip("\r\n"), path, i)


def csv_rows(stream: IO[bytes], path: str) -> Rows:
    """The rows of comma-separated values below a line of column names."""
    csv.field_size_limit(2**31 - 1)  # of characters in a field, 131,072 unless said
    # Strict: a quote that is never closed would take all lines behind it into one field.
    reader = csv.reader((decode_line(line, path, i) for i, line in enumerate(stream, 1)), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise PipelineError(f"{path}: two of its columns have one name ({', '.join(header)}): rename one")
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise PipelineError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields below {len(header)} column names: put a "
                    "field that holds a comma or a line break between double quotes"
                )
            yield f"{path}, line {reader.line_num}", dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise PipelineError(f"{path}, line {reader.line_num}: no comma-separated values ({error})") from error


def parquet_rows(file: Path, path: str) -> Rows:
    """The rows of a Parquet file."""
    from pyarrow import ArrowInvalid, parquet

    try:
        batches = parquet.ParquetFile(file).iter_batches(1000)
        for start, batch in zip(range(0, 2**62, 1000), batches, strict=False):
            for i, row in enumerate(batch.to_pylist(), start + 1):
                yield f"{path}, row {i}", row
    except (ArrowInvalid, OSError) as error:
        raise PipelineError(f"{path} cannot be read as a data set: {first_line(error)}: fetch it again") from error


def decode_line(line: bytes, path: str, number: int) -> str:
    """A line's text."""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise PipelineError(
            f"{path} cannot be read as a data set: line {number} is not UTF-8: save it as that"
        ) from error


def parse_json(text: str, path: str, first: int) -> Any:
    """What JSON text of a file holds, whose first line is the file's line `first`."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half of a character is none, and no file could hold it
        return value
    except json.JSONDecodeError as error:
        line, why = first + error.lineno - 1, f"{error.msg}, at character {error.colno}"
    except UnicodeEncodeError:
        line, why = first, "half of a character, \\ud800 or the like"
    except (ValueError, RecursionError) as error:
        line, why = first, first_line(error)
    raise PipelineError(f"{path} cannot be read as a data set: line {line} is no JSON ({why}): {FORM}")


def require_text(row: dict[str, Any], columns: tuple[str, ...], origin: str) -> dict[str, str]:
    """These columns of a row; raises PipelineError unless each is there and is text."""
    for column in columns:
        if column not in row:
            raise PipelineError(
                f"{origin} has no column {column!r}: found {', '.join(row) or 'none'}: each row is to have "
                f"{', '.join(columns)}"
            )
        if not isinstance(row[column], str):
            raise PipelineError(f"{origin}: {column} is {json_type(row[column])}, not text: correct it or take it out")
    return {column: row[column] for column in columns}


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def json_type(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {
        type(None): "null",
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
    }
    return names.get(type(value), "an object")
