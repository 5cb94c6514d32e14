"""Each loss, and its gradient, against the formula of its paper in float64."""

import math
import random

import pytest
import torch
from datasets import Dataset, load_from_disk
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig

from dpo_pipeline.config import compose
from dpo_pipeline.training.arguments import training_arguments
from dpo_pipeline.training.pair_trainer import PairTrainer
from dpo_pipeline.training.reference import add_reference_logps
from dpo_pipeline.training.tiny import word_tokenizer
from dpo_pipeline.training.trainer import make_trainer

BETA, SMOOTHING, VOCAB = 0.5, 0.1, 30


def tiny_llama(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def pair_rows():
    rng = random.Random(0)

    def ids(length):
        return [rng.randrange(VOCAB) for _ in range(length)]

    lengths = [(3, 2, 7), (1, 5, 4), (6, 1, 3), (2, 8, 1), (4, 4, 6), (5, 3, 2)]
    columns = zip(*[[ids(n) for n in row] for row in lengths], strict=True)
    return Dataset.from_dict(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(list, columns), strict=True)))


def trainer_at_reference(loss, folder, cached=True, eval_batch=4):
    """A trainer with the fields that conf/loss/ and training_arguments give TRL for a loss."""
    ours = training_arguments(compose([f"loss={loss}"]), "dpo", folder)
    fields = {name: getattr(ours, name) for name in ("loss_type", "loss_weights", "label_smoothing")}
    args = DPOConfig(
        output_dir=str(folder), beta=BETA, **fields,
        precompute_ref_log_probs=cached, per_device_train_batch_size=6, per_device_eval_batch_size=eval_batch,
        max_length=None, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    pair_rows().save_to_disk(folder / "rows")
    rows = load_from_disk(folder / "rows")
    trainer = make_trainer(
        PairTrainer,
        model=tiny_llama(0),
        ref_model=None if cached else tiny_llama(0),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=word_tokenizer(),
    )
    if cached:
        add_reference_logps(trainer, "tiny")
    return trainer


def moved(model):
    """Move the model's weights in place, far enough that margins pass 1 / BETA on both sides."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.15 * torch.randn(weight.shape, generator=generator)


def in_float64(model):
    """A float64 model of the same weights, with none of what the trainer hung on the other."""
    double = tiny_llama(0).double()
    double.load_state_dict(model.state_dict())
    return double


def completion_logprob(model, prompt, completion):
    """log pi(completion | prompt), by plain log_softmax over one row."""
    ids = prompt + completion
    logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logprobs[at - 1, ids[at]] for at in range(len(prompt), len(ids)))


def log_ratios(policy, reference):
    """log pi - log pi_ref of the chosen and of the rejected completions, both models in float64."""
    for row in pair_rows():
        ratios = []
        for side in ("chosen_ids", "rejected_ids"):
            with torch.no_grad():
                under_reference = completion_logprob(reference, row["prompt_ids"], row[side])
            ratios.append(completion_logprob(policy, row["prompt_ids"], row[side]) - under_reference)
        yield *ratios, len(row["chosen_ids"]), len(row["rejected_ids"])


def negative_log_sigmoid(x):
    return torch.log(1 + torch.exp(-x))


def sigmoid(chosen, rejected, *_):
    """arXiv 2305.18290, equation 7."""
    return negative_log_sigmoid(BETA * chosen - BETA * rejected)


def ipo(chosen, rejected, chosen_tokens, rejected_tokens):
    """arXiv 2310.12036, equation 17; TRL divides each log-ratio by its completion's tokens, the paper does not."""
    return (chosen / chosen_tokens - rejected / rejected_tokens - 1 / (2 * BETA)) ** 2


def hinge(chosen, rejected, *_):
    """arXiv 2309.06657, section 3.2: max(0, 1 - beta * delta)."""
    return torch.clamp(1 - BETA * (chosen - rejected), min=0)


def robust(chosen, rejected, *_):
    """arXiv 2403.00409: the loss whose mean under flipped labels is that of the true labels."""
    right, flipped = negative_log_sigmoid(BETA * (chosen - rejected)), negative_log_sigmoid(BETA * (rejected - chosen))
    return ((1 - SMOOTHING) * right - SMOOTHING * flipped) / (1 - 2 * SMOOTHING)


def cdpo(chosen, rejected, *_):
    """ericmitchell.ai/cdpo.pdf, equation 7: the binary cross-entropy with a target of 1 - e."""
    right, flipped = negative_log_sigmoid(BETA * (chosen - rejected)), negative_log_sigmoid(BETA * (rejected - chosen))
    return (1 - SMOOTHING) * right + SMOOTHING * flipped


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "frozen"])
@pytest.mark.parametrize("formula", [sigmoid, ipo, hinge, robust, cdpo])
def test_loss_and_gradient_equal_the_formula(formula, cached, tmp_path):
    trainer = trainer_at_reference(formula.__name__, tmp_path, cached)
    moved(trainer.model)
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    policy = in_float64(trainer.model)
    losses = [formula(*row) for row in log_ratios(policy, in_float64(tiny_llama(0)))]
    expected = sum(losses) / len(losses)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), policy.parameters(), strict=True):
        assert theirs.grad.abs().max() > 1e-4, name
        error = (ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert error < 1e-4, name


@pytest.mark.parametrize("rows", [1, 6])
def test_sigmoid_sft_adds_the_mean_negative_log_prob_of_the_chosen_tokens(rows, tmp_path):
    """arXiv 2404.19733, equation 1, with alpha 1; TRL takes the mean over the tokens of a batch."""
    trainer = trainer_at_reference("sigmoid_sft", tmp_path, cached=False)
    moved(trainer.model)
    batch = trainer.data_collator(list(pair_rows().select(range(rows))))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    policy = in_float64(trainer.model)
    preference = [sigmoid(*row) for row in log_ratios(policy, in_float64(tiny_llama(0)))][:rows]
    nll = [-completion_logprob(policy, row["prompt_ids"], row["chosen_ids"]) for row in pair_rows()][:rows]
    tokens = [len(row["chosen_ids"]) for row in pair_rows()][:rows]
    expected = sum(preference) / rows + sum(nll) / sum(tokens)
    if rows == 1:  # then it is the paper's
        assert expected.item() == pytest.approx((preference[0] + nll[0] / tokens[0]).item())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(trainer.model.parameters(), policy.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 1e-4 * theirs.grad.abs().max()


def test_the_moved_policy_has_pairs_on_both_sides_of_the_hinge(tmp_path):
    trainer = trainer_at_reference("hinge", tmp_path)
    moved(trainer.model)
    ratios = log_ratios(in_float64(trainer.model), in_float64(tiny_llama(0)))
    slack = [1 - BETA * (chosen - rejected).item() for chosen, rejected, *_ in ratios]
    assert min(slack) < -0.1
    assert max(slack) > 0.1
    assert min(map(abs, slack)) > 1e-3


def test_before_the_first_step_the_sigmoid_loss_is_ln_2_and_every_reward_0(tmp_path):
    trainer = trainer_at_reference("sigmoid", tmp_path, eval_batch=1)
    for i in range(len(trainer.eval_dataset)):
        metrics = trainer.evaluate(trainer.eval_dataset.select([i]))
        assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert metrics["eval_rewards/chosen"] == metrics["eval_rewards/rejected"] == 0


def test_a_cached_reference_is_the_frozen_one(tmp_path):
    losses = []
    for cached in (True, False):
        trainer = trainer_at_reference("sigmoid", tmp_path, cached)
        moved(trainer.model)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
