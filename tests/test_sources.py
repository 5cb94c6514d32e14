"""Each published form of rows becomes pairs and demonstrations as text and as messages; bad input is one sentence.

The rows are made up in the form that each set has on the hub; its file in conf/dataset/ says where that was seen.
"""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from dpo_pipeline.config import ROW_KEYS, compose, instantiate_node
from dpo_pipeline.data import formats
from dpo_pipeline.data.report import count_rows, print_report
from dpo_pipeline.data.reviews import GENRES, NOUNS
from dpo_pipeline.errors import PipelineError
from tests.test_data import loaded, prepared, write

NAMES = ("prompt", "chosen", "rejected", "demonstration")


def texts(row):
    """The prompt and the completions of a row."""
    assert row["source"] == "s"
    assert row["origin"]
    return {key: row[key] for key in NAMES if key in row}


def read(name, path, *overrides, chat=False, split="train"):
    """What the data set's own file in conf/ makes of the rows of a local copy."""
    return [texts(row) for row in loaded(name, path, *overrides, chat=chat)[split]]


def reasons(rows):
    return [row["reason"] for row in rows]


def user(content):
    return {"role": "user", "content": content}


def system(content):
    return {"role": "system", "content": content}


def reply(content):
    return {"role": "assistant", "content": content}


def turn(role, value):
    return {"from": role, "value": value}


HUMAN = "\n\nHuman: {}\n\nAssistant:".format
HH = HUMAN("hi")
PAIR = {"chosen": "yo", "rejected": "no"}
TEXT = {"prompt": HH, "chosen": " yo", "rejected": " no"}
CHAT = {"prompt": [user("hi")], **PAIR}
OURS, CHAT_OURS = {"prompt": HH, "demonstration": " yo"}, {"prompt": [user("hi")], "demonstration": "yo"}
KIND, KIND_CHAT = {**TEXT, "prompt": f"Be kind.{HH}"}, {**CHAT, "prompt": [system("Be kind."), user("hi")]}
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.{}\n\n### Response:\n"
)
WITH_INPUT = ALPACA.format(", paired with an input that provides further context", "\n\n### Input:\n1 2")
SHP = {
    "post_id": "qt3nxl", "domain": "askculinary_train", "upvote_ratio": 0.98, "history": "Rice?", "score_A": 340,
    "human_ref_A": "With water.", "human_ref_B": "Not at all.", "labels": 1, "score_ratio": 2.048,
}  # fmt: skip


def test_shp_takes_the_preferred_comment_of_clear_pairs_at_most_five_for_a_post(tmp_path):
    low = {**SHP, "score_ratio": 1.99}
    rows = [SHP, {**SHP, "labels": 0}, low, *[{**SHP, "human_ref_A": f"{i}"} for i in range(4)]]
    rows += [{**SHP, "history": "And beans?"}, {**SHP, "labels": 3}, {**SHP, "labels": None}]
    write(tmp_path / "askculinary" / "train.json", rows)
    write(tmp_path / "askcarguys" / "train.json", [SHP])
    write(
        tmp_path / "askculinary" / "test.csv", [{**SHP, "labels": "0", "score_ratio": "1.5"}, SHP]
    )  # text as numbers
    write(tmp_path / "askculinary" / "validation.json", [SHP])
    found = loaded("shp", tmp_path, "dataset.data_dir=askculinary")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 10, "test": 2}
    good = {"prompt": HUMAN("Rice?"), "chosen": " With water.", "rejected": " Not at all."}
    bad = {**good, "chosen": " Not at all.", "rejected": " With water."}
    assert [texts(row) for row in found["train"][:2]] == [good, bad]
    tie = "a tie (labels is neither 1 nor 0)"
    low_or_more = [None, None, "score_ratio below 2", None, None, None, "beyond 5 pairs of its prompt", None]
    assert reasons(found["train"]) == [*low_or_more, tie, tie]
    assert {row["kind"] for row in found["train"] if row["reason"]} == {"filtered"}  # and no fault
    assert (texts(found["test"][0]), *reasons(found["test"])) == (bad, "score_ratio below 2", None)
    assert len(read("shp", tmp_path)) == 11
    chat = read("shp", tmp_path / "askculinary" / "test.csv", chat=True)[1]
    assert chat == {"prompt": [user("Rice?")], "chosen": "With water.", "rejected": "Not at all."}


