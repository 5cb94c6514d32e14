"""Measure whether the result is better: `python -m dpo_pipeline.evaluate key=value ...`."""

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_pipeline import locks, runs
from dpo_pipeline.config import Run, main
from dpo_pipeline.errors import PipelineError, nearest
from dpo_pipeline.machine import check_device, together

if TYPE_CHECKING:
    from dpo_pipeline.evaluation.judging import Plan
    from dpo_pipeline.evaluation.material import Material, Questions
    from dpo_pipeline.evaluation.records import Ask, Policy, Records
    from dpo_pipeline.judges.judge import Judge

log = logging.getLogger("dpo_pipeline.evaluate")  # __name__ is __main__ when run as a command

KEPT = 20  # pairs and samples that changed most, in results.json
SHOWN = 2  # of these on the screen


def run_evaluate(run: Run) -> dict[str, Any]:
    """Measure all policies of a name, or one folder against another, and print how they compare; the results.

    What was measured before is not measured again, so an interrupted one goes on where it was. Raises PipelineError
    where a policy cannot be measured; and where a judge has failed, with all other results written.
    """
    from dpo_pipeline.evaluation import line_up, records
    from dpo_pipeline.judges.built import built
    from dpo_pipeline.policies import base_of, is_adapter
    from dpo_pipeline.training import handoff

    with runs.logged(None):
        check_device("dpo_pipeline.evaluate")
        one = run.evaluation.policy
        policies = together(lambda: line_up.of_folder(run) if one else line_up.of_name(run))
        if one:  # its own tokenizer and context, whatever model= says
            path = policies[0].path
            base = base_of(path) if is_adapter(path) else str(path)
            run = dataclasses.replace(run, model=dataclasses.replace(run.model, builder=None, path=base))
        judges = built(run, handoff.loading(run))
        plan = plan_of(run, policies, judges)
        on, plan.safety, plan.bias = together(lambda: materials(run, policies))
        log.info("evaluating %s", ", ".join(policy.name for policy in policies))
        if run.check:
            return {}
        base = None if one else "base"
        found = records.record(policies, base, on, asks_of(policies, plan, on))
        return together(lambda: tell(run, policies, base, on, found, judges, plan))


def plan_of(run: Run, policies: "list[Policy]", judges: "dict[str, Judge]") -> "Plan":
    """What the judges are asked; raises PipelineError where Best-of-N is asked for and cannot be had."""
    from dpo_pipeline.evaluation.judging import Plan

    settings = run.evaluation
    opponent = "chosen" if settings.prompts_file else settings.opponent
    plan = Plan(settings.temperatures, opponent, run.verdicts, settings.all_pairs)
    if run.best_of.n is None:
        return plan
    able = [name for name, judge in judges.items() if judge.score]
    picks = run.best_of.judge or next((name for name in able if not judges[name].late), next(iter(able), None))
    if picks not in able:
        given = f"best_of.judge={picks}" if picks else f"best_of.n={run.best_of.n}"
        raise PipelineError(
            f"{given}: it takes a judge of judge= that scores answers{nearest(picks, able)}: type judge=[NAME], such "
            "as length or reward_model"
        )
    source = next((policy.sft for policy in policies if policy.sft), None)
    if source is None:
        raise PipelineError("best_of.n draws from the SFT policy, and there is none: run `make sft` first")
    if len(able) == 1:
        log.warning(
            "best of %d is picked and scored by one judge, %s, so its score says how far that can be pushed, not how "
            "good the answers are: add another to judge=[...]",
            *(run.best_of.n, picks),
        )
    return dataclasses.replace(plan, n=run.best_of.n, drawn_from=source, picks=picks)


