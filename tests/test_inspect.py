"""What inspect_data says of a data set is true and can be acted on, and all that the data holds is shown as text."""

import contextlib
import io
import itertools
import json
import math
import random
import re
import sys
from functools import partial
from html.parser import HTMLParser

import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from dpo_pipeline.cli import main
from dpo_pipeline.config import compose
from dpo_pipeline.data import statistics
from dpo_pipeline.data.prepare import load_rows
from dpo_pipeline.data.report import kept_rows
from dpo_pipeline.data.token_table import LengthLimits, cut_text
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.estimates import accuracy
from dpo_pipeline.inspect_data import run_inspect, text_fields
from dpo_pipeline.report import data_page, token_view
from dpo_pipeline.tokenizer import load_tokenizer

SCRIPT = "<script>alert(1)</script>"
NASTY = f'{SCRIPT} \x1b[31mred\x07 \u202eback <img src=x onerror=alert(2)> | [a](javascript:b) ``` &amp; "q"'
PAIR = ("chosen", "rejected")


def draw_sizes(rng: random.Random, rows: int, completions: int = 2) -> tuple[list, pd.DataFrame]:
    """Random ids of prompts and completions, each ended by 0, and their sizes."""

    def draw(most: int) -> list[int]:
        return [rng.randrange(1, 9) for _ in range(rng.randrange(1, most))]

    found = [(draw(40), [[*draw(30), 0] for _ in range(completions)]) for _ in range(rows)]
    lengths = [[len(prompt), *map(len, ids), len(prompt) + max(map(len, ids))] for prompt, ids in found]
    return found, pd.DataFrame(lengths, columns=["prompt", *PAIR[:completions], "total"])


def test_spreads_are_those_of_a_sorted_list():
    values = draw_sizes(random.Random(1), 101)[1]["total"]
    together, spread = sorted(values), statistics.summarize(values)
    assert spread["mean"] == pytest.approx(sum(together) / 101)
    assert [spread[k] for k in ("p5", "median", "p95", "p99", "max")] == [together[i] for i in (5, 50, 95, 99, 100)]


def test_overlap_counts_each_common_token_once():
    for _, (one, other) in draw_sizes(random.Random(2), 50)[0]:
        left, common = list(other[:-1]), 0
        for token in one[:-1]:
            if token in left:
                left.remove(token)
                common += 1
        assert statistics.overlap(one, other) == pytest.approx(common / ((len(one) - 1 + len(other) - 1) / 2))
    assert statistics.overlap([1, 2, 3, 0], [3, 2, 1, 0]) == 1
    assert statistics.overlap([1, 0], [2, 0]) == 0  # the end token is no common word
    assert statistics.overlap([0], [0]) == 0


def test_length_bias_is_what_a_judge_of_length_reaches():
    found, sizes = draw_sizes(random.Random(3), 200)
    points = []
    for _, (chosen, rejected) in found:
        points.append(1 if len(chosen) > len(rejected) else 0.5 if len(chosen) == len(rejected) else 0)
    assert 0.5 in points
    bias = accuracy((sizes["chosen"] - sizes["rejected"]).tolist())
    share = sum(points) / 200
    assert bias["value"] == pytest.approx(share)
    # Wilson's interval: the shares p whose own standard error reaches the measured one.
    for end in (bias["low"], bias["high"]):
        assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 200), rel=1e-5)
    assert bias["low"] < share < bias["high"]


@pytest.mark.parametrize(("prompt", "completion"), [*itertools.product(("left", "drop"), ("drop", "keep_eos", "cut"))])
@pytest.mark.parametrize("completions", [1, 2])
def test_what_a_limit_would_cut_is_what_cutting_the_rows_does(prompt, completion, completions):
    found, sizes = draw_sizes(random.Random(4), 300, completions)
    seen = set()
    for limit, cut_to in ((100, 50), (40, 20), (30, 5), (20, 19), (8, 4)):
        lengths = LengthLimits(limit, cut_to, prompt, completion)
        expected = dict.fromkeys(("kept", "dropped", "prompts_cut", "answers_cut", "tokens"), 0)
        for given, whole in found:
            ids, eos_ids, _, reason = lengths.fit(given, whole, 0, partial(cut_text, given, 0))
            expected["dropped" if reason else "kept"] += 1
            if not reason:
                expected["prompts_cut"] += len(ids) < len(given)
                expected["answers_cut"] += any(len(a) < len(b) for a, b in zip(eos_ids, whole, strict=True))
                expected["tokens"] += sum(len(ids) + len(a) for a in eos_ids)
        assert statistics.apply_limits(sizes, lengths) == {"max": limit, **expected}
        seen |= {name for name, count in expected.items() if count}
    assert {"kept", "tokens"} < seen  # no policy was only tried where nothing happens


