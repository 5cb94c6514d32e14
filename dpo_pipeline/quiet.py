"""Silences exactly those messages of the libraries that tell a person nothing: each is named, with why."""

import logging
import warnings

WARNINGS = (
    # TRL 1.16 asks transformers for a property under its old name, in each reference pass.
    "`is_gradient_checkpointing` is deprecated",
    # PEFT on GPT-2's Conv1D layers: it sets what it warns of itself.
    "fan_in_fan_out is set to False but the target module is `Conv1D`",
)
LOG_LINES = {
    # 4-bit kernels of the CPU, which would be downloaded; the slower built-in ones work.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # What int8 does on every forward: LLM.int8() multiplies in float16 where columns are outliers.
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast from",
    # merge.py asks for just that.
    "transformers.integrations.bitsandbytes": "The modules are dequantized in",
    # Tied weights are saved once: an lm_head is "missing" whenever the best checkpoint is loaded.
    "transformers.trainer": "There were missing keys in the checkpoint model loaded: ['lm_head.weight']",
    # How checkpoints are sorted for deletion on some file systems; by number is what is wanted.
    "transformers.trainer_utils": "mtime may not be reliable on this filesystem",
}


def quiet() -> None:
    """Install the filters; before the libraries are imported."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, start in LOG_LINES.items():
        logging.getLogger(name).addFilter(lambda record, start=start: not record.getMessage().startswith(start))
