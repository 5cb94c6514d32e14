"""Reads a data set's rows, from a local file or folder or from the hub, and names what lies there."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from dpo_pipeline.errors import PipelineError, explain_disk

ENDINGS = (".json", ".jsonl", ".gz", ".csv", ".parquet")  # of what can only be meant as a file
FORM = "give one JSON object for each pair: one on each line, or all in one list"


def read(path: str, data_dir: str | None = None) -> dict[str, list[dict]]:
    """Rows of each split; a single file is `train`.

    `path` is a local .json or .jsonl file (or .gz), a local folder or a hub id; `data_dir` a folder in it. Raises
    PipelineError where nothing can be read there.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return {"train": read_file(local, path)}
    if local.is_dir():
        name, where = str(local), f"{path}, folder {data_dir}" if data_dir else path
    elif local.is_absolute() or path.startswith((".", "~")) or local.suffix in ENDINGS or path.count("/") > 1:
        raise PipelineError(f"there is no file or folder {path} (from {Path.cwd()}): check the path")
    else:
        name, where = path, f"{path}, folder {data_dir}" if data_dir else path
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        splits = load_dataset(name, data_dir=data_dir)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise PipelineError(
            f"the data set {path} is neither a local path nor to be had from the hub ({first_line(error)}): "
            "check the name and the network, `hf auth login` for a gated one, or give a local copy by dataset.path=..."
        ) from error
    except (DatasetGenerationError, OSError, EOFError, ValueError) as error:
        if sentence := explain_disk(error):
            raise PipelineError(sentence) from error
        for file in sorted((local / (data_dir or "")).glob("*.json*")):
            read_file(file, str(file))  # names the line, which datasets does not
        reason = first_line(error.__cause__ or error)
        if "corresponds to no data" in reason:
            reason = "it holds no rows"
        fix = "; dataset.subsets=null reads the files that lie in the folder itself" if data_dir else ""
        raise PipelineError(
            f"{where} cannot be read as a data set: {reason}: {FORM}, in a .jsonl file{fix}"
        ) from error
    return {name: split.to_list() for name, split in splits.items()}


def read_file(file: Path, path: str) -> list[dict]:
    """The JSON objects of a file, one on each line or all in one list; raises PipelineError that names the line."""
    packed = file.read_bytes()
    try:
        text = (gzip.decompress(packed) if file.suffix == ".gz" else packed).decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PipelineError(
            f"{path} cannot be read as a data set: it cannot be unpacked ({error}), it is cut short or no gzip file: "
            "fetch it again, or take .gz off its name"
        ) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PipelineError(
            f"{path} cannot be read as a data set: line {line} is not UTF-8: save it as that"
        ) from error
    if not text.strip():
        raise PipelineError(f"{path} is empty: {FORM}")
    if text.lstrip().startswith("["):
        rows = [("row", i, row) for i, row in enumerate(parsed(text, path, 1), 1)]
    else:
        # Not splitlines(): text may hold other line breaks, such as U+2028, as they are.
        lines = enumerate(text.split("\n"), 1)
        rows = [("line", i, parsed(line, path, i)) for i, line in lines if line.strip()]
    for what, i, row in rows:
        if not isinstance(row, dict):
            raise PipelineError(f"{path}: {what} {i} holds {kind(row)}, not an object: {FORM}")
    return [row for _, _, row in rows]


def parsed(text: str, path: str, first: int) -> Any:
    """What JSON text of a file holds, whose first line is the file's line `first`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {first + error.lineno - 1} is no JSON ({error.msg}, at character {error.colno})"
        raise PipelineError(f"{path} cannot be read as a data set: {where}: {FORM}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, list):
        return "messages" if messages_of(value) else "a list"
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text"}
    return names.get(type(value), "an object")


def messages_of(value: Any) -> bool:
    """Whether a value is a list of messages."""
    return bool(value) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )


def require(rows: list[dict], columns: tuple[str, ...], path: str, chat: bool = False) -> None:
    """Raise PipelineError unless there are rows, and each has text in these columns; where `chat`, or messages.

    `prompt` is the same of both in all rows; text is followed by text.
    """
    if not rows:
        raise PipelineError(f"{path} holds no rows: {FORM}")
    wanted = "text or messages with role and content" if chat else "text"
    for i, row in enumerate(rows, 1):
        for column in columns:
            if column not in row:
                where = f"{path} has" if i == 1 else f"{path}: row {i} has"
                found = ", ".join(row) or "none"
                raise PipelineError(
                    f"{where} no column {column!r}: found {found}: each row is to have {', '.join(columns)}"
                )
            found = kind(row[column])
            if found != "text" and not (chat and found == "messages"):
                raise PipelineError(f"{path}: row {i}: {column} is {found}, not {wanted}: correct it or take it out")
            if chat and column != "prompt" and found == "messages" and isinstance(row["prompt"], str):
                raise PipelineError(
                    f"{path}: row {i}: {column} is messages and its prompt is text: give that as messages too"
                )
        mine, first = kind(row["prompt"]) if chat else "", kind(rows[0]["prompt"]) if chat else ""
        if mine != first:
            raise PipelineError(f"{path}: row {i}: prompt is {mine}, that of row 1 is {first}: give all alike")
