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
from dpo_pipeline.judges.human import agreement, human, read_sheet, read_sheets
from dpo_pipeline.judges.judge import Completion

COLUMNS = ["id", "prompt", "completion_a", "completion_b", "better", "rating_a", "rating_b"]
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "=1+1?"}]


def completion(text, prompt="This film was"):
    return Completion(prompt, text, True, (1,), (2, 3))


def pair(one, other, prompt="This film was"):
    return completion(one, prompt), completion(other, prompt)


def both_orders(pairs):
    return [order for a, b in pairs for order in ((a, b), (b, a))]


def ask(folder, pairs, seed=0):
    """The rows of the sheet that these pairs make, as any CSV reader has them."""
    assert list(human(folder, [], seed).choose(pairs)) == [(i, None) for i in range(len(pairs))]
    return rows_of((folder / "sheet.csv").read_text(encoding="utf-8-sig"))


def has_mark(file):
    """Whether a file begins with what spreadsheets know UTF-8 by."""
    return file.read_bytes().startswith(b"\xef\xbb\xbf")


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def save(file, rows, **options):
    """A reader's file of these rows; its name."""
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, options.pop("fieldnames", COLUMNS), **options)
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def verdict(folder, sheets, one, other, prompt="This film was"):
    """What the judge says of two completions, asked in both orders."""
    found = dict(human(folder, sheets, 0).choose(both_orders([pair(one, other, prompt)])))
    assert (found[0] is None and found[1] is None) or found[0] + found[1] == 1
    return found[0]


def test_each_two_different_completions_are_one_row_and_nothing_tells_whose_they_are(tmp_path, caplog):
    pairs = both_orders([pair("good .", "bad ."), pair("bad .", "so so"), pair("=2", "-2", CHAT), pair("one", "one")])
    with caplog.at_level(logging.INFO):
        rows = ask(tmp_path / "human", pairs)
    (told,) = caplog.messages
    assert "3 pairs to judge" in told
    assert f"{tmp_path}/human/sheet.html" in told
    assert "judge.human.sheets=[FILE,...]" in told
    assert list(rows[0]) == COLUMNS
    assert {(row["prompt"], frozenset((row["completion_a"], row["completion_b"]))) for row in rows} == {
        ("This film was", frozenset(("good .", "bad ."))),
        ("This film was", frozenset(("so so", "bad ."))),
        ("system: Be kind.\nuser: =1+1?", frozenset(("'=2", "'-2"))),
    }
    assert len(rows) == 3
    assert {row[name] for row in rows for name in COLUMNS[4:]} == {""}
    assert sorted(p.name for p in (tmp_path / "human").iterdir()) == ["sheet.csv", "sheet.html"]
    assert has_mark(tmp_path / "human" / "sheet.csv")


def test_the_seed_draws_the_order_and_which_is_a_whatever_the_order_given(tmp_path):
    pairs = [pair(f"good {i}", f"bad {i}", f"prompt {i}") for i in range(200)]
    rows = ask(tmp_path / "one", pairs)
    assert 70 < sum(row["completion_a"].startswith("good") for row in rows) < 130  # 4 standard deviations
    order = [int(row["prompt"].split()[1]) for row in rows]
    assert sorted(order) == list(range(200))
    assert sum(abs(i - at) for at, i in enumerate(order)) > 200 * 200 / 4  # a third of the square is expected
    ask(tmp_path / "again", [(b, a) for a, b in pairs[::-1]])
    assert (tmp_path / "one/sheet.csv").read_bytes() == (tmp_path / "again/sheet.csv").read_bytes()
    other = ask(tmp_path / "other", pairs, seed=1)
    assert [row["id"] for row in other] != [row["id"] for row in rows]
    first = {row["id"]: row["completion_a"] for row in rows}
    assert 70 < sum(first[row["id"]] == row["completion_a"] for row in other) < 130


