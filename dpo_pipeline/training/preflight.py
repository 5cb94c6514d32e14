"""What must hold before step 1, checked on the run's own rows, first batch and weights.

TRL checks none of it: it trains with a wrong reference, an adapter that was not loaded, a completion without its end.
"""

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch

from dpo_pipeline.data.prepare import Prepared
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.logprobs import completion_logprobs, inference
from dpo_pipeline.models import LoadOptions
from dpo_pipeline.record import RunRecord
from dpo_pipeline.run_folder import finished_sft
from dpo_pipeline.schema import Run
from dpo_pipeline.training.fingerprint import check_start, policy_fingerprint
from dpo_pipeline.training.memory import check_memory, random_state_kept, trial_step
from dpo_pipeline.training.pair_logps import policy_logps, reference_logps, tolerance
from dpo_pipeline.training.shared_prefix import check_shared_prefix
from dpo_pipeline.training.starting_policy import StartingPolicy

log = logging.getLogger(__name__)


def check_sft(trainer: Any, run: Run, data: Prepared) -> dict[str, Any]:
    """The fingerprint of an SFT's policy, once all holds that must hold before step 1; raises PipelineError."""
    check_rows(data)
    check_completions(unpack_batch(first_batch(trainer)), data)
    batch = two_rows(trainer)
    check_trainable(trainer)
    check_forward(trainer, batch, data.load_options)
    fingerprint = policy_fingerprint(trainer, data)
    check_memory(trainer, data, run.sft["activation_checkpointing"] == "auto")
    return fingerprint


def check_dpo(trainer: Any, run: Run, data: Prepared, start: StartingPolicy, record: RunRecord) -> dict[str, Any]:
    """The fingerprint of a DPO's policy, once all holds that must hold before step 1; raises PipelineError.

    `record.manifest["loading"]` says how the weights of the starting policy were loaded.
    """
    check_rows(data)
    check_completions(unpack_batch(first_batch(trainer)), data)
    batch = two_rows(trainer)
    check_trainable(trainer)
    check_forward(trainer, batch, data.load_options)
    if start.is_adapter and not start.merge_to:
        check_adapter(trainer, start.source)
    if run.policy == "sft":
        sft = finished_sft(run)
        is_rounded = start.merge_to and (run.quantization is not None or data.load_options.dtype.itemsize < 4)
        is_exact = sft["loading"] == record.manifest["loading"] and not is_rounded
        check_start(trainer, sft["final"]["probe"], is_exact, start.source)
    check_reference(trainer, batch, start.source, run.reference.path)
    trainer.shares_prompts = check_shared_prefix(trainer, run.training.shared_prefix)
    fingerprint = policy_fingerprint(trainer, data)
    check_memory(trainer, data, run.dpo["activation_checkpointing"] == "auto")
    return fingerprint


def check_rows(data: Prepared) -> None:
    """Check every completion of the training rows, as `check_completions` does."""
    table = data.tables["train"]
    for name in set(table.column_names) & {"completion_ids", "chosen_ids", "rejected_ids"}:
        check_completions(zip(table["prompt_ids"], table[name], strict=True), data)


def check_completions(pairs: Iterable[tuple[list[int], list[int]]], data: Prepared) -> None:
    """Raise PipelineError unless each completion has one end token, its last, and no row has BOS twice."""
    eos_ids, bos, may_be_cut = data.eos_ids, data.tokenizer.bos_token_id, data.limits.completion == "cut"
    for row, (prompt, completion) in enumerate(pairs):
        ends = sum(token in eos_ids for token in completion)
        if not (may_be_cut and not ends) and (ends != 1 or completion[-1] not in eos_ids):
            raise PipelineError(
                f"completion {row} has {ends} end tokens, expected one, as the last of its {len(completion)} tokens: "
                "a policy trained on it would not learn to stop"
            )
        # A chat template may open every message with BOS; no text holds it inside, and nothing starts with two.
        if bos is not None and bos not in eos_ids and (prompt[:2] == [bos, bos] or bos in completion):
            raise PipelineError(
                f"row {row} holds the BOS token twice: take it out of the text, the tokenizer puts one before it"
            )


def first_batch(trainer: Any) -> dict[str, Any]:
    """The first micro batch that this process trains on."""
    with random_state_kept():
        loader = trainer.get_train_dataloader()
        batch = next(iter(loader))
        loader.end()
    return batch


def two_rows(trainer: Any) -> dict[str, Any]:
    """A batch of two training rows, or of the only one: enough to see whether log-probs are right."""
    rows = trainer.train_dataset.select(range(min(2, len(trainer.train_dataset))))
    return trainer._prepare_inputs(trainer.data_collator(list(rows)))


