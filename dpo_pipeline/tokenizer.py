"""Loads a tokenizer, and compares that of a policy with that of its base."""

from pathlib import Path
from typing import Any

from dpo_pipeline.errors import PipelineError
from dpo_pipeline.load_errors import explain_load_errors
from dpo_pipeline.models import is_adapter
from dpo_pipeline.schema import Model


def load_tokenizer(model: Model, path: str | Path | None = None) -> Any:
    """The tokenizer of `path`, by default of the base; a missing padding token becomes the end token."""
    from transformers import AutoTokenizer

    if path is None and is_adapter(model.path):
        raise PipelineError(
            f"{model.path} is an adapter, not a whole model: give its base by model.path=, and start DPO from the "
            "adapter by policy=FOLDER"
        )
    revision = {"revision": model.revision} if path is None else {}
    tokenizer = explain_load_errors(
        AutoTokenizer.from_pretrained, path or model.path, trust_remote_code=model.trust_remote_code, **revision
    )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_same_tokenizer(tokenizer: Any, model: Model, policy: str | Path) -> None:
    """Raise PipelineError where a policy's folder brings another tokenizer than that of the base model."""
    folder = Path(policy)
    if str(policy) == model.path:
        return
    if folder.is_dir() and not (any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file()):
        return
    other = load_tokenizer(model, policy)
    for what, expected, found in (
        ("vocabulary", tokenizer.get_vocab(), other.get_vocab()),
        ("chat template", tokenizer.chat_template, other.chat_template),
        ("end token", tokenizer.eos_token, other.eos_token),
        ("BOS", tokenizer.bos_token, other.bos_token),
    ):
        if expected != found:
            raise PipelineError(
                f"the tokenizer in {policy} has another {what} than that of the base {model.path}: use the tokenizer "
                "that the policy was trained with in both"
            )
