"""What policies write: completions side by side, and the pairs and completions that changed most."""

import pandas as pd

from dpo_pipeline.formatting import format_number, one_line
from dpo_pipeline.record import read_json
from dpo_pipeline.report.runs import Runs
from dpo_pipeline.report.section import Section

PROMPTS, SHORT_PROMPTS = 10, 2  # in the report, and on the terminal
CHANGES = 3  # of each kind
MAX_TEXT = 700  # characters of a completion


def completions(runs: Runs) -> list[Section]:
    """The first prompts for which base, SFT and the subject have a completion, with these."""
    samples = read_json(runs.home / "generation_samples.json") or []
    if not runs.policies:
        return []
    names = [name for name in runs.policies if name in ("base", runs.policies[runs.subject]["sft"], runs.subject)]
    complete = [sample for sample in samples if all(name in sample["answers"] for name in names)]
    width, lines, blocks = max(map(len, names)), [], []
    for sample in complete[:PROMPTS]:
        texts = {name: sample["answers"][name] for name in names}
        lines.append({"prompt": clip(sample["prompt"]), **{name: clip(text) for name, text in texts.items()}})
        if len(lines) <= SHORT_PROMPTS:
            answers = [f"  {name.ljust(width)}  {one_line(text)}" for name, text in texts.items()]
            blocks.append("\n".join([f"> {one_line(sample['prompt'])}", *answers]))
    title, text = "Completions side by side", "At temperature 1, on test prompts in their order."
    return [Section(title, text, pd.DataFrame(lines), short="\n\n".join(blocks))] if lines else []


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
        for side in heads:
            for example in change[side]["examples"][:CHANGES]:
                step = f"{format_number(example['before'])} to {format_number(example['after'])}"
                line = {"": "gain" if side == "successes" else "loss", quantity: step}
                texts = {name: clip(text) for name, text in example["texts"].items()}
                lines.append({**line, "prompt": clip(example["prompt"]), **texts})
        text = "; ".join(f"{head}: {change[side]['count']} of {change['n']}" for side, head in heads.items())
        sections.append(Section(title, f"{text}. The largest changes of each kind:", pd.DataFrame(lines)))
    return sections


def clip(text: str) -> str:
    """A text without its end where it is long."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."
