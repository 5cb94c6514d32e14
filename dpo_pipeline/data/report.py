"""The report on a data set: what became of every row that was read, by source, and whether that can be right."""

import json
from collections import Counter, defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from dpo_pipeline.errors import PipelineError
from dpo_pipeline.formatting import markdown_table

SPLITS = ("train", "validation", "test")
# Reasons why rows are left out on purpose; those of BEFORE apply before anything looks for problems.
BEFORE = ("prompt also in test", "prompt held out for DPO", "not drawn")
ON_PURPOSE = (*BEFORE, "another completion of its prompt", "no demonstration", "debug=true")
TOO_LONG = ("too long", "identical after cutting", "no completion token left")
CUT = ("prompt cut", "completion cut")
# Problems of single rows. All others raise the question whether this is a preference data set at all.
SINGLE = ("exact duplicate", "more than one BOS", "completion without its one end token", "prompt without a token")

EXAMPLES_PER_REASON = 3
MAX_INVALID = 0.05  # share of rows that teach nothing, above which a run stops
WARN_TOO_LONG, MAX_TOO_LONG = 0.05, 0.5  # shares of rows cut or dropped for length, to warn of and to stop at
WARN_RETOKENIZED = 0.05  # share of rows whose completion was tokenized alone, to warn of


@dataclass
class SourceCounts:
    """Rows of one source: those read, those kept by split, and those dropped, or kept but cut, by reason."""

    read: int = 0
    kept: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    dropped: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)


