"""Weights of pairs: the loss of a step is sum(weight * loss) / sum(weight), and a pair of weight 2 counts as two."""

import pytest
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from trl import DPOConfig

from dpo_pipeline.config import compose
from dpo_pipeline.data.splits import load_splits
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.record import read_metrics
from dpo_pipeline.training.pair_trainer import PairTrainer
from dpo_pipeline.training.reference import add_reference_logps
from dpo_pipeline.training.similar_lengths import BATCH_LOSSES
from dpo_pipeline.training.tiny import word_tokenizer
from dpo_pipeline.training.trainer import make_trainer
from tests.helpers import prepare_run, train
from tests.ranks import two_ranks
from tests.test_data import counts_of, pairs, write
from tests.test_forms import read_row
from tests.test_losses import BETA, in_float64, log_ratios, moved, negative_log_sigmoid, pair_rows, tiny_llama

WEIGHTS = [2.0, 1.0, 1.0, 3.0, 1.0, 1.0]
PAIR_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    *("discopop", "sigmoid_norm"),
)


def weighted(weights=WEIGHTS) -> Dataset:
    return pair_rows().add_column("weight", weights)


def repeated() -> Dataset:
    """Each row as often as its weight says."""
    rows = pair_rows()
    return concatenate_datasets([rows.select([i]) for i, weight in enumerate(WEIGHTS) for _ in range(int(weight))])


def trainer_of(rows, folder, cached=False, batch=9, accumulate=1, **fields):
    args = DPOConfig(
        output_dir=str(folder), beta=BETA, precompute_ref_log_probs=cached, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate, per_device_eval_batch_size=4, max_length=None, use_cpu=True,
        bf16=False, report_to="none", disable_tqdm=True,
        **{"loss_type": "sigmoid", **fields},
    )  # fmt: skip
    rows.save_to_disk(folder / "rows")
    rows = load_from_disk(folder / "rows")
    trainer = make_trainer(
        PairTrainer, model=tiny_llama(0), ref_model=None if cached else tiny_llama(0), args=args, train_dataset=rows,
        eval_dataset=rows, processing_class=word_tokenizer(),
    )  # fmt: skip
    if cached:
        add_reference_logps(trainer, "tiny")
    moved(trainer.model)
    return trainer


def loss_and_gradients(trainer):
    """The loss of one step over all micro batches, and its gradients, as the Trainer adds them up."""
    steps = trainer.args.gradient_accumulation_steps
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), steps, trainer.args.device)
    assert len(batches) == steps
    loss = sum(trainer.compute_loss(trainer.model, batch) / steps for batch in batches)
    loss.backward()
    return loss.item(), [p.grad for p in trainer.model.parameters()]


def assert_equal(one, other, tolerance=1e-5):
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    for ours, theirs in zip(one[1], other[1], strict=True):
        assert (ours - theirs).abs().max() < tolerance * 10 * theirs.abs().max()


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "frozen"])
def test_loss_and_gradient_are_the_weighted_mean_of_those_in_float64(cached, tmp_path):
    trainer = trainer_of(weighted(), tmp_path, cached)
    policy = in_float64(trainer.model)
    ratios = log_ratios(policy, in_float64(tiny_llama(0)))
    losses = [negative_log_sigmoid(BETA * (chosen - rejected)) for chosen, rejected, *_ in ratios]
    expected = sum(w * loss for w, loss in zip(WEIGHTS, losses, strict=True)) / sum(WEIGHTS)
    expected.backward()
    plain = sum(losses).item() / len(losses)
    assert abs(expected.item() - plain) > 0.01
    assert_equal(loss_and_gradients(trainer), (expected.item(), [p.grad for p in policy.parameters()]))


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_weight_2_is_the_row_twice(loss, tmp_path):
    fields = {"loss_type": loss, "label_smoothing": 0.1 if loss in ("exo_pair", "robust") else 0.0}
    one, other = (trainer_of(rows, tmp_path / str(len(rows)), **fields) for rows in (weighted(), repeated()))
    assert_equal(loss_and_gradients(one), loss_and_gradients(other))


def test_weights_reach_both_parts_of_a_loss_and_wpo(tmp_path):
    for number, fields in enumerate((
        {"loss_type": ["sigmoid", "robust"], "loss_weights": [1.1, -0.1], "label_smoothing": 1 / 3},
        {"use_weighting": True},
    )):  # fmt: skip
        one, other = (
            trainer_of(rows, tmp_path / f"{number}-{len(rows)}", **fields) for rows in (weighted(), repeated())
        )
        assert_equal(loss_and_gradients(one), loss_and_gradients(other))


@pytest.mark.parametrize(("batch", "accumulate"), [(2, 3), (1, 6), (4, 2)])
def test_micro_batches_make_the_loss_of_the_whole_step(batch, accumulate, tmp_path):
    whole = loss_and_gradients(trainer_of(weighted(), tmp_path / "whole"))
    parts = loss_and_gradients(trainer_of(weighted(), tmp_path / "parts", batch=batch, accumulate=accumulate))
    assert_equal(parts, whole)