def summary(text, policy):
    return {"text": text, "policy": policy, "note": None}


def comparison(post, first, second, choice):
    info = {"id": "t3_1", "post": post, "title": "Car", "subreddit": "legaladvice", "site": None, "article": None}
    return {"info": info, "summaries": [first, second], "choice": choice, "worker": "w", "extra": {"confidence": 8}}


def strings(*names):
    return pa.struct({name: pa.string() for name in names})


TLDR = pa.schema(  # as the set's script declares it
    {
        "info": strings("id", "post", "title", "subreddit", "site", "article"),
        "summaries": pa.list_(strings("text", "policy", "note")),
        "choice": pa.int32(), "worker": pa.string(), "extra": pa.struct({"confidence": pa.int32()}),
    }
)  # fmt: skip


def test_tldr_asks_in_the_papers_form_and_keeps_the_posts_own_summary(tmp_path):
    ref, one, two = summary(" own", "ref"), summary(" one", "sup4"), summary(" two", "sup4_ppo")
    news = comparison(None, one, ref, 0)
    news["info"] |= {"title": "News", "subreddit": None, "site": "cnn", "article": "It rains."}
    rows = [comparison("A.", one, two, 1), comparison("A.", ref, two, 0), comparison("B.", one, two, 0)]
    write(tmp_path / "comparisons" / "train" / "0000.parquet", rows, TLDR)
    write(tmp_path / "comparisons" / "validation" / "0000.parquet", [rows[1], news], TLDR)
    write(tmp_path / "axis" / "test" / "0000.parquet", [{"info": {"id": "1"}}])
    asked = "SUBREDDIT: r/legaladvice\n\nTITLE: Car\n\nPOST: A.\n\nTL;DR:"
    assert read("summarize_from_feedback", tmp_path, "dataset.revision=null") == [
        {"prompt": asked, "chosen": " two", "rejected": " one", "demonstration": " own"},
        {"prompt": asked, "chosen": " own", "rejected": " two", "demonstration": " own"},
        {"prompt": asked.replace("A.", "B."), "chosen": " one", "rejected": " two"},
    ]
    found = loaded("summarize_from_feedback", tmp_path, "dataset.revision=null")
    assert reasons(found["test"]) == [None, "no prompt"]
    chat = read("summarize_from_feedback", write(tmp_path / "batch9.jsonl", rows), chat=True)[0]
    assert chat == {"prompt": [user(asked)], "chosen": "two", "rejected": "one", "demonstration": "own"}


