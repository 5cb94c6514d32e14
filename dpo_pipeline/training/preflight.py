"""What must hold before step 1, looked at on the run's own first batch; and whether its longest batch fits.

TRL checks none of it: with a wrong reference, an adapter that was not loaded or a completion without its end it
trains.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import math
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.trainer_utils import IntervalStrategy, SchedulerType

from dpo_pipeline.config import Run
from dpo_pipeline.distributed import is_main_process, on_main_process, processes
from dpo_pipeline.errors import OneRankError, PipelineError
from dpo_pipeline.hardware import device, device_memory, gigabytes, peak_memory
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.run_folder import read_json, write_json
from dpo_pipeline.training.reference import compute_reference_logps, with_columns
from dpo_pipeline.training.trainer import sharding

log = logging.getLogger(__name__)

NO_MEMORY = r"out of memory|can't allocate memory|ALLOC_FAILED"

# Rates that published runs of 0.1 to 70 B parameters used, by stage and adapter: lowest, highest, where.
KNOWN_RATES = {
    "sft": (1e-6, 1e-4, "2e-5 in TRL's examples and Zephyr (arXiv:2310.16944), 5e-6 in Tulu 3"),
    "sft_lora": (2e-5, 2e-3, "1e-4 to 2e-4 in QLoRA (arXiv:2305.14314), 2e-4 in TRL's examples"),
    "dpo": (5e-8, 1e-5, "1e-6 in the DPO paper (arXiv:2305.18290), 5e-7 in Zephyr, 2e-7 to 5e-7 in Tulu 3"),
    "dpo_lora": (5e-7, 1e-4, "5e-6 in TRL's examples and Zephyr's QLoRA recipe, up to 5e-5 for small models"),
}


def check_rate(run: Run, stage: str) -> None:
    """Warn of a learning rate ten times beyond those known to work for its stage and mode, or for this model."""
    mode = stage if run.lora is None else f"{stage}_lora"
    rate, own = getattr(run, stage)["learning_rate"], getattr(run.model.learning_rate, mode)
    low, high, source = KNOWN_RATES[mode]
    if not min(low, own) / 10 <= rate <= 10 * max(high, own):
        log.warning(
            "%s.learning_rate=%g is far from what is known to work for %s %s: %g for this model, else %g to %g (%s)",
            *(stage, rate, stage.upper(), "with LoRA" if run.lora else "of every weight", own, low, high, source),
        )


def check_completions(
    pairs: Iterable[tuple[list[int], list[int]]], eos_ids: list[int], bos: int | None, cut: bool = False
) -> None:
    """Raise PipelineError unless each completion has one end token, its last, and no BOS, and no prompt opens with
    two.

    A completion that was `cut` may have none.
    """
    for row, (prompt, completion) in enumerate(pairs):
        found = sum(token in eos_ids for token in completion)
        if not (cut and not found) and (found != 1 or completion[-1] not in eos_ids):
            raise PipelineError(
                f"completion {row} has {found} end tokens, expected one, as the last of its {len(completion)} tokens: "
                "a policy trained on it would not learn to stop"
            )
        # A chat template may open every message with it, a text may not, and nothing starts with two.
        if bos is not None and bos not in eos_ids and (prompt[:2] == [bos, bos] or bos in completion):
            raise PipelineError(
                f"row {row} holds the BOS token twice: take it out of the text, the tokenizer puts one before it"
            )


def check_rows(rows: Any, eos_ids: list[int], bos: int | None, cut: bool = False) -> None:
    """`check_answers` of every completion of a table of token ids."""
    for name in rows.column_names:
        if name.endswith("_ids") and name != "prompt_ids":
            check_completions(zip(rows["prompt_ids"], rows[name], strict=True), eos_ids, bos, cut)


def unpack_batch(batch: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of each row of a collated batch, as the trainer's masks have them."""
    if "labels" in batch:
        masks = batch["labels"] != -100
        real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(masks)
    else:
        masks, real = batch["completion_mask"].bool(), batch["attention_mask"].bool()
    pairs = []
    for ids, mask, there in zip(batch["input_ids"], masks, real, strict=True):
        if not mask[there].diff().int().sum() <= 1 or not mask.any():
            raise PipelineError("a batch learns from something else than one completion behind its prompt")
        pairs.append((ids[there & ~mask].tolist(), ids[mask].tolist()))
    return pairs


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave Python's, numpy's and torch's random states as they are found."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def first_batch(trainer: Any) -> dict[str, Any]:
    """The first micro batch that this process will train on."""
    with random_state_kept():
        loader = trainer.get_train_dataloader()
        batch = next(iter(loader))
        loader.end()
    return batch