def test_candidates_reach_from_half_the_median_row_to_where_nothing_is_cut():
    sizes = pd.DataFrame({"total": [20, 50, 100]})
    assert statistics.candidate_limits(sizes, current=48, least=1, context=1000) == [32, 48, 64, 100, 128]
    assert statistics.candidate_limits(sizes, current=48, least=49, context=1000) == [48, 64, 100, 128]
    assert statistics.candidate_limits(sizes, current=48, least=1, context=70) == [32, 48, 64, 70, 128]
    assert statistics.candidate_limits(sizes, current=500, least=1, context=1000) == [32, 64, 128, 500]


@pytest.mark.parametrize("side", PAIR)
def test_a_block_that_one_side_begins_with_is_what_a_judge_of_it_alone_reaches(side):
    rng, rows = random.Random(12), []
    other = PAIR[1 - PAIR.index(side)]
    for i in range(300):
        row = {name: f"{rng.choice('abcdefgh')} {rng.random()} words" for name in PAIR}
        row[side] = f"<think>\n\n</think>\n\n{row[side]}" if i % 3 == 0 else row[side]
        row[other] = f"<think>\n\n</think>\n\n{row[other]}" if i % 30 == 1 else row[other]
        rows.append(row)
    block = statistics.leading_block(rows)
    assert block["value"] == pytest.approx(0.5 + (100 - 10) / 600)
    assert block["low"] > 0.55
    assert (block["text"], block["side"]) == ("<think>\n\n</think>\n\n", side)
    (sentence,) = warned(leading_block=block)
    assert f"of {side} completions alone tells which is chosen in 65.0%" in sentence
    assert statistics.leading_block([]) is statistics.leading_block([{"chosen": "", "rejected": ""}]) is None


def test_repeats_and_leakage_look_past_case_and_spaces():
    def rows_of(*rows) -> list[dict]:
        return [dict(zip(("prompt", *PAIR, "origin"), (*row, i), strict=True)) for i, row in enumerate(rows)]

    def says(role: str, text: str) -> list[dict]:
        return [{"role": role, "content": text}]

    train = [
        ("Say hello", "a", "b"),
        ("say  HELLO\n", "A", " b"),
        ("say hello", "b", "a"),
        (says("user", "Hi"), "a", "b"),
    ]
    test = [(prompt, "", "") for prompt in ("SAY hello", "say hell o", says("user", "hi "), says("system", "hi"))]
    rows = {"train": rows_of(*train), "test": rows_of(*test), "validation": rows_of(test[1])}
    found = statistics.find_repeats(rows, PAIR)
    assert found == {"repeats": {"prompts": 2, "alike": 1}, "leaked": {"test": [0, 2], "validation": []}}


ODD = [
    ("hold role or template text", "a:", "yes\n\nHuman: more"),
    ("are a list or an object", "a:", "['yes', 'no']"),
    ("begin with their prompt", "What is a lighthouse?", "What is a lighthouse? A tower."),
    ("follow a prompt without a space", "Name one", "two"),
]


