"""A reward model or any other text classifier as a judge: a sequence-classification model, local or of the hub."""

import logging
from collections.abc import Iterator
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


def reward_model(path: str, label: str | None, text: str, batch_size: int, revision: str | None = None) -> Judge:
    """Scores by the raw logit of the one output of the model at `path`, or by the probability of one `label` of many.

    The probability is the softmax over all labels, or the sigmoid of that logit for a multi-label model. `text` is
    what the model reads: the completion (`answer`), prompt and completion as one text (`prompt_answer`), or both in
    its own chat template (`chat`). Texts beyond its context lose their beginning, a completion alone its end. The
    model is loaded to score, and freed afterwards. Raises PipelineError if it cannot be loaded, or if `label` or
    `text` does not fit it.
    """
    from transformers import AutoConfig, AutoTokenizer

    config = explain_load_errors(AutoConfig.from_pretrained, path, revision=revision)
    tokenizer = explain_load_errors(AutoTokenizer.from_pretrained, path, revision=revision)
    labels = [config.id2label[i] for i in range(config.num_labels)] if config.num_labels > 1 else ["null"]
    inputs = ["answer", "prompt_answer", *(["chat"] if tokenizer.chat_template else [])]
    for key, value, allowed in (("label", label or "null", labels), ("text", text, inputs)):
        if value not in allowed:
            options = " or ".join(allowed) + nearest(value, allowed)
            raise PipelineError(f"judge.reward_model.{key}={value}: for {path} it must be {options}")
    tokenizer.padding_side, tokenizer.truncation_side = "right", "right" if text == "answer" else "left"

    def score(completions: list[Completion]) -> Results:
        texts = [model_input(completion, text, tokenizer) for completion in completions]
        is_multi_label = config.problem_type == "multi_label_classification"
        function = "none" if label is None else "sigmoid" if is_multi_label else "softmax"
        # A chat template writes special tokens itself.
        options = {"function_to_apply": function, "add_special_tokens": text != "chat", "batch_size": batch_size}
        for index, outputs in classify(path, revision, tokenizer, texts, **options):
            yield index, next(output["score"] for output in outputs if label in (None, output["label"]))

    # The whole folder: its config names the labels, and its tokenizer decides the ids.
    version = content_hash(Path(path)) if Path(path).is_dir() else weights_hash(path, revision)
    return Judge(score, version=f"{version} {label} {text}")


def model_input(completion: Completion, text: str, tokenizer: Any) -> str:
    """What the model reads of a completion; `text` as in `reward_model`."""
    row = {"prompt": completion.prompt, "chosen": completion.text}
    if text == "chat":
        row = as_messages(row)
        return render_chat([*row["prompt"], {"role": "assistant", "content": row["chosen"]}], tokenizer, ask=False)
    row = as_text(row)
    return completion.text if text == "answer" else row["prompt"] + row["chosen"]


def classify(path: str, revision: str | None, tokenizer: Any, texts: list[str], **options: Any) -> Iterator[Any]:
    """The index of each text and the score of each label, the longest text first; `options` of the pipeline."""
    from transformers import pipeline

    model, limit = load_classifier(path, revision, tokenizer)
    ids = tokenizer(texts, verbose=False, add_special_tokens=options["add_special_tokens"])["input_ids"]
    lengths = [len(each) for each in ids]
    if too_long := sum(length > limit for length in lengths):
        log.warning("%d of %d texts are longer than the reward model's %d tokens: cut", too_long, len(texts), limit)
    order = sorted(range(len(texts)), key=lengths.__getitem__, reverse=True)
    end = tokenizer.eos_token or tokenizer.unk_token  # stands for a text without a token, which no model reads
    rows = (texts[index] if lengths[index] else end for index in order)
    classifier = pipeline("text-classification", model, tokenizer=tokenizer, device=device())
    yield from zip(order, classifier(rows, top_k=None, truncation=True, max_length=limit, **options), strict=True)


def load_classifier(path: str, revision: str | None, tokenizer: Any) -> tuple[Any, int]:
    """The model at `path`, and how many tokens it reads; raises PipelineError if it lacks weights, as of its head."""
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
    # A decoder scores the last token that is not this one: with another than the tokenizer's, the padding is scored.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    # Some architectures have no such attribute. RoBERTa's first position is the one after its padding id.
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    layers = [layer for name, layer in model.named_modules() if name.endswith("position_embeddings")]
    first = max(
        (layer.padding_idx + 1 for layer in layers if getattr(layer, "padding_idx", None) is not None), default=0
    )
    return model, min(tokenizer.model_max_length, positions - first)
