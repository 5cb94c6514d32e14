"""Fine-tune the base model on the answers to imitate: `python -m dpo_pipeline.sft key=value ...`."""

import logging
from pathlib import Path

from dpo_pipeline import locks, runs
from dpo_pipeline.config import Run, main
from dpo_pipeline.machine import check_device, gigabytes, is_main_process, peak_memory, together
from dpo_pipeline.tracking import tracked

log = logging.getLogger("dpo_pipeline.sft")  # __name__ is __main__ when run as a command


def run_sft(run: Run) -> Path:
    """Train the SFT policy of a run, or find it trained; its folder, with `final/` in it."""
    folder = run.sft_folder
    if run.check:
        check_run(run, folder)
        return folder
    with locks.held(folder):
        return train(run, folder)


def train(run: Run, folder: Path) -> Path:
    """What `run_sft` does in a folder that is this process's own."""
    mine, decision = together(lambda: runs.claim(run, "sft", folder))
    if decision == "done":
        if is_main_process():
            print(f"already done: {folder}")
        return folder
    with runs.recording(run, "sft", folder, mine) as record:
        from dpo_pipeline.policies import load_tokenizer
        from dpo_pipeline.training import callbacks, guards, handoff, preflight, room, start, trainer
        from dpo_pipeline.training.arguments import training_arguments

        check_device("dpo_pipeline.sft")
        args, loading = training_arguments(run, "sft", folder), handoff.loading(run)
        preflight.check_rate(run, "sft")
        start.prepare_base(run)
        tokenizer, begin = load_tokenizer(run.model), handoff.sft_start(run)
        rows, account = start.made_once(run, lambda: start.prepared(run, "sft", tokenizer, "train", "validation"))
        start.limit_steps(run, args, len(rows["train"]))
        room.check_room(run, "sft", folder, begin)
        with preflight.memory_told(run, "sft"):
            policy = handoff.load_start(run, begin)
            sft = trainer.build_sft(policy, begin.lora, tokenizer, args, rows)
            record.save_manifest(**start.facts(sft, rows, account, run.model.path, loading))
            log.info("SFT of %s on %d answers -> %s", run.model.path, len(rows["train"]), folder)
            ends, lengths = start.ends_and_lengths(run, tokenizer)
            cut = lengths.answer == "cut"
            preflight.check_policy(sft, ends, tokenizer.bos_token_id, rows["train"], cut)
            probe = preflight.probe(sft)
            preflight.rehearse(sft, run, "sft")
            watch = [callbacks.ValidationPerplexity(sft), callbacks.Metrics(record), guards.Guards(sft)]
            with tracked(run, folder):
                trainer.train(sft, folder, watch)
            record.save_manifest(peak_memory_bytes=peak_memory())
            record.save_manifest(final=trainer.save_final(sft, tokenizer, folder, loading, probe))
    return folder


def check_run(run: Run, folder: Path) -> None:
    """Raise PipelineError for whatever would keep this SFT from training; loads no weights and leaves nothing."""
    from dpo_pipeline.policies import load_tokenizer
    from dpo_pipeline.training import fetch, handoff, preflight, room, start
    from dpo_pipeline.training.arguments import training_arguments

    with runs.logged(None), fetch.base_at_hand(run) as run:
        training_arguments(run, "sft", folder)
        preflight.check_rate(run, "sft")
        decision = runs.decide(folder, runs.identity(run, "sft"), run.overwrite)
        tokenizer = load_tokenizer(run.model)
        rows, _ = start.prepared(run, "sft", tokenizer, "train", "validation")
        ends, lengths = start.ends_and_lengths(run, tokenizer)
        preflight.check_rows(rows["train"], ends, tokenizer.bos_token_id, lengths.answer == "cut")
        needed, free = room.check_room(run, "sft", folder, handoff.sft_start(run))
        log.info(
            "check: SFT of %s on %d answers -> %s (%s); writes up to %s of %s free",
            *(run.model.path, len(rows["train"]), folder, decision, gigabytes(needed), gigabytes(free)),
        )


if __name__ == "__main__":
    main(run_sft)
