"""Show how the policies of a name compare: `python -m dpo_pipeline.report key=value ...`."""

import logging
from pathlib import Path

from dpo_pipeline.cli import main
from dpo_pipeline.record import run_logging
from dpo_pipeline.schema import Run

log = logging.getLogger("dpo_pipeline.report")


def run_report(run: Run) -> Path:
    """Write the report of a name from what its runs wrote, and print it in short; the page."""
    from dpo_pipeline.report.build import write_report

    with run_logging(None):
        log.info("%s", write_report(run.home, run.evaluation.kl_budget, run.overlay))
    return run.home / "report" / "index.html"


if __name__ == "__main__":
    main(run_report)
