"""People as a judge: pairs of completions go into a blind sheet, and what its readers filled in is read back."""

import csv
import hashlib
import io
import itertools
import json
import logging
import os
import random
import re
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from dpo_pipeline import estimates
from dpo_pipeline.data.normalize import prompt_to_text
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.formatting import format_estimate, format_number
from dpo_pipeline.judges.judge import Choices, Completion, Judge, Scores

log = logging.getLogger(__name__)

TEXTS = ("prompt", "completion_a", "completion_b")
GIVEN = {"better": ("A", "B", "same"), "rating_a": ("1", "2", "3", "4", "5"), "rating_b": ("1", "2", "3", "4", "5")}
COLUMNS = ("id", *TEXTS, *GIVEN)
VALUES = {"A": 1.0, "same": 0.5, "B": 0.0}
FORMULA = re.compile(r"'*[=+\-@\t]")  # what a spreadsheet would run, or is kept from running by a ' before it

Sheet = dict[str, dict[str, str]]  # rows by id


def human(folder: str | Path, sheets: list[str] | str, seed: int) -> Judge:
    """Writes the pairs into a blind sheet in `folder`; given `sheets` that readers filled in, says what these say.

    It chooses by the mean verdict of those who judged a pair, and scores a completion by its mean rating, 1 to 5, over
    rows and readers; None where nobody did, and throughout without `sheets`. `seed` draws the order of the rows and
    which completion is A. Raises PipelineError where a sheet is not the one that was written, or cannot be read.
    """
    readers = read_sheets(folder, [sheets] if isinstance(sheets, str) else sheets)
    verdicts: dict[tuple[str, ...], list[float]] = {}  # by prompt, a completion, and the one it is held against
    ratings: dict[tuple[str, ...], list[float]] = {}  # by prompt and completion
    rows = [row for sheet in readers.values() for row in sheet.values()]
    for row, (one, other) in itertools.product(rows, ("ab", "ba")):
        prompt, text = row["prompt"], row[f"completion_{one}"]
        given = verdicts.setdefault((prompt, text, row[f"completion_{other}"]), [])
        if row["better"]:
            given.append(VALUES[row["better"]] if one == "a" else 1 - VALUES[row["better"]])
        if row[f"rating_{one}"]:
            ratings.setdefault((prompt, text), []).append(float(row[f"rating_{one}"]))

    def score(completions: list[Completion]) -> Scores:
        yield from (
            (i, mean_or_none(ratings.get(completion_key(completion)))) for i, completion in enumerate(completions)
        )

    def choose(pairs: list[tuple[Completion, Completion]]) -> Choices:
        keys = [(*completion_key(first), completion_key(second)[1]) for first, second in pairs]
        if not readers:
            write_sheets(Path(folder), keys, seed)
        elif unasked := {row_id(*key) for key in keys if key[1] != key[2] and key not in verdicts}:
            log.warning(
                "%d pairs are in no sheet, and count for nothing: leave out judge.human.sheets, and %s gets them too",
                *(len(unasked), Path(folder) / "sheet.csv"),
            )
        for i, key in enumerate(keys):
            found = 0.5 if readers and key[1] == key[2] else mean_or_none(verdicts.get(key))
            yield i, None if found is None else 1.0 if found > 0.5 else 0.5 if found == 0.5 else 0.0

    return Judge(score, choose, post_training_only=True)


def mean_or_none(values: list[float] | None) -> float | None:
    """The mean; None of nothing."""
    return fmean(values) if values else None


def completion_key(completion: Completion) -> tuple[str, str]:
    """The prompt and the text of a completion as a sheet has them: spreadsheets change line breaks."""
    prompt, text = (re.sub(r"\r\n?", "\n", part) for part in (prompt_to_text(completion.prompt), completion.text))
    return prompt, text


def row_id(prompt: str, first: str, second: str) -> str:
    """What tells a pair from others, in either order; it begins with a letter, or spreadsheets might see a number."""
    return "r" + hashlib.sha256(json.dumps([prompt, *sorted([first, second])]).encode()).hexdigest()[:12]


