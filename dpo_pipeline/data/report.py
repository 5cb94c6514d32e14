"""The account of a data set: what became of every row that was read, by source, and whether that can be right."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from dpo_pipeline.errors import PipelineError
from dpo_pipeline.formatting import markdown_table

EXAMPLES = 3  # origins kept of each reason
SPLITS = ("train", "validation", "test")
# Reasons to leave a row out on purpose, those of length, and faults that cost one row but damn no data set. All others
# are faults after which one asks whether this is a preference data set at all.
BEFORE = ("prompt also in test", "prompt held out for DPO", "not drawn")  # known before faults are looked for
ON_PURPOSE = (*BEFORE, "another completion of its prompt", "no demonstration", "debug=true")
LENGTH = ("too long", "identical after cutting", "no completion token left")
SINGLE = ("exact duplicate", "more than one BOS", "completion without its one end token", "prompt without a token")
FAULTY = 0.05  # share of rows that teach nothing, above which a set is not what it is taken for
TOUCHED, LOST = 0.05, 0.5  # shares of rows cut or dropped for length: to be warned of, and to stop at
MERGED = 0.05  # share of rows whose completion was tokenized alone, to be warned of


@dataclass
class DataReport:
    """Rows read and kept by source, and the reasons why others were dropped, or were kept but cut."""

    on_bad_row: str = "drop"
    read: Counter[str] = field(default_factory=Counter)
    kept: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    dropped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    cut: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # first origins, by reason
    on_purpose: set[str] = field(default_factory=lambda: set(ON_PURPOSE))
    notes: list[str] = field(default_factory=list)
    rows_measured: int = 0  # rows whose length was looked at
    retokenized: int = 0  # rows whose completions had to be tokenized without their prompt
    p99_length: int = 0  # the length.max that would keep 99% of the rows whole, in tokens

    def drop(self, row: dict[str, Any], reason: str) -> None:
        """Count a row that is not kept; raises PipelineError for a bad one where the config says so."""
        self.dropped[row["source"]][reason] += 1
        self.add_example(reason, row["origin"])

    def mark_cut(self, row: dict[str, Any], reason: str) -> None:
        """Count a row that is kept, but not as it was."""
        self.cut[row["source"]][reason] += 1
        self.add_example(reason, row["origin"])

    def add_example(self, reason: str, origin: str) -> None:
        """Keep the first origins of a reason; raises PipelineError where a bad row is to end the run."""
        if self.on_bad_row == "error" and reason not in (*self.on_purpose, *LENGTH, "prompt cut", "completion cut"):
            raise PipelineError(
                f"{origin}: {reason}: correct the row or take it out, or drop such rows by dataset.on_bad_row=drop"
            )
        if len(self.examples[reason]) < EXAMPLES:
            self.examples[reason].append(origin)

    def keep(self, split: str, rows: list[dict[str, Any]]) -> None:
        """Set the rows of a split that are kept."""
        found = Counter(row["source"] for row in rows)
        for source in self.read:
            self.kept[source][split] = found[source]

    def to_dict(self) -> dict[str, Any]:
        """What `hear` of another account takes, as JSON."""
        names = ("dropped", "cut", "examples", "rows_measured", "retokenized", "p99_length")
        return {name: getattr(self, name) for name in names}

    def merge(self, other: dict[str, Any]) -> None:
        """Take in what the account of some of these rows has told."""
        for mine, theirs in ((self.dropped, other["dropped"]), (self.cut, other["cut"])):
            for source, reasons in theirs.items():
                mine[source].update(reasons)
        for reason, origins in other["examples"].items():
            for origin in origins:
                self.add_example(reason, origin)
        self.rows_measured += other["rows_measured"]
        self.retokenized += other["retokenized"]
        self.p99_length = max(self.p99_length, other["p99_length"])

    def as_json(self) -> dict[str, Any]:
        """`{"sources": {name: {"read", "kept": {split: n}, "dropped": {reason: n}, "cut": {reason: n}}}}`."""
        return {
            "sources": {
                source: {
                    "read": read,
                    "kept": {split: self.kept[source][split] for split in SPLITS},
                    "dropped": dict(self.dropped[source]),
                    "cut": dict(self.cut[source]),
                }
                for source, read in self.read.items()
            }
        }

    def table(self) -> str:
        """The account as Markdown, a line for each source, and where the first bad row of each kind is."""
        lines = [["source", "read", *SPLITS, "dropped", "cut"]]
        for source, part in self.as_json()["sources"].items():
            reasons = (", ".join(f"{n:,} {reason}" for reason, n in part[key].items()) for key in ("dropped", "cut"))
            lines.append([source, f"{part['read']:,}", *(f"{part['kept'][s]:,}" for s in SPLITS), *reasons])
        bad = [
            reason
            for reason in self.examples
            if reason not in (*self.on_purpose, *LENGTH, "prompt cut", "completion cut")
        ]
        return "\n".join([markdown_table(lines), *(f"{reason}: {self.examples[reason][0]}" for reason in bad)])

    def invalid_sources(self) -> list[str]:
        """A sentence for each source of whose rows more than 5% teach nothing."""
        sentences = []
        for source, read in self.read.items():
            gone = self.dropped[source]
            faults = {r: n for r, n in gone.items() if r not in (*self.on_purpose, *LENGTH, *SINGLE)}
            # Of the rows in which faults were looked for.
            meant = read - sum(n for r, n in gone.items() if r in BEFORE or r in self.on_purpose - set(ON_PURPOSE))
            if (bad := sum(faults.values())) > FAULTY * meant:
                listed = "; ".join(f"{n} {reason} ({self.examples[reason][0]})" for reason, n in faults.items())
                sentences.append(
                    f"{bad} of {meant} rows of {source} teach nothing, more than {FAULTY:.0%}: {listed}: check that "
                    "dataset= fits the form of this file and that chosen and rejected are the columns meant, or take "
                    "them out"
                )
        return sentences

    def count_too_long(self) -> tuple[int, int]:
        """How many rows the limits of length have dropped, and how many cut."""
        lost = sum(reasons[name] for reasons in self.dropped.values() for name in LENGTH)
        return lost, sum(reasons[name] for reasons in self.cut.values() for name in ("prompt cut", "completion cut"))

    def errors(self, context: int) -> list[str]:
        """What ends a run: a sentence for each source that teaches too little, and one where too much is too long."""
        return self.invalid_sources() + (
            [self.length_message(context)] if sum(self.count_too_long()) > LOST * self.rows_measured else []
        )

    def warnings(self, context: int) -> list[str]:
        """What a run warns of: a sentence each."""
        sentences = list(self.notes)
        for source, read in self.read.items():
            for reason in sorted(self.on_purpose - set(ON_PURPOSE)):
                if (n := self.dropped[source][reason]) > read / 2:
                    first = self.examples[reason][0]
                    sentences.append(f"{n} of {read} rows of {source} are left out: {reason} (such as {first})")
        if TOUCHED * self.rows_measured < sum(self.count_too_long()) <= LOST * self.rows_measured:
            sentences.append(self.length_message(context))
        if self.retokenized > MERGED * self.rows_measured:
            sentences.append(
                f"{self.retokenized} of {self.rows_measured} rows: the prompt's tokens change when a completion "
                "follows, so the completion was tokenized alone: end the prompts where a token ends (a line break, "
                "or no trailing space)"
            )
        return sentences

    def length_message(self, context: int) -> str:
        """What the limits of length do, and the limit that would keep 99% of the rows whole."""
        lost, cut = self.count_too_long()
        beyond = ""
        if self.p99_length > context:
            beyond = (
                f", and the model reads {context}: `length.max={context}`, or a model of longer context, keeps most"
            )
        return (
            f"{(lost + cut) / self.rows_measured:.0%} of {self.rows_measured} rows are too long: {lost} dropped, "
            f"{cut} cut: `length.max={self.p99_length}` would keep 99% of them whole{beyond}"
        )
