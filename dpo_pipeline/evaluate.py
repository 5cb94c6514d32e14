"""Measure whether the result is better: `python -m dpo_pipeline.evaluate key=value ...`."""

import logging
from typing import Any

from dpo_pipeline.cli import main
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.record import run_logging
from dpo_pipeline.schema import Run

log = logging.getLogger("dpo_pipeline.evaluate")  # __name__ is __main__ when run as a command


def run_evaluate(run: Run) -> dict[str, Any]:
    """Measure what is not measured yet of a name's policies, or of one folder and another; the results of all.

    Raises PipelineError, with all else written, where a judge failed or `gate` finds the policy worse.
    """
    from dpo_pipeline.data.prepare import prepare
    from dpo_pipeline.distributed import on_main_process
    from dpo_pipeline.evaluation.eval_set import load_eval_sets
    from dpo_pipeline.evaluation.gate import check_gate, gated_policies
    from dpo_pipeline.evaluation.judging import judging_plan, requests_of
    from dpo_pipeline.evaluation.measure import Comparison, measure_policies
    from dpo_pipeline.evaluation.policies import policies_to_measure
    from dpo_pipeline.evaluation.results import judge_and_write
    from dpo_pipeline.hardware import check_device
    from dpo_pipeline.judges.build import build_judges
    from dpo_pipeline.models import load_options
    from dpo_pipeline.report.build import report_or_warn
    from dpo_pipeline.tokenizer import check_same_tokenizer

    with run_logging(None):
        check_device("dpo_pipeline.evaluate")
        run, policies = on_main_process(lambda: policies_to_measure(run))
        plan = judging_plan(run, policies, judges := build_judges(run, load_options(run)))
        gated = gated_policies(run, policies, judges, plan)
        data = prepare(run, "dpo", ("test",), strict=False)
        for policy in policies:
            check_same_tokenizer(data.tokenizer, run.model, policy.path)
        eval_set, other_prompts = on_main_process(lambda: load_eval_sets(run, data))
        log.info("evaluating %s", ", ".join(policy.name for policy in policies))
        if run.check:
            return {}
        base, home = (None, policies[0].folder) if run.evaluation.policy else ("base", run.home)
        comparison = Comparison(eval_set, policies, base, requests_of(policies, plan, eval_set, other_prompts))
        measure_policies(comparison)
        results = on_main_process(lambda: judge_and_write(home, {"eval.json": comparison}, judges, plan))
        if reasons := "; ".join(map(": ".join, comparison.failures.items())):
            raise PipelineError(f"{reasons} (all other results are written to {home}/results.json)")
        on_main_process(lambda: report_or_warn(run, home, policies[0].name if run.evaluation.policy else None))
        if gated:
            on_main_process(lambda: check_gate(*gated, run.gate.metric, comparison))
        return results


if __name__ == "__main__":
    main(run_evaluate)