@pytest.mark.parametrize(("kind", "prompt", "text"), ODD)
def test_completions_that_are_no_text_as_meant_are_counted(kind, prompt, text):
    rows = [{"prompt": prompt, "chosen": text, "rejected": " no", "origin": "1"}]
    rows.append({"prompt": "Name one:", "chosen": " [1] two", "rejected": " no", "origin": "2"})
    assert {name: origins for name, origins in statistics.odd_completions(rows, PAIR).items() if origins} == {
        kind: ["1"]
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder without weights, whose tokens are bytes, and one whole script tag."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([SCRIPT])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(vocab_size=300, max_position_embeddings=400, bos_token_id=0, eos_token_id=1)
    config.save_pretrained(folder)
    return folder


def tokens_of(text: str) -> int:
    """Tokens of a text by that tokenizer."""
    return len(text.replace(SCRIPT, "x").encode())


def pairs(rng: random.Random, rows: int) -> list[dict[str, str]]:
    """Pairs with a number in the prompt, the chosen completion being longer in four of five; some are é and 🙂."""
    made = []
    for i in range(rows):
        short = "".join(rng.choice("abc dé🙂") for _ in range(rng.randrange(2, 20))) + "."
        long = short + "".join(rng.choice("efg h") for _ in range(rng.randrange(1, 20))) + "!"
        chosen, rejected = (long, short) if rng.random() < 0.8 else (short, long)
        made.append({"prompt": f"Question {i}: " + "why " * rng.randrange(20), "chosen": chosen, "rejected": rejected})
    return made


def command(model, root, rows, *overrides, file="pairs.jsonl", test=()):
    """The config of the command for a file of pairs, written into `root`."""
    root.mkdir(exist_ok=True)
    for name, content in ((file, rows), ("test.jsonl", test)):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    given = ["model=path", f"model.path={model}", "dataset=json", f"dataset.path='{root / file}'", "name=n"]
    given += [f"dataset.test_path={root / 'test.jsonl'}"] if test else ["dataset.test_rows=10"]
    return compose([*given, f"root={root / 'outputs'}", *overrides])


def inspected(*given, **options):
    """The folder that the command writes, and its data.json."""
    folder = run_inspect(command(*given, **options)).parent
    return folder, json.loads((folder / "data.json").read_text())


@pytest.fixture(scope="module")
def looked_at(model, tmp_path_factory):
    """A set with every fault once or more: what the command made of it, and the rows that are train's."""
    rng = random.Random(6)
    rows = pairs(rng, 200)
    rows[7] |= {"prompt": f"Nasty: {NASTY}", "chosen": f"{NASTY} yes", "rejected": f"{NASTY} no"}
    rows[20] |= {"prompt": "w" * 500}  # cut
    rows[21] |= {"chosen": "l" * 500}  # too long
    rows[22] |= {"chosen": "  "}
    rows[23] |= {"rejected": rows[23]["chosen"]}
    rows[24] = dict(rows[25])
    rows[26] = {"prompt": rows[27]["prompt"], "chosen": rows[27]["rejected"], "rejected": rows[27]["chosen"]}
    rows[28] |= {"chosen": "ends</s>twice"}
    test = [{**row, "prompt": f"Tested {i}"} for i, row in enumerate(pairs(rng, 30))]
    test[3]["prompt"] = rows[30]["prompt"]
    test[4]["prompt"] = f"  {rows[31]['prompt'].upper()}"
    root = tmp_path_factory.mktemp("looked")
    run = command(model, root, rows, test=test)
    folder = run_inspect(run).parent
    train = kept_rows(load_rows(run, "dpo", load_tokenizer(run.model)), "train")
    train = [row for row in train if "</s>" not in row["chosen"]]
    return folder, json.loads((folder / "data.json").read_text()), train


def test_every_row_is_accounted_for(looked_at):
    _, summary, train = looked_at
    (source,) = summary["sources"].values()
    assert source["read"] == 230 == sum(source["kept"].values()) + sum(source["dropped"].values())
    assert source["dropped"] == {
        **{"prompt also in test": 1, "empty completion": 1, "identical completions": 1},
        **{"contradiction": 2, "exact duplicate": 1, "too long": 1},
        "completion without its one end token": 1,
    }
    assert source["cut"] == {"prompt cut": 1}
    assert summary["rows"] == source["kept"] == {"train": 183, "validation": 9, "test": 30}
    assert summary["examples"]["too long"][0].endswith("line 22")
    assert len(train) == 184  # with the one too long
    rows = pd.read_parquet(looked_at[0] / "rows.parquet")
    assert len(rows) == 230
    assert rows[rows["reason"].isna()].groupby("split").size().to_dict() == source["kept"]
    assert rows["reason"].value_counts().to_dict() == source["dropped"]
    assert source["unused_columns"] == []


def test_numbers_are_those_of_a_plain_count(looked_at):
    _, summary, train = looked_at
    prompt = [tokens_of(row["prompt"]) + 1 for row in train]  # with <s>
    chosen, rejected = ([tokens_of(row[name]) + 1 for row in train] for name in PAIR)  # with </s>
    together = [p + max(c, r) for p, c, r in zip(prompt, chosen, rejected, strict=True)]
    for name, lengths in {"prompt": prompt, "chosen": chosen, "rejected": rejected, "total": together}.items():
        found = summary["lengths"][name]
        assert [found[k] for k in ("mean", "max")] == pytest.approx([sum(lengths) / 184, max(lengths)])
        assert found["median"] == (sorted(lengths)[91] + sorted(lengths)[92]) / 2
    longer = sum((c > r) + (c == r) / 2 for c, r in zip(chosen, rejected, strict=True))
    assert summary["longer_chosen"]["value"] == pytest.approx(longer / 184)
    assert summary["longer_chosen"]["n"] == 184
    assert summary["repeats"] == {"prompts": 183, "alike": 0}
    now = next(at for at in summary["limits"] if at["max"] == summary["length"]["max"] == 400)
    assert now["kept"] == summary["rows"]["train"] == 183
    tokens = sum(
        (200 if total > 400 else p) * 2 + c + r
        for p, c, r, total in zip(prompt, chosen, rejected, together, strict=True)
        if max(c, r) < 400
    )
    assert now["tokens"] == summary["epoch"]["tokens"] == tokens
    assert (now["dropped"], now["prompts_cut"], now["answers_cut"]) == (1, 1, 0)
    assert summary["epoch"]["steps"] == 3
    assert [origin.rsplit("/", 1)[1] for origin in summary["leaked"]["test"]] == ["test.jsonl, line 5"]
    assert summary["leaked"]["validation"] == []


class Seen(HTMLParser):
    """The tags of a page with their attributes, and the text within each `class` of token rows."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts, self.inside, self.special, self.specials = [], [], None, False, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        classes = (dict(attrs).get("class") or "").split()
        if tag == "div" and "tokens" in classes:
            self.inside = len(self.texts)
            self.texts.append((classes[1], []))
        self.special = classes == ["special"]

    def handle_endtag(self, tag):
        self.inside = None if tag == "div" else self.inside

    def handle_data(self, data):
        if self.inside is not None:
            self.texts[-1][1].append(data)
            self.specials += [data] * self.special


@pytest.fixture(scope="module")
def nasty(model, tmp_path_factory):
    """The folder of rows whose every text, and whose file's name, is markup; what was printed; the page's contents."""
    rows = [
        {**row, "prompt": f"{i}\n{NASTY}", "chosen": f"{NASTY} {i} \U0001f642 \xe9"}
        for i, row in enumerate(pairs(random.Random(7), 60))
    ]
    rows[3]["chosen"] = " "
    write, contents, root = data_page.write_data_page, [], tmp_path_factory.mktemp("nasty")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(data_page, "write_data_page", lambda *args: contents.append(args) or write(*args))
        folder, _ = inspected(model, root, rows, file="<img src=x onerror=alert(3)>|[b](c).jsonl")
    return folder, printed.getvalue(), contents[0]


def test_html_shows_markup_as_text(nasty):
    folder = nasty[0]
    page = (folder / "data.html").read_text()
    seen = Seen(page)
    assert {tag for tag, _ in seen.tags} == {
        *("html head meta title style body nav a section h1 h2 h3 div ul li p code table tr th td".split()),
        *("figure figcaption img span br".split()),
    }
    sources = [attrs["src"] for tag, attrs in seen.tags if tag == "img"]
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert {file.name for file in folder.glob("*.png")} == {"data_lengths.png", "data_pairs.png"}
    assert not any(name.startswith("on") for _, attrs in seen.tags for name in attrs)
    assert all(attrs["href"].startswith("#") for tag, attrs in seen.tags if tag == "a")
    # What the data holds is all there, each script tag as one token's text.
    shown = ["".join(text).replace("\ufffd", "") for _, text in seen.texts]
    assert [name for name, _ in seen.texts] == ["prompt", "chosen", "rejected"] * 3
    assert all(text.startswith("<s>") and text.endswith(token_view.show_invisible(NASTY)) for text in shown[::3])
    assert all(
        re.fullmatch(re.escape(token_view.show_invisible(NASTY)) + r" \d+ .* .*</s>", text) for text in shown[1::3]
    )
    assert all(SCRIPT in text for name, text in seen.texts if name != "rejected")
    assert "<img" not in page.replace('<img src="data:image', "")
    assert "<img" not in (folder / "data.md").read_text().split("## Three rows")[0]
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_a_terminal_shows_no_code_that_it_would_obey(nasty):
    printed = nasty[1]
    assert not set("\x1b\x07\u202e") & set(printed)
    assert "\\x1b[31mred\\x07 \\u202eback <img" in re.sub("[\u2502\ufffd]", "", printed)
    shown = [line for line in printed.splitlines() if line.startswith("    ")]
    assert sum(SCRIPT in line.replace("\u2502", "") for line in shown) == 6


def test_colours_only_on_a_terminal_that_wants_them(nasty, model, tmp_path, monkeypatch):
    _, printed, (*contents, is_coloured) = nasty
    assert not is_coloured
    coloured = data_page.write_data_page(tmp_path / "page", *contents[1:], True)
    assert "\u27e6</s>\u27e7" in printed
    assert set(re.findall("\x1b\\[([0-9;]*)m", coloured)) == {
        *("0", "30;43"),
        *(f"97;48;5;{shade}" for name in ("prompt", *PAIR) for shade in token_view.SHADES[name]),
    }
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured) in re.sub("[\u2502\u27e6\u27e7]", "", printed)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    seen, write = [], data_page.write_data_page
    monkeypatch.setattr(data_page, "write_data_page", lambda *args: seen.append(args[-1]) or write(*args))
    for value in ("", "1"):
        monkeypatch.setenv("NO_COLOR", value)
        inspected(model, tmp_path, pairs(random.Random(7), 30))
    assert seen == [True, False]


def test_rows_are_shown_as_they_are_trained_on(looked_at):
    folder, _, train = looked_at
    seen = Seen((folder / "data.html").read_text())
    shown = [texts for _, texts in seen.texts]
    longest = max((r for r in train if tokens_of(r["chosen"]) < 400), key=lambda r: tokens_of(r["prompt"]))
    assert len(longest["prompt"]) == 500
    assert shown[6] == ["<s>", *"w" * 199]  # its left is cut, its <s> stays
    assert shown[7] == [*letters(longest["chosen"]), "</s>"]
    assert seen.specials == ["<s>", "</s>", "</s>"] * 3
    assert "301 tokens cut" in (folder / "data.html").read_text()
    by_prompt = {row["prompt"]: row for row in train}
    for prompt, chosen, rejected in (shown[:3], shown[3:6]):
        row = by_prompt["".join(prompt[1:])]
        assert [chosen, rejected] == [[*letters(row[name]), "</s>"] for name in PAIR]
    assert any("\ufffd" in texts for texts in shown)


def letters(text: str) -> list[str]:
    """The bytes of a text as pieces: of a character of several the last has it, the others stand for a part."""
    return [piece for c in text for piece in ["\ufffd"] * (len(c.encode()) - 1) + [c]]


OVERRIDE = re.compile("`([^`]+)`")


def warned(**changes) -> list[str]:
    """The warnings of a set with nothing wrong but `changes`."""
    good = {
        "sources": {"a": {"read": 900, "dropped": {"empty completion": 2}}, "b": {"read": 100, "dropped": {}}},
        "rows": {"train": 5000, "validation": 250, "test": 500},
        "longer_chosen": {"value": 0.55, "low": 0.54, "high": 0.56, "n": 5000},
        "overlap": {"median": 0.3},
        "leading_block": {"text": "Yes", "side": "chosen", "value": 0.56, "low": 0.54, "high": 0.58, "n": 5000},
        "epoch": {"steps": 79, "batch": 64, "tokens": 1},
        "leaked": {"validation": [], "test": []},
        "odd": {"are a list or an object": []},
    }
    return data_page.data_warnings({**good, **changes})


def bias(value: float, low: float, high: float) -> dict[str, dict[str, float]]:
    return {"longer_chosen": {"value": value, "low": low, "high": high, "n": 100}}


def dropped(**reasons: int) -> dict[str, dict[str, dict]]:
    return {"sources": {"a": {"read": 1000, "dropped": reasons}}}


@pytest.mark.parametrize(
    ("wrong", "fine", "said"),
    [
        ({"rows": {"train": 1999}}, {"rows": {"train": 2000}}, "1,999 pairs are few"),
        ({"rows": {"train": 10}}, {"rows": {"train": 10}, "longer_chosen": None, "overlap": None}, "10 pairs"),
        ({"epoch": {"steps": 49, "batch": 64}}, {"epoch": {"steps": 50, "batch": 64}}, "49 steps of 64"),
        ({"epoch": {"steps": 9, "batch": 9}}, {"epoch": {"steps": 9, "batch": 8}}, "batch.global_size=8"),
        (bias(0.681, 0.61, 0.75), bias(0.681, 0.60, 0.76), "the longer completion is chosen in 68.1% of pairs"),
        (bias(0.32, 0.25, 0.39), bias(0.32, 0.23, 0.41), "the shorter completion is chosen in 68.0% of pairs"),
        ({"overlap": {"median": 0.81}}, {"overlap": {"median": 0.8}}, "81% of their tokens"),
        ({"leaked": {"test": ["t, line 3", "u"]}}, {"leaked": {"test": []}}, "2 of the test rows"),
    ],
)
def test_warnings_come_at_their_bounds_with_an_override_that_composes(wrong, fine, said):
    assert warned() == warned(**fine) == []
    (sentence,) = warned(**wrong)
    assert said in sentence
    (override,) = OVERRIDE.findall(sentence)
    run = compose(["dataset=json", "dataset.path=x.jsonl", *override.split()])
    assert run != compose(["dataset=json", "dataset.path=x.jsonl"])


def test_copies_and_odd_completions_warn_from_their_bounds():
    assert warned(**dropped(**{"exact duplicate": 100})) == []
    assert "101 rows are exact duplicates" in warned(**dropped(**{"exact duplicate": 101}))[0]
    assert warned(odd={"are a list or an object": ["a"] * 100}) == []
    assert "101 train rows are a list" in warned(odd={"are a list or an object": ["a"] * 101})[0]


def test_what_would_stop_training_is_shown_all_the_same(model, tmp_path, capsys):
    rows = pairs(random.Random(8), 80)
    folder, summary = inspected(model, tmp_path / "long", rows, "length.max=8")
    assert summary["rows"] == {"train": 0, "validation": 0, "test": 0}
    assert summary["warnings"][0].startswith("training would stop: 100% of 80 rows are too long")
    assert summary["limits"][0]["dropped"] == summary["limits"][-1]["kept"] > 0
    for row in rows[:40]:
        row["rejected"] = row["chosen"]
    folder, summary = inspected(model, tmp_path / "faulty", rows)
    assert summary["warnings"][0].startswith("training would stop: 40 of 80 rows of pairs.jsonl teach nothing")
    assert capsys.readouterr().out.count("training would stop") == 2
    assert "training would stop" in (folder / "data.html").read_text()


def test_a_set_for_sft_alone_has_lengths_and_no_bias(model, tmp_path):
    texts = [{"text": f"{i} one two three four five six seven eight {'nine ' * (i % 9)}"} for i in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    given = (f"sft_dataset.path={tmp_path / 'texts.jsonl'}", "sft_dataset.test_rows=10")
    folder, summary = inspected(model, tmp_path, pairs(random.Random(10), 60), "dataset@sft_dataset=imdb", *given)
    assert list(summary["lengths"]) == ["prompt", "chosen", "rejected", "total"]
    summary = json.loads((folder / "sft" / "data.json").read_text())
    assert list(summary["lengths"]) == ["prompt", "demonstration", "total"]
    assert summary["longer_chosen"] is summary["overlap"] is None
    assert {file.name for file in (folder / "sft").iterdir()} == {
        *("data.json", "data.html", "data.md", "rows.parquet", "data_lengths.png"),
    }
    page = (folder / "sft" / "data.html").read_text()
    assert "The two completions" not in page
    assert [name for name, _ in Seen(page).texts] == ["prompt", "demonstration"] * 3


def test_to_look_at_data_takes_one_process_and_no_sweep(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PipelineError, match="one process is enough"):
        run_inspect(compose([f"root={tmp_path}"]))
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(sys, "argv", ["inspect_data", "-m", "beta=0.1,0.2", f"root={tmp_path}"])
    with pytest.raises(SystemExit, match="-m is for sft and dpo"):
        main(run_inspect)


def test_rows_of_messages_are_written_as_json():
    row = {"prompt": [{"role": "user", "content": "hi"}], "chosen": "", "extra": {"chosen": {"tool_calls": [1]}}}
    fields = {name: json.loads(text) for name, text in text_fields({**row, "tools": [{"name": "f"}]}).items()}
    assert fields["prompt"] == row["prompt"]
    assert fields["chosen"] == [{"role": "assistant", "content": "", "tool_calls": [1]}]
    assert fields["tools"] == [{"name": "f"}]
    assert text_fields({"prompt": "a", "rejected": " b"}) == {"prompt": "a", "rejected": " b"}
