"""What makes training faster changes no loss and no gradient: shared prompts, similar lengths, a shorter head."""

import random
import re
from copy import deepcopy
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.functional import log_softmax
from transformers import AutoConfig, AutoModelForCausalLM, set_seed
from trl import DPOConfig
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import add_fused_lm_head

from dpo_pipeline.config import compose
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.training import lm_head, memory, preflight, shared_prefix, trainer
from dpo_pipeline.training.arguments import training_arguments
from dpo_pipeline.training.pair_trainer import PairTrainer
from dpo_pipeline.training.shared_prefix import check_shared_prefix, prompts_shared, share_prompts
from dpo_pipeline.training.similar_lengths import BATCH_LOSSES
from dpo_pipeline.training.tiny import word_tokenizer
from dpo_pipeline.training.trainer import make_trainer
from tests.test_losses import VOCAB, tiny_llama

SIZE = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**SIZE, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
LAYERS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
MODELS = {
    "llama": LLAMA,
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4},
    "gpt_neox": SIZE,
    "opt": {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": SIZE,
    "mistral": {**LLAMA, "sliding_window": 7},
    "gemma3_text": {**LLAMA, **LAYERS},
    "qwen3": {**LLAMA, **LAYERS, "use_sliding_window": True},
}
OTHERS = {"falcon": {**SIZE, "alibi": True}}  # positions as a bias of attention
# Tokens of prompt, chosen and rejected: unequal, of one token, long before short, equal.
LENGTHS = {"odd": [(20, 5, 9), (40, 1, 1), (33, 20, 3)], "one pair": [(12, 4, 4)], "equal": [(9, 6, 6)] * 4}
LENGTHS["one token"] = [(1, 30, 1), (60, 2, 1), (60, 1, 3)]


def make_model(kind: str, dtype: torch.dtype, attention: str = "sdpa") -> torch.nn.Module:
    set_seed(0)
    config = AutoConfig.for_model(kind, **{**MODELS, **OTHERS}[kind])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    for weight in model.parameters():
        if weight.dim() > 1:  # far from uniform, so that a wrong mask is seen
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def make_batch(lengths: list[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for counts in lengths:
        ids = [torch.randint(3, 97, (count,), generator=generator).tolist() for count in counts]
        rows.append(dict(zip(columns, ids, strict=True)))
    return DataCollatorForPreference(pad_token_id=0)(rows)


def plain_logprobs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the completion tokens, by the model's layers and its own head."""
    layers, ids = model.base_model, batch["input_ids"]
    hidden = layers(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).last_hidden_state
    logprobs = log_softmax(model.get_output_embeddings()(hidden[:, :-1]), -1)
    return logprobs.gather(-1, ids[:, 1:, None])[..., 0] * batch["completion_mask"][:, 1:]


def trl_logprobs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """As TRL computes them."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return model(**inputs, labels=labels, fused_lm_head=True, use_cache=False).log_probs


def with_gradients(model: torch.nn.Module, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probs, and all gradients of chosen minus rejected in one vector."""
    model.zero_grad()
    chosen, rejected = logprobs.sum(1).chunk(2)
    torch.nn.functional.logsigmoid(chosen - rejected).sum().backward()
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return logprobs.detach(), torch.cat(gradients)


def compare(model: torch.nn.Module, batch: dict[str, torch.Tensor], logprobs_of) -> tuple[float, float]:
    """How far log-probs, in nats, and gradients, relative, of shared prompts are from those of two rows a pair."""
    plain = with_gradients(model, logprobs_of(model, batch))
    with prompts_shared([model], batch):
        shared = with_gradients(model, logprobs_of(model, batch))
    assert plain[0].abs().sum() > 1
    return float((plain[0] - shared[0]).abs().max()), float((plain[1] - shared[1]).norm() / plain[1].norm())


@pytest.fixture(autouse=True)
def always_share(monkeypatch):
    monkeypatch.setattr(shared_prefix, "MIN_SAVED", -9.0)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind", MODELS)
def test_shared_prompts_change_no_log_prob_and_no_gradient(kind, lengths):
    gaps = compare(make_model(kind, torch.float64), make_batch(LENGTHS[lengths]), plain_logprobs)
    assert gaps[0] < 1e-9
    assert gaps[1] < 1e-6


@pytest.mark.parametrize("kind", MODELS)
def test_shared_prompts_leave_what_trl_computes(kind):
    model = make_model(kind, torch.float32)
    add_fused_lm_head(model)
    gaps = compare(model, make_batch(LENGTHS["odd"]), trl_logprobs)
    assert gaps[0] < 1e-4  # of 10 nats a token
    assert gaps[1] < 1e-5


@pytest.mark.parametrize("typed", ["eager", "lora", "checkpointing", "bf16"])
def test_shared_prompts_with(typed):
    model = make_model("llama", torch.float32, "eager" if typed == "eager" else "sdpa")
    add_fused_lm_head(model)
    if typed == "lora":
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if typed == "checkpointing":
        model.train().activation_checkpointing_enable()
    with torch.autocast("cpu", torch.bfloat16, enabled=typed == "bf16"):
        gaps = compare(model, make_batch(LENGTHS["odd"]), trl_logprobs)
    assert gaps[0] < (0.3 if typed == "bf16" else 1e-4)
    assert gaps[1] < (0.1 if typed == "bf16" else 1e-5)


def test_a_batch_that_saves_little_stays_as_it_is(monkeypatch):
    monkeypatch.undo()
    model, shapes = make_model("llama", torch.float32), []
    model.get_input_embeddings().register_forward_pre_hook(lambda layer, args: shapes.append(tuple(args[0].shape)))
    for lengths in ([(1, 30, 30)], [(20, 5, 9)]):
        batch = make_batch(lengths)
        with prompts_shared([model], batch):
            plain_logprobs(model, batch)
    assert shapes == [(2, 31), (1, 34)]
    shapes.clear()
    plain_logprobs(model, batch)
    assert shapes == [(2, 29)]  # nothing stays behind


def test_each_token_of_shared_rows_has_its_place():
    rows = share_prompts(
        torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]])
    )
    assert rows.source.tolist() == [[0, 1, 2, 3, 7, 8, 9]]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert rows.part.tolist() == [[0, 0, 1, 1, 2, 2, 2]]
    assert rows.target.tolist() == [[0, 1, 2, 3, 0], [0, 1, 4, 5, 6]]


