"""Reads a data set's rows, from a local file or folder or from the hub, and names what lies there."""

from pathlib import Path

from dpo_pipeline.errors import PipelineError

ENDINGS = (".json", ".jsonl", ".gz", ".csv", ".parquet")  # of what can only be meant as a file


def read(path: str, data_dir: str | None = None) -> dict[str, list[dict]]:
    """Rows of each split, as datasets reads them; a single file is `train`.

    `path` is a local .json or .jsonl file (or .gz), a local folder or a hub id; `data_dir` a folder in it. Raises
    PipelineError where nothing can be read there.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    local = Path(path).expanduser()
    if local.is_file():
        if local.stat().st_size == 0:
            raise PipelineError(f"{path} is empty: give a file with one JSON object for each pair")
        name, options = "json", {"data_files": {"train": str(local)}}
    elif local.is_dir():
        name, options = str(local), {"data_dir": data_dir}
    elif local.is_absolute() or path.startswith((".", "~")) or local.suffix in ENDINGS or path.count("/") > 1:
        raise PipelineError(f"there is no file or folder {path} (from {Path.cwd()}): check dataset.path")
    else:
        name, options = path, {"data_dir": data_dir}
    try:
        splits = load_dataset(name, **options)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise PipelineError(
            f"the data set {path} is neither a local path nor to be had from the hub ({first_line(error)}): "
            "check the name and the network, `hf auth login` for a gated one, or give a local copy by dataset.path=..."
        ) from error
    except (DatasetGenerationError, FileNotFoundError, ValueError) as error:
        reason = first_line(error.__cause__ or error)
        if "corresponds to no data" in reason:
            reason = "it holds no rows"
        where = f", folder {data_dir}" if data_dir else ""
        fix = "; dataset.subsets=null reads the files that lie in the folder itself" if data_dir else ""
        raise PipelineError(f"{path}{where} cannot be read as a data set: {reason}{fix}") from error
    return {name: split.to_list() for name, split in splits.items()}


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def require(rows: list[dict], columns: tuple[str, ...], path: str) -> None:
    """Raise PipelineError unless there are rows and they have these columns."""
    if not rows:
        raise PipelineError(f"{path} holds no rows: give a file with one JSON object for each pair")
    for column in columns:
        if column not in rows[0]:
            raise PipelineError(f"{path} has no column {column!r}: found {', '.join(rows[0])}")
