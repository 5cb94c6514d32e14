"""The report of a name: its sections in their order, and the files they are written to."""

import logging
import time
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

from dpo_pipeline.formatting import escape_controls, one_line
from dpo_pipeline.report import betas, comparison, curves, details, frontier, verdict
from dpo_pipeline.report.page import write_page
from dpo_pipeline.report.runs import Runs, load_runs
from dpo_pipeline.schema import Run

log = logging.getLogger(__name__)

SECTIONS = (
    *(verdict.verdict, comparison.comparison, frontier.frontier, curves.training_curves),
    *(betas.temperatures, betas.all_variants, details.completions, details.changes),
    *(comparison.all_estimates, comparison.accuracy_by_kind, comparison.by_judges, comparison.other_prompts),
    details.run_facts,
)


def write_report(
    home: Path,
    kl_budget: float,
    overlay: list[str],
    subject: str | None = None,
    failed: dict[str, str] | None = None,
) -> str:
    """Write index.html, report.md and PNGs to `report/` in `home`; the text for a terminal.

    The report is about the policy `subject`, by default the recommended one. `failed` are DPO variants whose last run
    failed, with the reason. All is made before any of it is written: a failure leaves the report as it was.
    """
    runs = load_runs(home, kl_budget, subject, frontier.read_overlays(overlay), failed or {})
    sections = [section for make_sections in SECTIONS for section in make_sections(runs)]
    write_page(home / "report", "index.html", "report.md", home.name, describe(runs), sections)
    if len(runs.variants) > 1:
        write_csv(home / "report" / "sweep.csv", runs)
    blocks = ["\n\n".join(escape_controls(section.short) for section in sections if section.short), ""]
    blocks.append(f"Report:  {home}/report/index.html, and report.md")
    final = home / runs.subject / "final"
    blocks += [f"Policy:  {final}"] if final.is_dir() and runs.subject else []
    return "\n".join(blocks)


def write_csv(file: Path, runs: Runs) -> None:
    """A line for each variant, its estimates on test and validation in columns such as test.kl.value."""
    table = pd.json_normalize(runs.variants.to_dict("records"))
    table = table.drop(columns=[name for name in table if "accuracy_by" in name])
    table.convert_dtypes().to_csv(file, index=False)


def describe(runs: Runs) -> str:
    """The model, the data set and the number of policies."""
    files = sorted([*runs.home.glob("dpo/*/config.yaml"), *runs.home.glob("sft/*/config.yaml")])
    config = OmegaConf.load(files[0]).model if files else {"builder": None, "path": ""}
    model = "the embedded model" if config["builder"] else str(config["path"])
    data = runs.policies[runs.subject]["dataset"] if runs.subject else ""
    parts = [model, data, f"{len(runs.policies)} policies measured", time.strftime("%Y-%m-%d %H:%M")]
    return ", ".join(part for part in parts if part)


def report_or_warn(
    run: Run, home: Path | None = None, subject: str | None = None, failed: dict[str, str] | None = None
) -> None:
    """Print and write the report at the end of another command, in which its failure is a warning and no error."""
    try:
        log.info("\n%s", write_report(home or run.home, run.evaluation.kl_budget, run.overlay, subject, failed))
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(str(error))}"
        log.warning("there is no new report, all else is written (%s): correct it and type the command report", reason)
