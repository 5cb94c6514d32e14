"""Measure whether the result is better: `python -m dpo_pipeline.evaluate key=value ...`."""

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_pipeline import locks, run_folder
from dpo_pipeline.config import Run, main
from dpo_pipeline.distributed import on_main_process
from dpo_pipeline.errors import PipelineError, nearest
from dpo_pipeline.hardware import check_device

if TYPE_CHECKING:
    from dpo_pipeline.evaluation.eval_set import EvalSet, PromptSet
    from dpo_pipeline.evaluation.judging import Plan
    from dpo_pipeline.evaluation.measure import Measurements, Policy, SamplingRequest
    from dpo_pipeline.judges.judge import Judge

log = logging.getLogger("dpo_pipeline.evaluate")  # __name__ is __main__ when run as a command

KEPT = 20  # pairs and samples that changed most, in results.json
SHOWN = 2  # of these on the screen


def run_evaluate(run: Run) -> dict[str, Any]:
    """Measure all policies of a name, or one folder against another, and print how they compare; the results.

    What was measured before is not measured again, so an interrupted one goes on where it was. Raises PipelineError
    where a policy cannot be measured; and where a judge has failed, with all other results written.
    """
    from dpo_pipeline.evaluation import measure, policies_to_compare
    from dpo_pipeline.judges.build import build_judges
    from dpo_pipeline.models import adapter_base, is_adapter
    from dpo_pipeline.training import starting_policy

    with run_folder.run_logging(None):
        check_device("dpo_pipeline.evaluate")
        one = run.evaluation.policy
        policies = on_main_process(
            lambda: policies_to_compare.external_policies(run) if one else policies_to_compare.policies_of_name(run)
        )
        if one:  # its own tokenizer and context, whatever model= says
            path = policies[0].path
            base = adapter_base(path) if is_adapter(path) else str(path)
            run = dataclasses.replace(run, model=dataclasses.replace(run.model, builder=None, path=base))
        judges = build_judges(run, starting_policy.load_options(run))
        plan = judging_plan(run, policies, judges)
        on, plan.safety, plan.bias = on_main_process(lambda: load_eval_sets(run, policies))
        log.info("evaluating %s", ", ".join(policy.name for policy in policies))
        if run.check:
            return {}
        base = None if one else "base"
        found = measure.measure_policies(policies, base, on, sampling_requests(policies, plan, on))
        return on_main_process(lambda: judge_and_report(run, policies, base, on, found, judges, plan))


def judging_plan(run: Run, policies: "list[Policy]", judges: "dict[str, Judge]") -> "Plan":
    """What the judges are asked; raises PipelineError where Best-of-N is asked for and cannot be had."""
    from dpo_pipeline.evaluation.judging import Plan

    settings = run.evaluation
    opponent = "chosen" if settings.prompts_file else settings.opponent
    plan = Plan(settings.temperatures, opponent, run.verdicts, settings.all_pairs)
    if run.best_of.n is None:
        return plan
    able = [name for name, judge in judges.items() if judge.score]
    picks = run.best_of.judge or next(
        (name for name in able if not judges[name].post_training_only), next(iter(able), None)
    )
    if picks not in able:
        given = f"best_of.judge={picks}" if picks else f"best_of.n={run.best_of.n}"
        raise PipelineError(
            f"{given}: it takes a judge of judge= that scores completions{nearest(picks, able)}: type judge=[NAME], "
            "such as length or reward_model"
        )
    source = next((policy.sft for policy in policies if policy.sft), None)
    if source is None:
        raise PipelineError("best_of.n draws from the SFT policy, and there is none: run `make sft` first")
    if len(able) == 1:
        log.warning(
            "best of %d is picked and scored by one judge, %s, so its score says how far that can be pushed, not how "
            "good the completions are: add another to judge=[...]",
            *(run.best_of.n, picks),
        )
    return dataclasses.replace(plan, n=run.best_of.n, drawn_from=source, picks=picks)


