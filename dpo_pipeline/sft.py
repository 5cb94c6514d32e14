"""Fine-tune the base model on the completions to imitate: `python -m dpo_pipeline.sft key=value ...`."""

import logging
from pathlib import Path

from dpo_pipeline import locks, run_folder
from dpo_pipeline.config import Run, main
from dpo_pipeline.distributed import is_main_process, on_main_process
from dpo_pipeline.hardware import check_device, gigabytes, peak_memory
from dpo_pipeline.tracking import tracked

log = logging.getLogger("dpo_pipeline.sft")  # __name__ is __main__ when run as a command


def run_sft(run: Run) -> Path:
    """Train the SFT policy of a run, or find it trained; its folder, with `final/` in it."""
    folder = run.sft_folder
    if run.check:
        check_run(run, folder)
        return folder
    with locks.run_lock(folder):
        return train(run, folder)


def train(run: Run, folder: Path) -> Path:
    """What `run_sft` does in a folder that is this process's own."""
    mine, decision = on_main_process(lambda: run_folder.claim(run, "sft", folder))
    if decision == "done":
        if is_main_process():
            print(f"already done: {folder}")
        return folder
    with run_folder.recorded_run(run, "sft", folder, mine) as record:
        from dpo_pipeline.data import prepare
        from dpo_pipeline.models import load_tokenizer
        from dpo_pipeline.training import callbacks, disk_space, guards, preflight, starting_policy, trainer
        from dpo_pipeline.training.arguments import training_arguments

        check_device("dpo_pipeline.sft")
        args, loading = training_arguments(run, "sft", folder), starting_policy.load_options(run)
        preflight.check_rate(run, "sft")
        prepare.prepare_base(run)
        tokenizer, begin = load_tokenizer(run.model), starting_policy.sft_start(run)
        rows, data_report = prepare.on_main_process_shared(
            run, lambda: prepare.prepare_tables(run, "sft", tokenizer, "train", "validation")
        )
        prepare.limit_steps(run, args, len(rows["train"]))
        disk_space.check_disk_space(run, "sft", folder, begin)
        with preflight.explain_oom(run, "sft"):
            policy = starting_policy.load_start(run, begin)
            sft = trainer.build_sft(policy, begin.lora, tokenizer, args, rows)
            record.save_manifest(**prepare.manifest_facts(sft, rows, data_report, run.model.path, loading))
            log.info("SFT of %s on %d completions -> %s", run.model.path, len(rows["train"]), folder)
            eos_ids, lengths = prepare.ends_and_lengths(run, tokenizer)
            cut = lengths.completion == "cut"
            preflight.check_policy(sft, eos_ids, tokenizer.bos_token_id, rows["train"], cut)
            probe = preflight.policy_fingerprint(sft)
            preflight.check_memory(sft, run, "sft")
            watch = [callbacks.ValidationPerplexity(sft), callbacks.Metrics(record), guards.NumericalGuard(sft)]
            with tracked(run, folder):
                trainer.train(sft, folder, watch)
            record.save_manifest(peak_memory_bytes=peak_memory())
            record.save_manifest(final=trainer.save_final(sft, tokenizer, folder, loading, probe))
    return folder


def check_run(run: Run, folder: Path) -> None:
    """Raise PipelineError for whatever would keep this SFT from training; loads no weights and leaves nothing."""
    from dpo_pipeline.data import prepare
    from dpo_pipeline.models import load_tokenizer
    from dpo_pipeline.training import disk_space, fetch, preflight, starting_policy
    from dpo_pipeline.training.arguments import training_arguments

    with run_folder.run_logging(None), fetch.with_base_model(run) as run:
        training_arguments(run, "sft", folder)
        preflight.check_rate(run, "sft")
        decision = run_folder.decide(folder, run_folder.identity(run, "sft"), run.overwrite)
        tokenizer = load_tokenizer(run.model)
        rows, _ = prepare.prepare_tables(run, "sft", tokenizer, "train", "validation")
        eos_ids, lengths = prepare.ends_and_lengths(run, tokenizer)
        preflight.check_rows(rows["train"], eos_ids, tokenizer.bos_token_id, lengths.completion == "cut")
        needed, free = disk_space.check_disk_space(run, "sft", folder, starting_policy.sft_start(run))
        log.info(
            "check: SFT of %s on %d completions -> %s (%s); writes up to %s of %s free",
            *(run.model.path, len(rows["train"]), folder, decision, gigabytes(needed), gigabytes(free)),
        )


if __name__ == "__main__":
    main(run_sft)
