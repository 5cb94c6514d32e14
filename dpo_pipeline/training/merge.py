"""Makes one whole model of an adapter and its base, in a folder of its own.

TRL takes a model merged in memory for the bare base: its reference is then wrong, and a new adapter names the wrong
base.
"""

import dataclasses
import logging
import os
import shutil
from pathlib import Path

from dpo_pipeline.errors import PipelineError
from dpo_pipeline.models import LoadOptions, adapter_base, load_policy
from dpo_pipeline.run_folder import read_json

log = logging.getLogger(__name__)


def merge(adapter: Path, folder: Path, loading: LoadOptions) -> Path:
    """The whole model, in float32, that an adapter's folder makes with its base; made in `folder` unless it is there.

    An adapter that was trained on a quantized base, as the manifest beside it tells, is merged into that base's
    rounded weights, so that it stays the policy it was. Raises PipelineError where the merged model's logits are not
    those of the adapter on its base.
    """
    import torch
    from peft import PeftModel

    if (folder / "config.json").is_file():
        return folder
    manifest = read_json(adapter.parent / "manifest.json")
    quantization = manifest["loading"]["quantization"] if manifest else None
    loading = dataclasses.replace(loading, dtype=torch.float32, quantization=quantization)
    policy = load_policy(adapter, loading)
    ids = torch.arange(16, device=policy.device)[None] % policy.config.get_text_config().vocab_size
    with torch.inference_mode():
        before = policy(input_ids=ids).logits.cpu()
    if quantization is not None:
        del policy
        rounded = load_policy(adapter_base(adapter), loading).dequantize(dtype=torch.float32)
        policy = PeftModel.from_pretrained(rounded, adapter)
    whole = policy.merge_and_unload(safe_merge=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    whole.save_pretrained(partial)
    del policy, whole
    # Loaded as anybody loads it, not as it lies in memory.
    saved = load_policy(partial, dataclasses.replace(loading, quantization=None))
    with torch.inference_mode():
        worst = float((saved(input_ids=ids.cpu()).logits - before).abs().max() / before.abs().max())
    # LLM.int8() rounds activations too, which a whole model does not.
    if worst > (0.05 if quantization and "load_in_8bit" in quantization else 1e-3):
        shutil.rmtree(partial)
        raise PipelineError(
            f"merging {adapter} changed its logits by {worst:.2g} of their size: continue it with lora="
        )
    try:
        os.replace(partial, folder)
    except OSError:  # another run that starts from it was faster
        shutil.rmtree(partial)
    log.info("merged %s into %s: logits differ by %.1g of their size", adapter, folder, worst)
    return folder