def test_a_mask_that_lets_rejected_see_chosen_is_noticed(monkeypatch):
    monkeypatch.setattr(shared_prefix, "make_mask", lambda rows, plain, **arguments: plain(**arguments))
    assert compare(make_model("llama", torch.float64), make_batch(LENGTHS["odd"]), plain_logprobs)[0] > 0.1


def pair_table(rows: int) -> Dataset:
    """Random rows, prompts of 1 to 30 tokens and completions of 1 to 9."""
    rng = random.Random(0)
    columns = {"prompt_ids": 30, "chosen_ids": 9, "rejected_ids": 9}
    return Dataset.from_dict(
        {
            name: [rng.choices(range(3, VOCAB), k=rng.randint(1, most)) for _ in range(rows)]
            for name, most in columns.items()
        }
    )


def pair_trainer(folder: Path, model: Any = None, loss: str = "sigmoid", **fields: Any) -> PairTrainer:
    args = DPOConfig(
        output_dir=str(folder), loss_type=loss, per_device_train_batch_size=2, gradient_accumulation_steps=4,
        per_device_eval_batch_size=4, num_train_epochs=2, max_length=None, use_cpu=True, bf16=False, logging_steps=1,
        report_to="none", disable_tqdm=True, data_seed=3, save_strategy="steps", save_steps=1, learning_rate=1e-3,
        **fields,
    )  # fmt: skip
    return make_trainer(
        PairTrainer, model=model or tiny_llama(0), ref_model=deepcopy(model) or tiny_llama(0), args=args,
        train_dataset=pair_table(29), eval_dataset=pair_table(9), processing_class=word_tokenizer(),
    )  # fmt: skip


def losses_of(trainer: PairTrainer) -> list[float]:
    return [
        line[key]
        for line in trainer.state.log_history
        for key in ("loss", "logps/chosen", "rewards/margins", "grad_norm")
        if key in line
    ]


