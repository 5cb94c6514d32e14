"""What every policy of a comparison is measured on, as text and as token ids, and how."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from dpo_pipeline.judges.judge import Completion
from dpo_pipeline.models import LoadOptions


@dataclass
class PromptSet:
    """Prompts to complete, as their rows have them and as token ids, and the data's own completion to each, if any."""

    prompts: list[Any]
    ids: list[list[int]]
    human: list[Completion] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)  # safe or unsafe
    groups: list[tuple[str, str]] = field(default_factory=list)  # (template, group)


@dataclass
class EvalSet:
    """Test pairs and questions, with all that a policy's numbers depend on beside its weights; `sources` of pairs."""

    dataset: str
    rows: list[dict[str, Any]]
    prompts: list[list[int]]
    chosen: list[list[int]]
    rejected: list[list[int]]
    prompt_set: PromptSet
    tokenizer: Any
    eos_ids: list[int]
    max_new_tokens: int
    seed: int
    loading: LoadOptions
    batch_size: int
    prompts_file: str | None = None  # the file of the questions, where they are not those of the pairs

    def compute_settings(self) -> dict[str, Any]:
        """In what numbers weights are computed."""
        return {
            "dtype": str(self.loading.dtype).removeprefix("torch."),
            "quantization": self.loading.quantization,
            "attention": self.loading.model.attn_implementation,
        }

    def settings(self, weights: dict[str, str], beta: float) -> dict[str, Any]:
        """All that a policy's numbers depend on: `weights` of itself and of what it is measured against, and these."""
        data = json.dumps([self.prompts, self.chosen, self.rejected, self.prompt_set.ids])
        return {
            "pairs": len(self.prompts),
            "prompts": len(self.prompt_set.ids),
            "prompts_file": self.prompts_file,
            "max_new_tokens": self.max_new_tokens,
            "temperature": 1.0,
            "beta": beta,
            "seed": self.seed,
            **self.compute_settings(),
            "data": hashlib.sha256(data.encode()).hexdigest(),
            "weights": weights,
        }

    def completions(self, prompt_set: PromptSet, ids: list[list[int]], draws: int = 1) -> list[Completion]:
        """Sampled completions as a judge reads them, in the order of `ids`: `draws` for each question."""
        asked = [i for i in range(len(prompt_set.ids)) for _ in range(draws)]
        texts = completion_texts([prompt_set.ids[i] for i in asked], ids, self.tokenizer)
        return [
            Completion(prompt_set.prompts[i], text, own[-1] in self.eos_ids, tuple(prompt_set.ids[i]), tuple(own))
            for i, text, own in zip(asked, texts, ids, strict=True)
        ]


def completion_texts(prompts: list[list[int]], completions: list[list[int]], tokenizer: Any) -> list[str]:
    """Completions as text, as each follows its prompt.

    Decoded alone, a completion loses its first space with some tokenizers: those of the data, which have it, would be
    known by that.
    """
    if not completions:  # of which transformers makes one empty text
        return []
    before = tokenizer.batch_decode(prompts, skip_special_tokens=True)
    both = zip(prompts, completions, strict=True)
    whole = tokenizer.batch_decode([prompt + completion for prompt, completion in both], skip_special_tokens=True)
    alone = tokenizer.batch_decode(completions, skip_special_tokens=True)
    texts = zip(before, whole, alone, strict=True)
    return [full.removeprefix(prompt) if full.startswith(prompt) else own for prompt, full, own in texts]


def cut_prompt(ids: list[int], room: int) -> list[int]:
    """A prompt of at most `room` tokens: cut from its left, but for its first token, which may open every text."""
    return ids if len(ids) <= room else ids[:1] + ids[1 - room :]


def make_eval_set(table: Any, rows: list[dict[str, Any]], pairs: int, prompts: int, room: int, **rest: Any) -> EvalSet:
    """The first `pairs` rows of a tokenized `table`, with their texts in `rows`, and its first different prompts.

    A prompt longer than `room` tokens is cut before it is answered.
    """
    table = table.select(range(min(pairs, len(table))))
    kept = [rows[i] for i in table["row"]]
    first: dict[tuple[int, ...], int] = {}
    for place, ids in enumerate(table["prompt_ids"]):
        first.setdefault(tuple(cut_prompt(ids, room)), place)
    asked = dict(list(first.items())[:prompts])
    chosen = list(table["chosen_ids"])
    theirs = [chosen[at] for at in asked.values()]
    texts = completion_texts([list(ids) for ids in asked], theirs, rest["tokenizer"])
    human = [
        Completion(kept[at]["prompt"], text, True, ids, tuple(chosen[at]))
        for (ids, at), text in zip(asked.items(), texts, strict=True)
    ]
    return EvalSet(
        rows=kept, prompts=list(table["prompt_ids"]), chosen=chosen, rejected=list(table["rejected_ids"]),
        prompt_set=PromptSet([each.prompt for each in human], [list(ids) for ids in asked], human), **rest,
    )  # fmt: skip
