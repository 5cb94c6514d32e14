"""Align a policy with preference pairs and show what changed: `python -m dpo_pipeline.dpo key=value ...`."""

import logging
from pathlib import Path
from typing import Any

from dpo_pipeline import locks, run_folder
from dpo_pipeline.config import Run, main
from dpo_pipeline.distributed import on_main_process
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.hardware import check_device, gigabytes, peak_memory
from dpo_pipeline.tracking import tracked

log = logging.getLogger("dpo_pipeline.dpo")  # __name__ is __main__ when run as a command


def run_dpo(run: Run) -> dict[str, Any]:
    """Train the DPO policy of a run, or find it trained, and compare it with base and SFT; the name's results."""
    folder = run.dpo_folder
    if run.check:
        check_run(run, folder)
        return {}
    with locks.run_lock(folder):
        return train_and_compare(run, folder)


def train_and_compare(run: Run, folder: Path) -> dict[str, Any]:
    """What `run_dpo` does in a folder that is this process's own."""
    mine, decision = on_main_process(lambda: claim(run))
    if decision == "done":
        from dpo_pipeline.models import load_tokenizer

        with run_folder.run_logging(folder / "train.log"):
            log.info("already done: %s", folder)
            tokenizer = load_tokenizer(run.model)
            return compare_policies(run, on_main_process(lambda: prepare_dpo(run, tokenizer)[1][1]))
    with run_folder.recorded_run(run, "dpo", folder, mine) as record:
        from dpo_pipeline.data import prepare
        from dpo_pipeline.judges.build import build_judges
        from dpo_pipeline.training import disk_space, preflight, reference, starting_policy, trainer
        from dpo_pipeline.training.arguments import training_arguments

        check_device("dpo_pipeline.dpo")
        args, loading = training_arguments(run, "dpo", folder), starting_policy.load_options(run)
        judges = build_judges(run, loading)
        preflight.check_rate(run, "dpo")
        prepare.prepare_base(run)
        begin = starting_policy.dpo_start(run)
        tokenizer = starting_policy.tokenizer_of(run, begin.source)
        rows, (data_report, on) = prepare.on_main_process_shared(run, lambda: prepare_dpo(run, tokenizer))
        prepare.limit_steps(run, args, len(rows["train"]))
        disk_space.check_disk_space(run, "dpo", folder, begin)
        with preflight.explain_oom(run, "dpo"):
            policy, second = starting_policy.load_start(run, begin), starting_policy.second_model(run, begin)
            log.info("DPO of %s on %d pairs, beta %g -> %s", begin, len(rows["train"]), run.beta, folder)
            dpo = trainer.build_dpo(policy, second, begin.lora, tokenizer, args, rows)
            told = f"{run.reference.path or begin.source} ({run.reference.mode})"
            weights = run.reference.path or begin.weights
            record.save_manifest(
                **prepare.manifest_facts(dpo, rows, data_report, begin.source, loading),
                handoff=str(begin),
                reference=told,
            )
            eos_ids, lengths = prepare.ends_and_lengths(run, tokenizer)
            cut = lengths.completion == "cut"
            batch = preflight.check_policy(dpo, eos_ids, tokenizer.bos_token_id, rows["train"], cut)
            if begin.adapter and not begin.into:
                preflight.check_adapter(dpo, begin.source)
            if run.policy == "sft":
                sft = run_folder.finished_sft(run)
                rounded = begin.into and (run.quantization is not None or loading.dtype.itemsize < 4)
                exact = sft["loading"] == record.manifest["loading"] and not rounded
                preflight.check_start(dpo, sft["final"]["probe"], exact, begin.source)
            preflight.check_reference(dpo, batch, begin.source, run.reference.path)
            probe = preflight.policy_fingerprint(dpo)
            preflight.check_memory(dpo, run, "dpo")
            if args.precompute_ref_log_probs:
                prints = record.manifest["data_fingerprint"]
                place = on_main_process(lambda: reference.cache_path(run, weights, loading, prints, args))
                reference.add_reference_logps(dpo, place, preflight.padding_tolerance)
                if run.reference.path is None:
                    preflight.check_cache(dpo, begin.source)
            del policy, second
            with tracked(run, folder):
                trainer.train(dpo, folder, watchers(run, record, dpo, on["tracker"], weights, judges))
            record.save_manifest(peak_memory_bytes=peak_memory())
            record.save_manifest(final=trainer.save_final(dpo, tokenizer, folder, loading, probe))
        del dpo
        return compare_policies(run, on)


def claim(run: Run) -> tuple[dict[str, Any], str]:
    """The identity of this DPO and what is to be done with its folder, once its SFT is found to fit."""
    if run.policy == "sft":
        check_sft(run)
    return run_folder.claim(run, "dpo", run.dpo_folder)


def prepare_dpo(run: Run, tokenizer: Any) -> tuple[dict[str, Any], Any]:
    """Train and validation pairs as token ids, with their account and what the policies will be measured on.

    That is a Material for each file of results: the tables are of test rows; what chooses between runs, or watches
    over one (`tracker`), reads validation. Raises PipelineError where there are no test rows.
    """
    from dpo_pipeline.data import prepare
    from dpo_pipeline.evaluation.eval_set import make_eval_set

    how = prepare.eval_settings(run, tokenizer)
    tables, data_report, rows = prepare.prepare_tables_with_rows(run, "dpo", tokenizer, "train", "validation", "test")
    if not len(tables["test"]):
        raise PipelineError("there are no test rows to measure on: raise dataset.test_rows")
    files = {"eval.json": "test", "validation.json": "validation"}
    on = {file: make_eval_set(tables[split], rows[split], **how) for file, split in files.items()}
    count = run.evaluation.tracker_prompts
    asked = {**how, "pairs": len(tables["validation"]), "prompts": min(count, 8) if run.debug else count}
    on["tracker"] = make_eval_set(tables["validation"], rows["validation"], **asked)
    del tables["test"]
    return tables, (data_report, on)


