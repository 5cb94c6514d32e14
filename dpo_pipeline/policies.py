"""Loads a policy or a base model: from a folder that a run saved, a folder of anybody's, or the hub."""

import json
from pathlib import Path
from typing import Any

from dpo_pipeline.config import Model
from dpo_pipeline.errors import PipelineError


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter rather than a whole model."""
    return (Path(path) / "adapter_config.json").is_file()


def explained(load: Any, path: str | Path, **options: Any) -> Any:
    """`load(path, **options)`, with one sentence where nothing can be loaded from there."""
    if str(path).startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise PipelineError(f"there is no model folder {path} (from {Path.cwd()}): check model.path")
    try:
        return load(str(path), **options)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        if "gated" in reason or "401" in reason or "403" in reason:
            fix = "accept its licence on its page on the hub, then log in with `hf auth login`"
        elif "safetensors" in reason and "use_safetensors" not in reason:
            fix = (
                "it may hold pickles alone: model.use_safetensors=null takes them through torch's weights-only loader"
            )
        elif Path(path).is_dir():
            fix = "give a folder that from_pretrained loads, with config.json and weights"
        else:
            fix = "check the name, give a local folder by model=path model.path=..., or reach the hub"
        raise PipelineError(f"no model could be loaded from {path} ({reason[:300]}): {fix}") from error


def load_tokenizer(model: Model, path: str | Path | None = None) -> Any:
    """The tokenizer of `path`, else of the base model; its padding token is its end token where it has none."""
    from transformers import AutoTokenizer

    where = {"revision": model.revision} if path is None else {}
    tokenizer = explained(
        AutoTokenizer.from_pretrained, path or model.path, trust_remote_code=model.trust_remote_code, **where
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(model: Model) -> Any:
    """The base model's own config (layers, context), without its weights."""
    from transformers import AutoConfig

    return explained(
        AutoConfig.from_pretrained, model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
    )


def load_policy(path: str | Path, model: Model, dtype: Any, trainable: bool = False) -> Any:
    """The model at `path` in `dtype`, on the CPU; an adapter comes on its base, ready to train where `trainable`.

    `model` tells how a base is loaded. Raises PipelineError where nothing can be loaded.
    """
    from transformers import AutoModelForCausalLM

    options = {
        "dtype": dtype,
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": model.trust_remote_code,
        "use_safetensors": model.use_safetensors,
    }
    base = (
        json.loads((Path(path) / "adapter_config.json").read_text())["base_model_name_or_path"]
        if is_adapter(path)
        else path
    )
    revision = {"revision": model.revision} if base == model.path else {}
    loaded = explained(AutoModelForCausalLM.from_pretrained, base, **options, **revision)
    if base != path:
        from peft import PeftModel

        loaded = explained(lambda p: PeftModel.from_pretrained(loaded, p, is_trainable=trainable), path)
    return loaded if trainable else loaded.eval()


def device() -> str:
    """Where a single process measures and samples."""
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