def unpack_batch(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(what comes before, completion) of every part of a collated batch that the trainer learns, by its own masks."""
    is_learned = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"].bool()
    pairs = []
    for ids, learn_mask, real_mask in zip(batch["input_ids"], is_learned, batch["attention_mask"].bool(), strict=True):
        ids, learn_mask = ids[real_mask].tolist(), learn_mask[real_mask].tolist()
        edges = [n for n in range(len(ids) + 1) if (n > 0 and learn_mask[n - 1]) != (n < len(ids) and learn_mask[n])]
        if not edges or edges[0] == 0:
            raise PipelineError("a batch has a row that learns nothing, or learns its prompt too")
        pairs += [(ids[:start], ids[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return pairs


def check_trainable(trainer: Any) -> None:
    """Raise PipelineError where no weight of the policy is trainable."""
    sizes = [(p.numel(), p.requires_grad) for p in trainer.model.parameters()]
    trainable, total = sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
    if not trainable:
        raise PipelineError(
            "no weight of the policy is trainable, so nothing would be learnt: check lora.target_modules"
        )
    log.info("preflight: %s of %s parameters are trained; every completion ends once", f"{trainable:,}", f"{total:,}")


def check_forward(trainer: Any, batch: dict[str, Any], options: LoadOptions) -> None:
    """Raise PipelineError where log-probs are no numbers, or TRL's are not those of the model's own logits."""
    model = trainer.model
    labels = (
        batch["labels"] if "labels" in batch else batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with inference(model), trainer.accelerator.autocast():
        trl_logprobs = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True).log_probs
        # Row by row: on a GPU TRL's head needs less memory than all logits of a batch.
        logprobs = torch.cat(completion_logprobs(model, *zip(*unpack_batch(batch), strict=True), batch_size=1))
    if not logprobs.isfinite().all():
        names = (name for name, weight in model.named_parameters() if not weight.isfinite().all())
        cause = next(names, "none of its weights, so an option of lora= or precision= causes it")
        raise PipelineError(f"the starting policy gives log-probs that are no numbers; weights that hold NaN: {cause}")
    gap = float((trl_logprobs[labels[:, 1:] != -100].double().cpu() - logprobs).abs().mean())
    is_exact = model.dtype == torch.float32 and not (trainer.args.bf16 or trainer.args.fp16 or options.quantization)
    if not gap <= (1e-3 if is_exact else 0.1):
        raise PipelineError(
            f"TRL's log-probs differ by {gap:.3g} nats a token from those of the model's logits: "
            f"{model.config.model_type} has a layer before its head that TRL leaves out: choose another model="
        )


def check_adapter(trainer: Any, source: Any) -> None:
    """Raise PipelineError where a continued adapter changes nothing: it was not trained, or not loaded."""
    halves = [weight for name, weight in trainer.model.named_parameters() if ".lora_B.default" in name]
    if halves and not any(bool(weight.any()) for weight in halves):
        raise PipelineError(
            f"the adapter in {source} changes nothing, its B matrices are 0: give one that was trained"
        )


def check_reference(trainer: Any, batch: dict[str, Any], source: Any, reference_path: str | None) -> None:
    """Raise PipelineError unless every reward of the batch is 0 and a sigmoid loss is ln 2: policy = reference."""
    with trial_step(trainer):
        reference_sums = reference_logps(trainer, batch)
        rewards, limit = policy_logps(trainer, batch) - reference_sums, tolerance(trainer, batch, 4)
        chosen, rejected = reference_sums.float().chunk(2)
        columns = {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        with torch.no_grad(), trainer.accelerator.autocast():
            loss = float(trainer.compute_loss(trainer.model, {**batch, **columns}))
    if reference_path:
        margin = (rewards.chunk(2)[0] - rewards.chunk(2)[1]).mean()
        log.info("preflight: reference %s, as asked; first margins %.3g nats in the mean", reference_path, margin)
        return
    worst = int((rewards.abs() / limit).argmax())
    if not rewards.abs()[worst] <= limit[worst]:
        raise PipelineError(
            f"a step-0 reward is {rewards[worst]:.3g} nats, expected 0 within {limit[worst]:.2g}: the reference is "
            f"not the starting policy ({source}). Type reference=cached or frozen, or name another by reference.path="
        )
    is_plain = (trainer.loss_types, trainer.loss_weights) == (["sigmoid"], [1.0])
    is_plain = is_plain and not trainer.use_weighting and not trainer.aux_loss_enabled
    if not math.isfinite(loss) or (is_plain and abs(loss - math.log(2)) > 1e-3):
        raise PipelineError(
            f"the first loss is {loss:.4g}, expected ln 2 = 0.6931 of sigmoid, a finite one of any other"
        )
    log.info("preflight: reference = starting policy: largest reward %.2g nats, loss %.4f", rewards.abs().max(), loss)