def rows_of_steps(trainer: PairTrainer) -> list[list[tuple]]:
    """The pairs of each step, over two epochs."""
    loader, steps = trainer.get_train_dataloader(), []
    for epoch in range(2):
        loader.set_epoch(epoch)
        batches = [
            [tuple(ids) for ids in batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -1).tolist()]
            for batch in loader
        ]
        batches = [[tuple(i for i in ids if i >= 0) for ids in batch] for batch in batches]
        steps += [batches[start : start + 4] for start in range(0, len(batches), 4)]
    return steps


def test_steps_keep_their_rows_and_micro_batches_their_size(tmp_path, monkeypatch):
    sorted_steps = rows_of_steps(pair_trainer(tmp_path))
    monkeypatch.setattr(trainer, "use_similar_lengths", lambda trainer: None)
    plain_steps = rows_of_steps(pair_trainer(tmp_path))
    assert len(plain_steps) == 8
    for ours, plain in zip(sorted_steps, plain_steps, strict=True):
        assert sorted(chain(*ours)) == sorted(chain(*plain))
        assert [len(batch) for batch in ours] == [len(batch) for batch in plain]
        if sum(map(len, plain)) < 16:  # the last step of an epoch
            assert ours == plain
        else:
            assert padding(ours) < padding(plain)
    assert plain_steps[0] != plain_steps[4]


def padding(batches: list[list[tuple]]) -> int:
    return sum(max(map(len, batch)) * len(batch) - sum(map(len, batch)) for batch in batches)


@pytest.mark.parametrize("loss", sorted(BATCH_LOSSES))
def test_a_loss_of_the_whole_micro_batch_keeps_the_plain_order(loss, tmp_path, monkeypatch):
    ours = rows_of_steps(pair_trainer(tmp_path, loss=loss))
    monkeypatch.setattr(trainer, "use_similar_lengths", lambda trainer: None)
    assert ours == rows_of_steps(pair_trainer(tmp_path, loss=loss))


def test_a_whole_run_has_the_losses_and_weights_of_plain_trl(tmp_path, monkeypatch):
    ours = pair_trainer(tmp_path / "ours")
    assert check_shared_prefix(ours, "on")
    ours.shares_prompts = True
    ours.train()
    monkeypatch.setattr(trainer, "use_similar_lengths", lambda trainer: None)
    monkeypatch.setattr(trl_utils, "_use_triton", chunked_logprob._use_triton)
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", lm_head.trl_head)
    plain = pair_trainer(tmp_path / "plain")
    plain.train()
    assert losses_of(ours) == pytest.approx(losses_of(plain), abs=2e-5)
    for left, right in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-5)
    moved = zip(plain.model.parameters(), tiny_llama(0).parameters(), strict=True)
    assert max(float((left - right).abs().max()) for left, right in moved) > 1e-3


