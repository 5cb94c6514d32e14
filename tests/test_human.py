"""People as a judge: what is written is blind, what spreadsheets and the page save is read back, nothing else is."""

import csv
import io
import json
import logging
import re
import shutil
import subprocess
from html import unescape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_pipeline.errors import PipelineError
from dpo_pipeline.judges.human import human, read_sheet
from dpo_pipeline.judges.judge import Completion

COLUMNS = ["id", "prompt", "completion_a", "completion_b", "better", "rating_a", "rating_b"]
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "=1+1?"}]


def pair(one, other, prompt="This film was"):
    return tuple(Completion(prompt, text, True, (1,), (2, 3)) for text in (one, other))


def both_orders(pairs):
    return [order for a, b in pairs for order in ((a, b), (b, a))]


THREE = [pair("good .", "bad ."), pair("bad .", "so so"), pair("fine", "dull")]


def write(folder, pairs, seed=0):
    """The rows of the sheet that these pairs make, as any CSV reader has them."""
    assert list(human(folder, [], seed).choose(pairs)) == [(i, None) for i in range(len(pairs))]
    return rows_of((folder / "sheet.csv").read_text(encoding="utf-8-sig"))


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def save(file, rows, **options):
    """A reader's file of these rows; its name."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, options.pop("fieldnames", COLUMNS), **options)
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def verdict(sheets, one, other, prompt="This film was"):
    """What the judge says of two completions, asked in both orders."""
    verdicts = dict(human("unused", sheets, 0).choose(both_orders([pair(one, other, prompt)])))
    assert (verdicts[0] is None and verdicts[1] is None) or verdicts[0] + verdicts[1] == 1
    return verdicts[0]


def test_each_two_different_completions_are_one_row_and_nothing_tells_whose_they_are(tmp_path, caplog):
    pairs = both_orders([*THREE[:2], pair("=2", "-2", CHAT), pair("one", "one"), pair("a\r\nb", "a\nb")])
    with caplog.at_level(logging.INFO):
        rows = write(tmp_path / "human", pairs)
    (message,) = caplog.messages
    assert re.search(f"3 pairs to judge.*{tmp_path}/human/sheet.html.*judge.human.sheets=.FILE", message)
    assert list(rows[0]) == COLUMNS
    assert sorted((row["prompt"], *sorted((row["completion_a"], row["completion_b"]))) for row in rows) == [
        ("This film was", "bad .", "good ."),
        ("This film was", "bad .", "so so"),
        ("system: Be kind.\nuser: =1+1?", "'-2", "'=2"),
    ]
    assert {row[name] for row in rows for name in COLUMNS[4:]} == {""}
    assert sorted(file.name for file in (tmp_path / "human").iterdir()) == ["sheet.csv", "sheet.html"]
    assert (tmp_path / "human" / "sheet.csv").read_bytes().startswith(b"\xef\xbb\xbf")  # spreadsheets know UTF-8 by it


def test_the_seed_draws_the_order_and_which_is_a_whatever_the_order_given(tmp_path):
    pairs = [pair(f"good {i}", f"bad {i}", f"prompt {i}") for i in range(200)]
    rows = write(tmp_path / "one", pairs)
    assert 70 < sum(row["completion_a"].startswith("good") for row in rows) < 130  # 4 standard deviations
    order = [int(row["prompt"].split()[1]) for row in rows]
    assert sorted(order) == list(range(200))
    assert sum(abs(number - place) for place, number in enumerate(order)) > 200 * 200 / 4  # a third is expected
    write(tmp_path / "again", [(b, a) for a, b in pairs[::-1]])
    assert (tmp_path / "one/sheet.csv").read_bytes() == (tmp_path / "again/sheet.csv").read_bytes()
    other = {row["prompt"]: row["completion_a"] for row in write(tmp_path / "other", pairs, seed=1)}
    assert list(other) != [row["prompt"] for row in rows]
    assert 70 < sum(other[row["prompt"]] == row["completion_a"] for row in rows) < 130


def test_a_pair_is_judged_in_both_orders_by_one_row(tmp_path):
    rows = write(tmp_path, THREE)
    for row in rows:
        texts = [row["completion_a"], row["completion_b"]]
        better = {"good .", "so so"} & {*texts}
        row["better"] = "AB"[texts.index(better.pop())] if better else "same"
    sheets = [save(tmp_path / "ann.csv", rows)]
    assert verdict(sheets, "good .", "bad .") == 1
    assert verdict(sheets, "bad .", "so so") == 0
    assert verdict(sheets, "fine", "dull") == 0.5
    assert verdict(sheets, "one", "one") == 0.5
    assert verdict(sheets[0], "good .", "bad .") == 1  # as judge.human.sheets=ann.csv gives it


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        (["A", "A", "B"], 1), (["B", "B", "A"], 0), (["A", "B"], 0.5), (["A", "same"], 1), (["same", "B", "B"], 0),
        (["A", "B", "same"], 0.5), (["", "A"], 1), (["", "B", ""], 0), (["", ""], None), (["same", ""], 0.5),
    ],
)  # fmt: skip
def test_several_readers_count_by_their_mean_and_only_those_who_judged(marks, expected, tmp_path):
    (row,) = write(tmp_path, THREE[:1])
    sheets = [save(tmp_path / f"{i}.csv", [row | {"better": mark}]) for i, mark in enumerate(marks)]
    assert verdict(sheets, row["completion_a"], row["completion_b"]) == expected


def test_the_agreement_of_readers_is_logged(tmp_path, caplog):
    rows = write(tmp_path, [pair(f"good {i}", f"bad {i}") for i in range(5)])
    marks = {"ann": ["A", "A", "B", "B", ""], "ben": ["A", "B", "B", "B", "A"]}
    names = []
    for name, column in marks.items():
        filled = [row | {"better": mark} for row, mark in zip(rows, column, strict=True)]
        names.append(save(tmp_path / f"{name}.csv", filled))
    with caplog.at_level(logging.INFO):
        human(tmp_path, names[:1], 0)
        assert not caplog.messages
        human(tmp_path, names, 0)
    (message,) = caplog.messages
    assert message.startswith("2 readers: the same verdict on 0.750 [0.")  # 3 of the 4 that both judged


def test_a_score_is_the_mean_rating_over_rows_and_readers(tmp_path):
    rows = write(tmp_path, [*THREE[:2], pair("bad .", "fine", "Another")])
    ratings = [{"good .": "5", "bad .": "2", "fine": "4"}, {"bad .": "1"}]  # of Ann, and of Ben in the first row
    ann = [row | {f"rating_{side}": ratings[0].get(row[f"completion_{side}"], "") for side in "ab"} for row in rows]
    ben = {f"rating_{side}": ratings[1].get(rows[0][f"completion_{side}"], "") for side in "ab"}
    sheets = [save(tmp_path / "ann.csv", ann), save(tmp_path / "ben.csv", [rows[0] | ben, *rows[1:]])]
    items = [*pair("good .", "bad ."), *pair("so so", "never asked"), pair("bad .", "", "Another")[0]]
    means = {True: 1.5, False: 2}  # of Ben's 1 and Ann's 2 on "Another", or of Ann's alone
    is_another = rows[0]["prompt"] == "Another"
    film = 2 if is_another else 5 / 3  # Ann's two, with Ben's
    expected = [5, film, None, None, means[is_another]]
    assert [value for _, value in human(tmp_path, sheets, 0).score(items)] == pytest.approx(expected)
    assert dict(human(tmp_path, [], 0).score(items)) == dict.fromkeys(range(5))


TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("=+-@\t\r\n'\",;"), max_size=20)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4), st.sampled_from(",;\t"))
def test_any_text_is_read_back_and_none_is_a_formula(tmp_path_factory, texts, separator):
    folder = tmp_path_factory.mktemp("sheet")
    rows = write(folder, [pair(a, b, prompt) for prompt, a, b in texts])
    assert not [cell for row in rows for cell in row.values() if cell[:1] in tuple("=+-@\t")]
    filled = [row | {"better": "A", "rating_a": "5"} for row in rows]
    judge = human(folder, [save(folder / "ann.csv", filled, delimiter=separator)], 0)
    for prompt, *both in texts:
        verdicts = dict(judge.choose([pair(*both, prompt), pair(*both[::-1], prompt)]))
        differ = re.sub("\r\n?", "\n", both[0]) != re.sub("\r\n?", "\n", both[1])
        assert sorted(verdicts.values()) == ([0, 1] if differ else [0.5, 0.5])


FORMS = {
    "semicolons": ("utf-8-sig", {"delimiter": ";", "lineterminator": "\r\n"}),
    "tabs": ("utf-8", {"delimiter": "\t", "lineterminator": "\n"}),
    "quotes": ("utf-8", {"quoting": csv.QUOTE_ALL, "fieldnames": [*COLUMNS[::-1], "comment"]}),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_spreadsheets_make_of_a_file_is_accepted(form, tmp_path):
    codec, options = FORMS[form]
    (row,) = write(tmp_path, [pair('He said "no";\r\nand left, =so', "-1,5\n\n'tis", "Größe, «так»")])
    file, (one, other) = tmp_path / "ann.csv", (row[f"completion_{side}"].removeprefix("'") for side in "ab")
    for mark, expected in (("a", 1), (" A ", 1), ("b", 0), ("SAME", 0.5), ("Same\u00a0", 0.5)):
        row |= {"better": mark, "rating_a": " 4 ", "comment": "hm"}
        save(file, [row, {}], extrasaction="ignore", **options)
        text = file.read_bytes().decode().replace("\r\n,,,,,,\r\n", "\r\n")
        file.write_bytes(text.replace("\nand left", "\r\nand left").encode(codec))
        assert verdict([str(file)], one, other, "Größe, «так»") == expected
        assert dict(human(tmp_path, [str(file)], 0).score([pair(one, other, "Größe, «так»")[0]])) == {0: 4}


def test_a_sheet_grows_with_new_pairs_and_keeps_what_was_filled_in(tmp_path, caplog):
    (row,) = write(tmp_path, THREE[:1])
    save(tmp_path / "sheet.csv", [row | {"better": "A", "rating_b": "2"}])  # in place, without the mark of UTF-8
    for seed in range(4):  # some of which would draw the other as A
        rows = write(tmp_path, [THREE[0], pair("bad .", "fine")], seed=seed)
    first, new = sorted(rows, key=lambda each: each["id"] != row["id"])
    assert first == row | {"better": "A", "rating_b": "2"}
    assert {new["completion_a"], new["completion_b"]} == {"bad .", "fine"}
    sheets = [str(tmp_path / "sheet.csv")]
    assert verdict(sheets, row["completion_a"], row["completion_b"]) == 1
    assert verdict(sheets, "bad .", "fine") is None
    assert not caplog.messages
    assert verdict(sheets, "bad .", "never asked") is None
    assert caplog.messages[0].startswith("1 pairs are in no sheet and left out")


def test_a_sheet_written_anew_with_another_seed_does_not_turn_the_verdicts_of_the_first(tmp_path):
    (row,) = write(tmp_path / "one", THREE[:1])
    ids_and_marks = [{"id": row["id"], "better": "A"}]  # as the page saves them
    ann = save(tmp_path / "ann.csv", ids_and_marks, fieldnames=["id", *COLUMNS[4:]])
    for seed in range(1, 6):
        write(tmp_path / "two", THREE[:1], seed)
        assert verdict([ann], row["completion_a"], row["completion_b"]) == 1


def change(place, **cells):
    return lambda rows: [row | (cells if i == place else {}) for i, row in enumerate(rows)]


def swap(rows):
    return [row | {"completion_a": row["completion_b"], "completion_b": row["completion_a"]} for row in rows]


def swap_ids(rows):
    return [row | {"id": other["id"]} for row, other in zip(rows, rows[::-1], strict=True)]


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda rows: [*rows, rows[1]], "row 5: .* twice, or not as it was written: undo"),
        (change(1, id="r0"), "row 3: .*not as it was written"),
        (change(2, id=""), "row 4: .*not as it was written"),
        (change(0, prompt="This film is"), "row 2: .*not as it was written"),
        (change(1, completion_a="good"), "row 3: .*not as it was written"),
        (change(1, completion_b=""), "row 3: .*not as it was written"),
        (swap, "row 2: .*not as it was written"),
        (swap_ids, "row 2: .*not as it was written"),
        (change(0, better="C"), "row 2: better is 'C': type A, B, same, or nothing"),
        (change(2, rating_a="6"), "row 4: rating_a is '6': type 1, 2, 3, 4, 5, or nothing"),
        (change(2, rating_b="3.5"), "row 4: rating_b is '3.5': type"),
    ],
)
def test_rows_that_are_not_as_they_were_written_are_refused(edit, reason, tmp_path):
    rows = write(tmp_path, THREE)
    with pytest.raises(PipelineError, match=f"ann.csv, {reason}") as error:
        human(tmp_path, [save(tmp_path / "ann.csv", edit(rows))], 0)
    assert "\n" not in str(error.value)
    save(tmp_path / "sheet.csv", edit(rows))  # in its own place: refused before it is written anew
    before = (tmp_path / "sheet.csv").read_bytes()
    with pytest.raises(PipelineError, match=f"sheet.csv, {reason}"):
        list(human(tmp_path, [], 0).choose([pair("good .", "fine")]))
    assert (tmp_path / "sheet.csv").read_bytes() == before


def test_a_file_that_is_no_sheet_is_refused(tmp_path):
    ann = tmp_path / "ann.csv"
    for content, reason in (
        (b"id,better,rating_a\nr0,A,1\n", "ann.csv has no column rating_b: keep the first line"),
        ("id,größe".encode("cp1252"), "ann.csv cannot be read [(].*[)]: save it as CSV in UTF-8"),
        (b'id,prompt\n"a,b', "ann.csv cannot be read [(].*[)]: save it as CSV in UTF-8"),
        (b"", "ann.csv has no column better, id, rating_a, rating_b"),
    ):
        ann.write_bytes(content)
        with pytest.raises(PipelineError, match=reason):
            human(tmp_path, [str(ann)], 0)
    with pytest.raises(PipelineError, match="ben.csv cannot be read .*No such file"):
        human(tmp_path, [str(tmp_path / "ben.csv")], 0)
    with pytest.raises(PipelineError, match="names a file twice: give the file of each reader once"):
        human(tmp_path, [str(ann), str(ann)], 0)


HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=alert(1)>"


def test_the_page_fetches_nothing_and_a_text_ends_no_script(tmp_path):
    write(tmp_path / "plain", THREE[:1])
    page = (tmp_path / "plain" / "sheet.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|\bsrc=|<link|@import|url\(", page)
    write(tmp_path / "hostile", [pair(HOSTILE, "bad .", HOSTILE)])
    assert (tmp_path / "hostile" / "sheet.html").read_text().count("<") == page.count("<")


MARKS = [{"better": "A", "rating_b": "4"}, {"better": "same"}, {"better": "B", "rating_a": "1"}]


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_what_the_page_saves_is_read_back(tmp_path):
    pairs = [pair('=2, "of\ncourse"', "-2; 'tis", CHAT), pair(HOSTILE, " größer \t", HOSTILE), pair("one", "other")]
    rows = write(tmp_path, pairs)
    script = """<script>
      let blob; URL.createObjectURL = (object) => { blob = object; return "about:blank#"; };
      HTMLAnchorElement.prototype.click = function () { document.body.dataset.file = this.download; };
      const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
      press("a"); press("S");
      document.forms[0].elements.rating_b[3].click();
      document.querySelector("#name").value = "Ann B.";
      document.querySelector("#save").click();
      blob.arrayBuffer().then((bytes) => {
        const state = [document.title, document.body.dataset.file, document.querySelector("output").textContent,
          JSON.stringify({ ...localStorage })];
        document.body.innerHTML = `<pre>${Array.from(new Uint8Array(bytes)).join(" ")}</pre><b>${state.join("|")}</b>`;
      });
    </script>"""
    before = f"""<script>localStorage.setItem("{rows[2]["id"]}", '{{"better": "B", "rating_a": "1"}}');</script>"""
    page = (tmp_path / "sheet.html").read_text().replace("</style>", f"</style>{before}")
    (tmp_path / "tried.html").write_text(page + script)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--virtual-time-budget=2000", "--dump-dom", f"file://{tmp_path}/tried.html"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    (tmp_path / "ann.csv").write_bytes(bytes(map(int, re.search(r"<pre>([\d ]+)</pre>", output)[1].split())))
    title, name, progress, state = unescape(re.search(r"<b>(.*)</b>", output)[1]).split("|")
    assert (title, name, progress) == ("Which answer is better?", "sheet-Ann_B_.csv", "3 of 3 judged")
    stored = {key: json.loads(choices) for key, choices in json.loads(state).items()}
    assert stored == {row["id"]: marks for row, marks in zip(rows, MARKS, strict=True)}
    blank = dict.fromkeys(COLUMNS[4:], "")
    expected = [{"id": row["id"], **blank, **marks} for row, marks in zip(rows, MARKS, strict=True)]
    assert rows_of((tmp_path / "ann.csv").read_text()) == read_sheet(tmp_path / "ann.csv") == expected
