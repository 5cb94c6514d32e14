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
    if path is None:
        set_chat_template(tokenizer, model)
    return tokenizer


def set_chat_template(tokenizer: Any, model: Model) -> None:
    """Give the tokenizer the template of `model.chat_template`, with `model.chat_template_kwargs` as its defaults.

    They are written into the template itself: so every rendering has them, hashes follow, and `final/` carries them.
    """
    if model.chat_template:
        tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
    for name, value in (model.chat_template_kwargs or {}).items():
        if name not in str(tokenizer.chat_template):
            raise PipelineError(
                f"model.chat_template_kwargs.{name}: the chat template of {model.path} does not read it: correct the "
                "name, or give another template by model.chat_template=FILE"
            )
        # The line break belongs to the tag: transformers renders with trim_blocks.
        default = f"{{%- set {name} = {name} | default({value!r}) %}}\n"
        templates = tokenizer.chat_template
        if isinstance(templates, dict):  # of several names, such as default and tool_use
            tokenizer.chat_template = {key: default + text for key, text in templates.items()}
        else:
            tokenizer.chat_template = default + templates


def check_same_tokenizer(tokenizer: Any, model: Model, policy: str | Path) -> None:
    """Raise PipelineError where a policy's folder brings another tokenizer than that of the base model."""
    folder = Path(policy)
    if str(policy) == model.path:
        return
    if folder.is_dir() and not (any(folder.glob("tokenizer*")) or (folder / "vocab.json").is_file()):
        return
    other = load_tokenizer(model, policy)
    file = folder / "chat_template.jinja"
    template = f", or type model.chat_template={file}, without model.chat_template_kwargs" if file.is_file() else ""
    for what, value, other_value, remedy in (
        ("vocabulary", tokenizer.get_vocab(), other.get_vocab(), ""),
        ("chat template", tokenizer.chat_template, other.chat_template, template),
        ("end token", tokenizer.eos_token, other.eos_token, ""),
        ("BOS", tokenizer.bos_token, other.bos_token, ""),
    ):
        if value != other_value:
            raise PipelineError(
                f"the tokenizer in {policy} has another {what} than that of the base {model.path}: use the tokenizer "
                f"that the policy was trained with in both{remedy}"
            )
