"""What several tests use: runs prepared and trainers built as the commands build them, and trees of settings."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from trl import SFTTrainer

from dpo_pipeline.base_model import base_model
from dpo_pipeline.data.prepare import Prepared, prepare
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.evaluation import compare
from dpo_pipeline.report import build as report
from dpo_pipeline.report.runs import COLUMNS, Runs
from dpo_pipeline.schema import Run
from dpo_pipeline.sft import run_sft
from dpo_pipeline.training.arguments import training_arguments
from dpo_pipeline.training.pair_trainer import PairTrainer
from dpo_pipeline.training.starting_policy import load_reference, load_start, resolve_starting_policy
from dpo_pipeline.training.trainer import label_completions, make_trainer

# The embedded task shrunken to seconds.
SMALL = (
    *("model.builder.hidden_size=32", "model.builder.layers=2", "model.builder.heads=2", "model.builder.steps=40"),
    *("dataset.rows=300", "batch.global_size=16", "evaluation.pairs=20", "evaluation.prompts=4"),
    "evaluation.tracker_prompts=0",  # test_tracker.py and the whole chain have it on
    *("evaluation.max_new_tokens=24", "sft.logging_steps=1", "dpo.logging_steps=1"),
)


def runs_of(policies: dict[str, Any], subject: str = "", home: Path = Path("none"), **results: Any) -> Runs:
    """What a report of these policies is made from, without DPO variants."""
    results = {"notable": {}, **results}
    return Runs(home, policies, results, pd.DataFrame(columns=COLUMNS), "margin_nats", subject, 10.0, {})


def prepare_run(run: Run, stage: str, *splits: str) -> Prepared:
    """What a stage of this run works on."""
    with base_model(run) as run:
        return prepare(run, stage, splits or None)


def train(run: Run, stage: str) -> Path:
    """Run a stage without the comparison and the report that follow a DPO; its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "compare_policies", lambda *args: {})
        patch.setattr(report, "report_or_warn", lambda *args, **options: None)
        {"sft": run_sft, "dpo": run_dpo}[stage](run)
    return run.sft_folder if stage == "sft" else run.dpo_folder


def build(run: Run, stage: str, folder: Path, policy: Any = None, reference: Any = None) -> SimpleNamespace:
    """The `trainer` of a stage before its checks, with what it was `prepared` from and its `start`.

    Another policy or reference may be put in place of the run's own.
    """
    prepared = prepare_run(run, stage)
    start = resolve_starting_policy(run, stage)
    tables = {split: prepared.tables[split] for split in ("train", "validation")}
    arguments = {"peft_config": start.lora}
    if stage == "sft":
        tables = {split: label_completions(table, prepared.all_turns) for split, table in tables.items()}
    else:
        arguments["ref_model"] = reference or load_reference(run, start)
    trainer = make_trainer(
        SFTTrainer if stage == "sft" else PairTrainer,
        model=policy or load_start(run, start),
        args=training_arguments(run, stage, folder),
        train_dataset=tables["train"],
        eval_dataset=tables["validation"],
        processing_class=prepared.tokenizer,
        **arguments,
    )
    return SimpleNamespace(trainer=trainer, prepared=prepared, start=start)