def watchers(run: Run, record: Any, dpo: Any, eval_set: Any, weights: str | Path, judges: dict[str, Any]) -> list[Any]:
    """What looks on while DPO trains: the log, the reward-KL tracker with its guard, and what must hold at any time.

    `on` are the validation prompts to complete, `weights` those of the reference.
    """
    from dpo_pipeline.training import callbacks, guards, overoptimization, tracker

    kl = tracker.RewardKLTracker(dpo, run, record.folder, eval_set, judges, weights)
    return [
        callbacks.Metrics(record, run.beta), kl, overoptimization.OveroptimizationMonitor(run, record, kl.points),
        guards.NumericalGuard(dpo)
    ]  # fmt: skip


def check_run(run: Run, folder: Path) -> None:
    """Raise PipelineError for whatever would keep this DPO from training; loads no weights and leaves nothing.

    Where its SFT is still to come, what the same config would make stands for it.
    """
    from dpo_pipeline.data import prepare
    from dpo_pipeline.judges.build import build_judges
    from dpo_pipeline.models import load_tokenizer
    from dpo_pipeline.training import disk_space, fetch, preflight, starting_policy
    from dpo_pipeline.training.arguments import training_arguments

    with run_folder.run_logging(None), fetch.with_base_model(run) as run:
        training_arguments(run, "dpo", folder)
        preflight.check_rate(run, "dpo")
        to_come = run.policy == "sft" and run_folder.run_state(run.sft_folder) != "done"
        if run.policy == "sft" and not to_come:
            check_sft(run)
        mine = run_folder.identity(run, "dpo")
        decision = run_folder.decide(folder, mine, run.overwrite) if not to_come else "its SFT is still to come"
        begin = starting_policy.planned_sft(run) if to_come else starting_policy.dpo_start(run)
        tokenizer = load_tokenizer(run.model) if to_come else starting_policy.tokenizer_of(run, begin.source)
        rows, _ = prepare_dpo(run, tokenizer)
        eos_ids, lengths = prepare.ends_and_lengths(run, tokenizer)
        preflight.check_rows(rows["train"], eos_ids, tokenizer.bos_token_id, lengths.completion == "cut")
        build_judges(run, starting_policy.load_options(run))
        needed, free = disk_space.check_disk_space(run, "dpo", folder, begin)
        log.info(
            "check: DPO of %s on %d pairs -> %s (%s); writes up to %s of %s free",
            *(begin, len(rows["train"]), folder, decision, gigabytes(needed), gigabytes(free)),
        )


def check_sft(run: Run) -> None:
    """Say where the SFT was made with other settings; raise PipelineError for another base model."""
    theirs, mine = run_folder.finished_sft(run)["identity"], run_folder.identity(run, "sft")
    # Another adapter is a hand-off, which DPO tells of itself.
    given = [key for key in {**theirs, **mine} if not key.startswith(("lora", "quantization"))]
    differing = sorted(key for key in given if theirs.get(key) != mine.get(key))
    listed = "; ".join(f"{key} was {theirs.get(key)}, is {mine.get(key)} here" for key in differing)
    if any(key.startswith(("model.path", "model.builder", "model.revision")) for key in differing):
        raise PipelineError(f"{run.sft_folder} was trained from another base model ({listed}): give the same model=")
    if differing:
        print(f"note: the SFT in {run.sft_folder} was made with other settings: {listed}")


def compare_policies(run: Run, eval_sets: Any) -> dict[str, Any]:
    """Measure what is not measured yet of base, SFT and this DPO, print the tables, and give the name's results."""
    from dpo_pipeline.evaluation import compare, policies_to_compare, tables
    from dpo_pipeline.judges.build import build_judges
    from dpo_pipeline.training import starting_policy

    mine = policies_to_compare.dpo_with_references(run.dpo_folder, run)
    policies = policies_to_compare.unique_by_name([*mine, policies_to_compare.base_policy(run, None)])
    judges = {
        name: judge
        for name, judge in build_judges(run, starting_policy.load_options(run)).items()
        if judge.score and not judge.post_training_only
    }
    compare.measure_and_write(policies, "base", eval_sets["eval.json"], "eval.json", judges, run.verdicts)
    compare.measure_and_write(mine, None, eval_sets["validation.json"], "validation.json", judges, run.verdicts)

    def print_comparison() -> dict[str, Any]:
        with locks.file_lock(run.home / "results.json"):
            results = compare.write_name_results(run.home)
        names = [policy.name for policy in reversed(policies) if policy.shown]
        measured = results["policies"][policies[0].name]
        for block in (
            tables.caption(measured, "the base model"),
            tables.comparison(results["policies"], names, "base"),
            tables.caption(measured, f"DPO's own reference, {policies[0].reference}"),
            tables.comparison(results["policies"], [policies[0].name], "reference", with_own=False),
            tables.side_by_side(run_folder.read_json(run.home / "generation_samples.json"), names),
            f"Results: {run.home}/results.json, generation_samples.json\nPolicy:  {policies[0].path}",
        ):
            log.info("\n%s", block)
        return results

    return on_main_process(print_comparison)


if __name__ == "__main__":
    main(run_dpo)
