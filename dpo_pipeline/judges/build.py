"""Builds the judges that a run names."""

from typing import Any

from dpo_pipeline.config import instantiate_node
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.models import LoadOptions
from dpo_pipeline.schema import Run


def build_judges(run: Run, load_options: LoadOptions) -> dict[str, Judge]:
    """The judges of a run by name; keys that are null get the run's own folders. Raises PipelineError."""
    start = {"sft": run.sft_folder / "final", "base": run.model.path}.get(run.policy, run.policy)
    defaults: dict[str, dict[str, Any]] = {
        "implicit_reward": {"policy": str(run.dpo_folder / "final"), "reference": str(run.reference.path or start)},
        "human": {"folder": str(run.home / "report" / "human")},
    }
    judges = {}
    for name, node in run.judge.items():
        filled = {**node, **{key: value for key, value in defaults.get(name, {}).items() if node[key] is None}}
        if name == "implicit_reward":
            # Hydra would instantiate the nodes inside the load options, so they are passed to what it returns.
            judges[name] = instantiate_node({**filled, "_partial_": True})(load_options=load_options)
        else:
            judges[name] = instantiate_node(filled)
    return judges
