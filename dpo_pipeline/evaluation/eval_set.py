"""What every policy of a comparison is measured on, as text and as token ids, and how."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from dpo_pipeline.data.prepare import Prepared
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.judges.judge import Completion
from dpo_pipeline.models import LoadOptions
from dpo_pipeline.schema import Run


@dataclass
class PromptSet:
    """Prompts to complete: their rows (with the label or group of a prompt), their token ids, and the data's own
    completions, if there are any.
    """

    rows: list[dict[str, Any]]
    ids: list[list[int]]
    data_completions: list[Completion] = field(default_factory=list)


@dataclass
class EvalSet:
    """Pairs and prompts, with all that a policy's numbers depend on beside its weights."""

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
    prompts_file: str | None = None  # the file of the prompts, if they are not those of the pairs

    @property
    def sides(self) -> dict[str, list[list[int]]]:
        """The token ids of the pairs' completions."""
        return {"chosen": self.chosen, "rejected": self.rejected}

    def compute_settings(self) -> dict[str, Any]:
        """The settings of the forward pass that change numbers."""
        return {
            "dtype": str(self.loading.dtype).removeprefix("torch."),
            "quantization": self.loading.quantization,
            "attention": self.loading.model.attn_implementation,
        }

    def settings(self, weights: dict[str, str], beta: float) -> dict[str, Any]:
        """All that a policy's numbers depend on; `weights` are its own and those of its references."""
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
        """Sampled completions as a judge reads them, in the order of `ids`: `draws` for each prompt."""
        rows = [row for row in prompt_set.rows for _ in range(draws)]
        prompts = [prompt for prompt in prompt_set.ids for _ in range(draws)]
        texts = completion_texts(prompts, ids, self.tokenizer)
        return [
            Completion(row["prompt"], text, completion[-1] in self.eos_ids, tuple(prompt), tuple(completion))
            for row, prompt, text, completion in zip(rows, prompts, texts, ids, strict=True)
        ]


def completion_texts(prompts: list[list[int]], completions: list[list[int]], tokenizer: Any) -> list[str]:
    """Completions as text, each as it follows its prompt.

    Some tokenizers drop the first space of a completion that is decoded alone. The data's own completions have it, so
    a judge could tell them from sampled ones.
    """
    if not completions:  # transformers decodes an empty batch to one empty text
        return []
    sequences = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    batches = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prompts, sequences, completions))
    return [
        sequence.removeprefix(prompt) if sequence.startswith(prompt) else completion
        for prompt, sequence, completion in zip(*batches, strict=True)
    ]


def cut_prompt(ids: list[int], limit: int) -> list[int]:
    """A prompt of at most `limit` tokens: cut from its left, but for its first token, which may be a start token."""
    return ids if len(ids) <= limit else ids[:1] + ids[1 - limit :]


def make_eval_sets(run: Run, data: Prepared) -> dict[str, EvalSet]:
    """The eval sets of a DPO run: of the files `eval.json` and `validation.json`, and of the `tracker`.

    Tables read test rows; what chooses between runs, or watches one, reads validation. For rank 0, which has the rows.
    """
    settings, validation_rows = run.evaluation, len(data.tables["validation"])
    return {
        "eval.json": make_eval_set(run, data, "test", settings.pairs, settings.prompts),
        "validation.json": make_eval_set(run, data, "validation", settings.pairs, settings.prompts),
        "tracker": make_eval_set(run, data, "validation", validation_rows, settings.tracker_prompts),
    }


def make_eval_set(run: Run, data: Prepared, split: str, pairs: int, prompts: int) -> EvalSet:
    """The first `pairs` rows of a split, and their first `prompts` different prompts; with `debug` at most 8.

    A prompt is cut if it leaves no room for a completion. Raises PipelineError if there are no rows, or no room.
    """
    table, max_new_tokens = data.tables[split], run.evaluation.max_new_tokens
    limit = data.context - max_new_tokens
    if not len(table):
        raise PipelineError(f"there are no {split} rows to measure on: raise dataset.test_rows")
    if limit < 2:
        raise PipelineError(
            f"evaluation.max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's context of "
            f"{data.context} tokens: lower it"
        )
    table = table.select(range(min(pairs, len(table))))
    eval_set = EvalSet(
        dataset=run.dataset_name,
        rows=[data.rows[split][number] for number in table["row"]],
        prompts=list(table["prompt_ids"]),
        chosen=list(table["chosen_ids"]),
        rejected=list(table["rejected_ids"]),
        prompt_set=PromptSet([], []),
        tokenizer=data.tokenizer,
        eos_ids=data.eos_ids,
        max_new_tokens=max_new_tokens,
        seed=run.dataset["split_seed"],
        loading=data.load_options,
        batch_size=run.batch.micro_size,
    )
    eval_set.prompt_set = different_prompts(eval_set, limit, min(prompts, 8) if run.debug else prompts)
    return eval_set


def different_prompts(eval_set: EvalSet, limit: int, count: int) -> PromptSet:
    """The first `count` different prompts of the pairs, cut to `limit` tokens, with the chosen completion of each."""
    first_rows: dict[tuple[int, ...], int] = {}
    for number, ids in enumerate(eval_set.prompts):
        first_rows.setdefault(tuple(cut_prompt(ids, limit)), number)
    numbers = list(first_rows.values())[:count]
    prompt_set = PromptSet([eval_set.rows[i] for i in numbers], [list(ids) for ids in first_rows][:count])
    prompt_set.data_completions = eval_set.completions(prompt_set, [eval_set.chosen[i] for i in numbers])
    return prompt_set
