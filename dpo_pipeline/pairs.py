"""Make preference pairs: sample completions of a policy, and score them with a judge.

python -m dpo_pipeline.pairs                                              of the SFT; policy=FOLDER takes another
python -m dpo_pipeline.dpo dataset=json dataset.path=FILE name=NAME       trains on them
"""

import itertools
import json
import logging
from functools import cache, partial
from pathlib import Path
from typing import Any

from dpo_pipeline.cli import main
from dpo_pipeline.errors import PipelineError, nearest
from dpo_pipeline.naming import clean_name, policy_name
from dpo_pipeline.record import run_logging, write_file
from dpo_pipeline.run_folder import finished_sft
from dpo_pipeline.schema import Run

log = logging.getLogger("dpo_pipeline.pairs")  # __name__ is __main__ when run as a command


def run_pairs(run: Run) -> Path | None:
    """Write preference pairs of the starting policy's completions to `<home>/pairs/`; the file, or None with `check`.

    The prompts are those of the train split. An interruption loses at most 512 completions. Raises PipelineError
    where no judge scores completions, or where no two completions of a prompt have scores that differ enough.
    """
    from dpo_pipeline.base_model import base_model
    from dpo_pipeline.data.prepare import prepare
    from dpo_pipeline.distributed import on_main_process
    from dpo_pipeline.hardware import check_device
    from dpo_pipeline.judges.build import build_judges

    with run_logging(None), base_model(run) as run:
        check_device("dpo_pipeline.pairs")
        if run.policy == "sft":
            finished_sft(run)
        label = run.policy if run.policy in ("sft", "base") else policy_name(run.policy)
        # The prompts of any set will do: of pairs, of demonstrations, of plain text.
        changes = {"sft_dataset": None, "sft_target": run.dataset["sft_target"]}
        data = prepare(run.model_copy(update=changes), "sft", ("train",), strict=False)
        judges = build_judges(run, data.load_options)
        judge = find_scoring_judge(run.pairs.judge, [name for name in judges if judges[name].score])
        eval_set = on_main_process(lambda: train_prompts(run, data))
        if run.check:
            return None
        table = sample_completions(label, sampled_policy(run), run, eval_set)
        return on_main_process(lambda: write_pairs(run, table, eval_set.prompt_set.rows, judge, judges[judge], label))


def write_pairs(run: Run, table: Any, prompt_rows: list[Any], name: str, judge: Any, label: str) -> Path:
    """Score the completions of a table by the judge of this name, and write their pairs; raises PipelineError."""
    from dpo_pipeline.judges.judge import scores

    settings = run.pairs
    table["score"] = scores(judge, list(table["completion"]), run.verdicts, f"scores by {name}")
    pairs = choose_pairs(table, settings.keep, settings.min_gap, settings.only_ended)
    if not pairs:
        raise PipelineError(
            f"no prompt has two completions whose scores by {name} differ by more than {settings.min_gap:g}: type a "
            "lower pairs.min_gap, more pairs.completions, or pairs.only_ended=false"
        )
    source = {"judge": name, "policy": str(sampled_policy(run)), "temperature": settings.temperature}
    file = run.home / "pairs" / f"{clean_name(f'{label}-{name}-{settings.keep}')}.jsonl"
    write_rows(file, [format_pair(prompt_rows, *pair) | source for pair in pairs])
    log.info("train on them: python -m dpo_pipeline.dpo dataset=json dataset.path=%s name=%s", file, run.name)
    return file


def sampled_policy(run: Run) -> str | Path:
    """The folder or hub id of the policy that completes the prompts."""
    return {"sft": run.sft_folder / "final", "base": str(run.model.path)}.get(run.policy, run.policy)


def find_scoring_judge(name: str | None, scoring: list[str]) -> str:
    """The judge that `pairs.judge` names, by default the first; raises PipelineError where it does not score."""
    if (name or (scoring and scoring[0])) not in scoring:
        raise PipelineError(
            f"pairs.judge={name}: no judge scores completions{nearest(name, scoring)}: type judge=[NAME], "
            "such as length or reward_model"
        )
    return name or scoring[0]


