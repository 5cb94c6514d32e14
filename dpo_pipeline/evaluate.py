"""Measure whether the result is better: `python -m dpo_pipeline.evaluate key=value ...`."""

import logging
import os
from typing import Any

from dpo_pipeline.cli import main
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.record import run_logging
from dpo_pipeline.schema import Run

log = logging.getLogger("dpo_pipeline.evaluate")  # __name__ is __main__ when run as a command


def run_evaluate(run: Run) -> dict[str, Any]:
    """Measure all policies of a name, or one folder against another, and report how they compare; the results.

    What is measured already is not measured again. Raises PipelineError where a judge failed, with all else written.
    """
    from dpo_pipeline.data.prepare import prepare
    from dpo_pipeline.distributed import on_main_process
    from dpo_pipeline.evaluation.compare import judge_and_report
    from dpo_pipeline.evaluation.eval_set import load_eval_sets
    from dpo_pipeline.evaluation.judging import judging_plan, requests_of
    from dpo_pipeline.evaluation.measure import Comparison, measure_policies
    from dpo_pipeline.evaluation.policies import external_policies, policies_of_name
    from dpo_pipeline.hardware import check_device
    from dpo_pipeline.judges.build import build_judges
    from dpo_pipeline.models import load_options, with_base_of
    from dpo_pipeline.tokenizer import check_same_tokenizer

    with run_logging(None):
        check_device("dpo_pipeline.evaluate")
        check_keys(run)
        is_external = run.evaluation.policy is not None
        policies = on_main_process(lambda: external_policies(run) if is_external else policies_of_name(run))
        if is_external:
            run = with_base_of(run, policies[0].path)
        plan = judging_plan(run, policies, judges := build_judges(run, load_options(run)))
        data = prepare(run, "dpo", ("test",), strict=False)
        for policy in policies:
            check_same_tokenizer(data.tokenizer, run.model, policy.path)
        eval_set, other_prompts = on_main_process(lambda: load_eval_sets(run, data))
        log.info("evaluating %s", ", ".join(policy.name for policy in policies))
        if run.check:
            return {}
        base, home = (None, policies[0].folder) if is_external else ("base", run.home)
        comparison = Comparison(eval_set, policies, base, requests_of(policies, plan, eval_set, other_prompts))
        measure_policies(comparison)
        arguments = (run, home, {"eval.json": comparison}, judges, plan)
        results, outcome = on_main_process(lambda: judge_and_report(*arguments))
        if outcome.failures:
            reasons = "; ".join(map(": ".join, outcome.failures.items()))
            raise PipelineError(f"{reasons} (all other results are written to {home}/results.json)")
        return results


def check_keys(run: Run) -> None:
    """Raise PipelineError where a judge would ask OpenAI and there is no key: before anything is measured."""
    has_key_or_server = os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL")
    for name, node in run.judge.items():
        if "base_url" in node and node["base_url"] is None and not has_key_or_server:
            raise PipelineError(
                f"judge=[{name}] asks OpenAI and there is no key: set the environment variable OPENAI_API_KEY, or "
                f"name another server by judge.{name}.base_url="
            )


if __name__ == "__main__":
    main(run_evaluate)
