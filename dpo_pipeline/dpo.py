"""Align a policy with preference pairs and show what changed: `python -m dpo_pipeline.dpo key=value ...`."""

import logging
from pathlib import Path
from typing import Any

from dpo_pipeline import locks, runs
from dpo_pipeline.config import Run, main
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.machine import check_device, gigabytes, peak_memory, together
from dpo_pipeline.tracking import tracked

log = logging.getLogger("dpo_pipeline.dpo")  # __name__ is __main__ when run as a command


def run_dpo(run: Run) -> dict[str, Any]:
    """Train the DPO policy of a run, or find it trained, and compare it with base and SFT; the name's results."""
    folder = run.dpo_folder
    if run.check:
        check_run(run, folder)
        return {}
    with locks.held(folder):
        return train_and_compare(run, folder)


def train_and_compare(run: Run, folder: Path) -> dict[str, Any]:
    """What `run_dpo` does in a folder that is this process's own."""
    mine, decision = together(lambda: claim(run))
    if decision == "done":
        from dpo_pipeline.policies import load_tokenizer

        with runs.logged(folder / "train.log"):
            log.info("already done: %s", folder)
            tokenizer = load_tokenizer(run.model)
            return compare_policies(run, together(lambda: prepared(run, tokenizer)[1][1]))
    with runs.recording(run, "dpo", folder, mine) as record:
        from dpo_pipeline.judges.built import built
        from dpo_pipeline.training import handoff, preflight, reference, room, start, trainer
        from dpo_pipeline.training.arguments import training_arguments

        check_device("dpo_pipeline.dpo")
        args, loading = training_arguments(run, "dpo", folder), handoff.loading(run)
        judges = built(run, loading)
        preflight.check_rate(run, "dpo")
        start.prepare_base(run)
        begin = handoff.dpo_start(run)
        tokenizer = handoff.tokenizer_of(run, begin.source)
        rows, (account, on) = start.made_once(run, lambda: prepared(run, tokenizer))
        start.limit_steps(run, args, len(rows["train"]))
        room.check_room(run, "dpo", folder, begin)
        with preflight.memory_told(run, "dpo"):
            policy, second = handoff.load_start(run, begin), handoff.second_model(run, begin)
            log.info("DPO of %s on %d pairs, beta %g -> %s", begin, len(rows["train"]), run.beta, folder)
            dpo = trainer.build_dpo(policy, second, begin.lora, tokenizer, args, rows)
            told = f"{run.reference.path or begin.source} ({run.reference.mode})"
            weights = run.reference.path or begin.weights
            record.save_manifest(
                **start.facts(dpo, rows, account, begin.source, loading), handoff=str(begin), reference=told
            )
            ends, lengths = start.ends_and_lengths(run, tokenizer)
            cut = lengths.answer == "cut"
            batch = preflight.check_policy(dpo, ends, tokenizer.bos_token_id, rows["train"], cut)
            if begin.adapter and not begin.into:
                preflight.check_adapter(dpo, begin.source)
            if run.policy == "sft":
                sft = runs.finished_sft(run)
                rounded = begin.into and (run.quantization is not None or loading.dtype.itemsize < 4)
                exact = sft["loading"] == record.manifest["loading"] and not rounded
                preflight.check_start(dpo, sft["final"]["probe"], exact, begin.source)
            preflight.check_reference(dpo, batch, begin.source, run.reference.path)
            probe = preflight.probe(dpo)
            preflight.rehearse(dpo, run, "dpo")
            if args.precompute_ref_log_probs:
                prints = record.manifest["data_fingerprint"]
                place = together(lambda: reference.place_of(run, weights, loading, prints, args))
                reference.cache(dpo, place, preflight.padded)
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
    return runs.claim(run, "dpo", run.dpo_folder)


def prepared(run: Run, tokenizer: Any) -> tuple[dict[str, Any], Any]:
    """Train and validation pairs as token ids, with their account and what the policies will be measured on.

    That is a Material for each file of results: the tables are of test rows; what chooses between runs, or watches
    over one (`tracker`), reads validation. Raises PipelineError where there are no test rows.
    """
    from dpo_pipeline.evaluation.material import material
    from dpo_pipeline.training import start

    how = start.measuring(run, tokenizer)
    tables, account, rows = start.prepared_with_rows(run, "dpo", tokenizer, "train", "validation", "test")
    if not len(tables["test"]):
        raise PipelineError("there are no test rows to measure on: raise dataset.test_rows")
    files = {"eval.json": "test", "validation.json": "validation"}
    on = {file: material(tables[split], rows[split], **how) for file, split in files.items()}
    count = run.evaluation.tracker_prompts
    asked = {**how, "pairs": len(tables["validation"]), "prompts": min(count, 8) if run.debug else count}
    on["tracker"] = material(tables["validation"], rows["validation"], **asked)
    del tables["test"]
    return tables, (account, on)


