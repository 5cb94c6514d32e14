"""What every policy of a comparison is measured on, as text and as token ids, and how."""

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_pipeline.data.normalize import REPLY
from dpo_pipeline.data.prepare import Prepared
from dpo_pipeline.data.prompts import prompt_ids, prompts_to_rows, read_prompts
from dpo_pipeline.data.tokens import encode_rows
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import eval_batch_size
from dpo_pipeline.judges.judge import Completion
from dpo_pipeline.models import LoadOptions
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)


@dataclass
class PromptSet:
    """Prompts to complete: `name` is the split of their pairs or their file, `rows` hold the label or group of each.

    `data_completions` are the data's own completions, if there are any.
    """

    name: str
    rows: list[dict[str, Any]]
    ids: list[list[int]]
    data_completions: list[Completion] = field(default_factory=list)


@dataclass
class EvalSet:
    """The pairs of a split and prompts, with all that a policy's numbers depend on beside its weights."""

    split: str
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
    batch_size: int | None  # as in `run_in_batches`

    def compute_settings(self) -> dict[str, Any]:
        """The settings of the forward pass that change numbers."""
        return {
            "dtype": str(self.loading.dtype).removeprefix("torch."),
            "quantization": self.loading.quantization,
            "attention": self.loading.model.attn_implementation,
        }

    def settings(self) -> dict[str, Any]:
        """All that numbers depend on, beside the weights and the versions of code and libraries."""
        data = json.dumps([self.prompts, self.chosen, self.rejected, self.prompt_set.ids])
        return {
            "pairs": len(self.prompts),
            "prompts": len(self.prompt_set.ids),
            "prompts_file": None if self.prompt_set.name == self.split else self.prompt_set.name,
            "max_new_tokens": self.max_new_tokens,
            "temperature": 1.0,
            "seed": self.seed,
            **self.compute_settings(),
            "data": hashlib.sha256(data.encode()).hexdigest(),
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
    """Completions as text, each as it follows its prompt: decoded alone it may lose the space it begins with."""
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


def prompt_limit(run: Run, data: Prepared) -> int:
    """The most tokens of a prompt that leave room for a completion; raises PipelineError where there are none."""
    limit = data.context - run.evaluation.max_new_tokens
    if limit < 2:
        raise PipelineError(
            f"evaluation.max_new_tokens={run.evaluation.max_new_tokens} leaves no room for a prompt in the model's "
            f"context of {data.context} tokens: lower it"
        )
    return limit


def make_eval_sets(run: Run, data: Prepared) -> dict[str, EvalSet]:
    """The eval sets of the files `eval.json` and `validation.json`, and of the `tracker`, for rank 0 with the rows.

    Tables read test rows; what chooses between runs, or watches one, reads validation.
    """
    settings, rows = run.evaluation, len(data.tables["validation"])
    sizes = {"eval.json": ("test", settings.pairs, settings.prompts)}
    sizes["validation.json"] = ("validation", settings.pairs, settings.prompts)
    sizes["tracker"] = ("validation", rows, settings.tracker_prompts)
    return {name: make_eval_set(run, data, *size) for name, size in sizes.items()}


def make_eval_set(run: Run, data: Prepared, split: str, pairs: int, prompts: int) -> EvalSet:
    """The first `pairs` rows of a split, and their first `prompts` different prompts; with `debug` at most 8.

    A prompt is cut if it leaves no room for a completion. Raises PipelineError if there are no rows, or no room.
    """
    table, limit = data.tables[split], prompt_limit(run, data)
    if not len(table):
        raise PipelineError(f"there are no {split} rows to measure on: raise dataset.test_rows")
    table = table.select(range(min(pairs, len(table))))
    eval_set = EvalSet(
        split=split,
        dataset=run.dataset_name,
        rows=[data.rows[split][number] for number in table["row"]],
        prompts=list(table["prompt_ids"]),
        chosen=list(table["chosen_ids"]),
        rejected=list(table["rejected_ids"]),
        prompt_set=PromptSet(split, [], []),
        tokenizer=data.tokenizer,
        eos_ids=data.eos_ids,
        max_new_tokens=run.evaluation.max_new_tokens,
        seed=run.dataset["split_seed"],
        loading=data.load_options,
        batch_size=eval_batch_size(run),
    )
    first_rows: dict[tuple[int, ...], int] = {}  # of each different prompt
    for number, ids in enumerate(eval_set.prompts):
        first_rows.setdefault(tuple(cut_prompt(ids, limit)), number)
    first_rows = dict(list(first_rows.items())[: min(prompts, 8) if run.debug else prompts])
    numbers = first_rows.values()
    eval_set.prompt_set = PromptSet(split, [eval_set.rows[i] for i in numbers], [list(ids) for ids in first_rows])
    data_ids = [eval_set.chosen[i] for i in numbers]
    eval_set.prompt_set.data_completions = eval_set.completions(eval_set.prompt_set, data_ids)
    return eval_set


def load_eval_sets(run: Run, data: Prepared) -> tuple[EvalSet, list[PromptSet]]:
    """The test pairs with prompts to complete, and the prompt sets `safety` and `bias`, if the run has such files."""
    settings, limit = run.evaluation, data.context - run.evaluation.max_new_tokens
    eval_set = make_eval_set(run, data, "test", settings.pairs, settings.prompts)
    if settings.prompts_file:
        name = Path(settings.prompts_file).name
        eval_set.prompt_set = load_prompt_set(name, settings.prompts_file, (), eval_set, limit)
    elif settings.opponent != "chosen":
        compare_with_column(eval_set, settings.opponent)
    if cut := sum(len(ids) == limit for ids in eval_set.prompt_set.ids):
        log.warning(
            "%d of %d prompts fill the room that %d tokens leave in the model's context: longer ones are cut",
            *(cut, len(eval_set.prompt_set.ids), settings.max_new_tokens),
        )
    files = (("safety", settings.safety_file, ("label",)), ("bias", settings.bias_file, ("template", "group")))
    return eval_set, [load_prompt_set(name, file, keys, eval_set, limit) for name, file, keys in files if file]


def load_prompt_set(name: str, path: str, columns: tuple[str, ...], eval_set: EvalSet, limit: int) -> PromptSet:
    """The prompts of a file in the form of the test pairs, cut to `limit` tokens; the rows keep these columns."""
    is_chat = isinstance(eval_set.rows[0]["prompt"], list)
    # A base model that learned from dialogues is asked in a dialogue.
    is_dialogue = not is_chat and all(row["prompt"].endswith(REPLY) for row in eval_set.rows)
    file_rows = read_prompts(path, columns)
    prompt_rows = prompts_to_rows([row["prompt"] for row in file_rows], is_chat, path, is_dialogue)
    rows = [{**file_row, "prompt": row["prompt"]} for file_row, row in zip(file_rows, prompt_rows, strict=True)]
    ids = prompt_ids([row["prompt"] for row in rows], is_chat, eval_set.tokenizer)
    return PromptSet(name, rows, [cut_prompt(each, limit) for each in ids])


def compare_with_column(eval_set: EvalSet, column: str) -> None:
    """Compare policies with another column's completions, not the chosen ones; PipelineError if a row has none."""
    prompt_set = eval_set.prompt_set
    if any(column not in row for row in prompt_set.rows):
        raise PipelineError(f"evaluation.opponent={column}: some test rows have none: type evaluation.opponent=chosen")
    encoded = encode_rows(prompt_set.rows, (column,), eval_set.tokenizer, eval_set.eos_ids)
    prompt_set.data_completions = eval_set.completions(prompt_set, [completions[0] for _, completions, *_ in encoded])