ULTRA = {
    "prompt": "hi", "prompt_id": "a", "chosen": [user("hi"), reply("yo")], "rejected": [user("hi"), reply("no")],
    "messages": [user("hi"), reply("yo")], "score_chosen": 8.0, "score_rejected": 4.0,
}  # fmt: skip
KINDLY = {"system": "Be kind.", **PAIR}
STACK = {
    "qid": 1,
    "question": "hi",
    "date": "2012/01/01",
    "metadata": ["a", "b"],
    "response_j": "yo",
    "response_k": "no",
}
ADD = {"instruction": "Add.", "input": "1 2", "output": "3"}
REVIEW = {"text": "I saw it  twice, and\nwould do so again.<br /><br />Go!", "label": 1}
# Of each set: a file of a copy, a row, and what it becomes as text and as messages.
PUBLISHED = {
    "ultrafeedback_binarized": ("data/train_prefs-00000-of-00001.parquet", ULTRA, TEXT, CHAT),
    "orca_dpo_pairs": ("orca_rlhf.jsonl", {**KINDLY, "question": "hi"}, KIND, KIND_CHAT),
    "truthy_dpo": ("truthy-dpo.parquet", {**KINDLY, "id": "a", "source": "truthy", "prompt": "hi"}, KIND, KIND_CHAT),
    "stack_exchange_paired": ("data/rl/train-00000-of-00001.parquet", STACK, TEXT, CHAT),
    "alpaca": ("train-00000-of-00001.parquet", {**ADD, "text": "Below is an instruction"},
               {"prompt": WITH_INPUT, "demonstration": "3"}, {"prompt": [user("Add.\n\n1 2")], "demonstration": "3"}),
    "instruction_preference": ("list.json", {**ADD, **PAIR}, {"prompt": WITH_INPUT, **PAIR, "demonstration": "3"},
                               {"prompt": [user("Add.\n\n1 2")], **PAIR, "demonstration": "3"}),
    "imdb": ("train.jsonl.gz", REVIEW,
             {"prompt": "I saw it  twice, and\nwould do so", "demonstration": " again.<br /><br />Go!"},
             {"prompt": [user("I saw it  twice, and\nwould do so")], "demonstration": "again.<br /><br />Go!"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_set_is_read_as_text_and_as_messages(name, tmp_path):
    file, row, text, chat = PUBLISHED[name]
    folder = write(tmp_path / file, [row, row]).removesuffix(f"/{file}")
    if name == "ultrafeedback_binarized":
        for split in ("test_prefs", "train_sft"):  # the splits have names of their own
            write(tmp_path / "data" / f"{split}-00000-of-00001.parquet", [row])
        assert read(name, folder, split="test") == [text]
    write(
        tmp_path / "data" / "finetune" / "train-00000-of-00001.parquet",
        [row] * 3 if name.startswith("stack") else [row],
    )
    if name not in ("ultrafeedback_binarized", "stack_exchange_paired"):
        folder = tmp_path / file
    assert read(name, folder) == [text, text]
    assert read(name, folder, "dataset.rows=1", chat=True) == [chat]


def test_options_of_published_sets(tmp_path):
    short = write(tmp_path / "short.jsonl", [{"text": "Seven words and no more than that"}, REVIEW])
    assert read("imdb", short)[0] == {"prompt": "Seven words and no more than that", "demonstration": ""}
    assert read("imdb", short, "dataset.prompt_words=2")[1]["prompt"] == "I saw"
    kind = write(tmp_path / "kind.jsonl", [{**KINDLY, "question": "hi"}, {**KINDLY, "system": "", "question": "hi"}])
    assert read("orca_dpo_pairs", kind)[1] == TEXT
    assert read("orca_dpo_pairs", kind, "dataset.columns.system=null")[0] == TEXT
    add = write(tmp_path / "add.jsonl", [{**ADD, "input": ""}])
    assert read("alpaca", add)[0]["prompt"] == ALPACA.format("", "")
    assert read("alpaca", add, chat=True)[0]["prompt"] == [user("Add.")]


SHAREGPT = {"conversations": [turn("human", "hi")], "chosen": turn("gpt", "yo"), "rejected": turn("gpt", "no")}
OPENAI = {
    "input": {"messages": [user("hi")], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [reply("yo")], "non_preferred_output": [reply("no")],
}  # fmt: skip
MESSAGES = {"prompt": [user("hi")], "chosen": [reply("yo")], "rejected": [reply("no")]}
PLAIN = {"prompt": "hi", **PAIR}
NINE = {"text": "a b c d e f g h i", "label": 1}
TALKS = {name: [turn("human", "hi"), turn("gpt", text)] for name, text in PAIR.items()}
FORMS = {
    "text": (PLAIN, PLAIN, CHAT),
    "text with a demonstration": ({**PLAIN, "demonstration": "so"},) * 2 + ({**CHAT, "demonstration": "so"},),
    "messages": (MESSAGES, TEXT, CHAT),
    "text, answered by messages": ({**MESSAGES, "prompt": "hi"}, TEXT, CHAT),
    "a system prompt beside it": ({"system": "Be kind.", **PLAIN}, KIND, KIND_CHAT),
    "OpenAI's": (OPENAI, TEXT, CHAT),
    "ShareGPT's": (SHAREGPT, TEXT, CHAT),
    "ShareGPT's with a system prompt": ({**SHAREGPT, "system": "Be kind."}, KIND, KIND_CHAT),
    "dialogues of turns": (TALKS, TEXT, CHAT),
    "dialogues of text": ({"chosen": f"{HH} yo", "rejected": f"{HH} no"}, TEXT, CHAT),
    "a question": ({"question": "hi", **PAIR}, TEXT, CHAT),
    "content in parts": ({**PLAIN, "prompt": [user([{"type": "text", "text": c} for c in "hi"])]}, TEXT, CHAT),
    "an instruction with completions": (
        {"instruction": "Add.", **PAIR}, {"prompt": ALPACA.format("", ""), **PAIR}, {"prompt": [user("Add.")], **PAIR},
    ),
    "SFT: messages": ({"messages": [user("hi"), reply("yo")]}, OURS, CHAT_OURS),
    "SFT: turns": ({"conversations": [turn("human", "hi"), turn("gpt", "yo")]}, OURS, CHAT_OURS),
    "SFT: a completion": ({"prompt": "hi", "completion": " yo"}, {"prompt": "hi", "demonstration": " yo"}, CHAT_OURS),
    "SFT: plain text": (
        NINE, {"prompt": "a b c d e f g h", "demonstration": " i"},
        {"prompt": [user("a b c d e f g h")], "demonstration": "i"},
    ),
}  # fmt: skip


def test_a_common_form_is_recognised_without_columns_in_each_row(tmp_path):
    for number, (row, *expected) in enumerate(FORMS.values()):
        path = write(tmp_path / f"{number}.jsonl", [row, row])
        for each, chat in zip(expected, (False, True), strict=True):
            assert read("json", path, chat=chat) == [each, each]
    write(tmp_path / "all" / "train.jsonl", [MESSAGES, PLAIN])
    assert read("json", tmp_path / "all", chat=True) == [CHAT, CHAT]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl", "list.json", "a.jsonl.gz", "folder/train.jsonl"])
def test_a_copy_may_be_of_any_kind(name, tmp_path):
    row = {"asked": "a, b\n\u201cc\u201d", "good": " yo", "bad": "2020-01-01"}
    write(tmp_path / name, [row, {**row, "good": "None"}])
    columns = "dataset.columns={prompt: asked, chosen: good, rejected: bad}"
    rows = loaded("json", tmp_path / name.split("/")[0], columns)["train"]
    whole = {"prompt": row["asked"], "chosen": " yo", "rejected": "2020-01-01"}
    assert [texts(each) for each in rows] == [whole, {**whole, "chosen": "None"}]  # text stays text
    assert len({each["origin"] for each in rows}) == 2


def test_columns_are_paths_templates_and_names_with_dots(tmp_path):
    row = {
        "ask": {"title": "T", "turns": [{"text": "one"}, {"text": "two"}], "year": 2020}, "out.0": " yo",
        "marked": [{"by": "a.b", "text": " bad"}, {"by": "me", "text": " own"}],
    }  # fmt: skip
    columns = (
        'dataset.columns={prompt: "{ask.title} ({ask.year}): {ask.turns.-1.text}", chosen: out.0, '
        'rejected: "marked[by=a.b].text", demonstration: "marked[by=you].text"}'
    )
    path = write(tmp_path / "a.jsonl", [row])
    assert read("json", path, columns) == [{"prompt": "T (2020): two", "chosen": " yo", "rejected": " bad"}]


def test_a_second_file_or_folder_is_the_test_split_and_may_have_another_form(tmp_path):
    train = write(tmp_path / "a.jsonl", [PLAIN] * 3)
    test = write(tmp_path / "b.jsonl", [OPENAI])
    assert read("json", train, f"dataset.test_path={test}", split="test") == [TEXT]
    for name, count in (("train", 9), ("test", 2)):
        write(tmp_path / "all" / f"{name}.jsonl", [PLAIN] * count)
    assert len(read("json", train, f"dataset.test_path={tmp_path / 'all'}", split="test")) == 2


def test_what_may_stand_beside_a_form_is_looked_for_in_each_row(tmp_path):
    """Not in the first alone: the inputs and systems of all others would be gone without a word."""
    beside = {"question": "q", **PAIR}
    rows = [{"instruction": "a", "output": "x"}, {"instruction": "b", "input": "in", "output": "y"}, beside,
            {**beside, "system": "s"}, {**beside, "system": None}]  # fmt: skip
    prompts = [[user("a")], [user("b\n\nin")], [user("q")], [system("s"), user("q")], [user("q")]]
    for step in (1, -1):
        found = read("json", write(tmp_path / "a.jsonl", rows[::step]), chat=True)
        assert [row["prompt"] for row in found] == prompts[::step]


def test_a_prompt_is_empty_whatever_frame_is_put_around_it(tmp_path):
    rows = [
        {"question": " ", **PAIR},
        {"instruction": "", "input": "x", **PAIR},
        {"prompt": "\n", **PAIR},
        {"text": " "},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    for chat in (False, True):
        found = loaded("json", path, chat=chat)["train"]
        assert [row["problem"] for row in found] == ["empty prompt"] * 4


GIVEN = "dataset.columns={prompt: q, chosen: a.0.text, rejected: b}"
Q = {"q": "p", "b": "c"}
WRONG = [  # rows, what is typed, and what the sentence says
    ([{"prompt": "p", "chosen": "c"}], "", "line 1 has the columns prompt, chosen, which are no form"),
    ([PLAIN, {"prompt": "p", "chosen": "c"}], "", "line 2 has the columns prompt, chosen, which are no form known"),
    ([{"asked": "q", **PAIR}], "", "has the columns asked, chosen, rejected, which are no form"),
    ([{f"column{i}": "x" for i in range(200)}], "", "column9 and 190 more, which are no form"),
    ([Q], GIVEN, "line 1: columns.chosen=a.0.text: there is no a, found q, b$"),
    ([{**Q, "a": [{"content": "x", "role": "y"}]}], GIVEN, "there is no text, found content, role$"),
    ([{**Q, "a": []}], GIVEN, r"there is no 0, found \[\]$"),
    ([{**Q, "a": "x"}], GIVEN, 'there is no 0, found "x"$'),
    ([{"query": "p", "a": [{"text": ""}], "b": ""}], GIVEN.replace("q,", "qury,"), "no qury, .*: did you mean query"),
    ([PLAIN, {**PLAIN, "chosen": 3}], "", "(line|row) 2: chosen is 3, not text or messages"),
    (
        [PLAIN, {**PLAIN, "chosen": None}],
        "dataset.columns={question: prompt, chosen: chosen}",
        "line 2: chosen is null",
    ),
    ([{"q": None, **PAIR}], "dataset.columns={question: q, chosen: chosen}", "line 1: question is null, not text"),
    ([{"question": 3, **PAIR}], "", "prompt, message 1: its content is 3, not text"),
    ([{"text": ["a"]}], "", "line 1: text is .*, not text: correct it"),
    ([{"instruction": {}, **PAIR}], "", "line 1: instruction is {}, not text"),
    ([{"messages": [user("hi"), {"role": "oracle", "content": "x"}]}], "", "message 2: its role is 'oracle', none of"),
    ([{"messages": [user("hi")]}], "", "demonstration does not end with a reply"),
    ([{"q": {"x": 1}, "b": ""}], "dataset.columns={prompt: '<{q}>'}", "q is .*, not text: name a"),
    ([{"q": ["by x"]}], "dataset.columns={prompt: 'q[by=me]'}", 'there is no by, found "by x"'),
    ([Q], "dataset.columns={promt: q}", "columns.promt is no part of a row: .*mean prompt"),
    ([Q], "dataset.columns={choice: q}", "dataset.columns needs all three .*choices:"),
    ([PLAIN], "dataset.columns={prompt: prompt, answers: [0, 1], choice: x, choices: [0, 1]}", "there is no x"),
    ([Q], "dataset.columns=q", "dataset.columns=q: .*dictionary"),
    ([NINE], "dataset.at_least={text: 2}", "line 1: text is .*, not a number"),
    ([NINE], "dataset.at_least={text: x}", "dataset.at_least.text=x: .*number"),
    ([PLAIN], "dataset.rows=-5", "dataset.rows=-5: .*or equal to 0"),
    ([PLAIN], "dataset.prompt_words=0", "dataset.prompt_words=0: .*greater than 0"),
    ([PLAIN], "dataset.splits={validation: train}", "dataset.splits.validation=validation: .*'train' or 'test'"),
]


@pytest.mark.parametrize(("rows", "typed", "sentence"), WRONG)
def test_bad_input_is_one_sentence(rows, typed, sentence, tmp_path):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(PipelineError, match=sentence) as error:
        read("json", path, *[typed] if typed else [])
    assert "\n" not in str(error.value)


# What a reader could lose, or trip over, without a word.
PAIRED = json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n"
RAW = {
    "unclosed.csv": ('prompt,chosen,rejected\np,c,r\np,c,"r\np,c,r\n', "line 2 is no CSV.*double quotes"),
    "fields.csv": ("prompt,chosen,rejected\np,c\n", "line 2 is no CSV: not 3 fields.*double quotes"),
    "twice.csv": ("prompt,chosen,chosen\np,c,r\n", r"two of its columns have one name \(prompt, chosen, chosen\)"),
    "half.jsonl": (PAIRED + PAIRED.replace('"c"', '"\\ud800"'), "line 2 is no JSON .*surrogates"),
    "long.jsonl": (PAIRED + PAIRED.replace('"c"', "1" * 5000), "line 2 is no JSON .Exceeds the limit"),
    "deep.jsonl": (PAIRED + PAIRED.replace('"c"', "[" * 99999), "line 2 is no JSON"),
    "role.jsonl": (PAIRED.replace('"c"', '[{"role": ["user"], "content": "c"}]'), r"its role is \['user'\], none of"),
    "a.tsv": ("prompt\tchosen\n", ".tsv files are not supported.*save it as"),
    "a.jsonl.zst": ("x", ".zst files are not supported.*save it as"),
    "empty/train.jsonl": ("", "train.jsonl is empty"),
    "blank.jsonl": ("\n \n", "blank.jsonl is empty"),
    "list.json": ("[]", "list.json is empty"),
    "text.jsonl": (f'{PAIRED}"hello"', "line 2 holds .hello., not an object"),
    "py/script.py": ("import datasets\n", "py cannot be read as a data set: it holds no .json"),
    "alone/validation.jsonl": (PAIRED, "no split train, only validation: type 'dataset.splits="),
}


@pytest.mark.parametrize("name", RAW)
def test_a_file_that_is_not_what_it_seems_is_one_sentence(name, tmp_path):
    text, sentence = RAW[name]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(PipelineError, match=sentence) as error:
        read("json", tmp_path / name.split("/")[0])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("shp", ("stanfordnlp/SHP", None, None, None)),
        ("summarize_from_feedback", ("openai/summarize_from_feedback", "comparisons", "refs/convert/parquet",
                                     {"train": "train", "test": "validation"})),
        ("ultrafeedback_binarized", ("HuggingFaceH4/ultrafeedback_binarized", None, None,
                                     {"train": "train_prefs", "test": "test_prefs"})),
        ("stack_exchange_paired", ("lvwerra/stack-exchange-paired", "data/rl", None, None)),
    ],
)  # fmt: skip
def test_what_is_asked_of_the_hub(name, asked, monkeypatch):
    calls = []
    monkeypatch.setattr(formats, "read_source", lambda *given: calls.append(given) or {})
    node = compose([f"dataset={name}"]).dataset
    instantiate_node({key: value for key, value in node.items() if key not in ROW_KEYS}, chat=False, source="it")
    assert calls == [(*asked, None)]


def test_a_file_may_begin_with_a_byte_order_mark_and_hold_long_fields(tmp_path):
    """As Excel writes it; csv takes 131,072 characters unless told."""
    long = "word " * 50_000
    (tmp_path / "a.csv").write_text(f"prompt,chosen,rejected\np,{long},r\n", encoding="utf-8-sig")
    assert read("json", tmp_path / "a.csv") == [{"prompt": "p", "chosen": long, "rejected": "r"}]
    (tmp_path / "a.jsonl").write_text(PAIRED, encoding="utf-8-sig")
    assert read("json", tmp_path / "a.jsonl")[0]["prompt"] == "p"


def test_a_folder_is_read_whole_or_says_what_is_not(tmp_path, caplog):
    write(tmp_path / "a.jsonl", [PLAIN])
    write(tmp_path / "more" / "b.csv", [PLAIN, PLAIN])
    write(tmp_path / "validation.jsonl", [PLAIN])
    (tmp_path / "c.tsv").write_text("prompt\tchosen\n")
    (tmp_path / ".hidden.jsonl").write_text("{")
    rows = loaded("json", tmp_path)["train"]
    assert [texts(row) for row in rows] == [PLAIN] * 3
    assert rows[0]["origin"] == f"{tmp_path}/a.jsonl, line 1"
    assert "c.tsv cannot be read" in caplog.text
    assert "validation is not read; 'dataset.splits=" in caplog.text
    assert len(read("json", tmp_path, "dataset.splits={train: validation}")) == 1


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([PLAIN] * 2)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
    (row, _) = loaded("json", tmp_path / "one")["train"]
    assert texts(row) == PLAIN
    assert row["origin"].endswith("train row 1")
    for split in ("train", "test"):
        assert len(read("json", tmp_path / "two", split=split)) == 2


CARD = """---
configs:
- config_name: one
  data_files: one/*.jsonl.gz
- config_name: two
  data_files: two/*.jsonl
---
"""


def test_a_set_of_several_configs_lists_them_and_is_cached_under_root(small, tmp_path, monkeypatch):
    """A plain file stands for an HF_HOME that is read-only, since root may write everywhere."""
    configs, home = tmp_path / "set", tmp_path / "home"
    for name in ("one", "two"):
        rows = [{"prompt": f"the {GENRES[i % 8]} {NOUNS[i % 17]} .", "chosen": "it", "rejected": "cold", name: "x"}
                for i in range(20)]  # fmt: skip
        write(configs / name / f"train.jsonl{'.gz' if name == 'one' else ''}", rows)
    (configs / "README.md").write_text(CARD)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for typed in ([], ["dataset.config=three"]):
        with pytest.raises(PipelineError, match="set has the configs one, two: type dataset.config=NAME"):
            read("json", configs, *typed)
    rows = loaded("json", configs, "dataset.config=two")["train"]
    assert len(rows) == 20
    assert "two" in rows[0]["unused"]
    assert len(read("json", configs, "dataset.data_dir=one")) == 20
    home.write_text("")
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH", "HF_MODULES_CACHE"):
        monkeypatch.setattr(f"datasets.config.{name}", home / "datasets")
    run = small("dataset=json", f"dataset.path={configs}", "dataset.config=one", f"root={tmp_path}")
    assert len(prepared(run, "dpo", "train").tables["train"]) > 10
    assert list((Path(run.root) / ".cache" / "datasets").rglob("*.arrow"))


def test_a_report_names_ten_columns_at_most(tmp_path):
    many = {f"column{i}": "x" for i in range(200)}
    rows = loaded("json", write(tmp_path / "b.jsonl", [{**PLAIN, **many}]))["train"]
    assert "column9 and 190 more |" in print_report(count_rows([{**rows[0], "split": "train"}]), rows)
