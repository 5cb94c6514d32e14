"""Log-probs of completions, and what is made of them, against a plain loop in float64."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dpo_pipeline import estimates
from dpo_pipeline.evaluation.measure import Comparison
from dpo_pipeline.evaluation.policies import Policy
from dpo_pipeline.evaluation.summary import estimates_against
from dpo_pipeline.logprobs import completion_logprobs

VOCAB, BETA = 40, 0.3


def tiny_llama(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, attention_dropout=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def drawn(count, seed, shortest=1):
    """Rows of ids of mixed lengths, in no order; 0, which pads, is among them."""
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(shortest, 12))] for _ in range(count)]


PROMPTS, COMPLETIONS, OTHERS = drawn(40, 1), drawn(40, 2), drawn(40, 3)


@pytest.fixture(scope="module")
def policy():
    return tiny_llama(0)


@pytest.fixture(scope="module")
def reference():
    return tiny_llama(1)


def plain_loop(model, prompts, completions):
    """Log-probs token by token, in float64, one row at a time."""
    double = LlamaForCausalLM(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        row = []
        for t, token in enumerate(completion):
            with torch.no_grad():
                logits = double(input_ids=torch.tensor([prompt + completion[:t]])).logits[0, -1]
            row.append((logits[token] - logits.exp().sum().log()).item())
        rows.append(row)
    return rows


def sums(rows):
    return [float(sum(row)) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_log_probs_are_those_of_a_plain_loop(policy, batch_size):
    found = completion_logprobs(policy, PROMPTS, COMPLETIONS, batch_size)
    for row, expected in zip(found, plain_loop(policy, PROMPTS, COMPLETIONS), strict=True):
        assert row.dtype == torch.float64
        assert row.tolist() == pytest.approx(expected, abs=2e-5)


def test_rows_come_back_in_the_order_given(policy):
    forward = completion_logprobs(policy, PROMPTS, COMPLETIONS, 7)
    backward = completion_logprobs(policy, PROMPTS[::-1], COMPLETIONS[::-1], 7)
    for one, other in zip(forward, backward[::-1], strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), abs=2e-5)


def test_a_row_s_values_do_not_depend_on_the_rows_beside_it(policy):
    alone = [completion_logprobs(policy, [p], [a], 1)[0] for p, a in zip(PROMPTS, COMPLETIONS, strict=True)]
    for one, other in zip(alone, completion_logprobs(policy, PROMPTS, COMPLETIONS, 40), strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), abs=2e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode_and_is_measured_without_dropout(training):
    model = tiny_llama(0)
    expected = completion_logprobs(model, PROMPTS, COMPLETIONS, 8)
    model.train(training)
    found = completion_logprobs(model, PROMPTS, COMPLETIONS, 8)
    assert model.training is training
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_completions_that_differ_from_their_prompts_in_number_are_refused(policy):
    with pytest.raises(ValueError, match="zip"):
        completion_logprobs(policy, PROMPTS, COMPLETIONS[:-1], 8)


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_a_comparison_is_that_of_a_plain_loop(policy, reference, batch_size):
    sides = [
        [sums(plain_loop(model, PROMPTS, side)) for side in (COMPLETIONS, OTHERS)] for model in (policy, reference)
    ]
    (chosen, rejected), (chosen_ref, rejected_ref) = sides
    count = len(PROMPTS)
    margins, wins, reward_chosen, reward_rejected, nats, tokens = [], 0, 0.0, 0.0, 0.0, 0
    for i in range(count):
        gap_chosen, gap_rejected = chosen[i] - chosen_ref[i], rejected[i] - rejected_ref[i]
        margins.append(gap_chosen - gap_rejected)
        wins += margins[-1] > 0
        reward_chosen += BETA * gap_chosen / count
        reward_rejected += BETA * gap_rejected / count
        nats, tokens = nats + gap_chosen, tokens + len(COMPLETIONS[i])

    def measured(model):
        return [sums(completion_logprobs(model, PROMPTS, side, batch_size)) for side in (COMPLETIONS, OTHERS)]

    ours, theirs = measured(policy), measured(reference)
    found = compare(ours, theirs)
    assert 0.2 < wins / count < 0.8
    expected = {
        "preference_accuracy": wins / count,
        "margin_nats": sum(margins) / count,
        "margin": BETA * sum(margins) / count,
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "kl": nats / count,
        "kl_per_token": nats / tokens,
    }
    assert {key: found[key]["value"] for key in expected} == pytest.approx(expected, abs=1e-4)
    assert all(found[key]["n"] == count and found[key]["low"] < found[key]["high"] for key in expected)
    perplexity = estimates.perplexity(ours[0], [len(completion) for completion in COMPLETIONS])["value"]
    assert perplexity == pytest.approx(math.exp(-sum(chosen) / tokens), rel=1e-5)


def compare(ours, theirs):
    """What `estimates_against` says of these sums of chosen and rejected completions; the chosen were sampled too."""
    tokens = {"tokens_chosen": [*map(len, COMPLETIONS)], "tokens_rejected": [*map(len, OTHERS)], "source": "s"}
    pairs = [
        pd.DataFrame(
            {"policy": name, "row": range(len(PROMPTS)), "logprob_chosen": a, "logprob_rejected": b, **tokens}
        )
        for name, (a, b) in (("a", ours), ("b", theirs))
    ]
    samples = {"policy": "a", "prompt_set": "test", "temperature": 1.0, "draw": 0, "tokens": tokens["tokens_chosen"]}
    samples = pd.DataFrame({**samples, "logprob": ours[0], "logprob_base": theirs[0]})
    eval_set, policy = SimpleNamespace(prompt_set=SimpleNamespace(name="test")), Policy("a", "", Path(), BETA)
    comparison = Comparison(eval_set, [policy], "b", [], {}, pd.concat(pairs), samples)
    return estimates_against(policy, "base", "b", comparison)


def test_a_policy_against_itself_is_exactly_even(policy):
    own = [sums(completion_logprobs(policy, PROMPTS, side, 7)) for side in (COMPLETIONS, OTHERS)]
    again = [sums(completion_logprobs(policy, PROMPTS, side, 7)) for side in (COMPLETIONS, OTHERS)]
    found = compare(own, again)
    assert found["preference_accuracy"]["value"] == 0.5
    for key in ("margin", "margin_nats", "reward_chosen", "reward_rejected", "kl", "kl_per_token"):
        assert [found[key][bound] for bound in ("value", "low", "high")] == [0, 0, 0], key


def test_a_failing_forward_leaves_the_mode_as_it_was():
    model = tiny_llama(0).train()
    with pytest.raises(IndexError):
        completion_logprobs(model, [[VOCAB + 5]], [[1]], 1)
    assert model.training


@pytest.fixture
def gpu_memory(monkeypatch):
    """Lets a GPU have this many bytes, of which a third is taken, and run out of memory beyond some rows at once."""

    def give(free, policy, max_rows=1000):
        sizes, forward = [], policy.forward
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2 * free))

        def counted(*args, **kwargs):
            sizes.append(len(kwargs["input_ids"]))
            if sizes[-1] > max_rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
            return forward(*args, **kwargs)

        monkeypatch.setattr(policy, "forward", counted)
        return sizes

    return give


def test_without_a_batch_size_a_third_of_the_free_memory_is_taken(policy, gpu_memory):
    expected = completion_logprobs(policy, PROMPTS, COMPLETIONS, 1)
    tokens = max(len(p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True))
    row = 2 * tokens * 2 * 16 * 4 + 24 * max(map(len, COMPLETIONS)) * VOCAB  # 2 layers of 16 float32
    sizes = gpu_memory(3 * 7 * row, policy)
    found = completion_logprobs(policy, PROMPTS, COMPLETIONS, None)
    assert sizes == [7] * 5 + [5]
    for one, other in zip(found, expected, strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), abs=2e-5)


def test_without_a_batch_size_it_is_halved_where_memory_runs_out(policy, gpu_memory):
    expected = completion_logprobs(policy, PROMPTS, COMPLETIONS, 1)
    sizes = gpu_memory(10**12, policy, max_rows=16)
    found = completion_logprobs(policy, PROMPTS, COMPLETIONS, None)
    assert sizes == [40, 20, *[10] * 4]
    for one, other in zip(found, expected, strict=True):
        assert one.tolist() == pytest.approx(other.tolist(), abs=2e-5)


@pytest.mark.parametrize("batch_size", [20, None])
def test_a_batch_size_that_is_typed_and_one_row_are_not_halved(batch_size, policy, gpu_memory):
    gpu_memory(10**12, policy, max_rows=0 if batch_size is None else 16)
    with pytest.raises(torch.OutOfMemoryError):
        completion_logprobs(policy, PROMPTS, COMPLETIONS, batch_size)


def test_the_head_reads_completion_positions_alone(policy):
    read = []
    with policy.lm_head.register_forward_hook(lambda _, inputs, output: read.append(inputs[0].shape)):
        completion_logprobs(policy, PROMPTS, COMPLETIONS, 40)
    assert read == [(sum(map(len, COMPLETIONS)), 16)]


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gemma2", "granite", "mamba"])
def test_each_architecture_is_scored_as_by_its_own_logits(kind):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    extra = {"gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0}, "granite": {"logits_scaling": 3.0}}
    config = AutoConfig.for_model(kind, **sizes, **extra.get(kind, {}), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    rows = zip(PROMPTS, COMPLETIONS, completion_logprobs(model, PROMPTS, COMPLETIONS, 7), strict=True)
    for prompt, completion, found in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
        assert found.tolist() == pytest.approx(expected.tolist(), abs=2e-5)
