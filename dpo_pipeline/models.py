"""Loads a policy or a base model: from a folder that a run saved, from any other folder, or from the hub."""

import functools
import json
import logging
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_pipeline.config import instantiate_node
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import device, mixed_precision
from dpo_pipeline.load_errors import explain_load_errors
from dpo_pipeline.schema import Model, Run

log = logging.getLogger(__name__)
warn_once = functools.cache(log.warning)


@dataclass(frozen=True)
class LoadOptions:
    """How a run loads weights: its base, their torch dtype, and the quantization of the base under an adapter."""

    model: Model
    dtype: Any
    quantization: dict[str, Any] | None = None


def load_options(run: Run) -> LoadOptions:
    """The load options of a run: float32 where every weight is trained, the run's precision under an adapter."""
    import torch

    if run.model.dtype != "auto":
        dtype = getattr(torch, run.model.dtype)
    elif run.lora is None:
        dtype = torch.float32
    else:
        precisions = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        dtype = precisions[mixed_precision(run.precision)]
    return LoadOptions(run.model, dtype, run.quantization)


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter rather than a whole model."""
    return (Path(path) / "adapter_config.json").is_file()


def adapter_base(adapter: str | Path) -> str:
    """The model that an adapter names as its base; raises PipelineError where it names none."""
    file = Path(adapter) / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    except (ValueError, TypeError, KeyError) as error:
        raise PipelineError(f"{file} is not readable ({error!r}): give the folder as PEFT saved it") from error
    if not base:
        raise PipelineError(
            f"the adapter in {adapter} names no base: set base_model_name_or_path in adapter_config.json"
        )
    return base


def base_of(adapter: str | Path, model: Model) -> str:
    """The base that an adapter is loaded on: what it names, or `model.path` where that is not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    base = adapter_base(adapter)
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base)
    if base == model.path or Path(base).is_dir() or (is_hub_id and try_to_load_from_cache(base, "config.json")):
        return base
    warn_once(
        "the adapter in %s names the base %s, not here: model.path=%s is taken for it", adapter, base, model.path
    )
    return str(model.path)


def with_base_of(run: Run, policy: str | Path) -> Run:
    """The run with the base of a policy as its model, whatever `model=` says: its own tokenizer and context."""
    base = adapter_base(policy) if is_adapter(policy) else str(policy)
    return run.model_copy(update={"model": run.model.model_copy(update={"builder": None, "path": base})})


def load_config(model: Model, path: str | Path | None = None) -> Any:
    """The config of the model at `path`, by default of the base, without its weights.

    Raises PipelineError where it is not a causal language model, or has no context length.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    revision = {"revision": model.revision} if path is None else {}
    path = path or model.path
    options = {"trust_remote_code": model.trust_remote_code, **revision}
    config = explain_load_errors(AutoConfig.from_pretrained, path, **options)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not model.trust_remote_code:
        raise PipelineError(
            f"{path} is no causal language model (model_type {config.model_type}): give one that AutoModelForCausalLM "
            "loads, such as model=gpt2"
        )
    # Some architectures have no such attribute: they need no positions, so rows could have no limit.
    if getattr(config.get_text_config(), "max_position_embeddings", None) is None:
        raise PipelineError(
            f"{path} names no context (model_type {config.model_type}): set max_position_embeddings in its config.json"
        )
    return config


def load_generation_config(model: Model, config: Any) -> Any:
    """The generation config of the base model, made from its `config` where the folder has none.

    Raises PipelineError where it cannot be read: its end tokens would be lost. Those beyond the vocabulary, which no
    model samples, are left out with a warning.
    """
    from transformers import GenerationConfig

    file = Path(model.path) / "generation_config.json"
    try:
        generation_config = GenerationConfig.from_pretrained(model.path, revision=model.revision)
    except OSError as error:
        if file.is_file():
            raise PipelineError(f"{file} is not readable ({error}): repair it, or remove it") from error
        generation_config = GenerationConfig.from_model_config(config)
    size, ids = config.get_text_config().vocab_size, generation_config.eos_token_id
    ids = [ids] if isinstance(ids, int) else ids or []
    if unknown := [token for token in ids if token >= size]:
        log.warning("%s: end tokens %s are left out, the model knows %d tokens", file, unknown, size)
    generation_config.eos_token_id = [token for token in ids if token < size] or None
    return generation_config


def empty_model(model: Model, config: Any, lora: Any) -> Any:
    """A model with an adapter, if any, on the meta device: it has names and shapes, and no memory for weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
        if lora is None:
            return empty
        from peft import get_peft_model

        try:
            return get_peft_model(empty, lora)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise PipelineError(
                f"PEFT refuses what stands under lora: {reason}: name this model's layers by "
                "lora.target_modules=all-linear, and see the other keys of lora"
            ) from error


