"""What needs a model, once for each policy: the lines of the tables `pairs` and `completions`."""

import contextlib
import functools
import gc
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from dpo_pipeline import logprobs, models, sampling
from dpo_pipeline.content_hash import content_hash, weights_hash
from dpo_pipeline.distributed import map_over_ranks, on_main_process
from dpo_pipeline.evaluation.eval_set import EvalSet, PromptSet
from dpo_pipeline.evaluation.policies import Policy
from dpo_pipeline.hardware import device, versions
from dpo_pipeline.locks import file_lock
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.models import load_policy
from dpo_pipeline.record import write_file
from dpo_pipeline.sampling import sample

PART = 512  # lines that an interruption loses at most
VERDICT_COLUMNS = "judge policy temperature opponent label row verdict distinct length_difference".split()


@dataclass(frozen=True)
class Request:
    """Prompts that the named policies complete, with `draws` completions each.

    Draw 0 is a policy's own completion; those of Best-of-N start at 1, drawn with other random numbers.
    """

    prompt_set: PromptSet
    policies: tuple[str, ...]
    temperature: float = 1.0
    draws: int = 1
    first_draw: int = 0


@dataclass
class Comparison:
    """Policies, each before what it is measured against, on an eval set, and the tables of what is measured.

    All are measured against `base`, if there is one. A line of `pairs` is a pair under a policy; one of `completions`
    a completion, where KL is taken with its log-prob under policy, base and reference: sums over tokens, in nats. One
    of `verdicts` compares two completions: 1, 0.5 or 0, NaN if unreadable; `label` is the opponent's role, or `pair`
    between any two policies; `distinct` numbers the different pairs of texts.
    """

    eval_set: EvalSet
    policies: list[Policy]
    base: str | None
    requests: list[Request]
    weights: dict[str, str] = field(default_factory=dict)  # sha256 by policy
    pairs: pd.DataFrame = field(default_factory=pd.DataFrame)
    completions: pd.DataFrame = field(default_factory=pd.DataFrame)
    verdicts: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=VERDICT_COLUMNS))
    judge_counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # by what failed

    @property
    def shown_policies(self) -> list[Policy]:
        """The policies that have results of their own."""
        return [policy for policy in self.policies if policy.is_shown]

    def references_of(self, policy: Policy) -> dict[str, str]:
        """The names of what a policy is measured against: `base` and its own `reference`, if there is one."""
        references = {"base": self.base, "reference": policy.reference}
        return {kind: name for kind, name in references.items() if name}

    def samples(self, policy: str) -> pd.DataFrame:
        """The completions that a policy's KL and scores are taken from."""
        table = self.completions[self.completions["policy"] == policy]
        is_sample = (table["prompt_set"] == self.eval_set.prompt_set.name) & (table["draw"] == 0)
        return table[is_sample & (table["temperature"] == 1)]


@functools.cache
def measuring_versions() -> dict[str, str]:
    """The versions of all that makes a log-prob or a completion; of our own code the hash."""
    return versions() | {
        module.__name__: content_hash(Path(module.__file__)) for module in (logprobs, sampling, models)
    }


def measure_policies(*comparisons: Comparison) -> None:
    """Fill the tables of each comparison, one policy after the other; what an earlier run measured is read.

    Each policy is loaded at most once for all eval sets, alone, and by every process; the processes share the rows.
    """
    for policy in {policy.name: policy for each in comparisons for policy in each.policies}.values():
        loading = comparisons[0].eval_set.loading
        load_model = functools.cache(partial(load_policy, policy.path, loading, device_name=device()))
        for comparison in comparisons:
            if policy in comparison.policies:
                measure_policy(policy, comparison, load_model)
        load_model.cache_clear()
        gc.collect()  # frees the model before the next one is loaded


