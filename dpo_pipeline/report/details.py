"""What policies write, and what the report rests on: data, warnings of the runs, their cost and commands."""

import shlex
from pathlib import Path
from typing import Any

import pandas as pd

from dpo_pipeline.data.report import source_lines
from dpo_pipeline.formatting import format_number, one_line
from dpo_pipeline.record import read_json, read_metrics
from dpo_pipeline.report.page import Section
from dpo_pipeline.report.runs import Runs

PROMPTS, SHORT_PROMPTS = 10, 2  # in the report, and on the terminal
CHANGES = 3  # of each kind
MAX_TEXT = 700  # characters of a completion
MAX_WARNINGS = 10  # of a run


def completions(runs: Runs) -> list[Section]:
    """The first prompts for which base, SFT and the subject have a completion, with these."""
    samples = read_json(runs.home / "generation_samples.json") or []
    if not runs.policies:
        return []
    names = [name for name in runs.policies if name in ("base", runs.policies[runs.subject]["sft"], runs.subject)]
    samples = [sample for sample in samples if all(name in sample["answers"] for name in names)][:PROMPTS]
    if not samples:
        return []
    lines = [{"prompt": sample["prompt"], **{name: sample["answers"][name] for name in names}} for sample in samples]
    width, blocks = max(map(len, names)), []
    for line in lines[:SHORT_PROMPTS]:
        answers = [f"  {name.ljust(width)}  {one_line(line[name])}" for name in names]
        blocks.append("\n".join([f"> {one_line(line['prompt'])}", *answers]))
    text = "At temperature 1, on test prompts in their order."
    return [Section("Completions side by side", text, pd.DataFrame(lines).map(clip), short="\n\n".join(blocks))]


def changes(runs: Runs) -> list[Section]:
    """Pairs whose preference flipped, and samples whose score changed most, from the SFT policy to the subject."""
    notable = dict(runs.results["notable"].get(runs.subject, {}))
    before, after, sections = notable.pop("before", ""), runs.subject, []
    for change in notable.values():
        quantity, lines = change["quantity"], []
        heads = {"successes": f"{after} above {before} by {quantity}", "failures": f"{after} below {before}"}
        title = f"Largest gains and losses by {quantity}"
        if quantity == "margin_nats":
            title = "Flipped pairs"
            heads["successes"] = f"wrong with {before}, right with {after}"
            heads["failures"] = f"right with {before}, wrong with {after}"
        for side, kind in (("successes", "gain"), ("failures", "loss")):
            for example in change[side]["examples"][:CHANGES]:
                step = f"{format_number(example['before'])} to {format_number(example['after'])}"
                lines.append({"": kind, quantity: step, "prompt": example["prompt"], **example["texts"]})
        text = "; ".join(f"{head}: {change[side]['count']} of {change['n']}" for side, head in heads.items())
        table = pd.DataFrame(lines).map(clip)
        sections.append(Section(title, f"{text}. The largest changes of each kind:", table))
    return sections


def clip(text: str) -> str:
    """A text without its end where it is long."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."


def run_facts(runs: Runs) -> list[Section]:
    """What became of every row, what the train.log of each run warns of, and what the runs cost."""
    files = [file for stage in ("sft", "dpo") for file in sorted(runs.home.glob(f"{stage}/*/manifest.json"))]
    manifests = {f"{file.parent.parent.name}/{file.parent.name}": read_json(file) for file in files}
    summary = read_json(runs.home / "report" / "data.json", "sources", "warnings")
    sources = [each["sources"] for each in (*manifests.values(), summary) if each and "sources" in each]
    warnings, costs, parts = [], [], []
    if sources:
        text = "Written by inspect_data; data.html, beside this page, shows more." if summary else ""
        blocks = [text, "\n".join(f"- {sentence}" for sentence in (summary or {"warnings": []})["warnings"])]
        header, *lines = source_lines(sources[-1])
        parts.append(Section("Data", "\n\n".join(filter(None, blocks)), pd.DataFrame(lines, columns=header)))
    for name, manifest in manifests.items():
        file = runs.home / name / "train.log"
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
        logged = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
        warnings += [f"- {name}: {line}" for line in dict.fromkeys(logged[-MAX_WARNINGS:])]
        is_resumed = any("resuming from" in line for line in lines)
        costs.append(cost_line(runs.home / name, name, manifest, is_resumed))
    if manifests:
        parts.append(Section("Warnings of the runs", "\n".join(warnings) or "None."))
        parts.append(Section("Cost, and how to repeat it", table=pd.DataFrame(costs, dtype=object)))
    return parts


def cost_line(folder: Path, name: str, manifest: dict[str, Any], is_resumed: bool) -> dict[str, Any]:
    """Time, memory, speed and command of a run; its speed counts evaluations, and is unknown where it was resumed."""
    metrics = pd.DataFrame(read_metrics(folder), columns=["step", "num_tokens", "train_runtime"])
    tokens, seconds = metrics["num_tokens"].max(), metrics["train_runtime"].max()
    memory = manifest.get("peak_memory_bytes")
    place = [str(manifest[key]) for key in ("device", "precision") if key in manifest]
    return {
        "run": name,
        "steps": metrics["step"].max(),
        "time": f"{manifest['seconds']:,.0f} s",
        "tokens trained on": f"{tokens:,.0f}",
        "tokens a second": "" if is_resumed or not seconds > 0 else f"{tokens / seconds:,.0f}",
        "peak memory": f"{memory / 1e9:.1f} GB" if memory else "",
        "on": ", ".join([*place, f"{manifest['world_size']} process(es)"]),
        "command": shlex.join(manifest["command"]),
    }