def materials(run: Run, policies: "list[Policy]") -> "tuple[Material, Questions | None, Questions | None]":
    """What the policies are measured on: test pairs with prompts to answer, and prompts for safety and for bias.

    Raises PipelineError where a policy reads other tokens than the base.
    """
    from dpo_pipeline.data.prompts import as_rows, prompt_ids, read_prompts
    from dpo_pipeline.data.shape import REPLY
    from dpo_pipeline.data.tokens import encoded
    from dpo_pipeline.evaluation.material import Questions, cut, material, texts_behind
    from dpo_pipeline.judges.judge import Answer
    from dpo_pipeline.policies import load_tokenizer
    from dpo_pipeline.training import handoff, start

    for policy in policies:
        handoff.tokenizer_of(run, policy.path)
    tokenizer = load_tokenizer(run.model)
    how = start.measuring(run, tokenizer)
    rows, account = start.load_rows(run, "dpo", tokenizer, strict=False)
    tables = start.tokenized(run, "dpo", tokenizer, rows, account, "test", strict=False)
    if not len(tables["test"]):
        raise PipelineError("there are no test rows to measure on: raise dataset.test_rows")
    on = material(tables["test"], rows["test"], **how)
    chat = isinstance(on.rows[0]["prompt"], list)
    # A base model that learnt from dialogues is asked in a dialogue.
    dialogues = not chat and all(row["prompt"].endswith(REPLY) for row in on.rows)

    def questions(path: str | None, *columns: str) -> Questions | None:
        if path is None:
            return None
        read = read_prompts(path, columns)
        asked = [row["prompt"] for row in as_rows([row["prompt"] for row in read], chat, path, dialogues)]
        ids = [cut(ids, how["room"]) for ids in prompt_ids(asked, chat, tokenizer)]
        labels = [row["label"] for row in read] if "label" in columns else []
        groups = [(row["template"], row["group"]) for row in read] if "group" in columns else []
        return Questions(asked, ids, labels=labels, groups=groups)

    if other := questions(run.evaluation.prompts_file):
        on.questions, on.asked = other, Path(str(run.evaluation.prompts_file)).name
    elif run.evaluation.opponent != "chosen":
        name = run.evaluation.opponent
        asked = {tuple(cut(ids, how["room"])): row for ids, row in zip(on.prompts, on.rows, strict=True)}
        held = [asked[answer.prompt_ids] for answer in on.questions.human if answer.prompt_ids in asked]
        if len(held) < len(on.questions.ids) or any(name not in row for row in held):
            raise PipelineError(
                f"evaluation.opponent={name}: some test rows have none: type evaluation.opponent=chosen"
            )
        ids = [own for _, (own,), _, _ in encoded(held, (name,), tokenizer, on.ends)]
        texts = texts_behind(on.questions.ids, ids, tokenizer)
        on.questions.human = [
            Answer(row["prompt"], text, True, answer.prompt_ids, tuple(own))
            for row, text, answer, own in zip(held, texts, on.questions.human, ids, strict=True)
        ]
    if long := sum(len(ids) == how["room"] for ids in on.questions.ids):
        log.warning(
            "%d of %d prompts fill the room that %d tokens leave in the model's context: longer ones are cut",
            *(long, len(on.questions.ids), on.max_new_tokens),
        )
    return on, questions(run.evaluation.safety_file, "label"), questions(run.evaluation.bias_file, "template", "group")


def asks_of(policies: "list[Policy]", plan: "Plan", on: "Material") -> "list[Ask]":
    """What the policies are asked to answer; safety and bias at temperature 0, as in XSTest (arXiv:2308.01263)."""
    from dpo_pipeline.evaluation.judging import BEST_OF, DRAWN, ask_name
    from dpo_pipeline.evaluation.records import Ask

    shown = tuple(policy.name for policy in policies if policy.shown)
    asks = [Ask(ask_name(t), on.questions, t, to=shown) for t in dict.fromkeys((1.0, *plan.temperatures))]
    for at in range(0, plan.n or 0, DRAWN):  # kept as they come, and other draws than the policy's own answer
        drawn = {"draws": min(DRAWN, (plan.n or 0) - at), "seed": 1 + at}
        asks.append(Ask(f"{BEST_OF}-{at}", on.questions, to=(str(plan.drawn_from),), **drawn))
    for name, asked in (("safety", plan.safety), ("bias", plan.bias)):
        if asked is not None:
            asks.append(Ask(name, asked, temperature=0.0, to=shown))
    return asks


