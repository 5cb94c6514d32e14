"""People as a judge: pairs of completions go into a blind sheet, and the sheets that readers filled in are read."""

import csv
import hashlib
import io
import itertools
import json
import logging
import os
import random
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from dpo_pipeline.data.normalize import prompt_to_text
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.estimates import Estimate, proportion
from dpo_pipeline.formatting import format_estimate, format_number, render_template
from dpo_pipeline.judges.judge import Completion, Judge, Results, score_each

log = logging.getLogger(__name__)

TEXTS = ("prompt", "completion_a", "completion_b")
MARKS = {"better": ("A", "B", "same"), "rating_a": tuple("12345"), "rating_b": tuple("12345")}
COLUMNS = ("id", *TEXTS, *MARKS)
VALUE_OF_A = {"A": 1.0, "same": 0.5, "B": 0.0}
FORMULA = re.compile(r"'*[=+\-@\t]")  # a spreadsheet would run it, unless a ' stands before it

Sheet = dict[str, dict[str, str]]  # rows by id


def human(folder: str | Path, sheets: list[str] | str, seed: int) -> Judge:
    """Without `sheets`, writes pairs into a blind sheet in `folder`; with them, gives what their readers filled in.

    It chooses by the mean verdict of the readers who judged a pair, and scores a completion by its mean rating, 1 to
    5, over rows and readers; None where nobody did. `seed` draws the order of the rows, and which completion is A.
    Raises PipelineError if a sheet cannot be read, or is not the one that was written.
    """
    readers = read_sheets(Path(folder), [sheets] if isinstance(sheets, str) else sheets)
    verdicts, ratings = collect_marks(readers)

    def score(completion: Completion) -> float | None:
        values = ratings.get(completion_key(completion))
        return fmean(values) if values else None

    def choose(pairs: list[tuple[Completion, Completion]]) -> Results:
        keys = [(*completion_key(first), completion_key(second)[1]) for first, second in pairs]
        known = set().union(*readers.values())
        if not readers:
            write_sheets(Path(folder), keys, seed)
        elif missing := {row_id(*key) for key in keys if key[1] != key[2]} - known:
            log.warning("%d pairs are in no sheet and left out: without judge.human.sheets they join it", len(missing))
        for index, key in enumerate(keys):
            yield index, 0.5 if readers and key[1] == key[2] else majority(verdicts.get(key))

    return Judge(score_each(score), choose, post_training_only=True)


def collect_marks(readers: dict[str, Sheet]) -> tuple[dict[Any, list[float]], dict[Any, list[float]]]:
    """Verdicts for the first text by (prompt, first, second), in both orders; ratings by (prompt, text)."""
    verdicts, ratings = defaultdict(list), defaultdict(list)
    for row in itertools.chain(*(sheet.values() for sheet in readers.values())):
        prompt, a, b = (row[name] for name in TEXTS)
        if row["better"]:
            verdicts[prompt, a, b].append(VALUE_OF_A[row["better"]])
            verdicts[prompt, b, a].append(1 - VALUE_OF_A[row["better"]])
        for text, rating in ((a, row["rating_a"]), (b, row["rating_b"])):
            if rating:
                ratings[prompt, text].append(float(rating))
    return verdicts, ratings


def majority(values: list[float] | None) -> float | None:
    """1 if the mean is above one half, 0 if below, 0.5 if equal; None without values."""
    if not values:
        return None
    mean = fmean(values)
    return 0.5 if mean == 0.5 else float(mean > 0.5)


def completion_key(completion: Completion) -> tuple[str, str]:
    """The prompt and the text of a completion as a sheet holds them: spreadsheets change line breaks."""
    prompt, text = (re.sub(r"\r\n?", "\n", part) for part in (prompt_to_text(completion.prompt), completion.text))
    return prompt, text


def row_id(prompt: str, first: str, second: str) -> str:
    """The id of a pair in either order; it begins with a letter, so that no spreadsheet takes it for a number."""
    return "r" + hashlib.sha256(json.dumps([prompt, *sorted([first, second])]).encode()).hexdigest()[:12]


def write_sheets(folder: Path, keys: list[tuple[str, str, str]], seed: int) -> None:
    """Add pairs (prompt and two texts) to sheet.csv and sheet.html in `folder`; the rows that are there stay."""
    file, page = folder / "sheet.csv", folder / "sheet.html"
    sheet = read_sheet(file) if file.is_file() else {}
    for prompt, *texts in keys:
        key = row_id(prompt, *texts)
        if texts[0] != texts[1] and key not in sheet:
            a, b = sorted(texts, reverse=random.Random(f"A {seed} {key}").random() < 0.5)
            sheet[key] = dict(zip(COLUMNS, (key, prompt, a, b, "", "", ""), strict=True))
    rows = sorted(sheet.values(), key=lambda row: random.Random(f"order {seed} {row['id']}").random())
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8-sig", newline="") as stream:  # by its mark spreadsheets know UTF-8
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows(["'" * bool(FORMULA.match(row[name])) + row[name] for name in COLUMNS] for row in rows)
    os.replace(partial, file)
    columns = ("id", *MARKS)
    page.write_text(render_template(Path(__file__).parent / "human.html.jinja", rows=rows, columns=columns), "utf-8")
    message = (
        "%d pairs to judge: each reader opens %s in a browser and saves a CSV file, or fills in %s; then repeat the "
    )
    log.info(message + "command with 'judge.human.sheets=[FILE,...]'", len(rows), page, file)


