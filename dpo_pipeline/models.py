"""Loads a policy or a base model: from a folder that a run saved, a folder of anybody's, or the hub."""

import json
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_pipeline.config import Model, instantiate_node
from dpo_pipeline.errors import PipelineError, explain_disk
from dpo_pipeline.hardware import device


@dataclass(frozen=True)
class LoadOptions:
    """How a run loads weights: its base, the torch dtype, and the quantization of what an adapter lies on."""

    model: Model
    dtype: Any
    quantization: dict[str, Any] | None = None


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter rather than a whole model."""
    return (Path(path) / "adapter_config.json").is_file()


def adapter_base(adapter: str | Path) -> str:
    """The model that an adapter names as its base; raises PipelineError where it names none."""
    file = Path(adapter) / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PipelineError(f"{file} is no JSON ({error}): give the folder as PEFT saved it") from error
    if not isinstance(config, dict):
        raise PipelineError(f"{file} holds no JSON object: give the folder as PEFT saved it")
    if not (named := config.get("base_model_name_or_path")):
        raise PipelineError(
            f"the adapter in {adapter} names no base: set base_model_name_or_path in adapter_config.json"
        )
    return named


def explain_load_errors(load: Any, path: str | Path, **options: Any) -> Any:
    """`load(path, **options)`, with one sentence where nothing can be loaded from there."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    local = Path(path)
    if local.is_file():
        raise PipelineError(f"{path} is a file, not a model: give the folder that holds config.json and the weights")
    if str(path).startswith(("/", ".", "~")) and not local.is_dir():
        raise PipelineError(f"there is no model folder {path} (from {Path.cwd()}): give one that is, or a hub id")
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
        fix = load_hint(local, reason)
        raise PipelineError(f"no model could be loaded from {path} ({reason[:300]}): {fix}") from error


def load_hint(path: Path, reason: str) -> str:
    """What to type where a library could not load a model, for the reason it gave."""
    if "attn_implementation" in reason or "FlashAttention" in reason:
        return "type model.attn_implementation=sdpa or eager"
    if "trust_remote_code" in reason or "contains custom code" in reason:
        return "read that code, then type model.trust_remote_code=true to run it"
    if not path.is_dir() and ("gated" in reason or "401" in reason or "403" in reason):
        return "accept its licence on its page on the hub, then log in with `hf auth login`"
    if not path.is_dir():
        return f"no folder {path} lies here: check the name, give one by model=path model.path=..., or reach the hub"
    if is_adapter(path):
        return "give the folder that PEFT saved: adapter_config.json and adapter_model.safetensors, made on its base"
    if not any(path.glob("*.safetensors")) and "safetensors" in reason:
        if any(path.glob("*.bin")) and ".bin" not in reason:  # else it was looked for too
            return "it holds pickles alone: model.use_safetensors=null takes them through torch's weights-only loader"
        return "it holds no weights: give a folder with model.safetensors"
    return "give a folder that from_pretrained loads, with config.json, whole weights and the tokenizer's files"


def load_tokenizer(model: Model, path: str | Path | None = None) -> Any:
    """The tokenizer of `path`, else of the base model; its padding token is its end token where it has none."""
    from transformers import AutoTokenizer

    if path is None and is_adapter(model.path):
        raise PipelineError(
            f"{model.path} is an adapter, not a whole model: give its base by model.path=, and start DPO from the "
            "adapter by policy=FOLDER"
        )
    where = {"revision": model.revision} if path is None else {}
    tokenizer = explain_load_errors(
        AutoTokenizer.from_pretrained, path or model.path, trust_remote_code=model.trust_remote_code, **where
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(model: Model, path: str | Path | None = None) -> Any:
    """The config of the model at `path`, else of the base (layers, context), without its weights.

    Raises PipelineError where it is not that of a causal language model, or names no context.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    where = {"revision": model.revision} if path is None else {}
    path = path or model.path
    config = explain_load_errors(AutoConfig.from_pretrained, path, trust_remote_code=model.trust_remote_code, **where)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not model.trust_remote_code:
        raise PipelineError(
            f"{path} is no causal language model (model_type {config.model_type}): give one that AutoModelForCausalLM "
            "loads, such as model=gpt2"
        )
    # Not an attribute of every architecture: some need no positions, and have no limit that rows could be held to.
    if getattr(config.get_text_config(), "max_position_embeddings", None) is None:
        raise PipelineError(
            f"{path} names no context (model_type {config.model_type}): set max_position_embeddings in its config.json"
        )
    return config


def load_policy(path: str | Path, loading: LoadOptions, trainable: bool = False, device_name: str = "cpu") -> Any:
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
        "ignore_mismatched_sizes": True,  # told below: transformers' own error refers to a table it logs
    }
    if loading.quantization is not None:
        compute = {"bnb_4bit_compute_dtype": loading.dtype} if "load_in_4bit" in loading.quantization else {}
        place = torch.cuda.current_device() if device() == "cuda" else device()
        options |= {
            "quantization_config": instantiate_node(loading.quantization, **compute),
            "device_map": {"": place},
        }
    base = adapter_base(path) if is_adapter(path) else str(path)
    if base == model.path:
        options["revision"] = model.revision
    loaded, info = explain_load_errors(AutoModelForCausalLM.from_pretrained, base, output_loading_info=True, **options)
    if lacking := sorted(info["missing_keys"]):
        raise PipelineError(
            f"{base} lacks {len(lacking)} weights of its architecture, {type(loaded).__name__}, such as {lacking[0]}: "
            "it is cut short, or another kind of model: give a causal language model"
        )
    if other := sorted(info["mismatched_keys"]):
        name, found, wanted = other[0]
        raise PipelineError(
            f"{len(other)} weights in {base} have not the shape that its config.json names, such as {name}, "
            f"{list(found)} instead of {list(wanted)}: give the config.json that these weights were saved with"
        )
    if loading.quantization is not None and device() == "cpu":
        from bitsandbytes.nn import Linear4bit

        # Else a forward in eval mode packs the weights anew, with coarser scales: policy and reference then differ.
        for layer in (module for module in loaded.modules() if isinstance(module, Linear4bit)):
            layer.support_avx512bf16_for_cpu = False
    if base != str(path):
        from peft import PeftModel

        if not any(Path(path).glob("adapter_model.*")):
            raise PipelineError(f"{path} holds no adapter_model.safetensors: give the folder as PEFT saved it")
        with warnings.catch_warnings():
            # Else an adapter of another architecture leaves the base as it is.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            try:
                loaded = explain_load_errors(
                    lambda p: PeftModel.from_pretrained(loaded, p, is_trainable=trainable), path
                )
            except UserWarning as warning:
                reason = " ".join(str(warning).split())[:200]
                raise PipelineError(f"the adapter in {path} does not fit its base {base}: {reason}") from warning
    loaded = loaded if loading.quantization is not None else loaded.to(device_name)
    return loaded if trainable else loaded.eval()
