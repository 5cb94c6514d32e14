"""The prompts of an evaluation: those of the test pairs or of a file, and those that show safety and bias."""

import logging
from pathlib import Path

from dpo_pipeline.data.normalize import REPLY
from dpo_pipeline.data.prepare import Prepared
from dpo_pipeline.data.prompts import prompt_ids, prompts_to_rows, read_prompts
from dpo_pipeline.data.tokens import encode_rows
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.evaluation.eval_set import EvalSet, PromptSet, cut_prompt, make_eval_set
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)


def load_eval_sets(run: Run, data: Prepared) -> tuple[EvalSet, dict[str, PromptSet]]:
    """The test pairs with prompts to complete, and the prompt sets `safety` and `bias`, if the run has such files."""
    settings = run.evaluation
    eval_set = make_eval_set(run, data, "test", settings.pairs, settings.prompts)
    limit = data.context - settings.max_new_tokens
    if settings.prompts_file:
        eval_set.prompt_set = load_prompt_set(settings.prompts_file, (), eval_set, limit)
        eval_set.prompts_file = Path(settings.prompts_file).name
    elif settings.opponent != "chosen":
        compare_with_column(eval_set, settings.opponent)
    if cut := sum(len(ids) == limit for ids in eval_set.prompt_set.ids):
        log.warning(
            "%d of %d prompts fill the room that %d tokens leave in the model's context: longer ones are cut",
            *(cut, len(eval_set.prompt_set.ids), settings.max_new_tokens),
        )
    prompt_sets = {}
    if settings.safety_file:
        prompt_sets["safety"] = load_prompt_set(settings.safety_file, ("label",), eval_set, limit)
    if settings.bias_file:
        prompt_sets["bias"] = load_prompt_set(settings.bias_file, ("template", "group"), eval_set, limit)
    return eval_set, prompt_sets


def load_prompt_set(path: str, columns: tuple[str, ...], eval_set: EvalSet, limit: int) -> PromptSet:
    """The prompts of a file in the form of the test pairs, cut to `limit` tokens; the rows keep these columns."""
    is_chat = isinstance(eval_set.rows[0]["prompt"], list)
    # A base model that learned from dialogues is asked in a dialogue.
    is_dialogue = not is_chat and all(row["prompt"].endswith(REPLY) for row in eval_set.rows)
    file_rows = read_prompts(path, columns)
    prompt_rows = prompts_to_rows([row["prompt"] for row in file_rows], is_chat, path, is_dialogue)
    rows = [{**file_row, "prompt": row["prompt"]} for file_row, row in zip(file_rows, prompt_rows, strict=True)]
    ids = prompt_ids([row["prompt"] for row in rows], is_chat, eval_set.tokenizer)
    return PromptSet(rows, [cut_prompt(each, limit) for each in ids])


def compare_with_column(eval_set: EvalSet, column: str) -> None:
    """Compare policies with the completions of another column of the test rows, in place of the chosen ones.

    Raises PipelineError if a row has none.
    """
    prompt_set = eval_set.prompt_set
    if any(column not in row for row in prompt_set.rows):
        raise PipelineError(f"evaluation.opponent={column}: some test rows have none: type evaluation.opponent=chosen")
    encoded = encode_rows(prompt_set.rows, (column,), eval_set.tokenizer, eval_set.eos_ids)
    ids = [completion for _, (completion,), _, _ in encoded]
    prompt_set.data_completions = eval_set.completions(prompt_set, ids)
