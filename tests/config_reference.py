"""Writes conf/README.md from the comments of the config: `make config-reference`; a test compares the two."""

import re
from pathlib import Path

from dpo_pipeline.config import CONF
from dpo_pipeline.formatting import markdown_table

GROUPS = {
    "model": "what training starts from",
    "dataset": "the pairs, or `dataset@sft_dataset=` what SFT learns from",
    "lora": "train every weight, or an adapter",
    "quantization": "what the base is held in under an adapter",
    "loss": "which preference loss",
    "reference": "how the reference's log-probs are had",
    "judge": "what scores sampled completions: `judge=[A,B]`",
    "experiment": "recipes; the second line of each file is its command",
}
LINE = re.compile(r"^( *)(?:- )?([\w@./]+):(?: +([^#\s].*?))?(?: +# (.*))?$")


def read_keys(file: Path) -> list[tuple[str, str, str]]:
    """(dotted key, default, effect) of each line of a YAML file with a key; a comment alone continues the last one."""
    rows: list[list[str]] = []
    parents: list[tuple[int, str]] = []
    for line in file.read_text("utf-8").splitlines():
        if rows and (more := re.match(r"^ {8,}# (.*)$", line)):
            rows[-1][2] += f" {more[1]}"
        elif match := LINE.match(line):
            indent, key, value, effect = len(match[1]), match[2], match[3] or "", match[4] or ""
            parents = [parent for parent in parents if parent[0] < indent]
            dotted = ".".join([*(name for _, name in parents), key])
            if value and not value.startswith("|"):
                rows.append([dotted, value, effect])
            else:
                parents.append((indent, key))
    return [tuple(row) for row in rows]


def first_sentences(file: Path) -> str:
    """The comment at the head of a file, without its package line and its commands."""
    lines = []
    for line in file.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(("# @package", "#   ", "# make ")):
            lines.append(line.removeprefix("# "))
    return " ".join(lines)


def reference() -> str:
    """The text of conf/README.md."""
    keys = [row for row in read_keys(CONF / "config.yaml") if not row[0].startswith(("defaults", "hydra"))]
    parts = [
        "# Every key and option",
        "Written by `make config-reference` from the comments of the files here. `KEY=VALUE` on a command line sets a "
        "key, `GROUP=OPTION` takes an option.",
        "## Keys of every run",
        markdown_table(
            [["key", "default", "effect"], *([f"`{key}`", f"`{value}`", effect] for key, value, effect in keys)]
        ),
    ]
    for group, purpose in GROUPS.items():
        files = sorted((CONF / group).glob("*.yaml"))
        rows = [["option", "what it is"], *([f"`{file.stem}`", first_sentences(file)] for file in files)]
        parts += [f"## {group}=: {purpose}", markdown_table(rows)]
        keys = [
            (f"{group}.{key}", value, effect)
            for file in [*sorted((CONF / group / "common").glob("*.yaml")), *files]
            for key, value, effect in read_keys(file)
            if effect and not key.startswith("defaults")
        ]
        if keys and group != "experiment":
            seen = {key: [f"`{key}`", f"`{value}`", effect] for key, value, effect in reversed(keys)}
            parts.append(markdown_table([["key", "default", "effect"], *reversed(seen.values())]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (CONF / "README.md").write_text(reference(), encoding="utf-8")
