"""Tells weights, tokenizers and data apart by their bytes, and reads each file once."""

import functools
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from dpo_pipeline.models import adapter_base, is_adapter

WEIGHTS = (".safetensors", ".bin")


def weights_hash(path: str | Path, revision: str | None = None, endings: tuple[str, ...] = WEIGHTS) -> str:
    """A hash of the weights in a local folder (of an adapter with those of its base), or the id of a hub model."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return f"{path}@{revision or 'main'}"
    digest = content_hash(folder, endings)
    return f"{digest}+{weights_hash(adapter_base(folder), revision, endings)}" if is_adapter(folder) else digest


def data_hash(path: str | None) -> str | None:
    """A hash of all bytes of a local file or folder, or the path itself (a hub id)."""
    local = Path(path).expanduser() if path else None
    return f"sha256:{content_hash(local)}" if local and local.exists() else path


def content_hash(path: Path, endings: tuple[str, ...] = ()) -> str:
    """sha256 over the bytes and names of a file, of all files in a folder, or of its own files with these endings."""
    paths = [path] if path.is_file() else path.glob("*") if endings else path.rglob("*")
    digest = hashlib.sha256()
    for file in sorted(each for each in paths if each.is_file() and (not endings or each.name.endswith(endings))):
        digest.update(str(file.relative_to(path)).encode())
        digest.update(file_hash(file, file.stat().st_size, file.stat().st_mtime_ns))
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what a tokenizer saves, its chat template included, except for its last padding."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        if (file := Path(folder) / "tokenizer.json").is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps({**content, "padding": None, "truncation": None}), encoding="utf-8")
        return content_hash(Path(folder))


@functools.cache
def file_hash(file: Path, size: int, mtime_ns: int) -> bytes:
    """sha256 of a file, read again once its size or the time of its last change (nanoseconds) is another."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
