"""Measure whether the result is better: `python -m dpo_pipeline.evaluate key=value ...`."""

import logging
from typing import Any

from dpo_pipeline.cli import main
from dpo_pipeline.record import run_logging
from dpo_pipeline.schema import Run

log = logging.getLogger("dpo_pipeline.evaluate")  # __name__ is __main__ when run as a command


def run_evaluate(run: Run) -> dict[str, Any]:
    """Measure all policies of a name, or one folder against another, and print how they compare; the results.

    What is measured already is not measured again, so an interrupted evaluation resumes. Raises PipelineError where a
    policy cannot be measured, and where a judge failed, with all other results written.
    """
    from dpo_pipeline.data.prepare import prepare
    from dpo_pipeline.distributed import on_main_process
    from dpo_pipeline.evaluation.evaluation_prompts import load_eval_sets
    from dpo_pipeline.evaluation.measure import Measurements, measure_policies
    from dpo_pipeline.evaluation.plan import judging_plan, sampling_requests
    from dpo_pipeline.evaluation.policies_to_compare import external_policies, policies_of_name
    from dpo_pipeline.hardware import check_device
    from dpo_pipeline.judges.build import build_judges
    from dpo_pipeline.models import check_same_tokenizer, load_options, with_base_of

    with run_logging(None):
        check_device("dpo_pipeline.evaluate")
        is_external = run.evaluation.policy is not None
        policies = on_main_process(lambda: external_policies(run) if is_external else policies_of_name(run))
        if is_external:
            run = with_base_of(run, policies[0].path)
        judges = build_judges(run, load_options(run))
        plan = judging_plan(run, policies, judges)
        data = prepare(run, "dpo", ("test",), strict=False)
        for policy in policies:
            check_same_tokenizer(data.tokenizer, run.model, policy.path)
        eval_set, plan.prompt_sets = on_main_process(lambda: load_eval_sets(run, data))
        log.info("evaluating %s", ", ".join(policy.name for policy in policies))
        if run.check:
            return {}
        requests = sampling_requests(policies, plan, eval_set)
        measurements = Measurements(eval_set, policies, None if is_external else "base", requests)
        measure_policies(measurements)
        return on_main_process(lambda: judge_and_report(run, measurements, judges, plan))


def judge_and_report(run: Run, measurements: Any, judges: dict[str, Any], plan: Any) -> dict[str, Any]:
    """Judge what was measured, write all results and print the tables; raises PipelineError if a judge failed."""
    from dpo_pipeline.errors import PipelineError
    from dpo_pipeline.evaluation.examples import notable_changes
    from dpo_pipeline.evaluation.judging import run_judges
    from dpo_pipeline.evaluation.prompt_sets import evaluate_prompt_set
    from dpo_pipeline.evaluation.results import write_name_results, write_results
    from dpo_pipeline.evaluation.terminal import print_evaluation

    judge_results = run_judges(measurements, judges, plan)
    extra: dict[str, Any] = {
        "comparisons": judge_results.comparisons,
        "judges": judge_results.judges,
        "best_of": judge_results.best_of,
    }
    for name in plan.prompt_sets:
        extra[name] = evaluate_prompt_set(name, measurements, judges, plan, judge_results)
    extra["notable"] = notable_changes(measurements, judge_results.scores)
    write_results(measurements, judge_results)
    folders = [policy.folder for policy in measurements.shown_policies]
    home = run.home if measurements.base else folders[0]
    results = write_name_results(home, None if measurements.base else folders, **extra)
    print_evaluation(run, home, results, measurements, judge_results)
    if judge_results.failures:
        reasons = "; ".join(f"{judge}: {reason}" for judge, reason in judge_results.failures.items())
        raise PipelineError(f"{reasons} (all other results are written to {home}/results.json)")
    return results


if __name__ == "__main__":
    main(run_evaluate)
