"""A local file of pairs: `prompt`, `chosen`, `rejected`, as text or as messages, and perhaps `demonstration`."""

from dpo_pipeline.data.files import read, require


def load(path: str, test_path: str | None) -> dict[str, list[dict]]:
    """Pairs of the file, and of `test_path` as the test split where it is given."""
    files = {"train": path, **({"test": test_path} if test_path else {})}
    splits = {split: read(file)["train"] for split, file in files.items()}
    for split, rows in splits.items():
        require(rows, ("prompt", "chosen", "rejected"), files[split])
    return splits
