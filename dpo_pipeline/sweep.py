"""The table and plots of all DPO variants of a name: `python -m dpo_pipeline.sweep key=value ...`, at any time."""

from dpo_pipeline.config import Run, main


def run_sweep(run: Run) -> str:
    """Print what a sweep ends with, of whatever is there of its name; the Markdown."""
    from dpo_pipeline.errors import PipelineError
    from dpo_pipeline.evaluation.variants import report

    if not (run.home / "dpo").is_dir():
        raise PipelineError(
            f"there is no DPO in {run.home}: run one, or give the model=, dataset= or name= of another"
        )
    text = report(run.home, run.evaluation.kl_budget, {})
    print(text)
    return text


if __name__ == "__main__":
    main(run_sweep)
