"""What the report rests on: the data, the warnings of the runs, what they cost, and the commands that make them."""

import shlex
from pathlib import Path
from typing import Any

import pandas as pd

from dpo_pipeline.data.report import source_lines
from dpo_pipeline.record import read_json, read_metrics
from dpo_pipeline.report.runs import Runs
from dpo_pipeline.report.section import Section

MAX_WARNINGS = 10  # of a run


def run_folders(runs: Runs) -> dict[str, dict[str, Any]]:
    """The manifest of each SFT and DPO of the name."""
    files = [file for stage in ("sft", "dpo") for file in sorted(runs.home.glob(f"{stage}/*/manifest.json"))]
    return {f"{file.parent.parent.name}/{file.parent.name}": read_json(file) for file in files}


def data_report(runs: Runs) -> list[Section]:
    """What became of every row, as inspect_data says, else as the runs do."""
    summary = read_json(runs.home / "report" / "data.json", "sources", "warnings")
    text = "Written by inspect_data; data.html, beside this page, shows more." if summary else ""
    manifests = [each for each in run_folders(runs).values() if "sources" in each]
    if summary is None and not manifests:
        return []
    lines = source_lines((summary or manifests[-1])["sources"])
    warnings = "\n".join(f"- {sentence}" for sentence in (summary or {"warnings": []})["warnings"])
    blocks = "\n\n".join(filter(None, (text, warnings)))
    return [Section("Data", blocks, pd.DataFrame(lines[1:], columns=lines[0]))]


def warnings(runs: Runs) -> list[Section]:
    """What the train.log of each run warns of."""
    lines = []
    for name in run_folders(runs):
        file = runs.home / name / "train.log"
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        found = [line.removeprefix("warning: ") for line in text.splitlines() if line.startswith("warning: ")]
        lines += [f"- {name}: {line}" for line in dict.fromkeys(found[-MAX_WARNINGS:])]
    return [Section("Warnings of the runs", "\n".join(lines) or "None.")] if run_folders(runs) else []


def cost(runs: Runs) -> list[Section]:
    """Time, memory and speed of each run, and its command."""
    lines = [cost_line(runs.home / name, name, manifest) for name, manifest in run_folders(runs).items()]
    return [Section("Cost, and how to repeat it", "", pd.DataFrame(lines, dtype=object))] if lines else []


def cost_line(folder: Path, name: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """The line of one run; its speed counts evaluations, and is left out where the run was resumed."""
    metrics = pd.DataFrame(read_metrics(folder), columns=["step", "num_tokens", "train_runtime"])
    tokens, seconds = metrics["num_tokens"].max(), metrics["train_runtime"].max()
    log_file = folder / "train.log"
    is_resumed = log_file.is_file() and "resuming from" in log_file.read_text(encoding="utf-8", errors="replace")
    line = {"run": name, "steps": metrics["step"].max(), "time": f"{manifest['seconds']:,.0f} s"}
    line["tokens trained on"] = f"{tokens:,.0f}"
    line["tokens a second"] = "" if is_resumed or not seconds > 0 else f"{tokens / seconds:,.0f}"
    memory = manifest.get("peak_memory_bytes")
    line["peak memory"] = f"{memory / 1e9:.1f} GB" if memory else ""
    place = [str(manifest[key]) for key in ("device", "precision") if key in manifest]
    line["on"] = ", ".join([*place, f"{manifest['world_size']} process(es)"])
    return line | {"command": shlex.join(manifest["command"])}
