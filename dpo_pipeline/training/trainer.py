"""TRL's trainers, given our rows: SFT as it is, DPO with the two things it lacks."""

import logging
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from transformers import PrinterCallback, TrainerCallback
from trl import DPOTrainer, SFTTrainer

from dpo_pipeline import runs
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.logprobs import answer_logprobs
from dpo_pipeline.policies import device, load_policy
from dpo_pipeline.training.callbacks import CheckpointOnInterrupt, KeepRandomState

log = logging.getLogger(__name__)


class PairTrainer(DPOTrainer):
    """DPOTrainer on rows that are tokenized already, and whose reference log-probs we compute after it is built.

    TRL would tokenize and cut the rows anew, and compute the log-probs inside `__init__`, before any check.
    """

    def _prepare_dataset(self, dataset, *args):
        return dataset

    def _precompute_ref_logps(self, dataset, *args):
        return dataset


def cache_reference(trainer: PairTrainer) -> None:
    """Give every row its log-probs under the reference, which here is the policy before step 1.

    Sums over the answer's tokens, in nats, by the trainer's own forward, so that a first reward is exactly 0. With a
    continued adapter the reference is TRL's frozen copy of it, which is then let go.
    """
    trainer.train_dataset = with_reference(trainer, trainer.train_dataset, "reference on train")
    trainer.eval_dataset = with_reference(trainer, trainer.eval_dataset, "reference on validation")
    model = trainer.accelerator.unwrap_model(trainer.model)
    if is_peft_model(model) and "ref" in model.peft_config:
        model.delete_adapter("ref")


def with_reference(trainer: PairTrainer, rows: Any, label: str) -> Any:
    """The rows with columns `ref_chosen_logps` and `ref_rejected_logps`."""
    from torch.utils.data import DataLoader
    from tqdm.auto import tqdm

    if not len(rows):
        return rows
    size = trainer.args.per_device_eval_batch_size
    loader = trainer.accelerator.prepare(DataLoader(rows, batch_size=size, collate_fn=trainer.data_collator))
    columns: dict[str, list[float]] = {"ref_chosen_logps": [], "ref_rejected_logps": []}
    for batch in tqdm(loader, desc=label, leave=False, disable=not runs.is_main_process()):
        both = trainer.accelerator.gather_for_metrics(trainer.compute_ref_log_probs(trainer.model, batch))
        for column, values in zip(columns.values(), both, strict=True):
            column.extend(values.tolist())
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows


def build_sft(policy: Any, lora: Any, tokenizer: Any, args: Any, rows: dict[str, Any]) -> SFTTrainer:
    """An SFTTrainer on rows of `prompt_ids` and `answer_ids`; loss on the answer alone."""

    def labelled(row: dict) -> dict:
        prompt, answer = row["prompt_ids"], row["answer_ids"]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    train, validation = (
        rows[split].map(labelled, remove_columns=rows[split].column_names, keep_in_memory=True)
        for split in ("train", "validation")
    )
    return refused(
        SFTTrainer,
        model=policy, args=args, train_dataset=train, eval_dataset=validation, processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip


def build_dpo(policy: Any, reference: Any, lora: Any, tokenizer: Any, args: Any, rows: dict[str, Any]) -> PairTrainer:
    """A DPO trainer on rows of `prompt_ids`, `chosen_ids` and `rejected_ids`, its reference log-probs cached if asked.

    `reference` is a second model, or None for cached log-probs and for the adapter's own reference.
    """
    trainer = refused(
        PairTrainer,
        model=policy, ref_model=reference, args=args, train_dataset=rows["train"], eval_dataset=rows["validation"],
        processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip
    if args.precompute_ref_log_probs:
        cache_reference(trainer)
    return trainer


def refused(trainer: Any, **arguments: Any) -> Any:
    """The trainer of these arguments, or one sentence where TRL refuses them."""
    try:
        return trainer(**arguments)
    except (ValueError, NotImplementedError) as error:
        raise PipelineError(f"TRL refuses this combination: {' '.join(str(error).split())}") from error


def train(trainer: Any, folder: Path, callbacks: list[TrainerCallback]) -> None:
    """Train, from the newest complete checkpoint of `folder` where there is one.

    Raises KeyboardInterrupt, with a checkpoint written, when Ctrl-C came in between.
    """
    interrupt = CheckpointOnInterrupt()
    trainer.remove_callback(PrinterCallback)
    for callback in (*callbacks, KeepRandomState(), interrupt):
        trainer.add_callback(callback)
    checkpoint = runs.newest_checkpoint(folder)
    if checkpoint:
        log.info("resuming from %s", checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if interrupt.interrupted:
        raise KeyboardInterrupt


def save_final(trainer: Any, tokenizer: Any, folder: Path, model: Any, dtype: Any) -> dict[str, Any]:
    """Save what `from_pretrained` loads into `folder/final`, reload it once, and tell its facts for the manifest.

    Raises PipelineError where the reloaded policy does not give the log-probs that training ended with.
    """
    # Without Accelerate's autocast, as anybody loads it.
    policy = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    final, partial = folder / "final", folder / "final.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    # Of an adapter's folder, without the frozen copy that served as its reference.
    policy.save_pretrained(partial, **({"selected_adapters": ["default"]} if is_peft_model(policy) else {}))
    policy.generation_config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    trainer.create_model_card(model_name=folder.name)
    shutil.move(Path(trainer.args.output_dir) / "README.md", partial / "README.md")
    partial.rename(final)
    rows = trainer.train_dataset.select(range(min(4, len(trainer.train_dataset))))
    if "labels" in rows.column_names:
        prompts, answers = [ids[:1] for ids in rows["input_ids"]], [ids[1:] for ids in rows["input_ids"]]
    else:
        prompts, answers = list(rows["prompt_ids"]), list(rows["chosen_ids"])
    trained = answer_logprobs(policy, prompts, answers, 4)
    # Room on the device for the reloaded policy: the trained one has done its part.
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    policy.to("cpu")
    saved = answer_logprobs(load_policy(final, model, dtype).to(device()), prompts, answers, 4)
    worst = max(float((a - b).abs().max()) for a, b in zip(trained, saved, strict=True))
    if worst > (1e-3 if dtype.itemsize == 4 else 0.1):
        raise PipelineError(f"{final} does not load back as it was trained: log-probs differ by {worst:.3g} nats")
    best = trainer.state.best_model_checkpoint
    step = int(best.rsplit("-", 1)[1]) if best else trainer.state.global_step
    if best:
        log.info("final/ is step %d: lowest validation perplexity, %.3f", step, trainer.state.best_metric)
    return {"step": step, "sha256": runs.content_hash(final, runs.WEIGHTS), "reload_difference_nats": worst}