def read_sheets(folder: Path, files: list[str]) -> dict[str, Sheet]:
    """The sheet of each reader, compared with the one in `folder`; logs how far several readers agree."""
    if len(set(files)) < len(files):
        raise PipelineError(f"judge.human.sheets={files} names a file twice: give the file of each reader once")
    written = read_sheet(folder / "sheet.csv") if files else None
    readers = {file: read_sheet(Path(file).expanduser(), written) for file in files}
    if len(readers) > 1:
        same, kappas = agreement(readers)
        listed = ", ".join(f"{format_number(kappa)} ({names})" for names, kappa in kappas.items())
        share = format_estimate(same) if same else "none"
        message = "%d readers: the same verdict on %s of the pairs that two or more judged; Cohen's kappa %s"
        log.info(message, len(readers), share, listed)
    return readers


def agreement(readers: dict[str, Sheet]) -> tuple[Estimate | None, dict[str, float | None]]:
    """How far the readers of one sheet agree on which completion is better.

    The share of the rows judged by two or more on which all of them say the same, None without such rows; and for each
    two readers Cohen's kappa of A, B and same (Cohen 1960), None where chance alone would agree.
    """
    import pandas as pd

    marks = pd.DataFrame({name: {key: row["better"] for key, row in sheet.items()} for name, sheet in readers.items()})
    marks = marks.where(marks != "")
    judged_twice = marks[marks.count(axis=1) > 1]
    same = (judged_twice.nunique(axis=1) == 1).astype(float).tolist()
    kappas: dict[str, float | None] = {}
    for first, second in itertools.combinations(marks, 2):
        both = marks[[first, second]].dropna()
        observed = (both[first] == both[second]).mean()
        chance = sum((both[first] == mark).mean() * (both[second] == mark).mean() for mark in MARKS["better"])
        kappas[f"{first}, {second}"] = float((observed - chance) / (1 - chance)) if len(both) and chance < 1 else None
    return proportion(same) if same else None, kappas


def read_sheet(file: Path, original: Sheet | None = None) -> Sheet:
    """The rows of a sheet by id; of a reader's sheet, the rows of `original` with the reader's marks.

    Raises PipelineError if it cannot be read, or if its rows are not those that were written.
    """
    if not file.is_file():
        raise PipelineError(f"there is no sheet {file}: leave out judge.human.sheets to write one, or check the path")
    try:
        text = file.read_bytes().decode("utf-8-sig")
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="", delimiter=delimiter, strict=True)
        columns, lines = reader.fieldnames or [], list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise PipelineError(f"{file} cannot be read ({error}): save it as CSV in UTF-8") from error
    if lacking := {"id", *MARKS, *(TEXTS if original is None else ())} - {*columns}:
        raise PipelineError(f"{file} has no column {', '.join(sorted(lacking))}: keep the first line of sheet.csv")
    sheet: Sheet = {}
    for number, line in enumerate(lines, 2):
        row = {name: clean_cell(name, line[name]) for name in COLUMNS if name in columns}
        if any(row.values()):  # spreadsheets add empty rows
            sheet[row["id"]] = check_row(row, f"{file}, row {number}", sheet, original)
    if missing := [key for key in original or {} if key not in sheet]:
        raise PipelineError(f"{file} lacks {len(missing)} rows, such as {missing[0]}: copy them back from sheet.csv")
    return sheet


def clean_cell(column: str, cell: str) -> str:
    """A cell without what spreadsheets and people change: line breaks, the ' before a formula, case and spaces."""
    if column in TEXTS:
        return re.sub(r"\r\n?", "\n", cell[1:] if re.match(f"'{FORMULA.pattern}", cell) else cell)
    values = {value.casefold(): value for value in MARKS.get(column, ())}
    return values.get(cell.strip().casefold(), cell.strip())


def check_row(row: dict[str, str], label: str, sheet: Sheet, original: Sheet | None) -> dict[str, str]:
    """The row with its texts; raises PipelineError if it was changed or doubled, or if a mark is not allowed."""
    key, source = row["id"], row if original is None else original.get(row["id"], {})
    complete = {**source, **row}
    texts = [complete.get(name, "") for name in TEXTS]
    if key in sheet or texts != [source.get(name, "") for name in TEXTS] or key != row_id(*texts):
        raise PipelineError(f"{label}: {key or 'no id'} is there twice, or not as it was written: undo that change")
    for column, allowed in MARKS.items():
        if row[column] and row[column] not in allowed:
            raise PipelineError(f"{label}: {column} is {row[column]!r}: type one of {', '.join(allowed)}, or nothing")
    return complete
