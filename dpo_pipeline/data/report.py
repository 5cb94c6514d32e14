"""What became of every row that was read, counted by source, and whether that can be right.

A row that is not kept has a `reason`, which is of one `kind`; one that was tokenized has its `tokens` and `cut`.
"""

import random
from itertools import chain
from typing import Any

from dpo_pipeline.data.files import list_names
from dpo_pipeline.formatting import markdown_table

SPLITS = ("train", "validation", "test")
# Kinds of reasons: left out by an option, before anything looks for problems; teaches nothing, so that one may ask
# whether this is a preference data set at all; a problem of that row alone; not needed; too long.
FILTERED, INVALID, SINGLE, SURPLUS, TOO_LONG = "filtered", "invalid", "single", "surplus", "too long"
MAX_INVALID = 0.05  # share of rows that teach nothing, above which a run stops
WARN_TOO_LONG, MAX_TOO_LONG = 0.05, 0.5  # shares of rows cut or dropped for length, to warn of and to stop at
WARN_RETOKENIZED = 0.05  # share of rows whose completion was tokenized alone, to warn of
FIELDS = "source origin split reason kind cut tokens retokenized is_further_pair unused".split()

Rows = list[dict[str, Any]]


def mark(reason: str, kind: str = FILTERED) -> dict[str, str]:
    """What a row that is not kept has; by default one that an option of its data set leaves out."""
    return {"reason": reason, "kind": kind}


def kept_rows(rows: Rows, split: str | None = None) -> Rows:
    """The rows that are kept, of all splits or of one."""
    return [row for row in rows if not row["reason"] and split in (None, row.get("split"))]


def drop_all_but(rows: Rows, count: int, rng: random.Random, reason: str, kind: str) -> None:
    """Keep so many rows, drawn."""
    remaining = kept_rows(rows)
    sample = set(rng.sample(range(len(remaining)), min(count, len(remaining))))
    for number, row in enumerate(remaining):
        if number not in sample:
            row |= mark(reason, kind)


def make_table(rows: Rows) -> Any:
    """The rows as a DataFrame, without their texts."""
    import pandas as pd

    return pd.DataFrame({name: pd.Series([row.get(name) for row in rows], dtype=object) for name in FIELDS})


def count_rows(rows: Rows) -> dict[str, Any]:
    """The data report: `sources`, as design and README show them, and `examples`, the first origins of each reason.

    `read` counts raw rows; `rows`, kept or dropped, are more where a list of completions makes several pairs.
    """
    table, sources, examples = make_table(rows), {}, {}
    for source, part in table.groupby("source", sort=False):
        kept = part[part["reason"].isna()]
        sources[source] = {
            "read": int(part["is_further_pair"].isna().sum()),
            "rows": len(part),
            "kept": {split: int((kept["split"] == split).sum()) for split in SPLITS},
            "dropped": part["reason"].value_counts(sort=False).to_dict(),
            "cut": kept["cut"].value_counts(sort=False).to_dict(),
            "retokenized": int(kept["retokenized"].eq(True).sum()),  # None where not tokenized
            "unused_columns": list(dict.fromkeys(chain.from_iterable(part["unused"].dropna()))),
        }
    for column in ("reason", "cut"):
        examples |= {reason: part.head(3).tolist() for reason, part in table.groupby(column, sort=False)["origin"]}
    return {"sources": sources, "examples": examples}


def source_lines(sources: dict[str, Any]) -> list[list[str]]:
    """A table with a line for each source, below its header."""
    lines = [["source", "read", *SPLITS, "dropped", "changed and kept", "not used"]]
    for source, counts in sources.items():
        numbers = [f"{number:,}" for number in (counts["read"], *counts["kept"].values())]
        numbers[0] += f" ({counts['rows']:,} pairs)" if counts["rows"] > counts["read"] else ""
        changed = counts["cut"] | {"completion tokenized alone": counts["retokenized"]}
        reasons = [
            "; ".join(f"{n:,} {reason}" for reason, n in each.items() if n) for each in (counts["dropped"], changed)
        ]
        lines.append([source, *numbers, *reasons, list_names(counts["unused_columns"])])
    return lines


