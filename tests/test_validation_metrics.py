"""What DPO logs of its validation pairs is their mean, whatever the batches: `dpo_best` chooses by it."""

import copy

import pytest

from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.models import load_options, load_policy
from tests.helpers import build


@pytest.fixture(scope="module")
def policies(small, sft):
    """The SFT policy and the base, which differ."""
    run = small()
    options = load_options(run)
    return {
        name: load_policy(path, options)
        for name, path in (("sft", run.sft_folder / "final"), ("base", run.model.path))
    }


def validate(small, policies, folder, batch, policy="sft"):
    """The metrics of one validation, with the trainer."""
    run = small("reference=frozen", f"batch.micro_size={batch}", f"batch.global_size={batch}", "variant=metrics")
    built = build(run, "dpo", folder, policy=copy.deepcopy(policies[policy]), reference=policies["base"])
    return built.trainer.evaluate(), built.trainer


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_they_are_the_means_over_all_pairs(batch, small, policies, tmp_path):
    found, trainer = validate(small, policies, tmp_path, batch)
    rows = trainer.eval_dataset
    assert len(rows) > 7
    assert len(rows) % 7
    logps, gaps = {}, {}
    for side in ("chosen", "rejected"):
        sums = [
            [
                float(row.sum())
                for row in completion_logprobs(model, list(rows["prompt_ids"]), list(rows[f"{side}_ids"]), 4)
            ]
            for model in policies.values()
        ]
        logps[side], gaps[side] = sums[0], [ours - base for ours, base in zip(*sums, strict=True)]
    margins = [a - b for a, b in zip(gaps["chosen"], gaps["rejected"], strict=True)]
    expected = {
        "rewards/accuracies": sum(margin > 0 for margin in margins) / len(margins),
        "rewards/margins": 0.1 * sum(margins) / len(margins),
        "rewards/chosen": 0.1 * sum(gaps["chosen"]) / len(margins),
        "logps/chosen": sum(logps["chosen"]) / len(margins),
        "logps/rejected": sum(logps["rejected"]) / len(margins),
        "margins_nats": sum(margins) / len(margins),
    }
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected, abs=1e-4)
    logged = trainer.state.log_history[-1]
    assert logged["eval_rewards/accuracies"] == expected["rewards/accuracies"]
    assert 0 < expected["rewards/accuracies"] < 1


def test_a_tie_counts_half(small, policies, tmp_path):
    """TRL counts it as wrong: before the first step its accuracy is 0."""
    found, _ = validate(small, policies, tmp_path, 7, policy="base")
    assert found["eval_rewards/accuracies"] == 0.5
