"""Instructions with a good and a bad answer, in the Alpaca form (github.com/tatsu-lab/stanford_alpaca)."""

from dpo_pipeline.data.files import read, require

HEAD = "Below is an instruction that describes a task"
ASK = "Write a response that appropriately completes the request."


def load(path: str) -> dict[str, list[dict]]:
    """Pairs with the instruction's own output as `demonstration`."""
    splits = read(path)
    for rows in splits.values():
        require(rows, ("instruction", "input", "output", "chosen", "rejected"), path)
    return {split: [pair(row) for row in rows] for split, rows in splits.items()}


def pair(row: dict) -> dict:
    """One row; the prompt ends after `### Response:` and its line break."""
    if row["input"]:
        given = (
            f", paired with an input that provides further context. {ASK}\n\n### Instruction:\n{row['instruction']}"
        )
        given += f"\n\n### Input:\n{row['input']}"
    else:
        given = f". {ASK}\n\n### Instruction:\n{row['instruction']}"
    prompt = f"{HEAD}{given}\n\n### Response:\n"
    return {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"], "demonstration": row["output"]}
