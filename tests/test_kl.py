"""Sampling and KL against every completion that a tiny policy can give."""

import copy
import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_pipeline import estimates
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.sampling import sample

VOCAB, END, PAD, HORIZON, DRAWS = 5, 4, 0, 3, 4000
PROMPTS = [[3, 0, 1, 2, 2, 1], [1]]


def tiny_llama(seed, vocab=VOCAB):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, bos_token_id=1, eos_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


POLICY, REFERENCE = tiny_llama(0), tiny_llama(1)


def next_token(model, ids, temperature=1.0):
    """The distribution of the next token in float64, by plain softmax."""
    double = LlamaForCausalLM(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    with torch.no_grad():
        return (double(input_ids=torch.tensor([ids])).logits[0, -1] / temperature).softmax(-1).tolist()


def tree(model, prompt, temperature=1.0):
    """The probability of every completion: ended by the end token or cut at the horizon."""
    completions, open_prefixes = {}, {(): 1.0}
    for step in range(HORIZON):
        grown = {}
        for prefix, reached in open_prefixes.items():
            for token, p in enumerate(next_token(model, prompt + list(prefix), temperature)):
                closed = token == END or step == HORIZON - 1
                (completions if closed else grown)[(*prefix, token)] = reached * p
        open_prefixes = grown
    return completions


def chain_rule_kl(policy, reference, prompt, prefix=()):
    """Exact KL of the completions that continue a prefix: over its next token, with that of what follows it."""
    if len(prefix) == HORIZON or END in prefix:
        return 0.0
    ours, theirs = (next_token(model, prompt + list(prefix)) for model in (policy, reference))
    kl = 0.0
    for token, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        kl += p * (math.log(p / q) + chain_rule_kl(policy, reference, prompt, (*prefix, token)))
    return kl


def summed(model, prompts, completions):
    return torch.stack([row.sum() for row in completion_logprobs(model, prompts, [list(a) for a in completions], 64)])


@pytest.mark.parametrize("prompt", PROMPTS, ids=["long", "short"])
def test_kl_over_all_completions_is_the_exact_one(prompt):
    exact = tree(POLICY, prompt)
    assert len(exact) == 1 + 4 + 4 * 4 * 5
    ours, theirs = (summed(model, [prompt] * len(exact), exact) for model in (POLICY, REFERENCE))
    assert ours.exp().tolist() == pytest.approx(list(exact.values()), abs=1e-6)
    assert ours.exp().sum().item() == pytest.approx(1, abs=1e-5)
    kl = chain_rule_kl(POLICY, REFERENCE, prompt)
    assert kl > 0.1
    assert (ours.exp() * (ours - theirs)).sum().item() == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize(("batch_size", "temperature"), [(2 * DRAWS, 1.0), (500, 1.0), (2 * DRAWS, 0.5)])
def test_completions_are_drawn_with_their_exact_probabilities(batch_size, temperature):
    completions = sample(POLICY, PROMPTS, [END], PAD, HORIZON, batch_size, 5, temperature, DRAWS)
    for which, prompt in enumerate(PROMPTS):
        drawn = completions[which * DRAWS : (which + 1) * DRAWS]
        counts, observed, expected = Counter(map(tuple, drawn)), [0], [0.0]
        exact = tree(POLICY, prompt, temperature)
        assert set(counts) <= set(exact)
        for completion, p in sorted(exact.items(), key=lambda item: item[1]):
            observed[-1] += counts[completion]
            expected[-1] += DRAWS * p
            if expected[-1] >= 5:
                observed.append(0)
                expected.append(0.0)
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
        assert len(expected) >= 8
        assert chisquare(observed, expected, sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize("prompt", PROMPTS, ids=["long", "short"])
def test_the_sampled_estimate_of_kl_holds_the_exact_one(prompt):
    completions = sample(POLICY, [prompt], [END], PAD, HORIZON, 1000, seed=6, draws=DRAWS)
    ours, theirs = (summed(model, [prompt] * DRAWS, completions) for model in (POLICY, REFERENCE))
    found, kl = estimates.mean((ours - theirs).tolist()), chain_rule_kl(POLICY, REFERENCE, prompt)
    assert abs(found["value"] - kl) < 1.3 * (found["high"] - found["value"])
    assert found["high"] - found["low"] < 0.2 * kl


def test_completions_end_at_the_first_end_token_or_at_the_horizon():
    for completion in sample(POLICY, PROMPTS, [END, 2], PAD, HORIZON, 64, seed=7, draws=200):
        assert (completion[-1] in (END, 2)) or len(completion) == HORIZON
        assert not {END, 2} & set(completion[:-1])


def test_the_same_seed_draws_the_same_completions_and_another_seed_others():
    one, again, other = (sample(POLICY, PROMPTS, [END], PAD, HORIZON, 64, seed=seed, draws=50) for seed in (8, 8, 9))
    assert one == again
    assert one != other


def test_a_completion_is_the_same_alone_in_any_batch_and_beside_any_others():
    together = sample(POLICY, PROMPTS, [END], PAD, HORIZON, 1000, seed=8, draws=100)
    in_sevens = sample(POLICY, PROMPTS[::-1], [END], PAD, HORIZON, 7, seed=8, draws=100)
    assert together == in_sevens[100:] + in_sevens[:100]
    for place, prompt in ((0, PROMPTS[0]), (100, PROMPTS[1])):
        (alone,) = sample(POLICY, [prompt], [END], PAD, HORIZON, 1, seed=8)
        assert alone == together[place]
    assert len(set(map(tuple, together))) > 20


def test_at_temperature_0_an_completion_is_the_likeliest_token_each_time():
    completions = sample(POLICY, PROMPTS, [END], PAD, HORIZON, 2, seed=8, temperature=0.0)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        for at, token in enumerate(completion):
            logits = POLICY(torch.tensor([prompt + completion[:at]])).logits[0, -1]
            assert token == int(logits.argmax())


def test_the_model_s_own_generation_settings_have_no_effect_and_stay():
    model = tiny_llama(0)
    own, state = model.generation_config, torch.get_rng_state()
    neutral = sample(model, PROMPTS, [END], PAD, HORIZON, 64, seed=8, draws=50)
    own.update(top_k=1, repetition_penalty=5.0, do_sample=False, temperature=0.1, max_length=2, min_new_tokens=3)
    before = copy.deepcopy(own.to_dict())
    model.train()
    assert sample(model, PROMPTS, [END], PAD, HORIZON, 64, seed=8, draws=50) == neutral
    assert model.generation_config is own
    assert own.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_no_token_of_a_large_vocabulary_is_cut_off():
    model, vocab = tiny_llama(0, vocab=200), 200
    model.lm_head.weight.data *= 0.1
    drawn = {completion[0] for completion in sample(model, [[1]], [END], PAD, 1, DRAWS, seed=9, draws=DRAWS)}
    assert drawn == set(range(vocab))
