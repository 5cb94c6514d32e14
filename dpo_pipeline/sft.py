"""Fine-tune the base model on the answers to imitate: `python -m dpo_pipeline.sft key=value ...`."""

import logging
from pathlib import Path

from dpo_pipeline import runs
from dpo_pipeline.config import Run, main

log = logging.getLogger("dpo_pipeline.sft")  # __name__ is __main__ when run as a command


def run_sft(run: Run) -> Path:
    """Train the SFT policy of a run, or find it trained; its folder, with `final/` in it."""
    folder, mine = run.sft_folder, runs.identity(run, "sft")
    if runs.decide(folder, mine, run.overwrite) == "done":
        print(f"already done: {folder}")
        return folder
    with runs.recording(run, "sft", folder, mine) as record:
        from dpo_pipeline.policies import load_policy, load_tokenizer
        from dpo_pipeline.training import callbacks, start, trainer
        from dpo_pipeline.training.arguments import training_arguments, weights_dtype

        args, dtype = training_arguments(run, "sft", folder), weights_dtype(run)
        rows = start.load_rows(run, "sft")
        start.prepare_base(run)
        tokenizer = load_tokenizer(run.model)
        rows = start.tokenized(run, "sft", tokenizer, rows, "train", "validation")
        start.limit_steps(run, args, len(rows["train"]))
        policy = load_policy(run.model.path, run.model, dtype, trainable=True)
        sft = trainer.build_sft(policy, start.new_adapter(run), tokenizer, args, rows)
        record.save_manifest(**start.facts(sft, rows, run.model.path))
        log.info("SFT of %s on %d answers -> %s", run.model.path, len(rows["train"]), folder)
        trainer.train(sft, folder, [callbacks.ValidationPerplexity(sft), callbacks.Metrics(record)])
        record.save_manifest(peak_memory_bytes=runs.peak_memory())
        record.save_manifest(final=trainer.save_final(sft, tokenizer, folder, run.model, dtype))
    return folder


if __name__ == "__main__":
    main(run_sft)
