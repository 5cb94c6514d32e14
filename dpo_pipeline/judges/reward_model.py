"""A reward model or any other classifier of text as a judge: a sequence-classification model, local or of the hub."""

import logging
from pathlib import Path
from typing import Any

from dpo_pipeline.data.normalize import as_messages, as_text
from dpo_pipeline.data.tokens import render_chat
from dpo_pipeline.errors import PipelineError, nearest
from dpo_pipeline.hardware import device
from dpo_pipeline.judges.judge import Completion, Judge, Scores
from dpo_pipeline.models import explain_load_errors
from dpo_pipeline.run_folder import content_hash, weights_of

log = logging.getLogger(__name__)

TEXTS = ("answer", "prompt_answer", "chat")


def reward_model(path: str, label: str | None, text: str, batch_size: int, revision: str | None = None) -> Judge:
    """Scores by the one output of the model at `path`, its raw logit, or by the probability of a `label` of several.

    The probability is the softmax over all labels, or the sigmoid of that one's logit where the model says that labels
    may hold together. `text` is what it reads: the completion alone, prompt and completion as one text, or both as
    messages through its own chat template. What is longer than the model can read loses its beginning, a completion
    alone its end. The model is loaded when scores are asked for, and freed after them. Raises PipelineError where
    nothing can be loaded, where `label` is none of the model's or needed, and where there is no chat template.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = str(Path(path).expanduser())
    config = explain_load_errors(AutoConfig.from_pretrained, path, revision=revision)
    tokenizer = explain_load_errors(AutoTokenizer.from_pretrained, path, revision=revision)
    labels = [config.id2label[i] for i in range(config.num_labels)]
    if label is None and len(labels) > 1:
        raise PipelineError(
            f"{path} has {len(labels)} labels, and a score is one number: type judge.reward_model.label=LABEL, one of "
            f"{', '.join(labels)}"
        )
    if label is not None and len(labels) == 1:
        raise PipelineError(f"{path} has one output, which is the score: leave out judge.reward_model.label={label}")
    if label is not None and label not in labels:
        raise PipelineError(
            f"judge.reward_model.label={label} is none of the labels of {path}: {', '.join(labels)}"
            f"{nearest(label, labels)}"
        )
    if text not in TEXTS:
        raise PipelineError(
            f"judge.reward_model.text={text} is none of its values: {', '.join(TEXTS)}{nearest(text, TEXTS)}"
        )
    if text == "chat" and not tokenizer.chat_template:
        raise PipelineError(f"{path} has no chat template: type judge.reward_model.text=prompt_answer or answer")
    tokenizer.padding_side, tokenizer.truncation_side = "right", "right" if text == "answer" else "left"

    def score(completions: list[Completion]) -> Scores:
        import torch

        model = load(path, revision, tokenizer)
        texts = [reward_model_text(completion, text, tokenizer) for completion in completions]
        how = {"add_special_tokens": text != "chat"}  # a chat template writes them itself
        lengths = [len(ids) for ids in tokenizer(texts, verbose=False, **how)["input_ids"]]
        # A completion of no token: what says so, since no model reads a row of none.
        texts = [
            each if n else tokenizer.eos_token or tokenizer.unk_token for each, n in zip(texts, lengths, strict=True)
        ]
        limit = reward_model_context(model, tokenizer)
        if cut := sum(length > limit for length in lengths):
            log.warning(
                "%d of %d texts are longer than the %d tokens that %s reads, and cut", cut, len(texts), limit, path
            )
        order = sorted(range(len(texts)), key=lengths.__getitem__, reverse=True)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=limit, return_tensors="pt", **how
            )
            with torch.inference_mode():
                logits = model(**batch.to(model.device)).logits.float()
            if label is not None:
                together = config.problem_type == "multi_label_classification"
                logits = logits.sigmoid() if together else logits.softmax(-1)
            yield from zip(rows, logits[:, labels.index(label) if label else 0].tolist(), strict=True)

    # The whole folder: its config names the labels, and its tokenizer what is read.
    version = content_hash(Path(path)) if Path(path).is_dir() else weights_of(path, revision)
    return Judge(score, version=f"{version} {label} {text}")


def load(path: str, revision: str | None, tokenizer: Any) -> Any:
    """The model at `path` in eval mode; raises PipelineError where it lacks weights, such as those of its head."""
    import torch
    from transformers import AutoModelForSequenceClassification

    dtype = torch.float32 if device() == "cpu" else "auto"  # half precision is slow there
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": dtype, "revision": revision}
    model, info = explain_load_errors(AutoModelForSequenceClassification.from_pretrained, path, **options)
    if wrong := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        raise PipelineError(
            f"{path} is no reward model or classifier: it lacks {len(wrong)} weights of {type(model).__name__}, such "
            f"as {wrong[0]}, which would be drawn at random: give a model that was trained as one"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.get_text_config().pad_token_id is None:  # a decoder's score is that of the last token before them
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.eval().to(device())


def reward_model_context(model: Any, tokenizer: Any) -> int:
    """The most tokens that a model reads at once."""
    # Not an attribute of every architecture. RoBERTa counts its positions from behind its padding's id.
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    offsets = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return min(tokenizer.model_max_length, places - max(offsets, default=0))


def reward_model_text(completion: Completion, text: str, tokenizer: Any) -> str:
    """What a model reads of a completion."""
    if text == "answer":
        return completion.text
    row = {"prompt": completion.prompt, "chosen": completion.text}
    if text == "prompt_answer":
        row = as_text(row)
        return row["prompt"] + row["chosen"]
    row = as_messages(row)
    return render_chat([*row["prompt"], {"role": "assistant", "content": row["chosen"]}], tokenizer, ask=False)
