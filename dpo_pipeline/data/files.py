"""Reads the rows of one file, each with its origin, and says what is wrong where it cannot be read.

Text stays text: the readers of `datasets` and pandas take dates and words such as None for other types.
"""

import ast
import csv
import gzip
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from dpo_pipeline.config import CONF
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.formatting import one_line

Row = dict[str, Any]
Rows = Iterator[tuple[str, Row]]  # each with its origin, such as `pairs.jsonl, line 3`

OTHER_ENDINGS = (".tsv", ".xlsx", ".xls", ".ods", ".zst", ".xz", ".bz2", ".zip", ".txt", ".arrow", ".parquet.gz")
FORM = "give one JSON object for each row: one on each line, or all in one list"


def remedy_of(path: str) -> str:
    """What to type where a file is missing: the line of the recipe that fetches it, else to look at the path."""
    for recipe in (CONF / "experiment").glob("*.yaml"):
        if line := re.search(rf"curl -LO \S+/{re.escape(Path(path).name)}$", recipe.read_text("utf-8"), re.MULTILINE):
            return f"fetch it by `{line[0]}`"
    return "check the path"


def read_file(file: Path, path: str) -> Rows:
    """The rows of a file with their origins, in which it is called `path`; PipelineError names a broken line."""
    name, is_empty = file.name.removesuffix(".gz"), True
    if file.name.endswith(OTHER_ENDINGS):
        raise unreadable(path, f"{file.suffix} files are not supported", "save it as .jsonl, .csv or .parquet")
    if name.endswith(".parquet"):
        rows = read_parquet(file, path)
    else:
        rows = (read_csv if name.endswith(".csv") else read_json_rows)(read_lines(file, path), path)
    for origin, row in rows:
        if is_dialogue(row):
            row = {"messages": row}
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
    """The values of JSON text: one on each line, or all in one list; a dialogue on a line is a list too."""
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("[") and not is_dialogue(decode(line)):
            values = enumerate(parse_json(line + "".join(lines), path, number), 1)
            yield from ((f"{path}, row {place}", value) for place, value in values)
        elif line.strip():
            yield f"{path}, line {number}", parse_json(line.rstrip("\r\n"), path, number)


def is_dialogue(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role, or ShareGPT's with `from` and `value`."""
    messages = value if isinstance(value, list) else []
    return bool(messages) and all(
        isinstance(m, dict) and ("role" in m or {"from", "value"} <= m.keys()) for m in messages
    )


def decode(value: Any) -> Any:
    """The messages that a text holds as JSON or as Python writes them; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for parse in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                parsed = parse(value.strip())
                return parsed if is_dialogue(parsed if isinstance(parsed, list) else [parsed]) else value
    return value


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


def read_csv(lines: Iterator[str], path: str) -> Rows:
    """The rows of comma-separated values below a line of column names."""
    csv.field_size_limit(2**31 - 1)  # in characters; the default is 131,072
    # Strict: a quote that is never closed would take all lines behind it into one field.
    reader = csv.DictReader(lines, strict=True)
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise PipelineError(f"{path}: two of its columns have one name ({list_names(names)}): rename one")
        for row in reader:
            if None in row or None in row.values():  # more fields than names, or fewer
                raise csv.Error(f"not {len(names)} fields, as there are column names")
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        remedy = "put a field that holds a comma, a quote or a line break between double quotes"
        raise unreadable(path, f"line {reader.line_num} is no CSV: {error}", remedy) from error


def read_parquet(file: Path, path: str) -> Rows:
    """The rows of a Parquet file."""
    from pyarrow import ArrowInvalid, parquet

    try:
        yield from number_rows(parquet.ParquetFile(file).iter_batches(1000), f"{path}, row")
    except (ArrowInvalid, OSError) as error:
        raise unreadable(path, error, "fetch it again") from error


def number_rows(batches: Iterable[Any], label: str) -> Rows:
    """The rows of Arrow batches with their number, from 1, as origin."""
    rows = chain.from_iterable(batch.to_pylist() for batch in batches)
    return ((f"{label} {number}", row) for number, row in enumerate(rows, 1))


def check_text(value: Any, label: str) -> str:
    """The value, if it is text; raises PipelineError otherwise."""
    if not isinstance(value, str):
        raise PipelineError(f"{label} is {show_value(value)}, not text: correct it or take it out")
    return value


def to_number(value: Any) -> float:
    """The number that a value is, or that its text says; NaN for any other value."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def show_value(value: Any) -> str:
    """A value as JSON writes it, cut to a few words."""
    return one_line(json.dumps(value, default=str), 60)


def list_names(names: Any) -> str:
    """At most ten names of columns."""
    names = [one_line(str(name), 40) for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def unreadable(path: str, reason: str | BaseException, remedy: str) -> PipelineError:
    """The error for a file or folder whose rows cannot be read."""
    sentence = one_line(str(reason)) or type(reason).__name__
    return PipelineError(f"{path} cannot be read as a data set: {sentence}: {remedy}")