def policy_fingerprint(trainer: Any) -> dict[str, Any]:
    """Two rows to recognise a policy by, with their log-probs in nats before training."""
    rows = trainer.train_dataset.select(range(min(2, len(trainer.train_dataset))))
    pairs = unpack_batch(trainer.data_collator(list(rows)))[: len(rows)]
    prompts, completions = [p[-256:] for p, _ in pairs], [a[:256] for _, a in pairs]
    return {"prompts": prompts, "answers": completions, "before": probe_logprobs(trainer, prompts, completions)}


def probe_logprobs(trainer: Any, prompts: list[list[int]], completions: list[list[int]]) -> list[float]:
    """The log-prob of each completion under the policy before it trains: as anybody loads it, without autocast."""
    return [float(row.sum()) for row in completion_logprobs(trainer.model, prompts, completions, len(prompts))]


def check_policy(trainer: Any, eos_ids: list[int], bos: int | None, rows: Any, cut: bool = False) -> dict[str, Any]:
    """The first batch of a run whose policy can learn from it; raises PipelineError where it cannot."""
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    if not trained:
        raise PipelineError("no weight of the policy is trainable: nothing would be learnt; check lora.target_modules")
    check_rows(rows, eos_ids, bos, cut)
    batch = first_batch(trainer)
    check_completions(unpack_batch(batch), eos_ids, bos, cut)
    total = sum(p.numel() for p in trainer.model.parameters())
    log.info("preflight: %s of %s parameters are trained; every completion ends once", f"{trained:,}", f"{total:,}")
    return batch


def check_adapter(trainer: Any, source: Any) -> None:
    """Raise PipelineError where a continued adapter changes nothing: it was not trained, or not loaded."""
    halves = [p for name, p in trainer.model.named_parameters() if ".lora_B.default" in name]
    if halves and not any(bool(p.any()) for p in halves):
        raise PipelineError(
            f"the adapter in {source} changes nothing, its B matrices are 0: give one that was trained"
        )


def check_start(trainer: Any, fingerprint: dict[str, Any], exact: bool, source: Any) -> None:
    """Raise PipelineError where the starting policy is not what SFT ended with, by the rows it left to know it by.

    Unless `exact`, weights were rounded on the way, to another precision or quantization: then what that changed is
    told where it is much.
    """
    found = probe_logprobs(trainer, fingerprint["prompts"], fingerprint["answers"])
    moved = sum(abs(a - b) for a, b in zip(fingerprint["after"], fingerprint["before"], strict=True))
    off = sum(abs(a - b) for a, b in zip(fingerprint["after"], found, strict=True))
    from_base = sum(abs(a - b) for a, b in zip(fingerprint["before"], found, strict=True))
    if moved == 0:
        raise PipelineError(f"the SFT policy {source} is the bare base: its training changed nothing; train it anew")
    allowed = sum(map(len, fingerprint["answers"])) * (1e-3 if trainer.model.dtype.itemsize == 4 else 0.02)
    if off >= from_base or (exact and off > allowed):
        raise PipelineError(
            f"the starting policy is not what SFT ended with ({source}): completions that SFT left to know it by "
            f"differ by {off:.3g} nats, and by {from_base:.3g} from its base: its weights or its adapter were not "
            "loaded"
        )
    if off > moved / 4:
        log.warning(
            "loaded in another precision, the starting policy is %.3g nats off, of %.3g that SFT moved", off, moved
        )
    log.info(
        "preflight: the starting policy is %s, %.3g nats from its base, %.2g from what SFT ended with",
        *(source, from_base, off),
    )


def pair_logps(trainer: Any, model: Any, batch: dict[str, Any], of_policy: bool) -> Any:
    """Summed log-probs [chosen..., rejected...] of a batch in nats, by the trainer's own forward."""
    held = trainer.ref_model
    try:
        if of_policy:
            trainer.ref_model = model  # so that TRL switches no adapter off
        return torch.cat(trainer.compute_ref_log_probs(model, batch)).double()
    finally:
        trainer.ref_model = held


def tolerance(trainer: Any, batch: dict[str, Any], roundings: int) -> Any:
    """How far two log-probs [chosen..., rejected...] of one policy may differ, in nats.

    That is 0.001, or so many roundings of the dtype for the square root of the completion's tokens.
    """
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    used = next((t for name, t in dtypes.items() if getattr(trainer.args, name)), trainer.model.dtype)
    return (roundings * torch.finfo(used).eps * batch["completion_mask"].sum(-1).double().sqrt()).clamp(min=1e-3)