def write_sheets(folder: Path, keys: list[tuple[str, str, str]], seed: int) -> None:
    """Add pairs (prompt and two completions) to the sheet in `folder`, as CSV and as a page; keep what is there."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    file, page = folder / "sheet.csv", folder / "sheet.html"
    sheet = read_sheet(file) if file.is_file() else {}
    for prompt, *texts in keys:
        name = row_id(prompt, *texts)
        if texts[0] != texts[1] and name not in sheet:
            a, b = sorted(texts, reverse=random.Random(f"A {seed} {name}").random() < 0.5)
            sheet[name] = dict.fromkeys(COLUMNS, "") | {
                "id": name,
                "prompt": prompt,
                "completion_a": a,
                "completion_b": b,
            }
    rows = sorted(sheet.values(), key=lambda row: random.Random(f"order {seed} {row['id']}").random())
    lines = io.StringIO(newline="")
    writer = csv.writer(lines)
    writer.writerow(COLUMNS)
    writer.writerows(["'" * bool(FORMULA.match(row[name])) + row[name] for name in COLUMNS] for row in rows)
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    blank = [{name: row[name] for name in ("id", *TEXTS)} for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    for place, text in (
        (file, "\ufeff" + lines.getvalue()),  # by which spreadsheets know UTF-8
        (page, templates.get_template("human.html.jinja").render(rows=blank, columns=COLUMNS)),
    ):
        partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
        partial.write_text(text, encoding="utf-8", newline="")
        os.replace(partial, place)
    log.info(
        "%d pairs await people: %s in a browser, which saves a CSV file for each reader, or %s in a spreadsheet; then "
        "type the same with 'judge.human.sheets=[FILE,...]'",
        *(len(rows), page, file),
    )


def read_sheets(folder: str | Path, names: list[str]) -> dict[str, Sheet]:
    """What each file of a reader says, checked against the sheet in `folder`; tells how far they agree."""
    if len(set(names)) < len(names):
        raise PipelineError(f"judge.human.sheets={names} names a file twice: give the file of each reader once")
    asked = read_sheet(Path(folder) / "sheet.csv") if names else None
    readers = {name: read_sheet(Path(name).expanduser(), asked) for name in names}
    if len(readers) > 1:
        found = agreement(readers)
        log.info(
            "%d readers: the same verdict on %s of the pairs that two or more judged; Cohen's kappa %s",
            len(readers),
            format_estimate(found["same"]) if found["same"] else "none",
            ", ".join(f"{format_number(kappa)} ({pair})" for pair, kappa in found["kappa"].items()),
        )
    return readers


def agreement(readers: dict[str, Sheet]) -> dict[str, Any]:
    """How far readers of one sheet agree on which completion is better.

    `same`: the share of the rows that two or more judged on which all of these say the same, None without such rows;
    `kappa`: for each two readers Cohen's kappa of A, B and same (Cohen 1960), None where chance alone would agree.
    """
    marks = {
        name: {key: row["better"] for key, row in sheet.items() if row["better"]} for name, sheet in readers.items()
    }
    by_row: dict[str, list[str]] = {}
    for key, mark in itertools.chain(*(own.items() for own in marks.values())):
        by_row.setdefault(key, []).append(mark)
    same = [float(len(set(row)) == 1) for row in by_row.values() if len(row) > 1]
    kappa: dict[str, float | None] = {}
    for (one, ours), (other, theirs) in itertools.combinations(marks.items(), 2):
        both = [(ours[key], theirs[key]) for key in ours if key in theirs]
        counts = Counter(a for a, _ in both), Counter(b for _, b in both)
        chance = sum(counts[0][mark] * counts[1][mark] for mark in VALUES) / len(both) ** 2 if both else 1.0
        agreed = sum(a == b for a, b in both) / max(1, len(both))
        kappa[f"{one}, {other}"] = None if chance == 1 else (agreed - chance) / (1 - chance)
    return {"same": estimates.proportion(same) if same else None, "kappa": kappa}


def read_sheet(file: Path, template: Sheet | None = None) -> Sheet:
    """The rows of a sheet as a page or a spreadsheet saves it; raises PipelineError unless they are those `asked`."""
    if not file.is_file():
        raise PipelineError(
            f"there is no sheet {file} (from {Path.cwd()}): leave out judge.human.sheets to have one written, or "
            "check the path"
        )
    try:
        text = file.read_bytes().decode("utf-8-sig")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        header, *lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise PipelineError(f"{file} cannot be read ({error}): save it as CSV in UTF-8") from error
    if lacking := [name for name in COLUMNS if name not in header]:
        raise PipelineError(
            f"{file} has no column {', '.join(lacking)} (found {', '.join(header) or 'none'}): keep the first line as "
            f"it was written, {','.join(COLUMNS)}"
        )
    sheet: Sheet = {}
    for number, cells in enumerate(lines, 2):
        if not any(map(str.strip, cells)):
            continue
        row = dict.fromkeys(COLUMNS, "") | dict(zip(header, cells, strict=False))
        for name in TEXTS:
            row[name] = re.sub(r"\r\n?", "\n", row[name][bool(re.match(f"'{FORMULA.pattern}", row[name])) :])
        for name, allowed in GIVEN.items():
            given = row[name].strip().casefold()
            row[name] = next((value for value in allowed if value.casefold() == given), given)
        sheet[check_row(row, f"{file}, row {number}", sheet, template)] = row
    if gone := [key for key in template or () if key not in sheet]:
        raise PipelineError(
            f"{file} lacks {len(gone)} of the {len(template or ())} rows of the sheet, such as {gone[0]}: put them "
            "back from sheet.csv, with nothing filled in where nothing was judged"
        )
    return sheet


def check_row(row: dict[str, str], label: str, sheet: Sheet, template: Sheet | None) -> str:
    """The id of a row; raises PipelineError where it is unknown, doubled or changed, or says what cannot be."""
    key = row["id"]
    if template is not None and key not in template:
        raise PipelineError(f"{label}: {key or 'no id'} is no row of the sheet: give the file made of that one")
    if key in sheet:
        raise PipelineError(f"{label}: {key} is there twice: take one of the two out")
    if key != row_id(*(row[name] for name in TEXTS)) or any(
        template and row[name] != template[key][name] for name in TEXTS
    ):
        fix = "copy the row back from sheet.csv" if template else "move that file away, to have it written anew"
        raise PipelineError(f"{label}: the prompt or a completion of {key} is not what was written: {fix}")
    for name, allowed in GIVEN.items():
        if row[name] and row[name] not in allowed:
            raise PipelineError(f"{label}: {name} is {row[name]!r}, none of {', '.join(allowed)}, or nothing")
    return key
