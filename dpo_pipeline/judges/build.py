"""Builds the judges that a run names."""

from dpo_pipeline.config import instantiate_node
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.models import LoadOptions
from dpo_pipeline.schema import Run


def build_judges(run: Run, load_options: LoadOptions) -> dict[str, Judge]:
    """The judges of a run by name; keys that are null get the run's own folders. Raises PipelineError."""
    start = {"sft": run.sft_folder / "final", "base": run.model.path}.get(run.policy, run.policy)
    judges = {}
    for name, node in run.judge.items():
        if name == "implicit_reward":
            policy = node["policy"] or str(run.dpo_folder / "final")
            reference = node["reference"] or str(run.reference.path or start)
            # Hydra would instantiate the nodes inside the load options, so they are passed to what it returns.
            partial = instantiate_node({**node, "policy": policy, "reference": reference, "_partial_": True})
            judges[name] = partial(load_options=load_options)
        elif name == "human":
            judges[name] = instantiate_node({**node, "folder": node["folder"] or str(run.home / "report" / "human")})
        elif name != "common":  # what the judges behind an endpoint share
            judges[name] = instantiate_node(node)
    return judges