def train_prompts(run: Run, data: Any) -> Any:
    """The eval set whose prompts are the different ones of the train split, or those of `pairs.prompts_file`."""
    from dpo_pipeline.evaluation.eval_set import EvalSet, PromptSet, cut_prompt, load_prompt_set, prompt_limit
    from dpo_pipeline.hardware import eval_batch_size

    limit = prompt_limit(run, data)
    table, rows = data.tables["train"], {}
    for number, ids in zip(table["row"], table["prompt_ids"], strict=True):
        rows.setdefault(tuple(cut_prompt(ids, limit)), data.rows["train"][number])
    rows = dict(list(rows.items())[: run.pairs.prompts])
    eval_set = EvalSet(
        split="train",
        dataset=run.dataset_name,
        rows=list(rows.values()),
        prompts=[],
        chosen=[],
        rejected=[],
        prompt_set=PromptSet("train", list(rows.values()), [list(ids) for ids in rows]),
        tokenizer=data.tokenizer,
        eos_ids=data.eos_ids,
        max_new_tokens=run.evaluation.max_new_tokens,
        seed=run.seed,
        loading=data.load_options,
        batch_size=eval_batch_size(run),
    )
    if file := run.pairs.prompts_file:
        eval_set.prompt_set = load_prompt_set(Path(file).name, file, (), eval_set, limit)
    return eval_set


def sample_completions(label: str, path: str | Path, run: Run, eval_set: Any) -> Any:
    """The lines of `pairs.completions` completions for each prompt, in parts under `<home>/pairs/records/`."""
    from dpo_pipeline.content_hash import weights_hash
    from dpo_pipeline.distributed import on_main_process
    from dpo_pipeline.evaluation.measure import Request, measuring_versions, sample_lines
    from dpo_pipeline.evaluation.policies import Policy
    from dpo_pipeline.hardware import device
    from dpo_pipeline.models import load_policy

    log.info(
        "sampling %d completions of %s for each of %d prompts",
        run.pairs.completions,
        path,
        len(eval_set.prompt_set.ids),
    )
    weights = on_main_process(lambda: weights_hash(path, run.model.revision))
    load_model = cache(partial(load_policy, path, eval_set.loading, device_name=device()))
    request = Request(eval_set.prompt_set, (label,), run.pairs.temperature, run.pairs.completions)
    key = [weights, eval_set.compute_settings(), measuring_versions()]
    return sample_lines(Policy(label, path, run.home / "pairs"), request, eval_set, key, load_model)


def choose_pairs(table: Any, keep: str, min_gap: float, only_ended: bool) -> list[tuple[dict, dict]]:
    """(chosen, rejected) lines of a table of completions with `row`, `text`, `ended` and `score`; logs the counts.

    `keep` is `best_worst`, one pair a prompt, or `all`; the scores of a pair differ by more than `min_gap`. An
    unreadable score, an empty text, and a completion that was cut where `only_ended`, make no pair; equal texts count
    once.
    """
    is_cut, is_unread = ~table["ended"] & only_ended, table["score"].isna()
    is_empty = table["text"].str.strip() == ""
    usable = table[~(is_cut | is_unread | is_empty)].drop_duplicates(["row", "text"])
    pairs = []
    for _, lines in usable.groupby("row"):
        ranked = lines.sort_values("score", ascending=False, kind="stable").to_dict("records")
        candidates = itertools.combinations(ranked, 2) if keep == "all" else [(ranked[0], ranked[-1])]
        pairs += [(best, worst) for best, worst in candidates if best["score"] - worst["score"] > min_gap]
    log.info(
        "%d pairs of %d prompts, of %d different completions of %d: %d left out as cut, %d empty, %d not scored",
        *(len(pairs), table["row"].nunique(), len(usable), len(table), is_cut.sum(), is_empty.sum(), is_unread.sum()),
    )
    return pairs


def format_pair(prompt_rows: list[dict[str, Any]], chosen: dict, rejected: dict) -> dict[str, Any]:
    """A row that `dataset=json` reads: messages where the prompt is messages, else text; with the scores of both."""
    prompt_row = prompt_rows[chosen["row"]]
    row = {key: prompt_row[key] for key in ("prompt", "tools") if key in prompt_row}
    for name, line in (("chosen", chosen), ("rejected", rejected)):
        is_chat = isinstance(row["prompt"], list)
        row[name] = [{"role": "assistant", "content": line["text"]}] if is_chat else line["text"]
        row[f"score_{name}"] = line["score"]
    return row


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines atomically."""
    write_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


if __name__ == "__main__":
    main(run_pairs)
