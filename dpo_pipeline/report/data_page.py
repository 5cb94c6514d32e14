"""A data set's page: its rows, lengths, biases and warnings, as sections."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dpo_pipeline.data.report import source_lines
from dpo_pipeline.report.figures import GREY, INK, ORANGE, TEAL, draw_histogram, draw_png
from dpo_pipeline.report.page import Panel, Section, to_text, write_page
from dpo_pipeline.report.token_view import show_invisible

MIN_PAIRS = 2000  # with fewer, reward models stay near chance (Gao et al., arXiv:2210.10760, on data size)
MAX_LENGTH_BIAS = 0.6  # share of pairs in which length alone tells the chosen completion; ours, 0.5 tells nothing
MAX_BLOCK_BIAS = 0.55  # share of pairs that a fixed opening tells; ours
MAX_OVERLAP = 0.8  # of the tokens of two completions; ours, after arXiv:2402.13228: DPO fails where they differ little
MIN_STEPS = 50  # of an epoch; ours: a tenth of them warm up
MAX_DUPLICATES, MAX_ODD = 0.1, 0.02  # shares of rows to warn from; ours


def write_data_page(
    folder: Path, summary: dict[str, Any], sizes: Any, overlaps: Any, examples: list[Any], colour: bool
) -> str:
    """Write data.json, data.html, data.md and PNGs into `folder`; the page as text for a terminal."""
    title = f"{', '.join(summary['sources'])} with the tokenizer of {summary['tokenizer']}"
    sections = [
        Section("Warnings", "\n".join(f"- {sentence}" for sentence in summary["warnings"]) or "Nothing to warn of."),
        *row_sections(summary),
        *length_sections(summary, sizes, overlaps),
        limit_section(summary),
        Section("Repeats and leakage", table=pd.DataFrame(count_faults(summary), columns=["", "rows"], dtype=object)),
        Section("Three rows, token by token", tokens=tuple(examples)),
    ]
    write_page(folder, "data.html", "data.md", title, overview(summary), sections)
    (folder / "data.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def show_lines(text: str) -> str:  # a terminal obeys only its line breaks
        return "\n".join(map(show_invisible, text.split("\n")))

    return to_text(title, overview(summary), sections, escape=show_lines, colour=colour)


def data_warnings(summary: dict[str, Any]) -> list[str]:
    """What the numbers of a data set warn of, each with what to type."""
    keys = ("rows", "epoch", "longer_chosen", "overlap", "leading_block")
    rows, epoch, bias, overlap, block = (summary[key] for key in keys)
    share, kind = max((bias["value"], "longer"), (1 - bias["value"], "shorter")) if bias else (0.5, "")
    is_biased = bias and (bias["low"] > MAX_LENGTH_BIAS or bias["high"] < 1 - MAX_LENGTH_BIAS)
    common, read = overlap["median"] if overlap else 0, sum(part["read"] for part in summary["sources"].values())
    copies = count_dropped(summary)["exact duplicate"]
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


def count_dropped(summary: dict[str, Any]) -> Counter[str]:
    """How many rows of all sources were dropped for each reason."""
    return sum((Counter(source["dropped"]) for source in summary["sources"].values()), Counter())


def count_faults(summary: dict[str, Any]) -> list[tuple[str, int]]:
    """How many rows and prompts occur more than once, and how many completions are odd."""
    dropped, reasons = count_dropped(summary), ("exact duplicate", "contradiction", "prompt also in test")
    counts = {f"rows dropped: {reason}": dropped[reason] for reason in reasons}
    counts["train rows that differ in case and spaces alone"] = summary["repeats"]["alike"]
    for split, origins in summary["leaked"].items():
        counts[f"{split} rows with a prompt of train except for case and spaces"] = len(origins)
    counts |= {f"train rows whose completions {name}": len(origins) for name, origins in summary["odd"].items()}
    return [*counts.items(), ("different prompts in train", summary["repeats"]["prompts"])]


def overview(summary: dict[str, Any]) -> str:
    """The most important numbers on one line."""
    rows, epoch, bias = summary["rows"], summary["epoch"], summary["longer_chosen"]
    counts = [f"{rows['train']:,} train {'pairs' if bias else 'rows'}"]
    counts += [f"{rows[split]:,} {split}" for split in ("validation", "test")]
    counts += [f"longer completion chosen in {bias['value']:.1%}"] if bias else []
    counts.append(f"{epoch['tokens']:,} tokens an epoch in {epoch['steps']:,} steps of {epoch['batch']}")
    return f"{', '.join(counts)}."


def row_sections(summary: dict[str, Any]) -> list[Section]:
    """What became of every row, and the first row of each reason."""
    header, *lines = source_lines(summary["sources"])
    text = "Of each source, read (or the pairs made of that) = train + validation + test + dropped."
    parts = [Section("Every row", text, pd.DataFrame(lines, columns=header))]
    if summary["examples"]:
        lines = [[reason, rows[0]] for reason, rows in summary["examples"].items()]
        parts.append(Section("Where to look", table=pd.DataFrame(lines, columns=["reason", "its first row"])))
    return parts


def length_sections(summary: dict[str, Any], sizes: Any, overlaps: Any) -> list[Section]:
    """The spread of token counts; and how the two completions of a pair differ in length, and how much they share."""
    limit, drawings = summary["length"]["max"], {}
    for name in sizes.columns.intersection(list(INK)):
        values = sizes[name].to_numpy()
        marks = {f"median {np.median(values):,.0f}": np.median(values), f"length.max {limit:,}": limit}
        edges = np.linspace(0, max(10, np.quantile(values, 0.995)), 41)
        drawings[f"tokens of {name}"] = (values, edges, INK[name], "tokens", marks)
    lines = [[name, *(f"{value:,.0f}" for value in spread.values())] for name, spread in summary["lengths"].items()]
    table = pd.DataFrame(lines, columns=["tokens", "mean", "5%", "median", "95%", "99%", "longest"])
    text = "Of train rows, before any cut, with end tokens."
    parts = [Section("Lengths", text, table, histograms(drawings), "data_lengths.png")]
    if (bias := summary["longer_chosen"]) is None:
        return parts
    text = (
        f"The longer completion is chosen in {bias['value']:.1%} of pairs [{bias['low']:.1%}, {bias['high']:.1%}] "
        "(ties count half): the accuracy of a judge of length alone."
    )
    if summary["overlap"]:
        text += f" Half of the kept pairs share at least {summary['overlap']['median']:.0%} of their tokens."
    text += f" Of all openings, {block_sentence(summary['leading_block'])}." if summary["leading_block"] else ""
    difference = (sizes["chosen"] - sizes["rejected"]).to_numpy()
    edges = np.linspace(-1, 1, 42) * max(20.5, np.quantile(np.abs(difference), 0.99))
    colours = [ORANGE] * 20 + [GREY] + [TEAL] * 20  # grey: about equal
    marks = {f"median {overlaps.median():.0%}": overlaps.median()} if len(overlaps) else {}
    drawings = {
        "tokens of chosen minus rejected": (difference, edges, colours, "rejected longer  |  chosen longer", {}),
        "share of tokens in common": (overlaps, np.linspace(0, 1, 41), GREY, "share", marks),
    }
    return [*parts, Section("The two completions", text, None, histograms(drawings), "data_pairs.png")]


def histograms(drawings: dict[str, tuple]) -> tuple[Panel, ...]:
    """A histogram of each title, with these arguments."""
    return tuple(
        Panel(title, draw_png(lambda axis, each=arguments: draw_histogram(axis, *each), title))
        for title, arguments in drawings.items()
    )


def limit_section(summary: dict[str, Any]) -> Section:
    """What other values of length.max would drop and cut."""
    length = summary["length"]
    header, lines = ["length.max", "kept", "dropped", "prompts cut", "completions cut", "tokens an epoch"], []
    for row in summary["limits"]:
        limit, *counts = (f"{value:,}" for value in row.values())
        note = " (beyond the model)" if row["max"] > length["context"] else ""
        lines.append([limit + (" (now)" if row["max"] == length["max"] else note), *counts])
    cut_to = "half of length.max" if length["max_prompt"] is None else f"{length['max_prompt']} tokens"
    text = (
        f"Of train rows, with `length.prompt={length['prompt']} length.completion={length['completion']}`. A cut "
        f"prompt keeps {cut_to}, and counts once for each completion. The model can read {length['context']:,} tokens."
    )
    return Section("What length.max cuts", text, pd.DataFrame(lines, columns=header))
