"""Rows of text or messages become token ids, once: what training, sampling and measuring all read."""

import json
import logging
from dataclasses import dataclass
from typing import Any

from dpo_pipeline.errors import PipelineError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lengths:
    """Limits in tokens: of a prompt with its longer answer, and of a prompt where the pair exceeds that."""

    max: int
    max_prompt: int

    @classmethod
    def of(cls, max_length: int | None, max_prompt: int | None, context: int) -> "Lengths":
        """The limits asked for, or their defaults; raises PipelineError beyond the model's `context`."""
        longest = max_length or min(512, context)
        if longest > context:
            raise PipelineError(f"length.max={longest} exceeds the model's context of {context} tokens: lower it")
        cut = max_prompt or longest // 2
        if cut >= longest:
            raise PipelineError(
                f"length.max_prompt={cut} leaves no room for an answer in length.max={longest}: lower it"
            )
        return cls(longest, cut)


def end_tokens(tokenizer: Any, generation_config: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's end token first, then those of the model's generation config.

    Raises PipelineError where the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise PipelineError(
            "the tokenizer has no end token, so no answer could end: set eos_token in its tokenizer_config.json"
        )
    also = generation_config.eos_token_id
    also = [] if also is None else [also] if isinstance(also, int) else also
    return list(dict.fromkeys([tokenizer.eos_token_id, *also]))


def tokenize(rows: list[dict], answers: tuple[str, ...], tokenizer: Any, ends: list[int], lengths: Lengths) -> Any:
    """A `datasets.Dataset` with `prompt_ids` and, for each of the columns `answers`, its ids (`chosen_ids`).

    The prompt's ids are those of the prompt alone, as sampling sees it. An answer's are what prompt and answer
    tokenized together have after them, ended by exactly one end token; where the prompt's ids are not a prefix of
    those, the answer is tokenized alone (`merged`: warned of above 5%). Where prompt and longest answer exceed
    `lengths.max` the prompt is cut from its left to `lengths.max_prompt`, as in the DPO authors' code but for its BOS,
    which stays; a row whose answer is still too long is dropped. The table's description holds the numbers of rows
    that were changed or dropped, by reason, as JSON. Raises PipelineError where no row is left.
    """
    from datasets import Dataset, DatasetInfo

    columns = {"prompt_ids": [], **{f"{name}_ids": [] for name in answers}}
    counts = {"merged": 0, "cut": 0, "too long": 0, "ended early": 0, "no prompt": 0}
    for start in range(0, len(rows), 1000):
        batch = rows[start : start + 1000]
        prompts = encode(batch, None, tokenizer, ends)
        together = [encode(batch, name, tokenizer, ends) for name in answers]
        for i, prompt in enumerate(prompts):
            if not prompt:  # the first token of an answer would have nothing to be predicted from
                counts["no prompt"] += 1
                continue
            merged = any(full[i][: len(prompt)] != prompt for full in together)
            ids = [full[i][len(prompt) :] for full in together]
            if merged:
                texts = [text(batch[i][name]) for name in answers]
                ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
            # Behind the end token of messages comes what their template puts there; of a text, more of the answer.
            early = isinstance(batch[i]["prompt"], str) and any(set(ends) & set(answer[:-1]) for answer in ids)
            ids = [end_once(answer, ends) for answer in ids]
            longest = max(map(len, ids))
            cut = len(prompt) + longest > lengths.max and len(prompt) > lengths.max_prompt
            if cut:
                bos = prompt[:1] if prompt[0] == tokenizer.bos_token_id else []
                prompt = bos + prompt[len(bos) + len(prompt) - lengths.max_prompt :]
            if len(prompt) + longest > lengths.max:
                counts["too long"] += 1
                continue
            counts["cut"] += cut
            counts["merged"] += merged
            counts["ended early"] += early
            for name, value in zip(columns, [prompt, *ids], strict=True):
                columns[name].append(value)
    table = Dataset.from_dict(columns, info=DatasetInfo(description=json.dumps({"read": len(rows), **counts})))
    tell(table, tokenizer, ends, lengths)
    return table


def tell(table: Any, tokenizer: Any, ends: list[int], lengths: Lengths) -> None:
    """Say what became of the rows that a table was made of; raises PipelineError where none is left."""
    counts = json.loads(table.info.description)
    read = counts["read"]
    if counts["no prompt"]:
        log.warning("%d of %d rows dropped: their prompt has no token", counts["no prompt"], read)
    if read and not len(table):
        why = f"have no prompt or are longer than length.max={lengths.max} tokens: raise it"
        raise PipelineError(f"all {read} rows {why}")
    if counts["cut"] or counts["too long"]:
        log.info(
            "%d rows: %d prompts cut from the left to %d tokens, %d rows dropped, longer than length.max=%d",
            *(read, counts["cut"], lengths.max_prompt, counts["too long"], lengths.max),
        )
    if counts["ended early"]:
        log.warning(
            "%d of %d rows: an answer holds the end token %r before its end, and was cut there: take it out",
            *(counts["ended early"], read, tokenizer.convert_ids_to_tokens(ends[0])),
        )
    if counts["merged"] > 0.05 * read:
        log.warning(
            "%d of %d rows: the prompt's tokens change when an answer follows, so the answer was tokenized alone: "
            "end the prompts where a token ends (a line break, or no trailing space)",
            *(counts["merged"], read),
        )


def encode(rows: list[dict], answer: str | None, tokenizer: Any, ends: list[int]) -> list[list[int]]:
    """Ids of each row's prompt, or of its prompt and the column `answer` together; messages through the template."""
    if isinstance(rows[0]["prompt"], str):
        texts = [row["prompt"] + (row[answer] if answer else "") for row in rows]
        ids = tokenizer(texts)["input_ids"]
        # Some tokenizers close every text with their end token; a prompt is not at its end.
        return [i[:-1] if len(i) > 1 and i[-1] in ends else i for i in ids]
    if not tokenizer.chat_template:
        raise PipelineError(
            "the rows are messages but the tokenizer has no chat template: take an instruction-tuned model, or give "
            "the pairs as text"
        )
    dialogues = [row["prompt"] + (messages(row[answer]) if answer else []) for row in rows]
    texts = [templated(dialogue, tokenizer, answer is None) for dialogue in dialogues]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def templated(dialogue: list[dict], tokenizer: Any, ask: bool) -> str:
    """A dialogue as the tokenizer's chat template writes it; raises PipelineError where the template refuses it."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        return tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=ask)
    except TemplateSyntaxError as error:
        raise PipelineError(
            f"the tokenizer's chat template cannot be read (line {error.lineno}: {error.message}): correct its "
            "chat_template.jinja, or take the one of the model's own page"
        ) from error
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in dialogue)
        raise PipelineError(
            f"the tokenizer's chat template refuses a dialogue of {roles} ({error.message}): give the messages in the "
            "order and roles that it takes"
        ) from error


def messages(answer: str | list[dict]) -> list[dict]:
    """An answer as the messages that follow the prompt's."""
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def text(answer: str | list[dict]) -> str:
    """The words of an answer that is text, or messages."""
    return answer if isinstance(answer, str) else "".join(message["content"] for message in answer)


def end_once(ids: list[int], ends: list[int]) -> list[int]:
    """The ids up to their first end token, or with the tokenizer's own appended."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), [*ids, ends[0]])
