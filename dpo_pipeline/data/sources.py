"""Reads the rows of a data set by split: from a local file or folder, or from the hub."""

import logging
import re
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Any

from dpo_pipeline.data.files import FORM, OTHER_ENDINGS, Rows, number_rows, read_file, remedy_of, unreadable
from dpo_pipeline.errors import PipelineError, explain_disk
from dpo_pipeline.formatting import one_line

log = logging.getLogger(__name__)

Text = str | None

FILE_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".json.gz", ".jsonl.gz", ".csv.gz")
METADATA = ("config.json", "dataset_info.json", "dataset_infos.json")
SAVED = ("dataset_dict.json", "state.json")  # what Dataset.save_to_disk leaves in a folder
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")  # as the hub names files: train_prefs-00000-of-00001.parquet
TRAIN, VALIDATION, TEST = ("train", "training"), ("validation", "valid", "val", "dev"), ("test", "testing", "eval")
SPLIT_OF_WORD = {word: words[0] for words in (TRAIN, VALIDATION, TEST) for word in words}


def read_source(
    path: str, data_dir: Text = None, revision: Text = None, splits: dict[str, str] | None = None, config: Text = None
) -> dict[str, Rows]:
    """Rows of the splits `train` and, if there is one, `test`, one at a time; a single file is `train`.

    `path` is a local file, a folder, or a hub id; `data_dir` a folder in it, `config` one that its card names,
    `splits` the set's own split for each of ours. Raises PipelineError; for a broken row, when the reader reaches it.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return {"train": read_file(local, path)}
    folder, card = local / (data_dir or ""), local / "README.md"
    looks_local = local.is_absolute() or path.startswith((".", "~")) or path.endswith((*FILE_ENDINGS, ".gz"))
    if not folder.is_dir() and (local.is_dir() or looks_local or path.count("/") > 1):
        raise PipelineError(f"there is no file or folder {folder} (from {Path.cwd()}): {remedy_of(path)}")
    label = f"{path}, folder {data_dir}" if data_dir else path
    has_configs = data_dir is None and card.is_file() and card.read_text("utf-8", "replace").count("config_name:") > 1
    if local.is_dir() and not config and not has_configs:
        parts = read_folder(folder, label)
    else:
        parts = load_parts(str(local) if local.is_dir() else path, config, data_dir, revision, label)
    if splits is None:
        splits = {"test": "test"} if "test" in parts else {}
        if unread := ", ".join(parts.keys() - {"train", "test"}):
            log.warning("%s: %s is not read; 'dataset.splits={train: NAME, test: NAME}' chooses splits", label, unread)
    names = {"train": "train", **splits}
    if absent := [name for name in names.values() if name not in parts]:
        present = f"{label} has no split {absent[0]}, only {', '.join(parts)}"
        raise PipelineError(f"{present}: type 'dataset.splits={{train: NAME}}'")
    return {split: parts[name] for split, name in names.items()}


def read_folder(folder: Path, label: str) -> dict[str, Rows]:
    """The rows of all data files in a folder and those below it, by split, as the names of both say."""
    if any((folder / name).is_file() for name in SAVED):
        from datasets import DatasetDict, load_from_disk

        saved = load_from_disk(str(folder))
        return read_datasets(saved if isinstance(saved, DatasetDict) else {"train": saved}, label)
    files, unread = defaultdict(list), []
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if not file.is_file() or file.name in METADATA or any(part.startswith(".") for part in parts):
            continue
        if file.name.endswith(FILE_ENDINGS):
            files[split_of(parts)].append(file)
        elif file.name.endswith(OTHER_ENDINGS):
            unread.append("/".join(parts))
    if unread:
        log.warning("%s: %s cannot be read, save it as .jsonl or .csv", label, one_line(", ".join(unread)))
    if not files:
        raise unreadable(label, "it holds no .json, .jsonl, .csv or .parquet file", FORM)
    return {name: chain.from_iterable(read_file(file, str(file)) for file in each) for name, each in files.items()}


def split_of(parts: tuple[str, ...]) -> str:
    """The split that the name of a file says, or that of a folder around it; `train` where none does."""
    if match := SHARD.match(parts[-1]):
        return match[1]
    words = [word for part in reversed(parts) for word in re.split("[^a-z]+", part.lower())]
    return next((SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD), "train")


def load_parts(path: str, config: Text, data_dir: Text, revision: Text, label: str) -> dict[str, Rows]:
    """The rows of a set of the hub, or of a local copy with its card, by split."""
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        # Not verified: the card of a set of millions of rows has no sizes of the one folder that is read.
        options = {"verification_mode": "no_checks", "cache_dir": datasets.config.HF_DATASETS_CACHE}
        return read_datasets(
            datasets.load_dataset(path, config, data_dir=data_dir, revision=revision, **options), label
        )
    except (DatasetNotFoundError, ConnectionError) as error:
        raise PipelineError(
            f"the data set {path} is neither a local path nor on the hub ({one_line(str(error))}): check the name and "
            "the network, run `hf auth login` for a gated one, or give a local copy by dataset.path=..."
        ) from error
    except (DatasetsError, ValueError, RuntimeError) as error:
        if sentence := explain_disk(error):
            raise PipelineError(sentence) from error
        if names := re.search(r"(?:configs?:|not found. Available:) \[(.*)\]", str(error)):
            configs = f"{label} has the configs {names[1].replace(chr(39), '')}"
            raise PipelineError(f"{configs}: type dataset.config=NAME for one of them") from error
        raise unreadable(label, error.__cause__ or error, "give a local copy of its files") from error


def read_datasets(parts: dict[str, Any], label: str) -> dict[str, Rows]:
    """The rows of each `datasets.Dataset` as Python's own values."""
    return {
        name: number_rows(rows.with_format("arrow").iter(1000), f"{label}, {name} row") for name, rows in parts.items()
    }
