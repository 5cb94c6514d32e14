"""Align a policy with preference pairs and show what changed: `python -m dpo_pipeline.dpo key=value ...`."""

import logging
from typing import Any

from dpo_pipeline import runs
from dpo_pipeline.config import Run, build, main
from dpo_pipeline.errors import PipelineError

log = logging.getLogger("dpo_pipeline.dpo")  # __name__ is __main__ when run as a command


def run_dpo(run: Run) -> dict[str, Any]:
    """Train the DPO policy of a run, or find it trained, and compare it with base and SFT; the name's results."""
    folder, mine = run.dpo_folder, runs.identity(run, "dpo")
    if run.policy == "sft":
        check_sft(run)
    if runs.decide(folder, mine, run.overwrite) == "done":
        from dpo_pipeline.training import start

        with runs.logged(folder / "train.log"):
            log.info("already done: %s", folder)
            return compare_policies(run, measured_on(run, start.load_rows(run, "dpo")))
    with runs.recording(run, "dpo", folder, mine) as record:
        from dpo_pipeline.policies import load_tokenizer
        from dpo_pipeline.training import callbacks, start, trainer
        from dpo_pipeline.training.arguments import training_arguments, weights_dtype

        args, dtype = training_arguments(run, "dpo", folder), weights_dtype(run)
        rows = start.load_rows(run, "dpo")
        start.prepare_base(run)
        on = measured_on(run, rows)
        starting = run.model.path if run.policy == "base" else run.sft_folder / "final"
        tokenizer = load_tokenizer(run.model, None if run.policy == "base" else starting)
        rows = start.tokenized(run, "dpo", tokenizer, rows, "train", "validation")
        start.limit_steps(run, args, len(rows["train"]))
        policy, reference = start.starting_policy(run), start.frozen_reference(run)
        lora = start.new_adapter(run) if run.policy == "base" else None
        log.info("DPO of %s on %d pairs, beta %g -> %s", starting, len(rows["train"]), run.beta, folder)
        dpo = trainer.build_dpo(policy, reference, lora, tokenizer, args, rows)
        record.save_manifest(**start.facts(dpo, rows, starting), reference=f"{starting} ({run.reference.mode})")
        trainer.train(dpo, folder, [callbacks.Metrics(record, run.beta)])
        record.save_manifest(peak_memory_bytes=runs.peak_memory())
        record.save_manifest(final=trainer.save_final(dpo, tokenizer, folder, run.model, dtype))
        del policy, reference, dpo
        return compare_policies(run, on)


def check_sft(run: Run) -> None:
    """Say where the SFT was made with other settings; raise PipelineError for another base model or adapter."""
    theirs, mine = runs.finished_sft(run)["identity"], runs.identity(run, "sft")
    differing = sorted(key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key))
    listed = "; ".join(f"{key} was {theirs.get(key)}, is {mine.get(key)} here" for key in differing)
    if any(key.startswith(("model.path", "model.builder", "model.revision")) for key in differing):
        raise PipelineError(f"{run.sft_folder} was trained from another base model ({listed}): give the same model=")
    if "lora.r" in theirs and "lora.r" in mine and any(key.startswith("lora.") for key in differing):
        raise PipelineError(f"DPO continues the adapter of {run.sft_folder} as it is ({listed}): give the same lora=")
    if differing:
        print(f"note: the SFT in {run.sft_folder} was made with other settings: {listed}")


def measured_on(run: Run, rows: dict[str, list[dict]]) -> Any:
    """What base, SFT and DPO are measured on: the test rows as token ids, and how; before any training.

    Raises PipelineError where there are no test rows, or no room for a prompt beside an answer.
    """
    from dpo_pipeline.evaluation import compare
    from dpo_pipeline.policies import load_config, load_tokenizer
    from dpo_pipeline.training import start
    from dpo_pipeline.training.arguments import weights_dtype

    settings = run.evaluation
    context = load_config(run.model).get_text_config().max_position_embeddings
    if settings.max_new_tokens > context - 2:
        raise PipelineError(
            f"evaluation.max_new_tokens={settings.max_new_tokens} leaves no room for a prompt in the model's context "
            f"of {context} tokens: lower it"
        )
    if not rows["test"]:
        raise PipelineError("there are no test rows to measure on: raise dataset.test_rows")
    tokenizer = load_tokenizer(run.model)
    return compare.material(
        start.tokenized(run, "dpo", tokenizer, rows, "test")["test"],
        pairs=min(settings.pairs, 100) if run.debug else settings.pairs,
        prompts=min(settings.prompts, 8) if run.debug else settings.prompts,
        context=context, max_new_tokens=settings.max_new_tokens, dataset=run.dataset_name, tokenizer=tokenizer,
        ends=start.ends_and_lengths(run, tokenizer)[0], beta=run.beta, seed=run.dataset["split_seed"],
        model=run.model, dtype=weights_dtype(run), batch_size=run.batch.micro_size,
        judges={name: build(node) for name, node in run.judge.items()},
    )  # fmt: skip


def compare_policies(run: Run, on: Any) -> dict[str, Any]:
    """Measure what is not measured yet of base, SFT and this DPO, print the tables, and give the name's results."""
    from dpo_pipeline.evaluation import compare, tables

    base = compare.Policy("base", run.model.path, run.home / "base")
    sft = compare.Policy(f"sft/{run.sft_variant}", run.sft_folder / "final", run.sft_folder)
    before = [sft, base] if run.policy == "sft" else [base]
    dpo = compare.Policy(f"dpo/{run.variant}", run.dpo_folder / "final", run.dpo_folder, before[0].name)
    compare.measure([dpo, *before], base.name, on)
    results = compare.gather(run.home)
    names = [policy.name for policy in reversed([dpo, *before])]
    measured = results["policies"][dpo.name]
    for block in (
        tables.caption(measured, "the base model"),
        tables.comparison(results, names, "base"),
        tables.caption(measured, f"DPO's own reference, {dpo.reference}"),
        tables.comparison(results, [dpo.name], "reference"),
        tables.side_by_side(runs.read_json(run.home / "generation_samples.json"), names),
        f"Results: {run.home}/results.json, generation_samples.json\nPolicy:  {dpo.path}",
    ):
        log.info("\n%s", block)
    return results


if __name__ == "__main__":
    main(run_dpo)
