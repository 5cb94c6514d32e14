"""Loads a policy or a base model: from a folder that a run saved, a folder of anybody's, or the hub."""

import json
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_pipeline.config import Model, build
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.machine import device


@dataclass(frozen=True)
class Loading:
    """How a run loads weights: its base, the torch dtype, and the quantization of what an adapter lies on."""

    model: Model
    dtype: Any
    quantization: dict[str, Any] | None = None


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter rather than a whole model."""
    return (Path(path) / "adapter_config.json").is_file()


def base_of(adapter: str | Path) -> str:
    """The model that an adapter names as its base; raises PipelineError where it names none."""
    named = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    if not named:
        raise PipelineError(
            f"the adapter in {adapter} names no base: set base_model_name_or_path in adapter_config.json"
        )
    return named


def explained(load: Any, path: str | Path, **options: Any) -> Any:
    """`load(path, **options)`, with one sentence where nothing can be loaded from there."""
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    if str(path).startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise PipelineError(f"there is no model folder {path} (from {Path.cwd()}): check model.path")
    try:
        return load(str(path), **options)
    except OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError, pickle.PickleError) as error:
        reason = " ".join(str(error).split())
        if "gated" in reason or "401" in reason or "403" in reason:
            fix = "accept its licence on its page on the hub, then log in with `hf auth login`"
        elif "safetensors" in reason and "use_safetensors" not in reason:
            fix = (
                "it may hold pickles alone: model.use_safetensors=null takes them through torch's weights-only loader"
            )
        elif Path(path).is_dir():
            fix = "give a folder that from_pretrained loads, with config.json and whole weights"
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


def load_config(model: Model, path: str | Path | None = None) -> Any:
    """The config of the model at `path`, else of the base (layers, context), without its weights."""
    from transformers import AutoConfig

    where = {"revision": model.revision} if path is None else {}
    return explained(
        AutoConfig.from_pretrained, path or model.path, trust_remote_code=model.trust_remote_code, **where
    )


def load_policy(path: str | Path, loading: Loading, trainable: bool = False, on: str = "cpu") -> Any:
    """The model at `path` on the device `on`; an adapter comes on its base, ready to train where `trainable`.

    A quantized model lies where this machine trains: its weights cannot be moved. Raises PipelineError where nothing
    can be loaded, or where weights are missing: transformers would draw them at random, with a warning.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = loading.model
    options: dict[str, Any] = {
        "dtype": loading.dtype,
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": model.trust_remote_code,
        "use_safetensors": model.use_safetensors,
    }
    if loading.quantization is not None:
        compute = {"bnb_4bit_compute_dtype": loading.dtype} if "load_in_4bit" in loading.quantization else {}
        place = torch.cuda.current_device() if device() == "cuda" else device()
        options |= {"quantization_config": build(loading.quantization, **compute), "device_map": {"": place}}
    base = base_of(path) if is_adapter(path) else str(path)
    if base == model.path:
        options["revision"] = model.revision
    loaded, info = explained(AutoModelForCausalLM.from_pretrained, base, output_loading_info=True, **options)
    if lacking := sorted(info["missing_keys"]):
        raise PipelineError(
            f"{base} lacks {len(lacking)} weights of its architecture, {type(loaded).__name__}, such as {lacking[0]}: "
            "it is cut short, or another kind of model: give a causal language model"
        )
    if loading.quantization is not None and device() == "cpu":
        from bitsandbytes.nn import Linear4bit

        # Else a forward in eval mode packs the weights anew, with coarser scales: policy and reference then differ.
        for layer in (module for module in loaded.modules() if isinstance(module, Linear4bit)):
            layer.support_avx512bf16_for_cpu = False
    if base != str(path):
        from peft import PeftModel

        with warnings.catch_warnings():
            # Else an adapter of another architecture leaves the base as it is.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            try:
                loaded = explained(lambda p: PeftModel.from_pretrained(loaded, p, is_trainable=trainable), path)
            except UserWarning as warning:
                reason = " ".join(str(warning).split())[:200]
                raise PipelineError(f"the adapter in {path} does not fit its base {base}: {reason}") from warning
    loaded = loaded if loading.quantization is not None else loaded.to(on)
    return loaded if trainable else loaded.eval()