@dataclass
class DataReport:
    """What became of the rows of each source, with the first origins of each reason."""

    on_bad_row: str = "drop"
    sources: dict[str, SourceCounts] = field(default_factory=lambda: defaultdict(SourceCounts))
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    left_out: set[str] = field(default_factory=set)  # reasons of the data set's own options
    notes: list[str] = field(default_factory=list)
    rows_measured: int = 0  # rows whose length was looked at
    retokenized: int = 0  # rows whose completions had to be tokenized without their prompt
    p99_length: int = 0  # the length.max that would keep 99% of the rows whole, in tokens

    def drop(self, row: dict[str, Any], reason: str) -> None:
        """Count a row that is not kept; raises PipelineError if it is invalid and the config says so."""
        if self.on_bad_row == "error" and self.is_invalid(reason):
            raise PipelineError(
                f"{row['origin']}: {reason}: correct the row or take it out, or drop such rows by "
                "dataset.on_bad_row=drop"
            )
        self.sources[row["source"]].dropped[reason] += 1
        self.add_example(row, reason)

    def mark_cut(self, row: dict[str, Any], reason: str) -> None:
        """Count a row that is kept, but not as it was."""
        self.sources[row["source"]].cut[reason] += 1
        self.add_example(row, reason)

    def add_example(self, row: dict[str, Any], reason: str) -> None:
        """Keep the origin of a row, if it is one of the first with this reason."""
        if len(self.examples[reason]) < EXAMPLES_PER_REASON:
            self.examples[reason].append(row["origin"])

    def is_invalid(self, reason: str) -> bool:
        """Whether rows teach nothing for this reason; not if they are left out on purpose, too long or cut."""
        return reason not in (*ON_PURPOSE, *self.left_out, *TOO_LONG, *CUT)

    def keep(self, split: str, rows: list[dict[str, Any]]) -> None:
        """Set the rows of a split that are kept."""
        counts = Counter(row["source"] for row in rows)
        for source in self.sources:
            self.sources[source].kept[split] = counts[source]

    def add_table(self, split: str, table: Any, rows: list[dict[str, Any]]) -> None:
        """Count what became of the rows of a split when `tokenize` made the table of them."""
        facts = json.loads(table.info.description)
        for number, reason in facts["dropped"]:
            self.drop(rows[number], reason)
        for number, reason in facts["cut"]:
            self.mark_cut(rows[number], reason)
        self.rows_measured += facts["rows_measured"]
        self.retokenized += facts["retokenized"]
        self.p99_length = max(self.p99_length, facts["p99_length"])
        self.keep(split, [rows[number] for number in table["row"]])

    def as_json(self) -> dict[str, Any]:
        """`{"sources": {name: {"read", "kept": {split: n}, "dropped": {reason: n}, "cut": {reason: n}}}}`."""
        return {"sources": {source: deepcopy(vars(counts)) for source, counts in self.sources.items()}}

    def table(self) -> str:
        """The report as Markdown, a line for each source, and the first row of each problem."""
        lines = [["source", "read", *SPLITS, "dropped", "cut"]]
        for source, counts in self.sources.items():
            numbers = [f"{number:,}" for number in (counts.read, *counts.kept.values())]
            dropped, cut = (
                ", ".join(f"{n:,} {reason}" for reason, n in reasons.items())
                for reasons in (counts.dropped, counts.cut)
            )
            lines.append([source, *numbers, dropped, cut])
        first_rows = [f"{reason}: {rows[0]}" for reason, rows in self.examples.items() if self.is_invalid(reason)]
        return "\n".join([markdown_table(lines), *first_rows])

    def list_reasons(self, reasons: dict[str, int]) -> str:
        """Each reason with its number of rows, and where the first one is."""
        return "; ".join(f"{n} {reason} ({self.examples[reason][0]})" for reason, n in reasons.items())

    def invalid_sources(self) -> list[str]:
        """A sentence for each source of whose rows more than 5% teach nothing."""
        sentences = []
        for source, counts in self.sources.items():
            invalid = {
                reason: n for reason, n in counts.dropped.items() if self.is_invalid(reason) and reason not in SINGLE
            }
            checked = counts.read - sum(counts.dropped[reason] for reason in {*BEFORE, *self.left_out})
            if sum(invalid.values()) > MAX_INVALID * checked:
                sentences.append(
                    f"{sum(invalid.values())} of {checked} rows of {source} teach nothing, more than "
                    f"{MAX_INVALID:.0%}: {self.list_reasons(invalid)}: check that dataset= fits the form of this file "
                    "and that chosen and rejected are the columns meant, or take them out"
                )
        return sentences

    def count_too_long(self) -> tuple[int, int]:
        """How many rows the length limits have dropped, and how many cut."""
        dropped = sum(counts.dropped[reason] for counts in self.sources.values() for reason in TOO_LONG)
        return dropped, sum(counts.cut.total() for counts in self.sources.values())

    def errors(self, context: int) -> list[str]:
        """What ends a run: a sentence for each source that teaches too little, and one if too much is too long."""
        sentences = self.invalid_sources()
        if sum(self.count_too_long()) > MAX_TOO_LONG * self.rows_measured:
            sentences.append(self.length_message(context))
        return sentences

    def warnings(self, context: int) -> list[str]:
        """What a run warns of: a sentence each."""
        sentences = list(self.notes)
        for source, counts in self.sources.items():
            for reason in sorted(self.left_out - {*ON_PURPOSE}):
                if (count := counts.dropped[reason]) > counts.read / 2:
                    example = self.examples[reason][0]
                    sentences.append(
                        f"{count} of {counts.read} rows of {source} are left out: {reason} (such as {example})"
                    )
        if WARN_TOO_LONG * self.rows_measured < sum(self.count_too_long()) <= MAX_TOO_LONG * self.rows_measured:
            sentences.append(self.length_message(context))
        if self.retokenized > WARN_RETOKENIZED * self.rows_measured:
            sentences.append(
                f"{self.retokenized} of {self.rows_measured} rows: the prompt's tokens change when a completion "
                "follows, so the completion was tokenized alone: end the prompts where a token ends (a line break, "
                "or no trailing space)"
            )
        return sentences

    def length_message(self, context: int) -> str:
        """What the length limits do, and the limit that would keep 99% of the rows whole."""
        dropped, cut = self.count_too_long()
        share = (dropped + cut) / self.rows_measured
        message = (
            f"{share:.0%} of {self.rows_measured} rows are too long: {dropped} dropped, {cut} cut: "
            f"`length.max={self.p99_length}` would keep 99% of them whole"
        )
        if self.p99_length > context:
            message += f", and the model reads {context}: `length.max={context}`, or one of longer context, keeps most"
        return message
