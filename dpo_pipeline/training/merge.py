"""Makes one whole model of an adapter and its base, in a folder of its own.

TRL takes a model that was merged in memory for the bare base: its reference is then wrong, and a new adapter names
the wrong base.
"""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

from dpo_pipeline.errors import PipelineError
from dpo_pipeline.models import LoadOptions, base_of, load_policy
from dpo_pipeline.record import read_json, write_json

log = logging.getLogger(__name__)


def merge(adapter: Path, folder: Path, options: LoadOptions) -> None:
    """Make the whole float32 model of an adapter and its base in `folder`, unless it exists; the caller locks it.

    An adapter that was trained on a quantized base, as the manifest beside it says, is merged into the rounded weights
    of that base, so that the policy stays what it was. Raises PipelineError where merging changes the logits.
    """
    import torch

    if folder.exists():
        return
    manifest = read_json(adapter.parent / "manifest.json")
    quantization = manifest["loading"]["quantization"] if manifest else None
    whole = dataclasses.replace(options, dtype=torch.float32, quantization=None)
    as_trained = dataclasses.replace(whole, quantization=quantization)
    logits = probe_logits(load_policy(adapter, as_trained))
    policy = merge_adapter(adapter, as_trained)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    policy.save_pretrained(partial)
    add_older_keys(partial)
    del policy
    gap = float((probe_logits(load_policy(partial, whole)) - logits).abs().max() / logits.abs().max())
    # LLM.int8() rounds activations too, which a whole model does not.
    if gap > (0.05 if quantization and "load_in_8bit" in quantization else 1e-3):
        shutil.rmtree(partial)
        raise PipelineError(f"merging {adapter} changed its logits by {gap:.2g} of their size: continue it with lora=")
    partial.rename(folder)
    log.info("merged %s into %s: logits differ by %.1g of their size", adapter, folder, gap)


def add_older_keys(folder: Path) -> None:
    """Add to a saved folder what transformers 4.57 reads, where 5 has other keys; 5 reads both alike.

    Without the base of RoPE at the top level 4.57 takes 10,000, without a word.
    """
    if config := read_json(folder / "config.json"):
        rope = config.get("rope_parameters") or {}
        whole = rope.get("full_attention", rope)  # some architectures have another one in sliding layers
        config |= {key: whole[key] for key in ("rope_theta", "partial_rotary_factor") if key in whole}
        if whole.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in whole.items() if key != "rope_theta"}
        if "sliding_attention" in rope:
            config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        write_json(folder / "config.json", config)
    if config := read_json(folder / "tokenizer_config.json"):
        if config["tokenizer_class"] == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        write_json(folder / "tokenizer_config.json", config)


def merge_adapter(adapter: Path, options: LoadOptions) -> Any:
    """An adapter and its base as one model in memory; a quantized base is dequantized to the dtype of `options`."""
    from peft import PeftModel

    base = load_policy(base_of(adapter, options.model), options)
    if "quantization_config" in base.config.to_dict():  # by the options, or as the base was saved
        base = base.dequantize(dtype=options.dtype)
        base._weight_conversions = None  # those of 4 bits cannot be reversed: saving then takes the architecture's
    return PeftModel.from_pretrained(base, adapter).merge_and_unload(safe_merge=True)


def probe_logits(model: Any) -> Any:
    """The logits of a model on the first 16 tokens of its vocabulary, on the CPU."""
    import torch

    ids = torch.arange(16, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        return model(input_ids=ids).logits.cpu()
