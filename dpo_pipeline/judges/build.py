"""The judges of a run, by the names of their options."""

from typing import Any

from dpo_pipeline.config import Run, instantiate_node
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.models import LoadOptions


def build_judges(run: Run, loading: LoadOptions) -> dict[str, Judge]:
    """What conf/judge/ names, with what only the run can say: its folders, and how it loads weights."""
    start = {"sft": run.sft_folder / "final", "base": run.model.path}.get(run.policy, run.policy)
    own: dict[str, dict[str, Any]] = {
        "implicit_reward": {"policy": str(run.dpo_folder / "final"), "reference": str(run.reference.path or start)},
        "human": {"folder": str(run.home / "report" / "human")},
    }
    judges = {}
    for name, node in run.judge.items():
        ours = {key: value for key, value in own.get(name, {}).items() if node[key] is None}
        # Given to what is built, not to build: Hydra would build what the loading holds.
        made = instantiate_node({**node, **ours, "_partial_": name == "implicit_reward"})
        judges[name] = made(loading=loading) if name == "implicit_reward" else made
    return judges
