"""What every policy of a comparison is measured on, as text and as token ids, and how."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from dpo_pipeline.judges.judge import Answer
from dpo_pipeline.policies import Loading


@dataclass
class Questions:
    """Prompts to answer, as their rows have them and as token ids, and the data's own answer to each, if any."""

    prompts: list[Any]
    ids: list[list[int]]
    human: list[Answer] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)  # safe or unsafe
    groups: list[tuple[str, str]] = field(default_factory=list)  # (template, group)


@dataclass
class Material:
    """Test pairs and questions, with all that a policy's numbers depend on beside its weights; `sources` of pairs."""

    dataset: str
    rows: list[dict[str, Any]]
    prompts: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]
    questions: Questions
    tokenizer: Any
    ends: list[int]
    max_new_tokens: int
    seed: int
    loading: Loading
    batch_size: int
    asked: str | None = None  # the file of the questions, where they are not those of the pairs

    def how(self) -> dict[str, Any]:
        """In what numbers weights are computed."""
        return {
            "dtype": str(self.loading.dtype).removeprefix("torch."),
            "quantization": self.loading.quantization,
            "attention": self.loading.model.attn_implementation,
        }

    def settings(self, weights: dict[str, str], beta: float) -> dict[str, Any]:
        """All that a policy's numbers depend on: `weights` of itself and of what it is measured against, and these."""
        data = json.dumps([self.prompts, self.chosen, self.rejected, self.questions.ids])
        return {
            "pairs": len(self.prompts),
            "prompts": len(self.questions.ids),
            "prompts_file": self.asked,
            "max_new_tokens": self.max_new_tokens,
            "temperature": 1.0,
            "beta": beta,
            "seed": self.seed,
            **self.how(),
            "data": hashlib.sha256(data.encode()).hexdigest(),
            "weights": weights,
        }

    def answers(self, questions: Questions, ids: list[list[int]], draws: int = 1) -> list[Answer]:
        """Sampled answers as a judge reads them, in the order of `ids`: `draws` for each question."""
        asked = [i for i in range(len(questions.ids)) for _ in range(draws)]
        texts = texts_behind([questions.ids[i] for i in asked], ids, self.tokenizer)
        return [
            Answer(questions.prompts[i], text, own[-1] in self.ends, tuple(questions.ids[i]), tuple(own))
            for i, text, own in zip(asked, texts, ids, strict=True)
        ]


def texts_behind(prompts: list[list[int]], answers: list[list[int]], tokenizer: Any) -> list[str]:
    """Answers as text, as each follows its prompt.

    Decoded alone, an answer loses its first space with some tokenizers: those of the data, which have it, would be
    known by that.
    """
    if not answers:  # of which transformers makes one empty text
        return []
    before = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    both = zip(prompts, answers, strict=True)
    whole = tokenizer.batch_decode([prompt + answer for prompt, answer in both], skip_special_tokens=True)
    alone = tokenizer.batch_decode(answers, skip_special_tokens=True)
    texts = zip(before, whole, alone, strict=True)
    return [full.removeprefix(prompt) if full.startswith(prompt) else own for prompt, full, own in texts]


def cut(ids: list[int], room: int) -> list[int]:
    """A prompt of at most `room` tokens: cut from its left, but for its first token, which may open every text."""
    return ids if len(ids) <= room else ids[:1] + ids[1 - room :]


def material(table: Any, rows: list[dict[str, Any]], pairs: int, prompts: int, room: int, **rest: Any) -> Material:
    """The first `pairs` rows of a tokenized `table`, with their texts in `rows`, and its first different prompts.

    A prompt longer than `room` tokens is cut before it is answered.
    """
    table = table.select(range(min(pairs, len(table))))
    kept = [rows[i] for i in table["row"]]
    first: dict[tuple[int, ...], int] = {}
    for place, ids in enumerate(table["prompt_ids"]):
        first.setdefault(tuple(cut(ids, room)), place)
    asked = dict(list(first.items())[:prompts])
    chosen = list(table["chosen_ids"])
    theirs = [chosen[at] for at in asked.values()]
    texts = texts_behind([list(ids) for ids in asked], theirs, rest["tokenizer"])
    human = [
        Answer(kept[at]["prompt"], text, True, ids, tuple(chosen[at]))
        for (ids, at), text in zip(asked.items(), texts, strict=True)
    ]
    return Material(
        rows=kept, prompts=list(table["prompt_ids"]), chosen=chosen, rejected=list(table["rejected_ids"]),
        questions=Questions([each.prompt for each in human], [list(ids) for ids in asked], human), **rest,
    )  # fmt: skip