def padding_tolerance(trainer: Any, batch: dict[str, Any]) -> Any:
    """The `tolerance` between two forwards that pad one batch otherwise."""
    return tolerance(trainer, batch, 40)


def check_reference(trainer: Any, batch: dict[str, Any], source: Any, reference: str | None) -> None:
    """Raise PipelineError unless every reward of the batch is 0 and a sigmoid loss ln 2: policy = reference.

    Both sides come from one forward on one batch, so that they are equal but for roundings. `reference` names another
    one given on purpose: then only told.
    """
    trainer.model.train()
    own = pair_logps(trainer, trainer.model, batch, True)
    theirs = pair_logps(trainer, trainer.ref_model or trainer.model, batch, False)
    rewards, allowed = own - theirs, tolerance(trainer, batch, 4)
    worst = int((rewards.abs() / allowed).argmax())
    margins = rewards.chunk(2)[0] - rewards.chunk(2)[1]
    if reference:
        log.info("preflight: reference %s, as asked; first margins %.3g nats in the mean", reference, margins.mean())
        return
    if not rewards.abs()[worst] <= allowed[worst]:
        raise PipelineError(
            f"a step-0 reward is {rewards[worst]:.3g} nats, expected 0 within {allowed[worst]:.2g}: the reference is "
            f"not the starting policy ({source}). Set reference=cached or frozen, or name another on purpose with "
            "reference.path=..."
        )
    chosen, rejected = theirs.float().chunk(2)
    with torch.no_grad(), trainer.accelerator.autocast():
        loss = float(
            trainer.compute_loss(trainer.model, {**batch, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected})
        )
    trainer._metrics["train"].clear()  # what TRL would else log with the first step
    trainer._total_train_tokens = 0
    plain = (trainer.loss_types, trainer.loss_weights) == (["sigmoid"], [1.0])
    plain = plain and not trainer.use_weighting and not trainer.aux_loss_enabled
    if not math.isfinite(loss) or (plain and abs(loss - math.log(2)) > 1e-3):
        raise PipelineError(f"the first loss is {loss:.4g}, expected ln 2 = 0.6931 of sigmoid, a number of any other")
    log.info("preflight: reference = starting policy: largest reward %.2g nats, loss %.4f", rewards.abs().max(), loss)


def check_cache(trainer: Any, source: Any) -> None:
    """Raise PipelineError unless the reference log-probs that the rows now hold are the starting policy's.

    Of the first batch, by a forward of its own, whose padding is another one: so with more room for roundings.
    """
    batch = first_batch(trainer)
    held = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]]).double()
    off = (pair_logps(trainer, trainer.model, batch, True) - held).abs()
    allowed = padding_tolerance(trainer, batch)
    worst = int((off / allowed).argmax())
    if not off[worst] <= allowed[worst]:
        raise PipelineError(
            f"cached reference log-probs are {off[worst]:.3g} nats from those of the starting policy ({source}), more "
            f"than {allowed[worst]:.2g}: another precision or order of the rows: type reference=frozen, and report it"
        )


def check_memory(trainer: Any, run: Run, stage: str) -> None:
    """Let the longest rows make two whole steps, unless a run that needs the same memory has done so on this machine.

    Jobs of a sweep differ in beta, loss and seed, which need none. `memory_told` says what to type where the device's
    memory does not hold them.
    """
    if sharding(trainer):
        log.info("preflight: no rehearsal, what is put in parts cannot be put back: watch the first two steps")
        return
    longest, length = longest_row(trainer.train_dataset)
    args, keys = trainer.args, ("optim", "activation_checkpointing", "per_device_train_batch_size", "world_size")
    needs = [dataclasses.asdict(run), stage, length, device_memory(), [getattr(args, key) for key in keys]]
    needs[0] = {key: needs[0][key] for key in ("model", "lora", "quantization", "precision", "reference")}
    digest = hashlib.sha256(json.dumps(needs, sort_keys=True).encode()).hexdigest()
    place = Path(run.root) / ".cache" / "rehearsed" / f"{digest}.json"
    known = on_main_process(lambda: read_json(place))
    if known is None:
        run_trial_steps(trainer, longest, stage)
        name, size = device_memory()
        known = {"peak": f"{gigabytes(peak_memory())} of {gigabytes(size)} ({name})"}
        if is_main_process():
            write_json(place, known)
    log.info("preflight: the longest batch, %d tokens a row, makes two steps: peak %s", length, known["peak"])


