"""Has a run's base model at hand without loading its weights: what `check=true` looks at."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dpo_pipeline.config import Model, Run, instantiate_node
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.models import adapter_base, explain_load_errors, is_adapter
from dpo_pipeline.run_folder import WEIGHTS


@contextlib.contextmanager
def with_base_model(run: Run) -> Iterator[Run]:
    """The run with its base on this machine: fetched into the hub's cache, or, where code makes it, made untrained."""
    others = [run.reference.path] if run.reference.path else []
    others += [run.policy] if run.policy not in ("sft", "base") else []
    for path in others:
        fetch(run.model, path)
        if is_adapter(path) and adapter_base(path) != run.model.path:
            fetch(run.model, adapter_base(path))
    if run.model.builder is None:
        fetch(run.model, run.model.path)
        yield run
    elif Path(run.model.path).is_dir():
        yield run
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/model"
            instantiate_node(run.model.builder | {"steps": 0}, folder=path)
            yield dataclasses.replace(run, model=dataclasses.replace(run.model, path=path))


def fetch(model: Model, path: str) -> None:
    """Download what `from_pretrained` reads, weights included, so that a machine without network finds it.

    Raises PipelineError where it is not to be had, or where a local folder's weights are missing or cut short.
    """
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    folder = Path(path)
    if not folder.is_dir():
        wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        wanted += (["*.bin"] if model.use_safetensors is None else []) + (["*.py"] if model.trust_remote_code else [])
        revision = model.revision if path == model.path else None
        options = {"revision": revision, "allow_patterns": wanted, "ignore_patterns": ["*/*"]}
        folder = Path(explain_load_errors(snapshot_download, path, **options))
    taken = WEIGHTS if model.use_safetensors is None else (".safetensors",)
    if not any(file.suffix in taken for file in folder.iterdir()):
        also = ", or take its pickles by model.use_safetensors=null" if any(folder.glob("*.bin")) else ""
        raise PipelineError(
            f"{folder} holds no weights ({' or '.join(taken)}): give a folder that from_pretrained loads{also}"
        )
    for file in folder.glob("*.safetensors"):
        # Opening reads the header, and compares it with the length of the file.
        explain_load_errors(lambda _, file=file: safe_open(file, "pt").keys(), folder)
