"""People as a judge: pairs of completions go into a blind sheet, and the sheets that readers filled in are read."""

import csv
import hashlib
import io
import json
import logging
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
from dpo_pipeline.record import write_file

log = logging.getLogger(__name__)

TEXTS = ("prompt", "completion_a", "completion_b")
MARKS = {"better": ("A", "B", "same"), "rating_a": tuple("12345"), "rating_b": tuple("12345")}
COLUMNS = ("id", *TEXTS, *MARKS)
VALUE_OF_A = {"A": 1.0, "same": 0.5, "B": 0.0}
FORMULA = r"'*[=+\-@\t]"  # a spreadsheet would run it, unless a ' stands before it


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
        values = [VALUE_OF_A[row["better"]]] if row["better"] else []
        verdicts[a, b] += values
        verdicts[b, a] += [1 - value for value in values]
        for key, rating in ((a, row["rating_a"]), (b, row["rating_b"])):
            ratings[key] += [float(rating)] if rating else []
    if judged_twice := [values for (a, b), values in verdicts.items() if a < b and len(values) > 1]:
        share = format_estimate(proportion([float(len(set(values)) == 1) for values in judged_twice]))
        log.info("%d readers: the same verdict on %s of the pairs that two or more judged", len(files), share)

    def score(completion: Completion) -> float | None:
        values = ratings.get(completion_key(completion.prompt, completion.text))
        return fmean(values) if values else None

    def choose(pairs: list[tuple[Completion, Completion]]) -> Results:
        keys = [tuple(completion_key(each.prompt, each.text) for each in pair) for pair in pairs]
        if not files:
            write_sheets(Path(folder), pairs, seed)
        elif missing := {frozenset(both) for both in keys if both[0] != both[1] and both not in verdicts}:
            log.warning("%d pairs are in no sheet and left out: without judge.human.sheets they join it", len(missing))
        for index, both in enumerate(keys):
            values = [0.5] if files and both[0] == both[1] else verdicts.get(both)
            mean = fmean(values) if values else None
            yield index, mean if mean in (None, 0.5) else float(mean > 0.5)

    return Judge(score_each(score), choose, post_training_only=True)


def completion_key(prompt: str | list[dict], text: str) -> str:
    """Half the id of a row, which names A and B in this order; a letter opens it, or spreadsheets see a number."""
    # Spreadsheets change line breaks.
    texts = [re.sub(r"\r\n?", "\n", each) for each in (prompt_to_text(prompt), text)]
    return "r" + hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def write_sheets(folder: Path, pairs: list[tuple[Completion, Completion]], seed: int) -> None:
    """Add pairs of completions to sheet.csv and sheet.html in `folder`; rows that are there stay."""
    file, page = folder / "sheet.csv", folder / "sheet.html"
    rows = {row["id"]: row for row in read_sheet(file)} if file.is_file() else {}
    for pair in pairs:
        texts = {completion_key(each.prompt, each.text): each.text for each in pair}
        keys = sorted(texts, key=lambda key: random.Random(f"{seed} {key}").random())
        ids = ["-".join(keys), "-".join(keys[::-1])]
        if len(texts) == 2 and not any(each in rows for each in ids):
            cells = (ids[0], prompt_to_text(pair[0].prompt), *(texts[key] for key in keys), "", "", "")
            rows[ids[0]] = dict(zip(COLUMNS, cells, strict=True))
    ordered = sorted(rows.values(), key=lambda row: random.Random(f"{seed} {row['id']}").random())
    stream = io.StringIO(newline="")
    cells = ([re.sub(f"^(?={FORMULA})", "'", row[name]) for name in COLUMNS] for row in ordered)
    csv.writer(stream).writerows([COLUMNS, *cells])
    write_file(file, stream.getvalue().encode("utf-8-sig"))  # by its mark spreadsheets know UTF-8
    template = Path(__file__).with_name("human.html.jinja")
    write_file(page, render_template(template, rows=ordered, columns=("id", *MARKS)).encode())
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
    marks = {mark.casefold(): mark for allowed in MARKS.values() for mark in allowed}
    for number, line in enumerate(lines, 2):
        row = {name: re.sub(f"^'(?={FORMULA})", "", line[name]) for name in TEXTS if name in columns}
        row |= {name: marks.get(line[name].strip().casefold(), line[name].strip()) for name in ("id", *MARKS)}
        if not any(row.values()):
            continue  # spreadsheets add empty rows
        is_intact = row["id"] not in rows and re.fullmatch(r"r\w{12}-r\w{12}", row["id"])
        if is_intact and columns >= {*TEXTS}:
            is_intact = row["id"] == "-".join(completion_key(row["prompt"], row[name]) for name in TEXTS[1:])
        if not is_intact:
            raise PipelineError(f"{file}, row {number}: it is there twice, or not as it was written: undo that change")
        for column, allowed in MARKS.items():
            if row[column] not in ("", *allowed):
                options = ", ".join(allowed)
                raise PipelineError(f"{file}, row {number}: {column} is {row[column]!r}: type {options}, or nothing")
        rows[row["id"]] = row
    return list(rows.values())