def test_a_pair_is_judged_in_both_orders_by_one_row(tmp_path):
    rows = ask(tmp_path, [pair("good .", "bad ."), pair("bad .", "so so"), pair("fine", "dull")])
    for row in rows:
        better = {"good .": "good .", "so so": "so so"}
        texts = row["completion_a"], row["completion_b"]
        row["better"] = next(("AB"[i] for i, text in enumerate(texts) if text in better), "same")
    sheets = [save(tmp_path / "ann.csv", rows)]
    assert verdict(tmp_path, sheets, "good .", "bad .") == 1
    assert verdict(tmp_path, sheets, "bad .", "so so") == 0
    assert verdict(tmp_path, sheets, "fine", "dull") == 0.5
    assert verdict(tmp_path, sheets, "one", "one") == 0.5
    assert verdict(tmp_path, sheets[0], "good .", "bad .") == 1  # as judge.human.sheets=ann.csv gives it


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        (["A", "A", "B"], 1), (["B", "B", "A"], 0), (["A", "B"], 0.5), (["A", "same"], 1), (["same", "B", "B"], 0),
        (["A", "B", "same"], 0.5), (["", "A"], 1), (["", "B", ""], 0), (["", ""], None), (["same", ""], 0.5),
    ],
)  # fmt: skip
def test_several_readers_count_by_their_mean_and_only_those_who_judged(marks, expected, tmp_path):
    (row,) = ask(tmp_path, [pair("good .", "bad .")])
    sheets = [save(tmp_path / f"{i}.csv", [row | {"better": mark}]) for i, mark in enumerate(marks)]
    assert verdict(tmp_path, sheets, row["completion_a"], row["completion_b"]) == expected


def test_a_score_is_the_mean_rating_over_rows_and_readers(tmp_path):
    rows = ask(tmp_path, [pair("good .", "bad ."), pair("bad .", "so so"), pair("bad .", "fine", "Another")])
    ratings = {"good .": "5", "bad .": "2", "so so": "", "fine": "4"}
    ann = [row | {f"rating_{side}": ratings[row[f"completion_{side}"]] for side in "ab"} for row in rows]
    ben = [
        row | {f"rating_{side}": {"bad .": "1"}.get(row[f"completion_{side}"], "") for side in "ab"}
        for row in rows[:1]
    ]
    ben += rows[1:]
    sheets = [save(tmp_path / "ann.csv", ann), save(tmp_path / "ben.csv", ben)]
    asked = [
        completion("good ."),
        completion("bad ."),
        completion("so so"),
        completion("bad .", "Another"),
        completion("never asked"),
    ]
    films = [2, 2] + [1] * (ben[0]["prompt"] == "This film was")
    another = [2] + [1] * (ben[0]["prompt"] == "Another")
    expected = [5, sum(films) / len(films), None, sum(another) / len(another), None]
    assert dict(human(tmp_path, sheets, 0).score(asked)) == dict(enumerate(expected))
    assert dict(human(tmp_path, [], 0).score(asked)) == dict.fromkeys(range(5))


TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("=+-@\t\r\n'\",;"), max_size=20)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4), st.sampled_from(",;\t"))
def test_any_text_is_read_back_and_none_is_a_formula(tmp_path_factory, texts, separator):
    folder = tmp_path_factory.mktemp("sheet")
    rows = ask(folder, [pair(a, b, prompt) for prompt, a, b in texts])
    assert not [cell for row in rows for cell in row.values() if cell[:1] in tuple("=+-@\t")]
    sheets = [save(folder / "ann.csv", [row | {"better": "A", "rating_a": "5"} for row in rows], delimiter=separator)]
    judge = human(folder, sheets, 0)
    for prompt, *both in texts:
        found = dict(judge.choose([pair(*both, prompt), pair(*both[::-1], prompt)]))
        unlike = re.sub("\r\n?", "\n", both[0]) != re.sub("\r\n?", "\n", both[1])
        assert sorted(found.values()) == ([0, 1] if unlike else [0.5, 0.5])


