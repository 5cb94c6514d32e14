"""The gate of an evaluation: whether a policy is worse than another by one metric, paired on the same rows."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from dpo_pipeline.errors import PipelineError, nearest
from dpo_pipeline.estimates import mean
from dpo_pipeline.evaluation.judging import JudgingPlan, baseline_label
from dpo_pipeline.evaluation.measure import Comparison
from dpo_pipeline.evaluation.policies import Policy, final_folder
from dpo_pipeline.evaluation.statistics import paired_test
from dpo_pipeline.evaluation.summary import changes_against
from dpo_pipeline.formatting import format_estimate
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)

LEVEL = 0.05  # of the paired test


def gated_policies(
    run: Run, policies: list[Policy], judges: dict[str, Judge], plan: JudgingPlan
) -> tuple[Policy, Policy] | None:
    """The policy of this command and that of `gate.against`, a policy's name or folder; None without a gate.

    Raises PipelineError where either is not measured, or `gate.metric` is not measured of both.
    """
    if run.gate.against is None:
        return None
    shown = {policy.name: policy for policy in policies if policy.is_shown}
    name = policies[0].name if run.evaluation.policy else f"dpo/{run.variant}"
    places = {Path(policy.path).absolute(): policy for policy in shown.values()}
    other = shown.get(run.gate.against, places.get(Path(final_folder(run.gate.against)).absolute()))
    if name not in shown:
        raise PipelineError(f"gate: {name} is no finished run: type the arguments that it was trained with")
    if other is None or other.name == name:
        options = f"{', '.join(sorted({*shown} - {name}))}{nearest(run.gate.against, shown)}"
        raise PipelineError(f"gate.against={run.gate.against}: type one of {options}")
    labels = [baseline_label(shown[name].sft)] if other.sft or shown[name].sft == other.name else []
    labels += [] if run.evaluation.prompts_file else [plan.opponent]
    suffixes = ["" if temperature == 1 else f".t{temperature:g}" for temperature in plan.temperatures]
    metrics = ["preference_accuracy", "margin_nats", "stop_rate"]
    metrics += [f"score.{judge}" for judge in judges if judges[judge].score]
    metrics += [f"win_rate.{judge}.{label}{suffix}" for judge in judges for label in labels for suffix in suffixes]
    if run.gate.metric not in metrics:
        options = f"{', '.join(metrics)}{nearest(run.gate.metric, metrics)}"
        raise PipelineError(f"gate.metric={run.gate.metric}: type one of {options}")
    return shown[name], other


def check_gate(policy: Policy, opponent: Policy, metric: str, comparison: Comparison) -> None:
    """Log that the policy is not worse than its opponent, with the numbers; raises PipelineError where it is."""
    reference = comparison.base or str(policy.reference)
    first, second = (values_by_row(each.name, metric, reference, comparison) for each in (policy, opponent))
    if second.empty and policy.sft == opponent.name:  # its own wins over itself
        second = first.assign(value=0.5)
    both = first.merge(second, left_index=True, right_index=True, suffixes=("_first", "_second")).dropna()
    both = both.groupby(["distinct_first", "distinct_second"]).mean()  # rows with the same texts are one comparison
    if both.empty:
        raise PipelineError(f"gate: {metric} of {policy.name} and {opponent.name} has no row in common")
    values = [both["value_first"].tolist(), both["value_second"].tolist()]
    test, means = paired_test(*values), [format_estimate(mean(each)) for each in values]
    is_worse = test["difference"]["value"] < 0 and test["p"] < LEVEL
    sentence = (
        f"gate: {policy.name} is {'' if is_worse else 'not '}worse than {opponent.name} by {metric}: {means[0]} "
        f"against {means[1]}, paired difference {format_estimate(test['difference'])} (n {len(both)}), "
        f"p {test['p']:.2g}"
    )
    if is_worse:
        raise PipelineError(f"{sentence}, below {LEVEL}: look at the report, or train another")
    log.info("%s", sentence)


def values_by_row(name: str, metric: str, reference: str, comparison: Comparison) -> pd.DataFrame:
    """The `value` of a metric by row, and a number `distinct` that rows with the same texts share."""
    if metric.startswith("win_rate."):
        _, judge, label, *suffix = metric.split(".", 3)
        temperature, lines = float(suffix[0].removeprefix("t")) if suffix else 1.0, comparison.verdicts
        is_asked = (lines["judge"] == judge) & (lines["label"] == label) & (lines["temperature"] == temperature)
        lines = lines[is_asked & (lines["policy"] == name)].set_index("row")
        return lines[["verdict", "distinct"]].rename(columns={"verdict": "value"}).astype(float)
    if metric in ("preference_accuracy", "margin_nats"):
        _, margins = changes_against(comparison, name, reference)
        values = margins if metric == "margin_nats" else (np.sign(margins) + 1) / 2
    else:
        values = comparison.samples(name).set_index("row")["ended" if metric == "stop_rate" else metric]
    return pd.DataFrame({"value": values.astype(float), "distinct": values.index})
