"""A local file of pairs: `prompt`, `chosen`, `rejected`, as text or as messages, and perhaps `demonstration`."""

from dpo_pipeline.data.files import read, require
from dpo_pipeline.errors import PipelineError


def load(path: str, test_path: str | None) -> dict[str, list[dict]]:
    """Pairs of the file, and of `test_path` as the test split where it is given."""
    files = {"train": path, **({"test": test_path} if test_path else {})}
    splits = {}
    for split, file in files.items():
        found = read(file)
        if "train" not in found:
            raise PipelineError(f"{file} holds no rows to train on, only {', '.join(found)}: name its file by itself")
        require(found["train"], ("prompt", "chosen", "rejected"), file, chat=True)
        splits[split] = found["train"]
    return splits