def test_what_spreadsheets_make_of_a_file_is_accepted(tmp_path):
    texts = 'He said "no";\r\nand left, =so', "-1,5\n\n'tis"
    (row,) = ask(tmp_path, [pair(*texts, "Größe, «так»")])
    for mark, expected in (("a", 1), (" A ", 1), ("b", 0), ("SAME", 0.5), ("Same\u00a0", 0.5)):
        row |= {"better": mark, "rating_a": " 4 ", "comment": "hm"}
        for number, (codec, options) in enumerate(
            [
                ("utf-8-sig", {"delimiter": ";", "lineterminator": "\r\n"}),
                ("utf-8", {"delimiter": "\t", "lineterminator": "\n"}),
                ("utf-8", {"quoting": csv.QUOTE_ALL, "fieldnames": [*COLUMNS[::-1], "comment"]}),
            ]
        ):
            file = tmp_path / f"{number}.csv"
            save(file, [row, {}], extrasaction="ignore", **options)
            text = file.read_bytes().decode().replace("\r\n,,,,,,\r\n", "\r\n")
            file.write_bytes(text.replace("\nand left", "\r\nand left").encode(codec))
            judge = human(tmp_path, [str(file)], 0)
            one, other = (row[f"completion_{side}"].removeprefix("'") for side in "ab")
            pairs = [pair(one, other, "Größe, «так»"), pair(other, one, "Größe, «так»")]
            assert dict(judge.choose(pairs)) == {0: expected, 1: 1 - expected}
            assert dict(judge.score([pairs[0][0]])) == {0: 4}


def test_a_sheet_grows_with_new_pairs_and_keeps_what_was_filled_in(tmp_path, caplog):
    (row,) = ask(tmp_path, [pair("good .", "bad .")])
    save(tmp_path / "sheet.csv", [row | {"better": "A", "rating_b": "2"}])  # in place, without the mark of UTF-8
    rows = ask(tmp_path, [pair("good .", "bad ."), pair("bad .", "fine")], seed=5)
    kept, new = sorted(rows, key=lambda each: each["id"] != row["id"])
    assert kept == row | {"better": "A", "rating_b": "2"}
    assert {new["completion_a"], new["completion_b"]} == {"bad .", "fine"}
    sheets = [str(tmp_path / "sheet.csv")]
    assert verdict(tmp_path, sheets, row["completion_a"], row["completion_b"]) == 1
    assert verdict(tmp_path, sheets, "bad .", "fine") is None
    assert not caplog.messages
    assert verdict(tmp_path, sheets, "bad .", "never asked") is None
    (told,) = caplog.messages
    assert told.startswith("1 pairs are in no sheet and left out")


def broken(tmp_path, change):
    """The file of a reader whose rows were changed so."""
    rows = ask(tmp_path, [pair("good .", "bad ."), pair("bad .", "so so"), pair("fine", "dull")])
    return save(tmp_path / "ann.csv", change(rows))


def changed(at, **cells):
    return lambda rows: [row | (cells if i == at else {}) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: rows[:2], r"ann.csv lacks 1 rows, such as r\w{12}: copy them back from sheet.csv"),
        (lambda rows: [], "ann.csv lacks 3 rows"),
        (lambda rows: [*rows, rows[1]], r"ann.csv, row 5: r\w{12} is there twice, or not as it was written: undo"),
        (changed(1, id="r0"), "ann.csv, row 3: r0 is .* not as it was written"),
        (changed(2, id=""), "ann.csv, row 4: no id is .* not as it was written"),
        (
            changed(0, prompt="This film is"),
            "ann.csv, row 2: r.* not as it was written",
        ),
        (
            changed(1, completion_a="good"),
            "ann.csv, row 3: r.* not as it was written: undo that change",
        ),
        (changed(1, completion_b=""), "ann.csv, row 3: r.* not as it was written"),
        (changed(0, better="C"), "ann.csv, row 2: better is 'C': type one of A, B, same, or nothing"),
        (changed(2, rating_a="6"), "ann.csv, row 4: rating_a is '6': type one of 1, 2, 3, 4, 5, or nothing"),
        (changed(2, rating_b="3.5"), "ann.csv, row 4: rating_b is '3.5': type"),
    ],
)
def test_rows_that_are_not_those_written_are_refused(change, sentence, tmp_path):
    with pytest.raises(PipelineError, match=sentence) as error:
        human(tmp_path, [broken(tmp_path, change)], 0)
    assert "\n" not in str(error.value)


