"""Align a policy with preference pairs and show what changed.

python -m dpo_pipeline.dpo model=gpt2 dataset=hh_rlhf beta=0.3                on one GPU, or on none
make dpo ARGS="model=gpt2 dataset=hh_rlhf beta=0.3" GPUS=4                    on four
python -m dpo_pipeline.dpo -m model=gpt2 dataset=hh_rlhf beta=0.05,0.1,0.3    a sweep
"""

import logging
import time
from typing import Any

from dpo_pipeline.cli import main
from dpo_pipeline.record import RunRecord
from dpo_pipeline.run_folder import open_run
from dpo_pipeline.schema import Run

log = logging.getLogger("dpo_pipeline.dpo")  # __name__ is __main__ when run as a command


def run_dpo(run: Run) -> dict[str, Any]:
    """Train the DPO policy of a run, or find it trained, and compare it with base and SFT; the results of its name.

    With `check` it stops before weights are loaded, and returns nothing.
    """
    started = time.monotonic()  # with the imports
    from dpo_pipeline.base_model import base_model
    from dpo_pipeline.data.prepare import prepare
    from dpo_pipeline.distributed import on_main_process
    from dpo_pipeline.evaluation.compare import compare_policies
    from dpo_pipeline.evaluation.eval_set import make_eval_sets
    from dpo_pipeline.judges.build import build_judges
    from dpo_pipeline.report.build import report_or_warn
    from dpo_pipeline.training.arguments import training_arguments
    from dpo_pipeline.training.before_loading import check_before_loading
    from dpo_pipeline.training.pair_weights import check_weights
    from dpo_pipeline.training.starting_policy import resolve_starting_policy

    with open_run(run, "dpo") as record, base_model(run) as run:
        record.started = started
        with record.timed("data"):
            args = training_arguments(run, "dpo", record.folder)
            start = resolve_starting_policy(run, "dpo")
            data = prepare(run, "dpo")
            judges = build_judges(run, data.load_options)
            eval_sets = on_main_process(lambda: make_eval_sets(run, data))
        if record.decision != "done":
            check_weights(run, data.tables["train"])
            check_before_loading(run, data, start, args, record)
            if run.check:
                return {}
            train_dpo(run, record, args, start, data, eval_sets["tracker"], judges)
        with record.timed("comparison"):
            results = compare_policies(run, eval_sets, judges)
        record.finish()  # so that the report shows it as done, with its time
        with record.timed("report"):
            on_main_process(lambda: report_or_warn(run, subject=f"dpo/{record.folder.name}"))
        if record.decision != "done":
            record.log_seconds()
        return results


def train_dpo(run: Run, record: RunRecord, args: Any, start: Any, data: Any, tracker_set: Any, judges: dict) -> None:
    """Train from the starting policy to `final/`, with everything that must hold checked before step 1."""
    from dpo_pipeline.content_hash import weights_hash
    from dpo_pipeline.distributed import on_main_process
    from dpo_pipeline.hardware import peak_memory
    from dpo_pipeline.training import callbacks, memory, preflight, reference, reward_kl, saving, tracking, trainer
    from dpo_pipeline.training.guards import NumericalGuard
    from dpo_pipeline.training.pair_trainer import PairTrainer
    from dpo_pipeline.training.starting_policy import load_reference, load_start

    with memory.explain_oom(run, "dpo", data):
        with record.timed("model and trainer"):
            dpo = trainer.make_trainer(
                PairTrainer,
                model=load_start(run, start),
                ref_model=load_reference(run, start),
                args=args,
                train_dataset=data.tables["train"],
                eval_dataset=data.tables["validation"],
                processing_class=data.tokenizer,
                peft_config=start.lora,
            )
        log.info("DPO of %s on %d pairs, beta %g -> %s", start, len(data.tables["train"]), run.beta, record.folder)
        reference_weights = run.reference.path or start.weights
        reference_name = f"{run.reference.path or start.source} ({run.reference.mode})"
        record.save_manifest(**trainer.manifest_facts(dpo, data, start), handoff=str(start), reference=reference_name)
        with record.timed("preflight"):
            fingerprint = preflight.check_dpo(dpo, run, data, start, record)
        if args.precompute_ref_log_probs:
            with record.timed("reference pass"):
                digest = on_main_process(lambda: weights_hash(reference_weights, run.model.revision))
                reference.add_reference_logps(dpo, reference.reference_key(digest, data.load_options, args))
        tracker = reward_kl.RewardKLTracker(dpo, run, record, tracker_set, judges, reference_weights)
        dpo.evaluate = record.timed("validation")(dpo.evaluate)
        dpo._save_checkpoint = record.timed("saving")(dpo._save_checkpoint)
        with tracking.track(run, record, dpo), record.timed("training"):
            trainer.train(dpo, record.folder, [callbacks.Metrics(record), tracker, NumericalGuard(dpo)])
        record.save_manifest(peak_memory_bytes=peak_memory())
        with record.timed("saving"):
            final = saving.save_final(dpo, data.tokenizer, record.folder, data.load_options, fingerprint)
        record.save_manifest(final=final)


if __name__ == "__main__":
    main(run_dpo)