def measure_policy(policy: Policy, comparison: Comparison, load_model: Callable[[], Any]) -> None:
    """Add the lines of one policy, and its log-probs of the completions of policies that are measured against it."""
    eval_set = comparison.eval_set
    weights = on_main_process(lambda: weights_hash(policy.path, eval_set.loading.model.revision))
    comparison.weights[policy.name] = weights
    key = [weights, eval_set.compute_settings(), measuring_versions()]

    def sum_logprobs(rows: list[Any]) -> list[float]:
        prompts, completions = ([row[i] for row in rows] for i in (0, 1))  # a rank's share may be empty
        options = (eval_set.batch_size, f"measuring {policy.name}")
        return [float(row.sum()) for row in completion_logprobs(load_model(), prompts, completions, *options)]

    def sums(folder: Path, prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
        rows = [list(row) for row in zip(prompts, completions, strict=True)]
        return in_parts(folder, "logprobs", key, rows, sum_logprobs)

    pairs: dict[str, Any] = {"policy": policy.name, "split": eval_set.split, "row": range(len(eval_set.rows))}
    pairs |= {name: [row[name] for row in eval_set.rows] for name in ("origin", "source")}
    for side, ids in (("chosen", eval_set.chosen), ("rejected", eval_set.rejected)):
        pairs |= {f"logprob_{side}": sums(policy.folder, eval_set.prompts, ids), f"tokens_{side}": [*map(len, ids)]}
    comparison.pairs = pd.concat([comparison.pairs, pd.DataFrame(pairs)], ignore_index=True)
    for request in comparison.requests:
        if policy.name in request.policies:
            lines = sample_lines(policy, request, eval_set, key, load_model)
            comparison.completions = pd.concat([comparison.completions, lines], ignore_index=True)
    for other in comparison.policies:
        references = {"logprob": other.name}
        references |= {f"logprob_{kind}": name for kind, name in comparison.references_of(other).items()}
        for column in [column for column, name in references.items() if name == policy.name and other.is_shown]:
            samples = comparison.samples(other.name)
            prompts = [list(each.prompt_ids) for each in samples["completion"]]
            comparison.completions.loc[samples.index, column] = sums(other.folder, prompts, list(samples["ids"]))


def sample_lines(
    policy: Policy, request: Request, eval_set: EvalSet, key: list[Any], load_model: Callable[[], Any]
) -> pd.DataFrame:
    """The lines of a policy's completions of some prompts; the column `completion` is what a judge reads."""
    prompt_set, draws = request.prompt_set, request.draws
    seed = eval_set.seed + request.first_draw

    def sample_prompts(prompts: list[list[int]]) -> list[list[list[int]]]:
        label = f"sampling {policy.name}, {prompt_set.name}, temperature {request.temperature:g}"
        limit, size, pad_id = eval_set.max_new_tokens, eval_set.batch_size, eval_set.tokenizer.pad_token_id
        options = (eval_set.eos_ids, pad_id, limit, size and 4 * size, seed, request.temperature, draws, label)
        completions = sample(load_model(), prompts, *options)
        return [completions[start : start + draws] for start in range(0, len(completions), draws)]

    key = [*key, request.temperature, draws, eval_set.max_new_tokens, eval_set.eos_ids, seed]
    by_prompt = in_parts(policy.folder, "completions", key, prompt_set.ids, sample_prompts, max(1, PART // draws))
    ids = [completion for completions in by_prompt for completion in completions]
    completions = eval_set.completions(prompt_set, ids, draws)
    texts = eval_set.tokenizer.batch_decode(prompt_set.ids, skip_special_tokens=True)
    columns: dict[str, Any] = {"policy": policy.name, "prompt_set": prompt_set.name}
    columns["temperature"] = request.temperature
    columns["draw"] = [request.first_draw + draw for _ in prompt_set.ids for draw in range(draws)]
    columns["row"] = [row for row in range(len(prompt_set.ids)) for _ in range(draws)]
    columns |= {"prompt": [texts[row] for row in columns["row"]], "text": [each.text for each in completions]}
    columns |= {"ids": ids, "tokens": [*map(len, ids)], "ended": [each.ended for each in completions]}
    for name in ("label", "template", "group"):
        if name in prompt_set.rows[0]:
            columns[name] = [prompt_set.rows[row][name] for row in columns["row"]]
    return pd.DataFrame({**columns, "completion": completions})


def in_parts(
    folder: Path,
    kind: str,
    key: list[Any],
    rows: list[Any],
    compute: Callable[[list[Any]], list[Any]],
    size: int = PART,
) -> list[Any]:
    """What `compute` gives for the rows, `size` rows at a time, each part read if an earlier run wrote it."""
    values: list[Any] = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        digest = hashlib.sha256(json.dumps([*key, part]).encode()).hexdigest()[:16]
        file = folder / "records" / f"{kind}-{digest}.parquet"
        with contextlib.ExitStack() as locks:
            on_main_process(lambda file=file: locks.enter_context(file_lock(file)))
            if not on_main_process(file.is_file):
                computed = map_over_ranks(lambda numbers, part=part: compute([part[i] for i in numbers]), len(part))
                on_main_process(lambda file=file, computed=computed: write_table(pa.table({"value": computed}), file))
            values += on_main_process(lambda file=file: parquet.read_table(file)["value"].to_pylist())
    return values


def write_table(table: pa.Table, file: Path) -> None:
    """Write a Parquet file atomically."""
    parquet.write_table(table, stream := pa.BufferOutputStream())
    write_file(file, stream.getvalue().to_pybytes())
