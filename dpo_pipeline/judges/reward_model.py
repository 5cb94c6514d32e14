"""A reward model or any other text classifier as a judge: a sequence-classification model, local or of the hub."""

import logging
from pathlib import Path
from typing import Any

from dpo_pipeline.content_hash import content_hash, weights_hash
from dpo_pipeline.data.normalize import as_messages, as_text
from dpo_pipeline.data.tokens import render_chat
from dpo_pipeline.errors import PipelineError, nearest
from dpo_pipeline.hardware import device
from dpo_pipeline.judges.judge import Completion, Judge, Results
from dpo_pipeline.models import explain_load_errors

log = logging.getLogger(__name__)

INPUTS = ("answer", "prompt_answer", "chat")


def reward_model(path: str, label: str | None, text: str, batch_size: int, revision: str | None = None) -> Judge:
    """Scores by the raw logit of the one output of the model at `path`, or by the probability of one `label` of many.

    The probability is the softmax over all labels, or the sigmoid of that logit for a multi-label model. `text` is
    what the model reads: the completion (`answer`), prompt and completion as one text (`prompt_answer`), or both in
    its own chat template (`chat`). Texts beyond its context lose their beginning, a completion alone its end. The
    model is loaded to score, and freed afterwards. Raises PipelineError if it cannot be loaded, or if `label` or
    `text` does not fit it.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = str(Path(path).expanduser())
    config = explain_load_errors(AutoConfig.from_pretrained, path, revision=revision)
    tokenizer = explain_load_errors(AutoTokenizer.from_pretrained, path, revision=revision)
    labels = [config.id2label[i] for i in range(config.num_labels)] if config.num_labels > 1 else ["null"]
    for key, value, allowed in (("label", label or "null", labels), ("text", text, INPUTS)):
        if value not in allowed:
            listed = " or ".join(allowed) + nearest(value, allowed)
            raise PipelineError(f"judge.reward_model.{key}={value}: for {path} it must be {listed}")
    if text == "chat" and not tokenizer.chat_template:
        raise PipelineError(f"{path} has no chat template: type judge.reward_model.text=prompt_answer or answer")
    tokenizer.padding_side, tokenizer.truncation_side = "right", "right" if text == "answer" else "left"

    def score(completions: list[Completion]) -> Results:
        model = load_classifier(path, revision, tokenizer)
        texts = [model_input(completion, text, tokenizer) for completion in completions]
        # A chat template writes special tokens itself.
        for rows, logits in classify(model, tokenizer, texts, batch_size, add_special_tokens=text != "chat"):
            if label is not None:
                is_multi_label = config.problem_type == "multi_label_classification"
                logits = logits.sigmoid() if is_multi_label else logits.softmax(-1)
            yield from zip(rows, logits[:, labels.index(label or "null")].tolist(), strict=True)

    # The whole folder: its config names the labels, and its tokenizer decides the ids.
    version = content_hash(Path(path)) if Path(path).is_dir() else weights_hash(path, revision)
    return Judge(score, version=f"{version} {label} {text}")


def classify(model: Any, tokenizer: Any, texts: list[str], batch_size: int, add_special_tokens: bool) -> Any:
    """Yields row numbers and float32 logits (rows, labels), batch by batch, the longest texts first."""
    import torch

    lengths = [len(ids) for ids in tokenizer(texts, verbose=False, add_special_tokens=add_special_tokens)["input_ids"]]
    limit = context_length(model, tokenizer)
    if too_long := sum(length > limit for length in lengths):
        log.warning("%d of %d texts are longer than the reward model's %d tokens: cut", too_long, len(texts), limit)
    # No model reads a row without a token: an end token stands for it.
    end = tokenizer.eos_token or tokenizer.unk_token
    texts = [text if length else end for text, length in zip(texts, lengths, strict=True)]
    order = sorted(range(len(texts)), key=lengths.__getitem__, reverse=True)
    options = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer([texts[i] for i in rows], add_special_tokens=add_special_tokens, **options)
        with torch.inference_mode():
            logits = model(**batch.to(model.device)).logits.float()
        yield rows, logits


def load_classifier(path: str, revision: str | None, tokenizer: Any) -> Any:
    """The model at `path` in eval mode; raises PipelineError if it lacks weights, such as those of its head."""
    import torch
    from transformers import AutoModelForSequenceClassification

    dtype = torch.float32 if device() == "cpu" else "auto"  # half precision is slow on CPU
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": dtype, "revision": revision}
    model, info = explain_load_errors(AutoModelForSequenceClassification.from_pretrained, path, **options)
    if lacking := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        raise PipelineError(
            f"{path} is not a reward model or classifier: it lacks {len(lacking)} weights of {type(model).__name__}, "
            f"such as {lacking[0]}: give a model that was trained as one"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.get_text_config().pad_token_id is None:  # a decoder scores the last token before the padding
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.eval().to(device())


def context_length(model: Any, tokenizer: Any) -> int:
    """The most tokens that a model reads at once."""
    # Some architectures have no such attribute. RoBERTa's first position is the one after its padding id.
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    offsets = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return min(tokenizer.model_max_length, positions - max(offsets, default=0))


def model_input(completion: Completion, text: str, tokenizer: Any) -> str:
    """What the model reads of a completion; `text` as in `reward_model`."""
    if text == "answer":
        return completion.text
    row = {"prompt": completion.prompt, "chosen": completion.text}
    if text == "prompt_answer":
        row = as_text(row)
        return row["prompt"] + row["chosen"]
    row = as_messages(row)
    return render_chat([*row["prompt"], {"role": "assistant", "content": row["chosen"]}], tokenizer, ask=False)
