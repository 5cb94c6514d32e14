"""Puts a run's base model in place: made in code, or fetched into the hub's cache."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dpo_pipeline.config import instantiate_node
from dpo_pipeline.distributed import on_main_process
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import device
from dpo_pipeline.load_errors import explain_load_errors
from dpo_pipeline.models import base_of, is_adapter
from dpo_pipeline.schema import Model, Run

WEIGHTS = (".safetensors", ".bin")


@contextlib.contextmanager
def base_model(run: Run, trained: bool = True) -> Iterator[Run]:
    """The run, with a base model that code makes in place; one that only the hub has is fetched by its first use.

    With `check` or without `trained` an embedded model that is not there yet is made untrained in a temporary folder:
    its tokenizer and its shapes are all that is read. With `check` every model that the run names is fetched.
    """
    if run.model.builder and device() == "cpu":
        import torch

        torch.set_num_threads(1)  # the same digits on more machines; beside a busy neighbour two are much slower
    if run.check:
        for path in paths_to_fetch(run):
            fetch(run.model, path)
    if run.model.builder and trained and not run.check:
        on_main_process(lambda: instantiate_node(run.model.builder, folder=run.model.path))
    if run.model.builder is None or Path(run.model.path).is_dir():
        yield run
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/model"
            instantiate_node(run.model.builder | {"steps": 0}, folder=path)
            yield run.model_copy(update={"model": run.model.model_copy(update={"path": path})})


def paths_to_fetch(run: Run) -> list[str]:
    """Folders and hub ids of the models that a run reads: base, starting policy, reference, and their bases."""
    paths = [path for path in (run.reference.path, run.policy) if path not in (None, "sft", "base")]
    paths += [base_of(path, run.model) for path in paths if is_adapter(path)]
    return list(dict.fromkeys([*paths, *([] if run.model.builder else [run.model.path])]))


def fetch(model: Model, path: str) -> Path:
    """The folder of a model; what `from_pretrained` reads of a hub id, weights included, is downloaded first.

    Raises PipelineError where it is not to be had, or where a local folder's weights are missing or cut short.
    """
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    folder = Path(path)
    if not folder.is_dir():
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        patterns += ["*.bin"] if model.use_safetensors is None else []
        patterns += ["*.py"] if model.trust_remote_code else []
        revision = model.revision if path == model.path else None
        options = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": ["*/*"]}
        folder = Path(explain_load_errors(snapshot_download, path, **options))
    suffixes = WEIGHTS if model.use_safetensors is None else (".safetensors",)
    if not any(file.suffix in suffixes for file in folder.iterdir()):
        pickles = ", or read its pickles by model.use_safetensors=null" if any(folder.glob("*.bin")) else ""
        raise PipelineError(
            f"{folder} holds no weights ({' or '.join(suffixes)}): give a folder that from_pretrained loads{pickles}"
        )
    for file in folder.glob("*.safetensors"):
        # Opening reads the header and compares it with the length of the file.
        explain_load_errors(lambda _, file=file: safe_open(file, "pt").keys(), folder)
    return folder
