"""A data set's page: what is wrong with it, for a terminal, as Markdown and as HTML, with plots beside them."""

import html
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpo_pipeline.data.length_stats import Sizes
from dpo_pipeline.formatting import markdown_table

FEW = 2000  # comparisons, below which reward models stay near chance (Gao et al., arXiv:2210.10760, on data size)
STRONG = 0.6  # of pairs in which length alone tells the chosen completion; ours, 0.5 tells nothing
ALIKE = 0.8  # of the tokens of two completions; ours, after arXiv:2402.13228: DPO fails where they differ little
STEPS = 50  # of an epoch; ours: a tenth of them warm up
OPEN = 4  # tokens before one, among which the character that it ends may have begun: UTF-8 has at most four bytes
INK = {"prompt": "#64748b", "chosen": "#0d9488", "rejected": "#ea580c", "demonstration": "#0d9488"}
# Backgrounds of neighbouring tokens, of 256 colours, under white text: they read on light and dark terminals.
SHADES = {"prompt": (238, 242), "chosen": (22, 29), "rejected": (52, 94), "demonstration": (22, 29)}


def write_data_page(folder: Path, summary: dict[str, Any], sizes: Sizes, examples: list[dict[str, Any]]) -> None:
    """Write data.json, data.md, data.html and the PNGs into `folder`; `examples` are made by `example`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder.mkdir(parents=True, exist_ok=True)
    draw(folder, summary, sizes)
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    templates.filters["visible"] = visible
    page = templates.get_template("data.html.jinja").render(
        title=page_title(summary),
        tiles=tiles(summary),
        told=summary["warnings"],
        parts=sections(summary),
        examples=examples,
    )
    files = {"json": json.dumps(summary, indent=2), "md": page_text(summary, examples, markdown=True), "html": page}
    for ending, content in files.items():
        (folder / f"data.{ending}").write_text(content + "\n", encoding="utf-8")


def data_warnings(summary: dict[str, Any]) -> list[str]:
    """What the numbers of a data set warn of, each with what to type."""
    told, rows, epoch, bias = [], summary["rows"], summary["epoch"], summary["longer_chosen"]
    if bias and rows["train"] < FEW:
        told.append(
            f"{rows['train']:,} pairs are few: reward models learnt from less than some {FEW:,} comparisons stay near "
            "chance (Gao et al., arXiv:2210.10760), and DPO fits the same loss. Stay near the start, with `lora=r16 "
            "beta=0.3`, or give more pairs"
        )
    if epoch["steps"] < STEPS and epoch["batch"] > 8:
        told.append(
            f"an epoch is {epoch['steps']} steps of {epoch['batch']} rows, and a tenth of them warm up: "
            f"`batch.global_size={max(8, epoch['batch'] // 4)}` makes more of them"
        )
    if strong(bias):
        kind, more = ("longer", "more") if bias["value"] > 0.5 else ("shorter", "less")
        told.append(
            f"length bias is strong: the {kind} completion is chosen in {max(bias['value'], 1 - bias['value']):.1%} "
            f"of pairs, so that writing {more} passes for better (arXiv:2310.03716). `++dpo.ld_alpha=0.5` halves the "
            "weight of what the longer completion has beyond the shorter one (LD-DPO, arXiv:2409.06411); read each "
            "win rate beside the length of the completions"
        )
    if bias and summary["overlap"]["median"] > ALIKE:
        told.append(
            f"half of the pairs have {summary['overlap']['median']:.0%} of their tokens in common, or more: DPO can "
            "then make both less likely (Pal et al., arXiv:2402.13228). `loss=sigmoid_sft` holds the chosen one up"
        )
    if both := dropped_rows(summary, "contradiction"):
        told.append(
            f"{both:,} rows were labelled both ways, and dropped: others are as noisy. `loss=cdpo` reckons with a "
            "tenth of them being wrong (dpo.label_smoothing)"
        )
    for split, origins in summary["leaked"].items():
        if origins:
            told.append(
                f"{len(origins):,} of the {split} rows have a prompt of train's but for case and spaces (such as "
                f"{origins[0]}), which flatters: take them out, and name that file by `dataset.path=FILE`"
            )
    return told


def strong(bias: dict[str, Any] | None) -> bool:
    """Whether length alone tells the chosen completion too often, beyond noise."""
    return bias is not None and (bias["low"] > STRONG or bias["high"] < 1 - STRONG)


def dropped_rows(summary: dict[str, Any], reason: str) -> int:
    """How many rows of all sources were dropped for a reason."""
    return sum(n for part in summary["sources"].values() for why, n in part["dropped"].items() if why == reason)


def page_title(summary: dict[str, Any]) -> str:
    """What the page is about."""
    return f"{', '.join(summary['sources'])}, as {summary['tokenizer']} reads it"


def tiles(summary: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """The numbers that stand above all others: each with its name, and whether it is warned of."""
    bias, epoch, rows = summary["longer_chosen"], summary["epoch"], summary["rows"]
    few = bias is not None and rows["train"] < FEW
    shown = [(f"{rows['train']:,}", ("train pairs" if bias else "train rows") + " (few)" * few, few)]
    shown += [(f"{rows[split]:,}", split, False) for split in ("validation", "test")]
    shown += [(f"{bias['value']:.1%}", "longer completion chosen", strong(bias))] if bias else []
    shown.append((f"{epoch['tokens']:,}", "tokens an epoch", False))
    return [*shown, (f"{epoch['steps']:,}", f"steps of {epoch['batch']}", epoch["steps"] < STEPS)]


@dataclass(frozen=True)
class Section:
    """A part of the page: its table is rows of cells below one of their names, its pictures captions by file."""

    title: str
    text: str = ""
    table: list[list[str]] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)


def sections(summary: dict[str, Any]) -> list[Section]:
    """The parts of the page as they are read."""
    splits, lengths, now, bias = list(summary["rows"]), summary["lengths"], summary["length"], summary["longer_chosen"]
    table = [["source", "read", *splits, "dropped", "cut and kept"]]
    for source, part in summary["sources"].items():
        reasons = ("; ".join(f"{n:,} {why}" for why, n in part[key].items()) for key in ("dropped", "cut"))
        table.append([source, f"{part['read']:,}", *(f"{part['kept'][split]:,}" for split in splits), *reasons])
    parts = [Section("Every row", "Of each source, read = train + validation + test + dropped.", table)]
    if summary["examples"]:
        table = [
            ["reason", "its first row"],
            *([reason, origins[0]] for reason, origins in summary["examples"].items()),
        ]
        parts.append(Section("Where to look", "", table))
    table = [["tokens", "mean", "5%", "median", "95%", "99%", "longest"]]
    table += [[name, *(f"{value:,.0f}" for value in spread.values())] for name, spread in lengths.items()]
    pictures = {f"data_{name}.png": f"Tokens of {name}" for name in lengths if name in INK}
    parts.append(
        Section("Lengths", "Of train rows, before any cut; completions with their end token.", table, pictures)
    )
    if bias:
        told = (
            f"The longer completion is chosen in {bias['value']:.1%} of pairs [{bias['low']:.1%}, "
            f"{bias['high']:.1%}], a tie counting half: the accuracy of a judge of length alone. Half of the pairs "
            f"have {summary['overlap']['median']:.0%} of their completions' tokens in common, or more."
        )
        pictures = {"data_difference.png": "Tokens of chosen less rejected", "data_overlap.png": "Tokens in common"}
        parts.append(Section("The two completions", told, [], pictures))
    table = [["length.max", "kept", "dropped", "prompts cut", "completions cut", "tokens an epoch"]]
    for at in summary["limits"]:
        mark = " (now)" if at["max"] == now["max"] else " (beyond the model)" if at["max"] > now["context"] else ""
        counts = (at[key] for key in ("kept", "dropped", "prompts_cut", "answers_cut", "tokens"))
        table.append([f"{at['max']:,}{mark}", *(f"{count:,}" for count in counts)])
    told = (
        f"Of train rows, by `length.prompt={now['prompt']} length.completion={now['completion']}`, a cut prompt "
        f"keeping {'half of it' if now['max_prompt'] is None else now['max_prompt']}; a prompt is read once for each "
        f"completion. The model can read {now['context']:,} tokens."
    )
    parts.append(Section("What length.max cuts", told, table))
    reasons = ("exact duplicate", "contradiction", "prompt also in test")
    counts = {f"rows dropped: {reason}": dropped_rows(summary, reason) for reason in reasons}
    counts["train rows alike but for case and spaces"] = summary["repeats"]["alike"]
    for split, origins in summary["leaked"].items():
        counts[f"{split} rows with a prompt of train's but for case and spaces"] = len(origins)
    counts["different prompts in train"] = summary["repeats"]["prompts"]
    table = [["", "rows"], *([name, f"{count:,}"] for name, count in counts.items())]
    return [*parts, Section("Repeats and leakage", "", table)]


def page_text(
    summary: dict[str, Any], examples: list[dict[str, Any]], colour: bool = False, markdown: bool = False
) -> str:
    """The page as text for a terminal, in `colour` or not, or as `markdown`, which shows its pictures."""
    safe = escaped if markdown else visible
    blocks = [
        f"# {safe(page_title(summary))}",
        ", ".join(f"{value} {name}" for value, name, _ in tiles(summary)) + ".",
    ]
    blocks.append("\n".join(f"- **warning**: {safe(told)}" for told in summary["warnings"]) or "Nothing to warn of.")
    for part in sections(summary):
        table = [[safe(cell) for cell in row] for row in part.table]
        pictures = [f"![{caption}]({file})" for file, caption in part.pictures.items() if markdown]
        blocks += [f"## {part.title}", part.text, markdown_table(table) if table else "", *pictures]
    blocks.append("## Three rows, token by token")
    for each in examples:
        blocks.append(f"{each['title']}: {safe(each['origin'])}" + f", {each['cut']} tokens cut" * (each["cut"] > 0))
        for part in each["parts"]:
            blocks.append(
                f"    {part['name']}, {len(part['tokens'])} tokens, {part['use']}\n    {format_part(part, colour)}"
            )
    return "\n\n".join(block for block in blocks if block)


def example(
    title: str, row: dict[str, Any], ids: dict[str, list[int]], token_count: int, tokenizer: Any
) -> dict[str, Any]:
    """A row of `token_count` tokens before any cut: the text of each token of prompt and completions."""
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    parts = []
    for name, own in ids.items():
        before = [] if name == "prompt" else ids["prompt"][-1:]
        shown = pieces([*before, *own], tokenizer)[len(before) :]
        tokens = [(visible(piece), i in special) for piece, i in zip(shown, own, strict=True)]
        parts.append({"name": name, "use": "only read" if name == "prompt" else "trained on", "tokens": tokens})
    return {"title": title, "origin": row["origin"], "cut": token_count - sum(map(len, ids.values())), "parts": parts}


def pieces(ids: list[int], tokenizer: Any) -> list[str]:
    """The text of each token: what it adds to that of the tokens before it."""
    windows = [(ids[max(0, i - OPEN) : i], ids[max(0, i - OPEN) : i + 1]) for i in range(len(ids))]
    decode = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    both = [[tokenizer.decode(part, **decode) for part in window] for window in windows]
    # A character begun stands as U+FFFD until it is whole.
    return [new[len(old if new.startswith(old) else old.rstrip("\ufffd")) :] or "\ufffd" for old, new in both]


def format_part(part: dict[str, Any], colour: bool) -> str:
    """Tokens on one line, less the middle of many: in colours, or with bars between and brackets about the special."""
    shades, tokens = SHADES[part["name"]], []
    for i, (piece, special) in enumerate(part["tokens"]):
        if colour:
            tokens.append(f"\x1b[{'30;43' if special else f'97;48;5;{shades[i % 2]}'}m{piece}\x1b[0m")
        else:
            tokens.append(f"⟦{piece}⟧" if special else piece)
    first, last = (30, 50) if part["name"] == "prompt" else (100, 20)
    if len(tokens) > first + last:
        tokens[first:-last] = [f" ... {len(tokens) - first - last} more ... "]
    return ("" if colour else "│").join(tokens)


def draw(folder: Path, summary: dict[str, Any], sizes: Sizes) -> None:
    """A histogram of each of the lengths, and for pairs of the difference in length and of the overlap."""
    limit, unit = summary["length"]["max"], "tokens"
    names = [name for name in summary["lengths"] if name in INK]
    for name, values in zip(names, (sizes.prompt, *sizes.completions), strict=True):
        end, median = max(10.0, float(np.quantile(values, 0.995))), summary["lengths"][name]["median"]
        marks = {f"median {median:,.0f}": median, **({f"length.max {limit:,}": limit} if limit < end else {})}
        histogram(folder / f"data_{name}.png", values, np.linspace(0, end, 41), INK[name], unit, marks)
    if summary["overlap"]:
        difference, median = sizes.completions[0] - sizes.completions[1], summary["overlap"]["median"]
        edges = np.linspace(-1, 1, 42) * max(20.5, float(np.quantile(np.abs(difference), 0.99)))
        colours = [INK["rejected"]] * 20 + [INK["prompt"]] + [INK["chosen"]] * 20  # grey: about the same
        unit = "rejected longer  |  chosen longer"
        histogram(folder / "data_difference.png", difference, edges, colours, unit, {})
        edges, marks = np.linspace(0, 1, 41), {f"median {median:.0%}": median}
        histogram(folder / "data_overlap.png", sizes.overlap, edges, INK["prompt"], "share", marks)


def histogram(
    file: Path, values: np.ndarray, edges: np.ndarray, colours: str | list[str], unit: str, marks: dict[str, float]
) -> None:
    """Rows by a value, with lines at `marks`; what lies beyond the outer edges is counted in the outer bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    figure, axis = pyplot.subplots(figsize=(4.4, 2.7), layout="constrained")
    axis.bar(edges[:-1], counts, np.diff(edges), align="edge", color=colours, edgecolor="white", linewidth=0.4)
    for (name, at), height in zip(marks.items(), (0.99, 0.87), strict=False):
        axis.axvline(at, color="#111827", linewidth=1, linestyle=(0, (4, 3)))
        side, shift = ("left", 5) if at < edges.mean() else ("right", -5)
        axis.annotate(name, (at, height), (shift, 0), ("data", "axes fraction"), "offset points", ha=side, va="top")
    axis.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.2 * counts.max()), xlabel=unit, ylabel="rows")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    figure.savefig(file, dpi=160)
    pyplot.close(figure)


def visible(text: str) -> str:
    """A text on one line, with signs for line breaks and tabs, and codes for what else cannot be seen.

    So no text of the data can move what a terminal shows.
    """
    signs = {"\n": "↵", "\t": "⇥"}
    return "".join(signs[c] if c in signs else c if c.isprintable() else ascii(c)[1:-1] for c in text)


def escaped(text: str) -> str:
    """A visible text that Markdown shows as it is: no markup, link, picture, or end of a table's cell."""
    return re.sub(r"[\[\]|\\]", r"\\\g<0>", html.escape(visible(text), quote=False))