def print_report(report: dict[str, Any], rows: Rows) -> str:
    """The report as Markdown, and the first row of each problem."""
    invalid = {row["reason"] for row in rows if row.get("kind") in (INVALID, SINGLE)}
    first_rows = [f"{reason}: {origins[0]}" for reason, origins in report["examples"].items() if reason in invalid]
    return "\n".join([markdown_table(source_lines(report["sources"])), *first_rows])


def list_reasons(table: Any) -> list[str]:
    """Each reason of rows that are not kept, with its number of rows and where the first one is."""
    groups = table.groupby("reason", sort=False)["origin"]
    return [f"{len(origins)} {reason} ({origins.iloc[0]})" for reason, origins in groups]


def invalid_sentences(table: Any, on_bad_row: str) -> list[str]:
    """What ends a run: a sentence for each source of whose rows more than 5% teach nothing, or for the first row."""
    sentences, bad = [], table[table["kind"].isin((INVALID, SINGLE))]
    if on_bad_row == "error" and len(bad):
        remedy = "correct the row or take it out, or drop such rows by dataset.on_bad_row=drop"
        return [f"{bad['origin'].iloc[0]}: {bad['reason'].iloc[0]}: {remedy}"]
    for source, part in table[table["kind"] != FILTERED].groupby("source", sort=False):
        invalid = part[part["kind"] == INVALID]
        if len(invalid) > MAX_INVALID * len(part):
            remedy = "check that dataset= fits and that chosen and rejected are the columns meant, or take them out"
            if "contradiction" in invalid["reason"].values:
                remedy += "; dataset.on_contradiction=drop leaves out pairs labelled both ways"
            count = f"{len(invalid)} of {len(part)} rows of {source} teach nothing, more than {MAX_INVALID:.0%}"
            sentences.append(f"{count}: {'; '.join(list_reasons(invalid))}: {remedy}")
    return sentences


def length_sentence(table: Any, limit: int, context: int) -> tuple[float, str]:
    """The share of rows that are dropped or cut for their length, and a sentence with the limit that keeps 99%."""
    lengths = sorted(table["tokens"].dropna())
    dropped, cut = (table["kind"] == TOO_LONG).sum(), (table["cut"].notna() & table["reason"].isna()).sum()
    if not lengths:
        return 0.0, ""
    share, p99 = (dropped + cut) / len(lengths), lengths[-(-99 * len(lengths) // 100) - 1]
    message = f"{share:.0%} of {len(lengths)} rows are too long: {dropped} dropped, {cut} cut"
    if p99 <= context:
        message += f": `length.max={p99}` would keep 99% of them whole"
    elif limit < context:
        message += f": `length.max={context}`, all that the model reads, keeps more, and a longer context all"
    else:
        message += f": the model reads {context} tokens, and 99% of the rows need {p99}: take one of longer context"
    return share, message


def find_errors(rows: Rows, on_bad_row: str, limit: int, context: int) -> list[str]:
    """What ends a run, a sentence each: too many rows that teach nothing, or that are too long."""
    table = make_table(rows)
    share, sentence = length_sentence(table, limit, context)
    return invalid_sentences(table, on_bad_row) + ([sentence] if share > MAX_TOO_LONG else [])


def find_warnings(rows: Rows, limit: int, context: int) -> list[str]:
    """What a run warns of, a sentence each."""
    share, sentence = length_sentence(make_table(rows), limit, context)
    sentences = [sentence] if WARN_TOO_LONG < share <= MAX_TOO_LONG else []
    measured = [row for row in rows if row.get("tokens")]
    if (retokenized := sum(row["retokenized"] for row in kept_rows(measured))) > WARN_RETOKENIZED * len(measured):
        reason = "the prompt's tokens change when a completion follows"
        remedy = "end the prompts where a token ends (a line break, or no trailing space)"
        if isinstance(measured[0]["prompt"], list):
            reason = "the chat template ends its generation prompt with what no dialogue has"
            remedy = "where that is an open <think>, type 'model.chat_template_kwargs={enable_thinking: false}'"
        count = f"{retokenized} of {len(measured)} rows"
        sentences.append(f"{count}: {reason}, so the completion was tokenized alone: {remedy}")
    return sentences