def weights_outside_adapter(policy: Any) -> list[str]:
    """The names of trained weights that stay when the adapter is off; PEFT names what goes with it by the adapter."""
    return [name for name, weight in policy.named_parameters() if weight.requires_grad and ".default" not in name]


def load_policy(path: str | Path, options: LoadOptions, trainable: bool = False, device_name: str = "cpu") -> Any:
    """The model at `path`; an adapter comes on its base, ready to train where `trainable`.

    A quantized model lies where this machine trains: its weights cannot be moved. Raises PipelineError where nothing
    can be loaded, or where weights are missing: transformers would draw them at random, with a warning.
    """
    base = base_of(path, options.model) if is_adapter(path) else str(path)
    loaded = load_whole_model(base, options)
    if base != str(path):
        loaded = load_adapter(loaded, path, base, trainable)
    if options.quantization is None:
        loaded = loaded.to(device_name)
    return loaded if trainable else loaded.eval()


def load_whole_model(path: str, options: LoadOptions) -> Any:
    """The model at `path`, quantized where the options say so; raises PipelineError for missing or misfit weights."""
    import torch
    from transformers import AutoModelForCausalLM

    model = options.model
    arguments: dict[str, Any] = {
        "dtype": options.dtype,
        "attn_implementation": model.attn_implementation,
        "trust_remote_code": model.trust_remote_code,
        "use_safetensors": model.use_safetensors,
        "ignore_mismatched_sizes": True,  # checked below: transformers' own error refers to a table in its log
    }
    if path == model.path:
        arguments["revision"] = model.revision
    if options.quantization is not None:
        compute = {"bnb_4bit_compute_dtype": options.dtype} if "load_in_4bit" in options.quantization else {}
        place = torch.cuda.current_device() if device() == "cuda" else device()
        arguments["quantization_config"] = instantiate_node(options.quantization, **compute)
        arguments["device_map"] = {"": place}
    loaded, info = explain_load_errors(
        AutoModelForCausalLM.from_pretrained, path, output_loading_info=True, **arguments
    )
    if missing := sorted(info["missing_keys"]):
        raise PipelineError(
            f"{path} lacks {len(missing)} weights of its architecture, {type(loaded).__name__}, such as {missing[0]}: "
            "it is cut short, or another kind of model: give a causal language model"
        )
    if misfits := sorted(info["mismatched_keys"]):
        name, found, expected = misfits[0]
        raise PipelineError(
            f"{len(misfits)} weights in {path} do not have the shape that its config.json names, such as {name}, "
            f"{list(found)} instead of {list(expected)}: give the config.json that these weights were saved with"
        )
    if options.quantization is not None and device() == "cpu":
        from bitsandbytes.nn import Linear4bit

        # Else a forward in eval mode packs the weights anew, with coarser scales: policy and reference then differ.
        for layer in loaded.modules():
            if isinstance(layer, Linear4bit):
                layer.support_avx512bf16_for_cpu = False
    return loaded


def load_adapter(base_model: Any, path: str | Path, base: str, trainable: bool) -> Any:
    """The adapter at `path` on its loaded base; raises PipelineError where it does not fit."""
    from peft import PeftModel

    if not any(Path(path).glob("adapter_model.*")):
        raise PipelineError(f"{path} holds no adapter_model.safetensors: give the folder as PEFT saved it")
    with warnings.catch_warnings():
        # Else an adapter of another architecture leaves the base as it is.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            policy = explain_load_errors(
                lambda folder: PeftModel.from_pretrained(base_model, folder, is_trainable=trainable), path
            )
        except UserWarning as warning:
            reason = " ".join(str(warning).split())[:200]
            raise PipelineError(f"the adapter in {path} does not fit its base {base}: {reason}") from warning
    policy.peft_config["default"].base_model_name_or_path = base  # what it is saved with
    return policy
