"""Fine-tune the base model on the completions to imitate.

python -m dpo_pipeline.sft model=gpt2 dataset=hh_rlhf          on one GPU, or on none
make sft ARGS="model=gpt2 dataset=hh_rlhf" GPUS=4              on four
"""

import logging
from pathlib import Path
from typing import Any

from dpo_pipeline.cli import main
from dpo_pipeline.record import RunRecord
from dpo_pipeline.run_folder import open_run
from dpo_pipeline.schema import Run

log = logging.getLogger("dpo_pipeline.sft")  # __name__ is __main__ when run as a command


def run_sft(run: Run) -> Path:
    """Train the SFT policy of a run, or find it trained; its folder, with `final/` in it.

    With `check` it stops before weights are loaded.
    """
    from dpo_pipeline.base_model import base_model
    from dpo_pipeline.data.prepare import prepare
    from dpo_pipeline.training.arguments import training_arguments
    from dpo_pipeline.training.before_loading import check_before_loading
    from dpo_pipeline.training.starting_policy import resolve_starting_policy

    with open_run(run, "sft") as record:
        if record.decision == "done":
            return record.folder
        with base_model(run) as run:
            args = training_arguments(run, "sft", record.folder)
            start = resolve_starting_policy(run, "sft")
            data = prepare(run, "sft")
            check_before_loading(run, data, start, args, record)
            if not run.check:
                train_sft(run, record, args, start, data)
    return record.folder


def train_sft(run: Run, record: RunRecord, args: Any, start: Any, data: Any) -> None:
    """Train from the base model to `final/`, with everything that must hold checked before step 1."""
    from trl import SFTTrainer

    from dpo_pipeline.hardware import peak_memory
    from dpo_pipeline.training import trainer
    from dpo_pipeline.training.callbacks import Metrics, ValidationPerplexity
    from dpo_pipeline.training.guards import NumericalGuard
    from dpo_pipeline.training.memory import explain_oom
    from dpo_pipeline.training.preflight import check_sft
    from dpo_pipeline.training.saving import save_final
    from dpo_pipeline.training.starting_policy import load_start
    from dpo_pipeline.training.tracking import track

    tables, options = data.tables, data.load_options
    with explain_oom(run, "sft", data):
        sft = trainer.make_trainer(
            SFTTrainer,
            model=load_start(run, start),
            args=args,
            train_dataset=trainer.label_completions(tables["train"], data.all_turns),
            eval_dataset=trainer.label_completions(tables["validation"], data.all_turns),
            processing_class=data.tokenizer,
            peft_config=start.lora,
        )
        log.info("SFT of %s on %d completions -> %s", run.model.path, len(tables["train"]), record.folder)
        record.save_manifest(**trainer.manifest_facts(sft, data, start))
        fingerprint = check_sft(sft, run, data)
        with track(run, record, sft):
            trainer.train(sft, record.folder, [ValidationPerplexity(sft), Metrics(record), NumericalGuard(sft)])
        record.save_manifest(peak_memory_bytes=peak_memory())
        record.save_manifest(final=save_final(sft, data.tokenizer, record.folder, options, fingerprint))


if __name__ == "__main__":
    main(run_sft)