def test_without_weights_and_with_equal_ones_nothing_changes(tmp_path):
    """Bit for bit: what a run without that column does is TRL's own."""
    results = [
        loss_and_gradients(trainer_of(rows, tmp_path / str(number)))
        for number, rows in enumerate((pair_rows(), weighted([1.0] * 6), weighted([4.0] * 6)))
    ]
    for loss, gradients in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(*both) for both in zip(gradients, results[0][1], strict=True))


def test_validation_weighs_within_each_batch(tmp_path):
    trainer = trainer_of(weighted(), tmp_path)
    metrics = trainer.evaluate()
    batches = [trainer.data_collator(list(weighted().select(part))) for part in (range(4), range(4, 6))]
    losses = [trainer.compute_loss(trainer.model, batch).item() for batch in batches]
    assert metrics["eval_loss"] == pytest.approx((4 * losses[0] + 2 * losses[1]) / 6, rel=1e-5)
    assert trainer.use_weighting is False


def test_a_loss_without_a_part_of_each_pair_is_refused(small, sft, tmp_path):
    path = write(tmp_path / "a.jsonl", [{**row, "weight": 1 + i % 2} for i, row in enumerate(pairs_of_words(60))])
    for loss in BATCH_LOSSES:
        typed = ["dataset=json", f"dataset.path={path}", f"++dpo.loss_type={loss}", "check=true", "policy=base"]
        with pytest.raises(PipelineError, match=rf"weights, and {loss} has no loss of each pair.*loss=sigmoid"):
            run_dpo(small(*typed))


def pairs_of_words(count):
    words = "film review the story script music city road".split()
    return [
        {"prompt": f"{words[i % 8]} {words[i // 8 % 8]} :", "chosen": f" {words[i % 8]} was funny .",
         "rejected": f" {words[i % 7]} was flat ."}
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("weight", [0, -1, "many", None, float("nan")])
def test_a_weight_that_is_no_positive_number_drops_its_row(weight, tmp_path):
    rows = [{**row, "weight": weight if i == 9 else 1 + i % 3} for i, row in enumerate(pairs(60))]
    node = compose(["dataset=json", f"dataset.path={write(tmp_path / 'a.jsonl', rows)}"]).dataset
    loaded = load_splits(node, ("chosen", "rejected"), False)
    assert counts_of(loaded, "a.jsonl")["dropped"] == {"weight that is no positive number": 1}
    assert counts_of(loaded, "a.jsonl")["unused_columns"] == []


def test_a_column_of_another_name_is_named(tmp_path):
    row = {"q": "q", "a": "c", "b": "r", "votes": "2.5"}
    columns = "dataset.columns={prompt: q, chosen: a, rejected: b, weight: votes}"
    assert read_row(tmp_path, row, columns)["weight"] == 2.5
    assert read_row(tmp_path, row, columns.replace(", weight: votes", ""))["unused"] == ("votes",)


def test_weights_are_in_the_token_table_and_its_key(small, tmp_path):
    path, seen = tmp_path / "a.jsonl", []
    for factor in (1, 2):
        rows = [{**row, "weight": factor * (1 + i % 3)} for i, row in enumerate(pairs_of_words(60))]
        del rows[0]["weight"]
        write(path, rows)
        data = prepare_run(small("dataset=json", f"dataset.path={path}", f"root={tmp_path}"), "dpo", "train")
        table, kept = data.tables["train"], data.rows["train"]
        assert table["weight"][:] == [kept[i].get("weight", 1.0) for i in table["row"]]
        seen.append(table["weight"][:])
    assert sorted(set(seen[0])) == [1.0, 2.0, 3.0]
    assert sorted(set(seen[1]) - {1.0}) == [2.0, 4.0, 6.0]


@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one(small, sft, tmp_path):
    path = write(tmp_path / "a.jsonl", [{**row, "weight": 1 + i % 5} for i, row in enumerate(pairs_of_words(64))])
    typed = ["dataset=json", f"dataset.path={path}", "policy=base", "evaluation.pairs=4", "evaluation.prompts=1"]
    typed += ["++dpo.max_steps=3"]
    folder = train(small(*typed, "variant=weighted-one"), "dpo")
    command = ("dpo", *small.typed, f"root={small().root}", "name=small", *typed, "variant=weighted-two")
    done, _ = two_ranks(tmp_path, command, COMPARES="no")
    assert done.returncode == 0
    folders = (folder, folder.with_name("weighted-two"))
    losses = [[row["loss"] for row in read_metrics(each) if "loss" in row] for each in folders]
    assert losses[1] == pytest.approx(losses[0], abs=5e-6)
    assert len(losses[0]) == 3