def test_completions_that_changed_their_places_are_refused(tmp_path):
    swap = broken(
        tmp_path,
        lambda rows: [
            row | {"completion_a": row["completion_b"], "completion_b": row["completion_a"]} for row in rows
        ],
    )
    with pytest.raises(PipelineError, match="row 2: r.* not as it was written"):
        human(tmp_path, [swap], 0)


def test_a_file_that_is_no_sheet_is_refused(tmp_path):
    ask(tmp_path, [pair("good .", "bad .")])
    ann = tmp_path / "ann.csv"
    for content, sentence in (
        (b"", "ann.csv has no column better, id, rating_a, rating_b: keep the first line"),
        (
            b"id,prompt,completion_a,completion_b,rating_a,rating_b\n",
            "ann.csv has no column better: keep the first line",
        ),
        ("id,größe".encode("cp1252"), "ann.csv cannot be read [(].*[)]: save it as CSV in UTF-8"),
        (b'id,prompt\n"a,b', "ann.csv cannot be read [(].*[)]: save it as CSV in UTF-8"),
    ):
        ann.write_bytes(content)
        with pytest.raises(PipelineError, match=sentence):
            human(tmp_path, [str(ann)], 0)
    with pytest.raises(PipelineError, match="there is no sheet .*ben.csv: leave out judge.human.sheets"):
        human(tmp_path, [str(tmp_path / "ben.csv")], 0)
    with pytest.raises(PipelineError, match="there is no sheet .*elsewhere/sheet.csv"):
        human(tmp_path / "elsewhere", [str(ann)], 0)
    with pytest.raises(PipelineError, match="names a file twice: give the file of each reader once"):
        human(tmp_path, [str(ann), str(ann)], 0)


def test_a_sheet_that_was_changed_in_its_own_place_is_refused_before_it_is_written_anew(tmp_path):
    (row,) = ask(tmp_path, [pair("good .", "bad .")])
    save(tmp_path / "sheet.csv", [row | {"completion_a": "great"}])
    before = (tmp_path / "sheet.csv").read_bytes()
    with pytest.raises(PipelineError, match="row 2: r.* not as it was written: undo that change"):
        list(human(tmp_path, [], 0).choose([pair("good .", "fine")]))
    assert (tmp_path / "sheet.csv").read_bytes() == before


def sheet(marks):
    return {f"r{i}": {"better": mark} for i, mark in enumerate(marks)}


def test_agreement_is_that_of_tables_computed_by_hand(tmp_path, caplog):
    # 20 both A, 5 A and B, 10 B and A, 15 both B: agreed 35/50, by chance (25*30 + 25*20)/2500 = 0.5.
    ann, ben = "A" * 25 + "B" * 25, "A" * 20 + "B" * 5 + "A" * 10 + "B" * 15
    same, kappas = agreement({"ann": sheet(ann), "ben": sheet(ben)})
    assert kappas == {"ann, ben": pytest.approx(0.4)}
    assert (same["value"], same["n"]) == (0.7, 50)
    # Three marks: rows 4 1 1, 1 2 1, 0 1 4; agreed 10/15, by chance (6*5 + 4*4 + 5*6)/225; unjudged rows beside.
    table = {"A": (4, 1, 1), "same": (1, 2, 1), "B": (0, 1, 4)}
    cells = [(one, other) for one, row in table.items() for other, n in zip(table, row, strict=True) for _ in range(n)]
    cells += [("", "A"), ("B", ""), ("", "")]
    ours, theirs = map(list, zip(*cells, strict=True))
    same, kappas = agreement({"ann": sheet(ours), "ben": sheet(theirs), "eve": sheet(["A", *[""] * 17])})
    assert kappas["ann, ben"] == pytest.approx(74 / 149)
    assert kappas["ann, eve"] is None
    assert same["value"] == pytest.approx(10 / 15)
    assert agreement({"ann": sheet(["A", ""]), "ben": sheet(["", "B"])}) == (None, {"ann, ben": None})


