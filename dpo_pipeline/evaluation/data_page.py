"""A data set's page: its rows, lengths, biases and warnings, for a terminal and as HTML with plots."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpo_pipeline.data.report import source_lines
from dpo_pipeline.evaluation.data_plots import INK, draw_histograms
from dpo_pipeline.evaluation.token_view import format_tokens, show_invisible
from dpo_pipeline.formatting import markdown_table, render_template

MIN_PAIRS = 2000  # with fewer, reward models stay near chance (Gao et al., arXiv:2210.10760, on data size)
MAX_LENGTH_BIAS = 0.6  # share of pairs in which length alone tells the chosen completion; ours, 0.5 tells nothing
MAX_BLOCK_BIAS = 0.55  # share of pairs that a fixed opening tells; ours
MAX_OVERLAP = 0.8  # of the tokens of two completions; ours, after arXiv:2402.13228: DPO fails where they differ little
MIN_STEPS = 50  # of an epoch; ours: a tenth of them warm up
MAX_DUPLICATES, MAX_ODD = 0.1, 0.02  # shares of rows to warn from; ours


@dataclass(frozen=True)
class Section:
    """A part of the page; the first row of its table is the header, its pictures are captions by file."""

    title: str
    text: str = ""
    table: list[list[str]] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)


def write_data_page(folder: Path, summary: dict[str, Any], sizes: Any, overlaps: Any, examples: list[Any]) -> None:
    """Write data.json, data.html and the PNGs into `folder`; `examples` are made by `show_tokens`."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_histograms(folder, summary, sizes, overlaps)
    page = render_template(
        Path(__file__).parent / "data.html.jinja",
        **{"title": page_title(summary), "overview": overview(summary), "warnings": summary["warnings"]},
        **{"sections": sections(summary), "examples": examples, "show": show_invisible},
    )
    (folder / "data.html").write_text(page + "\n", encoding="utf-8")
    (folder / "data.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def data_warnings(summary: dict[str, Any]) -> list[str]:
    """What the numbers of a data set warn of, each with what to type."""
    keys = ("rows", "epoch", "longer_chosen", "overlap", "leading_block")
    rows, epoch, bias, overlap, block = (summary[key] for key in keys)
    share, kind = max((bias["value"], "longer"), (1 - bias["value"], "shorter")) if bias else (0.5, "")
    is_biased = bias and (bias["low"] > MAX_LENGTH_BIAS or bias["high"] < 1 - MAX_LENGTH_BIAS)
    common, read = overlap["median"] if overlap else 0, sum(part["read"] for part in summary["sources"].values())
    contradictions, copies = (dropped_rows(summary, reason) for reason in ("contradiction", "exact duplicate"))
    sentences = {
        f"{rows['train']:,} pairs are few: below some {MIN_PAIRS:,} comparisons reward models stay near chance "
        "(arXiv:2210.10760), and DPO fits the same loss. Add pairs, or stay near the start by `lora=r16 beta=0.3`": (
            bias and rows["train"] < MIN_PAIRS
        ),
        f"an epoch is {epoch['steps']} steps of {epoch['batch']} rows, and a tenth of them warm up: type "
        f"`batch.global_size={max(8, epoch['batch'] // 4)}` for more steps": (
            epoch["steps"] < MIN_STEPS and epoch["batch"] > 8
        ),
        f"length bias is strong: the {kind} completion is chosen in {share:.1%} of pairs (arXiv:2310.03716). "
        "`++dpo.ld_alpha=0.5` halves the weight of the tokens that the longer completion has more (arXiv:2409.06411); "
        "read each win rate beside the completion length": is_biased,
        block_sentence(block) + ". A policy would learn it first: take it out, or give it to both": (
            block and block["low"] > MAX_BLOCK_BIAS
        ),
        f"half of the pairs share at least {common:.0%} of their tokens: DPO can then make both less likely "
        "(arXiv:2402.13228). `loss=sigmoid_sft` keeps the chosen one likely": common > MAX_OVERLAP,
        f"{contradictions:,} rows were labelled both ways, and dropped: other labels may be noisy too. `loss=cdpo` "
        "assumes that a tenth of them are wrong (dpo.label_smoothing)": contradictions,
        f"{copies:,} rows are exact duplicates of another, and dropped: is the file meant to repeat them?": (
            copies > MAX_DUPLICATES * read
        ),
    }
    for name, origins in summary["odd"].items():
        sentence = f"the completions of {len(origins):,} train rows {name}, such as {''.join(origins[:1])}"
        sentences[f"{sentence}: correct the file if that is not meant"] = len(origins) > MAX_ODD * rows["train"]
    for split, origins in summary["leaked"].items():
        count = f"{len(origins):,} of the {split} rows"
        sentence = f"{count} repeat a prompt of train except for case and spaces, such as {''.join(origins[:1])}"
        sentences[f"{sentence}: remove them, and give that file by `dataset.path=FILE`"] = origins
    return [sentence for sentence, is_true in sentences.items() if is_true]


def block_sentence(block: dict[str, Any] | None) -> str:
    """How often an opening that one side of the pairs has tells which is chosen."""
    if block is None:
        return ""
    return (
        f"the opening {json.dumps(block['text'][:60])} of {block['side']} completions alone tells which is chosen in "
        f"{block['value']:.1%} of pairs [{block['low']:.1%}, {block['high']:.1%}] (ties count half)"
    )


def dropped_rows(summary: dict[str, Any], reason: str) -> int:
    """How many rows of all sources were dropped for a reason."""
    return sum(source["dropped"].get(reason, 0) for source in summary["sources"].values())


def page_title(summary: dict[str, Any]) -> str:
    """The data sets and the tokenizer."""
    return f"{', '.join(summary['sources'])} with the tokenizer of {summary['tokenizer']}"


def overview(summary: dict[str, Any]) -> str:
    """The most important numbers on one line."""
    rows, epoch, bias = summary["rows"], summary["epoch"], summary["longer_chosen"]
    counts = [f"{rows['train']:,} train {'pairs' if bias else 'rows'}"]
    counts += [f"{rows[split]:,} {split}" for split in ("validation", "test")]
    counts += [f"longer completion chosen in {bias['value']:.1%}"] if bias else []
    counts.append(f"{epoch['tokens']:,} tokens an epoch in {epoch['steps']:,} steps of {epoch['batch']}")
    return f"{', '.join(counts)}."


def sections(summary: dict[str, Any]) -> list[Section]:
    """The parts of the page, in their order."""
    text = "Of each source, read (or the pairs made of that) = train + validation + test + dropped."
    parts = [Section("Every row", text, source_lines(summary["sources"]))]
    if summary["examples"]:
        lines = [["reason", "its first row"], *([reason, rows[0]] for reason, rows in summary["examples"].items())]
        parts.append(Section("Where to look", "", lines))
    lines = [["tokens", "mean", "5%", "median", "95%", "99%", "longest"]]
    lines += [[name, *(f"{value:,.0f}" for value in spread.values())] for name, spread in summary["lengths"].items()]
    pictures = {f"data_{name}.png": f"Tokens of {name}" for name in summary["lengths"] if name in INK}
    parts.append(Section("Lengths", "Of train rows, before any cut, with end tokens.", lines, pictures))
    if bias := summary["longer_chosen"]:
        low, high = f"{bias['low']:.1%}", f"{bias['high']:.1%}"
        text = (
            f"The longer completion is chosen in {bias['value']:.1%} of pairs [{low}, {high}] (ties count half): the "
            "accuracy of a judge of length alone."
        )
        text += f" Of all openings, {block_sentence(summary['leading_block'])}." if summary["leading_block"] else ""
        if summary["overlap"]:
            text += f" Half of the kept pairs share at least {summary['overlap']['median']:.0%} of their tokens."
        pictures = {"data_difference.png": "Tokens of chosen minus rejected", "data_overlap.png": "Shared tokens"}
        parts.append(Section("The two completions", text, [], pictures))
    return [*parts, limit_section(summary), repeat_section(summary)]


def limit_section(summary: dict[str, Any]) -> Section:
    """What other values of length.max would drop and cut."""
    length = summary["length"]
    lines = [["length.max", "kept", "dropped", "prompts cut", "completions cut", "tokens an epoch"]]
    for row in summary["limits"]:
        limit, *counts = (f"{value:,}" for value in row.values())
        note = " (beyond the model)" if row["max"] > length["context"] else ""
        lines.append([limit + (" (now)" if row["max"] == length["max"] else note), *counts])
    cut_to = "half of length.max" if length["max_prompt"] is None else f"{length['max_prompt']} tokens"
    text = (
        f"Of train rows, with `length.prompt={length['prompt']} length.completion={length['completion']}`. A cut "
        f"prompt keeps {cut_to}, and counts once for each completion. The model can read {length['context']:,} tokens."
    )
    return Section("What length.max cuts", text, lines)


def repeat_section(summary: dict[str, Any]) -> Section:
    """Rows and prompts that occur more than once, and completions that are odd."""
    reasons = ("exact duplicate", "contradiction", "prompt also in test")
    counts = {f"rows dropped: {reason}": dropped_rows(summary, reason) for reason in reasons}
    counts["train rows that differ in case and spaces alone"] = summary["repeats"]["alike"]
    for split, origins in summary["leaked"].items():
        counts[f"{split} rows with a prompt of train except for case and spaces"] = len(origins)
    counts |= {f"train rows whose completions {name}": len(origins) for name, origins in summary["odd"].items()}
    counts["different prompts in train"] = summary["repeats"]["prompts"]
    return Section("Repeats and leakage", "", [["", "rows"], *([name, f"{n:,}"] for name, n in counts.items())])


def page_text(summary: dict[str, Any], examples: list[dict[str, Any]], colour: bool = False) -> str:
    """The page as text for a terminal, in colour if asked for."""
    warnings = "\n".join(f"- **warning**: {show_invisible(sentence)}" for sentence in summary["warnings"])
    blocks = [f"# {show_invisible(page_title(summary))}", overview(summary), warnings or "Nothing to warn of."]
    for part in sections(summary):
        table = markdown_table([[show_invisible(cell) for cell in row] for row in part.table]) if part.table else ""
        blocks += [f"## {part.title}", part.text, table]
    blocks.append("## Three rows, token by token")
    for row in examples:
        cut = f", {row['cut']} tokens cut" * (row["cut"] > 0)
        blocks.append(f"{row['title']}: {show_invisible(row['origin'])}{cut}")
        for part in row["parts"]:
            head = f"{part['name']}, {len(part['tokens'])} tokens, {part['use']}"
            blocks.append(f"    {head}\n    {format_tokens(part, colour)}")
    return "\n\n".join(block for block in blocks if block)
