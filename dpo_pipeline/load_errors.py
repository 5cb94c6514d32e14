"""Answers a library's error while a model loads with one sentence: what is wrong, and what to type."""

import pickle
from pathlib import Path
from typing import Any

from dpo_pipeline.errors import PipelineError, explain_disk


def explain_load_errors(load: Any, path: str | Path, **options: Any) -> Any:
    """`load(path, **options)`; raises PipelineError with one sentence where nothing can be loaded from `path`."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    local = Path(path)
    if local.is_file():
        raise PipelineError(f"{path} is a file, not a model: give the folder that holds config.json and the weights")
    if str(path).startswith(("/", ".", "~")) and not local.is_dir():
        raise PipelineError(f"the model folder {path} does not exist (from {Path.cwd()}): check it, or give a hub id")
    try:
        return load(str(path), **options)
    except OutOfMemoryError:
        raise
    except (
        *(OSError, ValueError, TypeError, ImportError, RuntimeError, KeyError),
        *(SafetensorError, StrictDataclassError, pickle.PickleError),
    ) as error:
        if sentence := explain_disk(error):
            raise PipelineError(sentence) from error
        reason = " ".join(str(error).split())
        reason = reason if " " in reason else repr(error)  # the text of a KeyError is the key alone
        remedy = load_hint(local, reason)
        raise PipelineError(f"no model could be loaded from {path} ({reason[:300]}): {remedy}") from error


def load_hint(path: Path, reason: str) -> str:
    """What to type where a library could not load a model, for the reason it gave."""
    if "attn_implementation" in reason or "FlashAttention" in reason:
        return "type model.attn_implementation=sdpa or eager"
    if "trust_remote_code" in reason or "contains custom code" in reason:
        return "read that code, then type model.trust_remote_code=true to run it"
    if not path.is_dir() and any(word in reason for word in ("gated", "401", "403")):
        return "accept its licence on its page on the hub, then log in with `hf auth login`"
    if not path.is_dir():
        return (
            f"check the name: {path} is no folder here; give a folder by model=path model.path=..., or reach the hub"
        )
    if (path / "adapter_config.json").is_file():
        return "give the folder that PEFT saved: adapter_config.json and adapter_model.safetensors, made on its base"
    if not any(path.glob("*.safetensors")) and "safetensors" in reason:
        if any(path.glob("*.bin")) and ".bin" not in reason:  # else the library looked for them too
            return "it holds only pickles: model.use_safetensors=null reads them with torch's weights-only loader"
        return "it holds no weights: give a folder with model.safetensors"
    return "give a folder that from_pretrained loads, with config.json, whole weights and the tokenizer's files"