def run_trial_steps(trainer: Any, longest: Any, stage: str) -> None:
    """Make two whole steps of copies of the one row `longest` at learning rate 0, and put everything back as it was.

    Two, since the optimizer's memory exists only after the first.
    """
    # Whole, since a second train() would else find a model that is prepared, and leave out its autocast.
    held = [(vars(one), dict(vars(one))) for one in (trainer, trainer.model)]
    args, scaler = trainer.args, trainer.accelerator.scaler
    accumulated = min(2, args.gradient_accumulation_steps)  # gradients lie there while the second batch goes forward
    copies = args.per_device_train_batch_size * args.world_size * accumulated * 2
    scale = scaler.state_dict() if scaler is not None else None
    try:
        with random_state_kept():
            # Before the reference pass the rows have no log-probs of it yet.
            cached = stage == "dpo" and args.precompute_ref_log_probs
            row = with_columns(longest, compute_reference_logps(trainer, longest)) if cached else longest
            trainer.train_dataset = row.select([0] * copies)
            trainer.args = copy.copy(args)
            off = dict.fromkeys(("logging_strategy", "eval_strategy", "save_strategy"), IntervalStrategy.NO)
            off |= {"eval_on_start": False, "logging_first_step": False, "load_best_model_at_end": False}
            # Other schedules divide by the rate.
            flat = {"lr_scheduler_type": SchedulerType.CONSTANT, "lr_scheduler_kwargs": {}}
            two = {"num_train_epochs": 1, "max_steps": -1, "gradient_accumulation_steps": accumulated}
            for key, value in {**off, **two, "learning_rate": 0.0, "warmup_steps": 0, **flat}.items():
                setattr(trainer.args, key, value)
            if scale:
                scaler.load_state_dict({**scale, "scale": 1.0})  # no overflow: a skipped step makes no optimizer state
            trainer.callback_handler = CallbackHandler(
                [DefaultFlowCallback()], trainer.model, trainer.processing_class, None, None
            )
            trainer.train()
    finally:
        trainer.model.zero_grad()
        trainer.accelerator.free_memory()
        for live, was in held:
            live.clear()
            live.update(was)
        if scale:
            scaler.load_state_dict(scale)
        if device() == "cuda":
            torch.cuda.empty_cache()


def longest_row(rows: Any) -> tuple[Any, int]:
    """The row of a trainer's table that pads a batch to most tokens, and how many."""
    if "input_ids" in rows.column_names:
        lengths = [len(ids) for ids in rows["input_ids"]]
    else:
        columns = (rows[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
        lengths = [len(p) + max(len(c), len(r)) for p, c, r in zip(*columns, strict=True)]
    at = max(range(len(lengths)), key=lengths.__getitem__)
    return rows.select([at]), lengths[at]


@contextlib.contextmanager
def explain_oom(run: Run, stage: str) -> Iterator[None]:
    """Raise PipelineError with cheaper settings where the device's memory does not suffice for what is done."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(NO_MEMORY, str(error)):
            raise
        raise OneRankError(out_of_memory(run, stage)) from error


def out_of_memory(run: Run, stage: str) -> str:
    """What was needed, what there is, and cheaper settings to type, the cheapest in speed first."""
    (name, size), micro, cheaper = device_memory(), run.batch.micro_size, []
    if stage == "dpo" and run.reference.mode == "frozen":
        cheaper.append("reference=cached (no second model; no slower)")
    if micro > 1:
        fitting = (n for n in range(micro // 2, 0, -1) if run.batch.global_size % (n * processes()) == 0)
        cheaper.append(f"batch.micro_size={next(fitting, 1)} (a little slower)")
    if not getattr(run, stage)["activation_checkpointing"]:
        cheaper.append(f"{stage}.activation_checkpointing=true (same result, a fifth slower)")
    same_sft = f" sft_variant={run.sft_variant}" if stage == "dpo" and run.policy == "sft" else ""
    if run.lora is None:
        if device() == "cuda" and "8bit" not in getattr(run, stage)["optim"]:
            cheaper.append(f"{stage}.optim=paged_adamw_8bit (a quarter of the optimizer's memory)")
        cheaper.append(f"lora=r16{same_sft} (trains an adapter)")
    elif run.quantization is None:
        cheaper.append(f"quantization=nf4{same_sft} (the base in 4 bits)")
    cheaper.append(f"length.max={(run.length.max or 512) // 2} (drops what is longer)")
    return (
        f"out of memory: {micro} rows at once reached {gigabytes(peak_memory())} of {gigabytes(size)} ({name}). Add "
        f"one of these, the first costs least: {'; '.join(cheaper)}"
    )