def load_eval_sets(run: Run, policies: "list[Policy]") -> "tuple[EvalSet, PromptSet | None, PromptSet | None]":
    """What the policies are measured on: test pairs with prompts to complete, and prompts for safety and for bias.

    Raises PipelineError where a policy reads other tokens than the base.
    """
    from dpo_pipeline.data import prepare
    from dpo_pipeline.data.normalize import REPLY
    from dpo_pipeline.data.prompts import prompt_ids, prompts_to_rows, read_prompts
    from dpo_pipeline.data.tokens import encode_rows
    from dpo_pipeline.evaluation.eval_set import PromptSet, completion_texts, cut_prompt, make_eval_set
    from dpo_pipeline.judges.judge import Completion
    from dpo_pipeline.models import load_tokenizer
    from dpo_pipeline.training import starting_policy

    for policy in policies:
        starting_policy.tokenizer_of(run, policy.path)
    tokenizer = load_tokenizer(run.model)
    how = prepare.eval_settings(run, tokenizer)
    rows, data_report = prepare.load_rows(run, "dpo", tokenizer, strict=False)
    tables = prepare.tokenize_splits(run, "dpo", tokenizer, rows, data_report, "test", strict=False)
    if not len(tables["test"]):
        raise PipelineError("there are no test rows to measure on: raise dataset.test_rows")
    on = make_eval_set(tables["test"], rows["test"], **how)
    chat = isinstance(on.rows[0]["prompt"], list)
    # A base model that learnt from dialogues is asked in a dialogue.
    dialogues = not chat and all(row["prompt"].endswith(REPLY) for row in on.rows)

    def prompt_set(path: str | None, *columns: str) -> PromptSet | None:
        if path is None:
            return None
        read = read_prompts(path, columns)
        asked = [row["prompt"] for row in prompts_to_rows([row["prompt"] for row in read], chat, path, dialogues)]
        ids = [cut_prompt(ids, how["room"]) for ids in prompt_ids(asked, chat, tokenizer)]
        labels = [row["label"] for row in read] if "label" in columns else []
        groups = [(row["template"], row["group"]) for row in read] if "group" in columns else []
        return PromptSet(asked, ids, labels=labels, groups=groups)

    if other := prompt_set(run.evaluation.prompts_file):
        on.prompt_set, on.prompts_file = other, Path(str(run.evaluation.prompts_file)).name
    elif run.evaluation.opponent != "chosen":
        name = run.evaluation.opponent
        asked = {tuple(cut_prompt(ids, how["room"])): row for ids, row in zip(on.prompts, on.rows, strict=True)}
        held = [asked[completion.prompt_ids] for completion in on.prompt_set.human if completion.prompt_ids in asked]
        if len(held) < len(on.prompt_set.ids) or any(name not in row for row in held):
            raise PipelineError(
                f"evaluation.opponent={name}: some test rows have none: type evaluation.opponent=chosen"
            )
        ids = [own for _, (own,), _, _ in encode_rows(held, (name,), tokenizer, on.eos_ids)]
        texts = completion_texts(on.prompt_set.ids, ids, tokenizer)
        on.prompt_set.human = [
            Completion(row["prompt"], text, True, completion.prompt_ids, tuple(own))
            for row, text, completion, own in zip(held, texts, on.prompt_set.human, ids, strict=True)
        ]
    if long := sum(len(ids) == how["room"] for ids in on.prompt_set.ids):
        log.warning(
            "%d of %d prompts fill the room that %d tokens leave in the model's context: longer ones are cut",
            *(long, len(on.prompt_set.ids), on.max_new_tokens),
        )
    return (
        on,
        prompt_set(run.evaluation.safety_file, "label"),
        prompt_set(run.evaluation.bias_file, "template", "group"),
    )


def sampling_requests(policies: "list[Policy]", plan: "Plan", eval_set: "EvalSet") -> "list[SamplingRequest]":
    """What the policies are asked to complete; safety and bias at temperature 0, as in XSTest (arXiv:2308.01263)."""
    from dpo_pipeline.evaluation.judging import BEST_OF, DRAWN, ask_name
    from dpo_pipeline.evaluation.measure import SamplingRequest

    shown = tuple(policy.name for policy in policies if policy.shown)
    requests = [
        SamplingRequest(ask_name(t), eval_set.prompt_set, t, to=shown)
        for t in dict.fromkeys((1.0, *plan.temperatures))
    ]
    for at in range(0, plan.n or 0, DRAWN):  # kept as they come, and other draws than the policy's own completion
        drawn = {"draws": min(DRAWN, (plan.n or 0) - at), "seed": 1 + at}
        requests.append(SamplingRequest(f"{BEST_OF}-{at}", eval_set.prompt_set, to=(str(plan.drawn_from),), **drawn))
    for name, asked in (("safety", plan.safety), ("bias", plan.bias)):
        if asked is not None:
            requests.append(SamplingRequest(name, asked, temperature=0.0, to=shown))
    return requests


def judge_and_report(
    run: Run,
    policies: "list[Policy]",
    base: str | None,
    eval_set: "EvalSet",
    measurements: "Measurements",
    judges: "dict[str, Judge]",
    plan: "Plan",
) -> dict[str, Any]:
    """Judge what was recorded, write all results and print the tables; raises PipelineError where a judge failed."""
    from dpo_pipeline.evaluation import compare, judging
    from dpo_pipeline.evaluation.prompt_sets import evaluate_prompt_set

    policies = [policy for policy in policies if policy.shown]
    judged = judging.run_judges(policies, eval_set, measurements, judges, plan)
    more: dict[str, Any] = {"comparisons": judged.comparisons, "judges": judged.judges, "best_of": judged.best_of}
    for name, asked in (("safety", plan.safety), ("bias", plan.bias)):
        if asked is not None:
            more[name] = evaluate_prompt_set(
                name, asked, policies, eval_set, measurements, judges, run.verdicts, judged
            )
    more["notable"] = notable_changes(policies, base, eval_set, measurements, judged.scores)
    compare.write_results(policies, base, eval_set, measurements, judged.own, judged.scores, "eval.json")
    home = run.home if base else policies[0].folder
    with locks.file_lock(home / "results.json"):
        results = compare.write_name_results(home, None if base else [policy.folder for policy in policies], **more)
    print_tables(run, results, policies, base, judged)
    log.info("\nResults: %s/results.json, generation_samples.json", home)
    if judged.failed:
        told = "; ".join(f"{what}: {why}" for what, why in judged.failed.items())
        raise PipelineError(f"{told} (all other results are written to {home}/results.json)")
    return results