def tell(
    run: Run,
    policies: "list[Policy]",
    base: str | None,
    on: "Material",
    records: "Records",
    judges: "dict[str, Judge]",
    plan: "Plan",
) -> dict[str, Any]:
    """Judge what was recorded, write all results and print the tables; raises PipelineError where a judge failed."""
    from dpo_pipeline.evaluation import compare, judging
    from dpo_pipeline.evaluation.prompted import prompted

    policies = [policy for policy in policies if policy.shown]
    judged = judging.judged(policies, on, records, judges, plan)
    more: dict[str, Any] = {"comparisons": judged.comparisons, "judges": judged.judges, "best_of": judged.best_of}
    for name, asked in (("safety", plan.safety), ("bias", plan.bias)):
        if asked is not None:
            more[name] = prompted(name, asked, policies, on, records, judges, run.verdicts, judged)
    more["notable"] = changes(policies, base, on, records, judged.scores)
    compare.write_results(policies, base, on, records, judged.own, judged.scores, "eval.json")
    home = run.home if base else policies[0].folder
    with locks.alone(home / "results.json"):
        results = compare.gather(home, None if base else [policy.folder for policy in policies], **more)
    show(run, results, policies, base, judged)
    log.info("\nResults: %s/results.json, generation_samples.json", home)
    if judged.failed:
        told = "; ".join(f"{what}: {why}" for what, why in judged.failed.items())
        raise PipelineError(f"{told} (all other results are written to {home}/results.json)")
    return results


def changes(
    policies: "list[Policy]", base: str | None, on: "Material", records: "Records", scored: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """For each policy with one to beat: test pairs that it is right on otherwise, and samples that score otherwise.

    Margins are against the base; without one nothing is said of pairs: what is beaten is the reference itself.
    """
    from dpo_pipeline.evaluation.notable import flipped, largest

    def margins(name: str) -> list[float]:
        sides = zip(*records.pairs[name].values(), *records.pairs[base].values(), strict=True)
        return [(chosen - rejected) - (c - r) for chosen, rejected, c, r in sides]

    found: dict[str, Any] = {}
    for policy in policies:
        if policy.sft is None or policy.sft in (policy.name, "base") or policy.name == "base":
            continue
        before, names = policy.sft, (policy.sft, policy.name)
        texts = {name: on.answers(on.questions, records.answers[name, "answers"]) for name in names}
        samples = [
            {"prompt": one.prompt, "answers": {before: one.text, policy.name: other.text}}
            for one, other in zip(texts[before], texts[policy.name], strict=True)
        ]
        found[policy.name] = {"before": before}
        if base:
            found[policy.name]["pairs"] = flipped(on.rows, *map(margins, names), KEPT)
        old, new = (scored.get(name, {}) for name in names)
        for judge in (judge for judge in new if judge in old):
            found[policy.name][f"score.{judge}"] = largest(samples, old[judge], new[judge], KEPT, judge)
    return found


def show(run: Run, results: dict[str, Any], policies: "list[Policy]", base: str | None, judged: Any) -> None:
    """Print the tables."""
    from dpo_pipeline.evaluation import line_up, safety, tables, variants
    from dpo_pipeline.evaluation.notable import notable_text

    measured, every = results["policies"], [policy.name for policy in reversed(policies)]
    if best := judged.best_of:
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
            tables.comparison(measured, mine, "reference", alone=False),
        ]
    if len(own) > 1:
        blocks.append(variants.report(run.home, run.evaluation.kl_budget, {}))
    block, first = "reference" if policies[0].reference else "base", policies[0].name
    blocks += [f"Accuracy of {first} by kind of pair:", tables.breakdown(measured[first]["against"][block])]
    if names := line_up.preferred(policies):
        blocks.append(f"Preferred-FT, SFT on the chosen answers: {', '.join(names)}")
    for name, told in judged.judges.items():
        if told["unreadable"]:
            blocks.append(
                f"{name}: {told['unreadable']} of {told['results']} results could not be read, and are left out"
            )
    for name, rows in judged.comparisons.items():
        blocks += [f"Any two policies by {name}: wins, and the mean difference with its p:", tables.tests(rows)]
    if best:
        blocks += [f"Best of N answers of {best['policy']}, picked by {best['judge']}:", tables.best_of_n(best)]
    if "safety" in results:
        blocks += ["Prompts labelled safe and unsafe:", safety.safety_table(results["safety"])]
    if "bias" in results:
        blocks += ["Prompts in groups:", safety.bias_table(results["bias"])]
    for name, found in results["notable"].items():
        for key, part in found.items():
            if key != "before" and name == policies[0].name:
                few = {side: {**part[side], "examples": part[side]["examples"][:SHOWN]} for side in SIDES}
                blocks.append(notable_text({**part, **few}, found["before"], name))
    for block in blocks:
        log.info("\n%s", block)


SIDES = ("successes", "failures")

if __name__ == "__main__":
    main(run_evaluate)
