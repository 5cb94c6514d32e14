"""People as a judge: pairs of completions go into a blind sheet, and the sheets that readers filled in are read."""

import csv
import hashlib
import io
import json
import logging
import os
import random
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from dpo_pipeline.data.normalize import prompt_to_text
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.estimates import proportion
from dpo_pipeline.formatting import format_estimate, render_template
from dpo_pipeline.judges.judge import Completion, Judge, Results, score_each

log = logging.getLogger(__name__)

TEXTS = ("prompt", "completion_a", "completion_b")
MARKS = {"better": ("A", "B", "same"), "rating_a": tuple("12345"), "rating_b": tuple("12345")}
COLUMNS = ("id", *TEXTS, *MARKS)
VALUE_OF_A = {"A": 1.0, "same": 0.5, "B": 0.0}
FORMULA = re.compile(r"'*[=+\-@\t]")  # a spreadsheet would run it, unless a ' stands before it


def human(folder: str | Path, sheets: list[str] | str, seed: int) -> Judge:
    """Without `sheets`, writes pairs into a blind sheet in `folder`; with them, gives what their readers filled in.

    It chooses by the mean verdict of the readers who judged a pair, and scores a completion by its mean rating, 1 to
    5, over rows and readers; None where nobody did. `seed` draws the order of the rows, and which completion is A.
    Raises PipelineError if a sheet cannot be read, or is not as it was written.
    """
    files = [sheets] if isinstance(sheets, str) else sheets
    if len(set(files)) < len(files):
        raise PipelineError(f"judge.human.sheets={files} names a file twice: give the file of each reader once")
    verdicts, ratings = defaultdict(list), defaultdict(list)  # by the keys of two completions, and of one
    for row in [row for file in files for row in read_sheet(Path(file))]:
        a, b = row["id"].split("-")
        value = VALUE_OF_A.get(row["better"])
        verdicts[a, b] += [] if value is None else [value]
        verdicts[b, a] += [] if value is None else [1 - value]
        for key, rating in ((a, row["rating_a"]), (b, row["rating_b"])):
            ratings[key] += [float(rating)] if rating else []
    if judged_twice := [values for (a, b), values in verdicts.items() if a < b and len(values) > 1]:
        share = format_estimate(proportion([float(len(set(values)) == 1) for values in judged_twice]))
        log.info("%d readers: the same verdict on %s of the pairs that two or more judged", len(files), share)

    def score(completion: Completion) -> float | None:
        values = ratings.get(completion_key(prompt_to_text(completion.prompt), completion.text))
        return fmean(values) if values else None

    def choose(pairs: list[tuple[Completion, Completion]]) -> Results:
        texts = [(prompt_to_text(first.prompt), first.text, second.text) for first, second in pairs]
        keys = [(completion_key(prompt, first), completion_key(prompt, second)) for prompt, first, second in texts]
        if not files:
            write_sheets(Path(folder), texts, seed)
        elif missing := {frozenset(both) for both in keys if both[0] != both[1] and both not in verdicts}:
            log.warning("%d pairs are in no sheet and left out: without judge.human.sheets they join it", len(missing))
        for index, both in enumerate(keys):
            values = [0.5] if files and both[0] == both[1] else verdicts.get(both)
            mean = fmean(values) if values else None
            yield index, mean if mean in (None, 0.5) else float(mean > 0.5)

    return Judge(score_each(score), choose, post_training_only=True)


def completion_key(prompt: str, text: str) -> str:
    """Half the id of a row, which names A and B in this order; a letter opens it, or spreadsheets see a number."""
    texts = [re.sub(r"\r\n?", "\n", each) for each in (prompt, text)]  # spreadsheets change line breaks
    return "r" + hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def write_sheets(folder: Path, pairs: list[tuple[str, str, str]], seed: int) -> None:
    """Add pairs, each a prompt and two texts, to sheet.csv and sheet.html in `folder`; rows that are there stay."""
    file, page = folder / "sheet.csv", folder / "sheet.html"
    rows = {row["id"]: row for row in read_sheet(file)} if file.is_file() else {}
    for prompt, *texts in pairs:
        texts.sort(key=lambda text: random.Random(f"{seed} {completion_key(prompt, text)}").random())
        a, b = (completion_key(prompt, text) for text in texts)
        if a != b and f"{a}-{b}" not in rows and f"{b}-{a}" not in rows:
            rows[f"{a}-{b}"] = dict(zip(COLUMNS, (f"{a}-{b}", prompt, *texts, "", "", ""), strict=True))
    ordered = sorted(rows.values(), key=lambda row: random.Random(f"{seed} {row['id']}").random())
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8-sig", newline="") as stream:  # by its mark spreadsheets know UTF-8
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows(["'" * bool(FORMULA.match(row[name])) + row[name] for name in COLUMNS] for row in ordered)
    os.replace(partial, file)
    template = Path(__file__).parent / "human.html.jinja"
    page.write_text(render_template(template, rows=ordered, columns=("id", *MARKS)), "utf-8")
    log.info(
        "%d pairs to judge: each reader opens %s in a browser and saves a CSV file, or fills in %s; then repeat the "
        "command with 'judge.human.sheets=[FILE,...]'",
        *(len(rows), page, file),
    )


def read_sheet(file: Path) -> list[dict[str, str]]:
    """The rows of a sheet, those of sheet.csv with their texts; raises PipelineError for a row that was changed."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="", delimiter=delimiter, strict=True)
        columns, lines = {*(reader.fieldnames or ())}, list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PipelineError(f"the sheet {file} cannot be read ({error}): save it as CSV in UTF-8") from error
    if lacking := {"id", *MARKS} - columns:
        raise PipelineError(f"{file} has no column {', '.join(sorted(lacking))}: keep the first line of sheet.csv")
    rows: dict[str, dict[str, str]] = {}
    for number, line in enumerate(lines, 2):
        row = {name: clean_cell(name, line[name]) for name in COLUMNS if name in columns}
        if not any(row.values()):
            continue  # spreadsheets add empty rows
        is_intact = row["id"] not in rows and re.fullmatch(r"r\w{12}-r\w{12}", row["id"])
        if columns >= {*TEXTS} and is_intact:
            is_intact = row["id"] == "-".join(completion_key(row["prompt"], row[name]) for name in TEXTS[1:])
        if not is_intact:
            raise PipelineError(f"{file}, row {number}: it is there twice, or not as it was written: undo that change")
        for column, allowed in MARKS.items():
            if row[column] not in ("", *allowed):
                options = ", ".join(allowed)
                raise PipelineError(f"{file}, row {number}: {column} is {row[column]!r}: type {options}, or nothing")
        rows[row["id"]] = row
    return list(rows.values())


def clean_cell(column: str, cell: str) -> str:
    """A cell without what spreadsheets and people add: the ' before a formula, and case and spaces of a mark."""
    if column in TEXTS:
        return cell[1:] if re.match(f"'{FORMULA.pattern}", cell) else cell
    values = {value.casefold(): value for value in MARKS.get(column, ())}
    return values.get(cell.strip().casefold(), cell.strip())