def notable_changes(
    policies: "list[Policy]",
    base: str | None,
    eval_set: "EvalSet",
    measurements: "Measurements",
    scored: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """For each policy with one to beat: test pairs that it is right on otherwise, and samples that score otherwise.

    Margins are against the base; without one nothing is said of pairs: what is beaten is the reference itself.
    """
    from dpo_pipeline.evaluation.examples import largest_score_changes, preference_flips

    def margins(name: str) -> list[float]:
        sides = zip(*measurements.pairs[name].values(), *measurements.pairs[base].values(), strict=True)
        return [(chosen - rejected) - (c - r) for chosen, rejected, c, r in sides]

    found: dict[str, Any] = {}
    for policy in policies:
        if policy.sft is None or policy.sft in (policy.name, "base") or policy.name == "base":
            continue
        before, names = policy.sft, (policy.sft, policy.name)
        texts = {
            name: eval_set.completions(eval_set.prompt_set, measurements.completions[name, "answers"])
            for name in names
        }
        samples = [
            {"prompt": one.prompt, "answers": {before: one.text, policy.name: other.text}}
            for one, other in zip(texts[before], texts[policy.name], strict=True)
        ]
        found[policy.name] = {"before": before}
        if base:
            found[policy.name]["pairs"] = preference_flips(eval_set.rows, *map(margins, names), KEPT)
        old, new = (scored.get(name, {}) for name in names)
        for judge in (judge for judge in new if judge in old):
            found[policy.name][f"score.{judge}"] = largest_score_changes(samples, old[judge], new[judge], KEPT, judge)
    return found


def print_tables(
    run: Run, results: dict[str, Any], policies: "list[Policy]", base: str | None, judge_results: Any
) -> None:
    """Print the tables."""
    from dpo_pipeline.evaluation import policies_to_compare, safety, sweep_report, tables
    from dpo_pipeline.evaluation.examples import changes_as_markdown

    measured, every = results["policies"], [policy.name for policy in reversed(policies)]
    if best := judge_results.best_of:
        measured = {**measured, best["name"]: {"own": best["own"], "against": {"base": {}, "reference": {}}}}
        every.append(best["name"])
    blocks = [
        tables.caption(measured[every[0]], "the base model" if base else every[0], beta=base is None),
        tables.comparison(measured, every, base or "reference", {**tables.ROWS, **tables.MORE}),
    ]
    own = [policy for policy in policies if policy.reference] if base else []
    references = dict.fromkeys(policy.reference for policy in own)
    for reference in references if len(own) == 1 or len(references) > 1 else ():
        mine = [policy.name for policy in own if policy.reference == reference]
        blocks += [
            f"Against their own reference, {reference}:",
            tables.comparison(measured, mine, "reference", with_own=False),
        ]
    if len(own) > 1:
        blocks.append(sweep_report.sweep_report(run.home, run.evaluation.kl_budget, {}))
    block, first = "reference" if policies[0].reference else "base", policies[0].name
    blocks += [f"Accuracy of {first} by kind of pair:", tables.accuracy_by_subset(measured[first]["against"][block])]
    if names := policies_to_compare.preferred_ft_names(policies):
        blocks.append(f"Preferred-FT, SFT on the chosen completions: {', '.join(names)}")
    for name, told in judge_results.judges.items():
        if told["unreadable"]:
            blocks.append(
                f"{name}: {told['unreadable']} of {told['results']} results could not be read, and are left out"
            )
    for name, rows in judge_results.comparisons.items():
        blocks += [
            f"Any two policies by {name}: wins, and the mean difference with its p:",
            tables.pairwise_table(rows),
        ]
    if best:
        blocks += [
            f"Best of N completions of {best['policy']}, picked by {best['judge']}:",
            tables.best_of_n_table(best),
        ]
    if "safety" in results:
        blocks += ["Prompts labelled safe and unsafe:", safety.safety_table(results["safety"])]
    if "bias" in results:
        blocks += ["Prompts in groups:", safety.bias_table(results["bias"])]
    for name, found in results["notable"].items():
        for key, part in found.items():
            if key != "before" and name == policies[0].name:
                few = {side: {**part[side], "examples": part[side]["examples"][:SHOWN]} for side in SIDES}
                blocks.append(changes_as_markdown({**part, **few}, found["before"], name))
    for block in blocks:
        log.info("\n%s", block)


SIDES = ("successes", "failures")

if __name__ == "__main__":
    main(run_evaluate)