def watchers(run: Run, record: Any, dpo: Any, on: Any, weights: str | Path, judges: dict[str, Any]) -> list[Any]:
    """What looks on while DPO trains: the log, the reward-KL tracker with its guard, and what must hold at any time.

    `on` are the validation prompts to answer, `weights` those of the reference.
    """
    from dpo_pipeline.training import callbacks, guards, tracker, watch

    kl = tracker.Tracker(dpo, run, record.folder, on, judges, weights)
    return [
        callbacks.Metrics(record, run.beta), kl, watch.Watch(run, record, kl.points), guards.Guards(dpo)
    ]  # fmt: skip


def check_run(run: Run, folder: Path) -> None:
    """Raise PipelineError for whatever would keep this DPO from training; loads no weights and leaves nothing.

    Where its SFT is still to come, what the same config would make stands for it.
    """
    from dpo_pipeline.judges.built import built
    from dpo_pipeline.policies import load_tokenizer
    from dpo_pipeline.training import fetch, handoff, preflight, room, start
    from dpo_pipeline.training.arguments import training_arguments

    with runs.logged(None), fetch.base_at_hand(run) as run:
        training_arguments(run, "dpo", folder)
        preflight.check_rate(run, "dpo")
        to_come = run.policy == "sft" and runs.state(run.sft_folder) != "done"
        if run.policy == "sft" and not to_come:
            check_sft(run)
        mine = runs.identity(run, "dpo")
        decision = runs.decide(folder, mine, run.overwrite) if not to_come else "its SFT is still to come"
        begin = handoff.sft_to_come(run) if to_come else handoff.dpo_start(run)
        tokenizer = load_tokenizer(run.model) if to_come else handoff.tokenizer_of(run, begin.source)
        rows, _ = prepared(run, tokenizer)
        ends, lengths = start.ends_and_lengths(run, tokenizer)
        preflight.check_rows(rows["train"], ends, tokenizer.bos_token_id, lengths.answer == "cut")
        built(run, handoff.loading(run))
        needed, free = room.check_room(run, "dpo", folder, begin)
        log.info(
            "check: DPO of %s on %d pairs -> %s (%s); writes up to %s of %s free",
            *(begin, len(rows["train"]), folder, decision, gigabytes(needed), gigabytes(free)),
        )


def check_sft(run: Run) -> None:
    """Say where the SFT was made with other settings; raise PipelineError for another base model."""
    theirs, mine = runs.finished_sft(run)["identity"], runs.identity(run, "sft")
    # Another adapter is a hand-off, which DPO tells of itself.
    given = [key for key in {**theirs, **mine} if not key.startswith(("lora", "quantization"))]
    differing = sorted(key for key in given if theirs.get(key) != mine.get(key))
    listed = "; ".join(f"{key} was {theirs.get(key)}, is {mine.get(key)} here" for key in differing)
    if any(key.startswith(("model.path", "model.builder", "model.revision")) for key in differing):
        raise PipelineError(f"{run.sft_folder} was trained from another base model ({listed}): give the same model=")
    if differing:
        print(f"note: the SFT in {run.sft_folder} was made with other settings: {listed}")


def compare_policies(run: Run, on: Any) -> dict[str, Any]:
    """Measure what is not measured yet of base, SFT and this DPO, print the tables, and give the name's results."""
    from dpo_pipeline.evaluation import compare, line_up, tables
    from dpo_pipeline.judges.built import built
    from dpo_pipeline.training import handoff

    mine = line_up.of_dpo(run.dpo_folder, run)
    policies = line_up.unique([*mine, line_up.base_policy(run, None)])
    judges = {
        name: judge for name, judge in built(run, handoff.loading(run)).items() if judge.score and not judge.late
    }
    compare.measure(policies, "base", on["eval.json"], "eval.json", judges, run.verdicts)
    compare.measure(mine, None, on["validation.json"], "validation.json", judges, run.verdicts)

    def told() -> dict[str, Any]:
        with locks.alone(run.home / "results.json"):
            results = compare.gather(run.home)
        names = [policy.name for policy in reversed(policies) if policy.shown]
        measured = results["policies"][policies[0].name]
        for block in (
            tables.caption(measured, "the base model"),
            tables.comparison(results["policies"], names, "base"),
            tables.caption(measured, f"DPO's own reference, {policies[0].reference}"),
            tables.comparison(results["policies"], [policies[0].name], "reference", alone=False),
            tables.side_by_side(runs.read_json(run.home / "generation_samples.json"), names),
            f"Results: {run.home}/results.json, generation_samples.json\nPolicy:  {policies[0].path}",
        ):
            log.info("\n%s", block)
        return results

    return together(told)


if __name__ == "__main__":
    main(run_dpo)