def test_the_agreement_of_readers_is_told(tmp_path, caplog):
    rows = ask(tmp_path, [pair(f"good {i}", f"bad {i}") for i in range(4)])
    marks = {"ann": "AABB", "ben": "ABBB"}  # agreed 3/4, by chance (2*1 + 2*3)/16
    names = [
        save(tmp_path / f"{name}.csv", [row | {"better": mark} for row, mark in zip(rows, of, strict=True)])
        for name, of in marks.items()
    ]
    with caplog.at_level(logging.INFO):
        read_sheets(tmp_path, names[:1])
        assert not caplog.messages
        read_sheets(tmp_path, names)
    (told,) = caplog.messages
    assert told.startswith("2 readers: the same verdict on 0.750 [0.")
    assert told.endswith(f"Cohen's kappa 0.500 ({names[0]}, {names[1]})")


HOSTILE = "</script><script>document.title='run'</script><img src=x onerror=alert(1)>"


def test_the_page_fetches_nothing_and_a_text_ends_no_script(tmp_path):
    ask(tmp_path / "plain", [pair("good .", "bad .")])
    page = (tmp_path / "plain" / "sheet.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|\bsrc=|<link|@import|url\(", page)
    ask(tmp_path / "hostile", [pair(HOSTILE, "bad .", HOSTILE)])
    assert (tmp_path / "hostile" / "sheet.html").read_text().count("<") == page.count("<")


MARKS = [{"better": "A", "rating_b": "4"}, {"better": "same"}, {"better": "B", "rating_a": "1"}]


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_what_the_page_saves_is_read_back(tmp_path):
    pairs = [pair('=2, "of\ncourse"', "-2; 'tis", CHAT), pair(HOSTILE, " größer \t", HOSTILE), pair("one", "other")]
    rows = ask(tmp_path, pairs)
    script = """<script>
      let blob; URL.createObjectURL = (made) => { blob = made; return "about:blank#"; };
      HTMLAnchorElement.prototype.click = function () { document.body.dataset.file = this.download; };
      const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key }));
      press("a"); press("Enter"); press("S");
      document.forms[0].elements.rating_b[3].click();
      document.querySelector("#name").value = "Ann B.";
      document.querySelector("#save").click();
      blob.arrayBuffer().then((bytes) => {
        document.body.innerHTML = "<pre>" + Array.from(new Uint8Array(bytes)).join(" ") + "</pre><b>"
          + document.title + "|" + document.body.dataset.file + "|" + JSON.stringify({ ...localStorage }) + "</b>";
      });
    </script>"""
    before = f"""<script>localStorage.setItem("{rows[2]["id"]}", '{{"better": "B", "rating_a": "1"}}');</script>"""
    page = (tmp_path / "sheet.html").read_text().replace("</head>", f"{before}</head>")
    (tmp_path / "tried.html").write_text(page.replace("</body>", f"{script}</body>"))
    call = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    call += ["--virtual-time-budget=2000", "--dump-dom", f"file://{tmp_path}/tried.html"]
    out = subprocess.run(call, capture_output=True, text=True, timeout=120, check=True).stdout
    (tmp_path / "ann.csv").write_bytes(bytes(map(int, re.search(r"<pre>([\d ]+)</pre>", out)[1].split())))
    title, name, state = unescape(re.search(r"<b>(.*)</b>", out)[1]).split("|")
    assert (title, name) == ("Which answer is better?", "sheet-Ann_B_.csv")
    assert {key: json.loads(kept) for key, kept in json.loads(state).items()} == {
        row["id"]: mark for row, mark in zip(rows, MARKS, strict=True)
    }
    blank = dict.fromkeys(COLUMNS[4:], "")
    found = rows_of((tmp_path / "ann.csv").read_text())
    assert found == [{"id": row["id"], **blank, **mark} for row, mark in zip(rows, MARKS, strict=True)]
    (sheet,) = read_sheets(tmp_path, [str(tmp_path / "ann.csv")]).values()
    complete = read_sheet(tmp_path / "sheet.csv")
    assert sheet == {row["id"]: complete[row["id"]] | mark for row, mark in zip(rows, MARKS, strict=True)}