def test_a_run_that_was_stopped_in_its_second_epoch_goes_on_with_the_same_rows(tmp_path):
    whole, part = pair_trainer(tmp_path / "whole"), pair_trainer(tmp_path / "part")
    whole.train()
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert losses_of(part) == losses_of(whole)
    for left, right in zip(part.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_validation_is_the_same_in_order_of_length(tmp_path, monkeypatch):
    ours = pair_trainer(tmp_path).evaluate()
    monkeypatch.setattr(trainer, "use_similar_lengths", lambda trainer: None)
    plain = pair_trainer(tmp_path).evaluate()
    names = [name for name in plain if not re.search("runtime|per_second|logits|entropy|token_acc", name)]
    assert {name: ours[name] for name in names} == pytest.approx({name: plain[name] for name in names}, abs=1e-5)


def test_the_head_sees_completion_tokens_alone(tmp_path, monkeypatch):
    seen, score = [], trl_utils._ChunkedLogProbFunction.apply
    head = SimpleNamespace(apply=lambda hidden, *args: seen.append(len(hidden)) or score(hidden, *args))
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", head)
    ours = pair_trainer(tmp_path)
    batch = ours.data_collator(list(ours.train_dataset.select(range(4))))
    ours.compute_ref_log_probs(ours.model, batch)
    assert seen == [int(batch["completion_mask"].sum())]


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_plain_head_is_that_of_trl(softcap, monkeypatch):
    set_seed(0)
    hidden, weight, bias = (torch.randn(size, requires_grad=True) for size in ((40, 16), (97, 16), (97,)))
    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    targets = torch.randint(97, (40,))
    targets[:20] = (hidden @ weight.T + bias)[:20].argmax(-1)
    results = []
    for score in (lm_head.trl_head.apply, lm_head.score_tokens):
        scores = score(hidden, weight, bias, targets, 0.7, 32, softcap, 1.5, names)
        gradients = torch.autograd.grad((scores[0] * torch.arange(40)).sum(), (hidden, weight, bias))
        results.append([*scores, *gradients])
    for trl, ours in zip(*results, strict=True):
        assert torch.allclose(trl.float(), ours.float(), rtol=1e-4, atol=1e-4)
    assert 20 <= int(results[0][4].sum()) < 40
    monkeypatch.setattr(lm_head, "MAX_LOGITS", 40 * 97 - 1)
    monkeypatch.setattr(lm_head, "linear", None)
    assert torch.equal(
        lm_head.score_tokens(hidden, weight, bias, targets, 0.7, 32, softcap, 1.5, names)[0], results[0][0]
    )


def test_grouping_across_steps_is_transformers_own(tmp_path):
    steps = rows_of_steps(pair_trainer(tmp_path, train_sampling_strategy="group_by_length"))
    assert sum(map(padding, steps[:4])) < sum(map(padding, rows_of_steps(pair_trainer(tmp_path))[:4]))


def test_a_model_of_other_positions_is_found_out_and_trained_plainly(tmp_path, caplog):
    falcon = pair_trainer(tmp_path, make_model("falcon", torch.float32))
    caplog.set_level("INFO")
    assert not check_shared_prefix(falcon, "auto")
    assert re.search(r"prompts are not shared: a log-prob of falcon differs by [\d.]+ nats", caplog.text)
    with pytest.raises(PipelineError, match="shared_prefix=on: a log-prob of falcon .* training.shared_prefix=off"):
        check_shared_prefix(falcon, "on")
    assert not falcon.shares_prompts


def test_a_model_that_fails_on_shared_rows_is_trained_plainly(tmp_path, monkeypatch, caplog):
    dpo = pair_trainer(tmp_path)
    monkeypatch.setattr(shared_prefix, "make_mask", lambda *args, **arguments: 1 / 0)
    caplog.set_level("INFO")
    assert not check_shared_prefix(dpo, "auto")
    assert "llama does not take them (ZeroDivisionError: division by zero)" in caplog.text
    assert dpo.compute_ref_log_probs(dpo.model, dpo.data_collator(list(dpo.train_dataset.select(range(2)))))


def test_one_training_row_is_enough_for_preflight(tmp_path):
    dpo = pair_trainer(tmp_path)
    for rows in (1, 2, 29):
        dpo.train_dataset = pair_table(rows)
        assert len(preflight.two_rows(dpo)["input_ids"]) == 2 * min(2, rows)


def test_a_sampler_of_unequal_micro_batches_is_refused():
    run = compose(["++dpo.train_sampling_strategy=batch_rebalance"])
    with pytest.raises(PipelineError, match="dpo.train_sampling_strategy=batch_rebalance .* take it out"):
        training_arguments(run, "dpo", Path("none"))


@pytest.mark.parametrize(("may_checkpoint", "failures"), [(True, 1), (True, 2), (False, 1)])
def test_activation_checkpointing_comes_where_memory_asks_for_it(
    may_checkpoint, failures, tmp_path, monkeypatch, caplog
):
    dpo, outcomes = pair_trainer(tmp_path), [torch.OutOfMemoryError("CUDA out of memory")] * failures
    run_batch = memory.run_longest_batch
    monkeypatch.setattr(memory, "run_longest_batch", lambda *args: raise_next(outcomes) or run_batch(*args))
    data = SimpleNamespace(tables={"train": dpo.train_dataset})
    if failures == 2 or not may_checkpoint:
        with pytest.raises(torch.OutOfMemoryError):
            memory.check_memory(dpo, data, may_checkpoint)
        return
    caplog.set_level("INFO")
    memory.check_memory(dpo, data, may_checkpoint)
    assert "does not fit: activation checkpointing is on" in caplog.text
    assert dpo.args.activation_checkpointing
    dpo.train()
    assert dpo.model.is_activation_checkpointing


def raise_next(errors: list[Exception]) -> None:
    if errors:
        raise errors.pop()
