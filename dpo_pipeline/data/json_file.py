"""A local file of pairs: `prompt`, `chosen`, `rejected`, as text or as messages, and perhaps `demonstration`."""

from dpo_pipeline.data.files import read, require


def load(path: str, test_path: str | None) -> dict[str, list[dict]]:
    """Pairs of the file, and of `test_path` as the test split where it is given."""
    splits = read(path)
    if test_path:
        splits["test"] = read(test_path)["train"]
    for rows in splits.values():
        require(rows, ("prompt", "chosen", "rejected"), path)
    return splits
