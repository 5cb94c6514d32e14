"""Each published form of rows becomes pairs and demonstrations as text and as messages; bad input is one sentence.

The rows are made up in the form that each set has on the hub; its file in conf/dataset/ says where that was seen.
"""

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from dpo_pipeline.config import ROW_KEYS, compose, instantiate_node
from dpo_pipeline.data import formats
from dpo_pipeline.data.report import count_rows, kept_rows, print_report
from dpo_pipeline.data.reviews import GENRES, NOUNS
from dpo_pipeline.data.splits import load_splits
from dpo_pipeline.errors import PipelineError
from tests.helpers import prepare_run


def write(path, rows, schema=None):
    """A file of rows by its name's ending; the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows, schema), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = json.dumps(rows) if path.name == "list.json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return str(path)


def loaded(name, path, *overrides, chat=False):
    """What the data set's own file in conf/ makes of a local copy."""
    node = compose([f"dataset={name}", f"dataset.path={path}", *overrides]).dataset
    return instantiate_node({key: value for key, value in node.items() if key not in ROW_KEYS}, chat=chat, source="it")


def completions(row):
    """The prompt and the completions of a row."""
    assert row["source"] == "it"
    assert row["origin"]
    return {key: row[key] for key in ("prompt", "chosen", "rejected", "demonstration") if key in row}


def user(content):
    return {"role": "user", "content": content}


def system(content):
    return {"role": "system", "content": content}


def reply(content):
    return {"role": "assistant", "content": content}


HUMAN = "\n\nHuman: {}\n\nAssistant:".format
SHP = {
    "post_id": "qt3nxl",
    "domain": "askculinary_train",
    "upvote_ratio": 0.98,
    "history": "How do I cook rice?",
    "c_root_id_A": "hkh51xz",
    "c_root_id_B": "hkh51xa",
    "created_at_utc_A": 1636822112,
    "created_at_utc_B": 1636822110,
    "score_A": 340,
    "score_B": 166,
    "human_ref_A": "With water.",
    "human_ref_B": "Not at all.",
    "labels": 1,
    "seconds_difference": 2.0,
    "score_ratio": 2.048,
}


def test_shp_takes_the_preferred_comment_of_clear_pairs_at_most_five_for_a_post(tmp_path):
    rows = [
        SHP,
        {**SHP, "labels": 0},
        {**SHP, "score_ratio": 1.99},
        *[{**SHP, "human_ref_A": f"{i}"} for i in range(4)],
    ]
    write(tmp_path / "askculinary" / "train.json", [*rows, {**SHP, "history": "And beans?"}])
    write(tmp_path / "askcarguys" / "train.json", [SHP])
    write(tmp_path / "askculinary" / "test.json", [{**SHP, "score_ratio": 2.0}])
    write(tmp_path / "askculinary" / "validation.json", [SHP])
    found = loaded("shp", tmp_path, "dataset.data_dir=askculinary")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 8, "test": 1}
    asked = HUMAN("How do I cook rice?")
    assert completions(found["train"][0]) == {"prompt": asked, "chosen": " With water.", "rejected": " Not at all."}
    assert completions(found["train"][1]) == {"prompt": asked, "chosen": " Not at all.", "rejected": " With water."}
    reasons = ["score_ratio below 2", "beyond 5 pairs of its prompt"]
    assert [row["reason"] for row in found["train"]] == [
        None,
        None,
        reasons[0],
        None,
        None,
        None,
        reasons[1],
        None,
    ]
    assert found["test"][0]["reason"] is None
    assert len(loaded("shp", tmp_path)["train"]) == 9
    chat = loaded("shp", tmp_path / "askculinary" / "test.json", chat=True)["train"][0]
    assert completions(chat) == {
        "prompt": [user("How do I cook rice?")],
        "chosen": "With water.",
        "rejected": "Not at all.",
    }


def test_what_shp_leaves_out_is_counted_and_is_no_fault(tmp_path):
    rows = [{**SHP, "history": f"{i}", "score_ratio": 2.5 if i % 2 else 1.5} for i in range(100)]
    path = write(tmp_path / "train.json", rows)
    run = compose(["dataset=shp", f"dataset.path={path}", "dataset.test_rows=5"])
    rows = load_splits(run.dataset, ("chosen", "rejected"), chat=False)
    assert len(kept_rows(rows)) == 50
    assert count_rows(rows)["sources"]["train.json"]["dropped"] == {"score_ratio below 2": 50}


def test_a_number_in_csv_is_a_number(tmp_path):
    path = write(tmp_path / "shp.csv", [{**SHP, "labels": "0", "score_ratio": "1.5"}, {**SHP, "score_ratio": "3"}])
    first, second = loaded("shp", path)["train"]
    assert (first["chosen"], first["reason"]) == (" Not at all.", "score_ratio below 2")
    assert second["reason"] is None


def summary(text, policy):
    return {"text": text, "policy": policy, "note": None}


def comparison(post, first, second, choice):
    info = {"id": "t3_1", "post": post, "title": "Car", "subreddit": "legaladvice", "site": None, "article": None}
    rest = {"worker": "w", "batch": "batch9", "split": "train", "extra": {"confidence": 8}}
    return {"info": info, "summaries": [first, second], "choice": choice, **rest}


TLDR = pa.schema(  # as the set's script declares it
    {
        "info": pa.struct({name: pa.string() for name in ("id", "post", "title", "subreddit", "site", "article")}),
        "summaries": pa.list_(pa.struct({name: pa.string() for name in ("text", "policy", "note")})),
        "choice": pa.int32(),
        **dict.fromkeys(("worker", "batch", "split"), pa.string()),
        "extra": pa.struct({"confidence": pa.int32()}),
    }
)


def test_tldr_asks_in_the_papers_form_and_keeps_the_posts_own_summary(tmp_path):
    ref, one, two = summary(" own", "ref"), summary(" one", "sup4"), summary(" two", "sup4_ppo")
    news = comparison(None, one, ref, 0)
    news["info"] |= {"title": "News", "subreddit": None, "site": "cnn", "article": "It rains."}
    rows = [comparison("A.", one, two, 1), comparison("A.", ref, two, 0), comparison("B.", one, two, 0)]
    write(tmp_path / "comparisons" / "train" / "0000.parquet", rows, TLDR)
    write(tmp_path / "comparisons" / "validation" / "0000.parquet", [rows[1], news], TLDR)
    write(tmp_path / "axis" / "test" / "0000.parquet", [{"info": {"id": "1"}, "summary": ref}])
    found = loaded("summarize_from_feedback", tmp_path, "dataset.revision=null")
    asked = "SUBREDDIT: r/legaladvice\n\nTITLE: Car\n\nPOST: A.\n\nTL;DR:"
    first, second, third = map(completions, found["train"])
    assert first == {"prompt": asked, "chosen": " two", "rejected": " one", "demonstration": " own"}
    assert second == {"prompt": asked, "chosen": " own", "rejected": " two", "demonstration": " own"}
    assert third == {"prompt": asked.replace("A.", "B."), "chosen": " one", "rejected": " two"}
    assert [row["reason"] for row in found["test"]] == [None, "no prompt"]
    path = write(tmp_path / "batch9.jsonl", rows)
    assert completions(loaded("summarize_from_feedback", path, chat=True)["train"][0]) == {
        "prompt": [user(asked)],
        "chosen": "two",
        "rejected": "one",
        "demonstration": "own",
    }


def test_ultrafeedback_is_whole_dialogues_in_splits_of_its_own_names(tmp_path):
    row = {
        "prompt": "hi",
        "prompt_id": "a",
        "chosen": [user("hi"), reply("yo")],
        "rejected": [user("hi"), reply("no")],
        "messages": [user("hi"), reply("yo")],
        "score_chosen": 8.0,
        "score_rejected": 4.0,
    }
    for split, rows in (("train_prefs", [row]), ("test_prefs", [row]), ("train_sft", [row, row])):
        write(tmp_path / "data" / f"{split}-00000-of-00001.parquet", rows)
    text, chat = (loaded("ultrafeedback_binarized", tmp_path, chat=chat) for chat in (False, True))
    assert {split: len(rows) for split, rows in text.items()} == {"train": 1, "test": 1}
    assert completions(text["train"][0]) == {"prompt": HUMAN("hi"), "chosen": " yo", "rejected": " no"}
    assert completions(chat["test"][0]) == {"prompt": [user("hi")], "chosen": "yo", "rejected": "no"}


@pytest.mark.parametrize(
    ("name", "file", "row"),
    [
        ("orca_dpo_pairs", "orca_rlhf.jsonl", {"question": "hi"}),
        ("truthy_dpo", "truthy-dpo.parquet", {"id": "a", "source": "truthy_dpo", "prompt": "hi"}),
    ],
)
def test_a_system_prompt_stands_before_the_question(name, file, row, tmp_path):
    row = {**row, "system": "Be kind.", "chosen": "yo", "rejected": "no"}
    path = write(tmp_path / file, [row, {**row, "system": ""}])
    first, second = map(completions, loaded(name, path)["train"])
    assert first == {"prompt": f"Be kind.{HUMAN('hi')}", "chosen": " yo", "rejected": " no"}
    assert second["prompt"] == HUMAN("hi")
    first, second = map(completions, loaded(name, path, chat=True)["train"])
    assert first == {"prompt": [system("Be kind."), user("hi")], "chosen": "yo", "rejected": "no"}
    assert second["prompt"] == [user("hi")]
    assert loaded(name, path, "dataset.columns.system=null")["train"][0]["prompt"] == HUMAN("hi")


def test_stack_exchange_reads_one_folder_of_the_set_and_no_more_rows_than_asked(tmp_path):
    row = {"qid": 1, "question": "How?", "date": "2012/01/01", "metadata": ["a", "b"]}
    row |= {"response_j": "So.", "response_k": "No."}
    write(tmp_path / "data" / "rl" / "train-00000-of-00001.parquet", [row] * 5)
    write(tmp_path / "data" / "finetune" / "train-00000-of-00001.parquet", [row] * 7)
    assert len(loaded("stack_exchange_paired", tmp_path)["train"]) == 5
    rows = loaded("stack_exchange_paired", tmp_path, "dataset.rows=2")["train"]
    assert [completions(row) for row in rows] == [{"prompt": HUMAN("How?"), "chosen": " So.", "rejected": " No."}] * 2
    chat = loaded("stack_exchange_paired", tmp_path, chat=True)["train"][0]
    assert completions(chat) == {"prompt": [user("How?")], "chosen": "So.", "rejected": "No."}


def test_imdb_asks_for_the_rest_of_a_review(tmp_path):
    review = "I saw it  twice, and\nwould do so again.<br /><br />Go!"
    rows = [{"text": review, "label": 1}, {"text": "Seven words and no more than that", "label": 0}]
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl.gz", rows)
    found = loaded("imdb", tmp_path)
    first, second = map(completions, found["train"])
    assert first == {
        "prompt": "I saw it  twice, and\nwould do so",
        "demonstration": " again.<br /><br />Go!",
    }
    assert second == {"prompt": "Seven words and no more than that", "demonstration": ""}
    assert len(found["test"]) == 2
    chat = completions(loaded("imdb", tmp_path, "dataset.prompt_words=2", chat=True)["train"][0])
    assert chat == {"prompt": [user("I saw")], "demonstration": review.removeprefix("I saw ")}


ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is an instruction ..."}


@pytest.mark.parametrize("name", ["alpaca", "json"])
def test_alpaca_asks_in_its_own_form_or_plainly(name, tmp_path):
    path = write(tmp_path / "train-00000-of-00001.parquet", [ALPACA, {**ALPACA, "input": ""}])
    first, second = map(completions, loaded(name, path)["train"])
    assert first["prompt"].startswith("Below is an instruction that describes a task, paired with an input")
    assert first["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert second["prompt"].endswith("request.\n\n### Instruction:\nAdd.\n\n### Response:\n")
    assert {key: first[key] for key in first if key != "prompt"} == {"demonstration": "3"}
    first, second = map(completions, loaded(name, path, chat=True)["train"])
    assert first == {"prompt": [user("Add.\n\n1 2")], "demonstration": "3"}
    assert second["prompt"] == [user("Add.")]


def turn(role, value):
    return {"from": role, "value": value}


HH = HUMAN("hi")
PAIR = {"chosen": "yo", "rejected": "no"}
TEXT = {"prompt": HH, "chosen": " yo", "rejected": " no"}
CHAT = {"prompt": [user("hi")], **PAIR}
OURS = {"prompt": HH, "demonstration": " yo"}
CHAT_OURS = {"prompt": [user("hi")], "demonstration": "yo"}
FORMS = {
    "text": ({"prompt": "hi", **PAIR}, {"prompt": "hi", **PAIR}, CHAT),
    "text with a demonstration": (
        {"prompt": "hi", **PAIR, "demonstration": "so"},
        {"prompt": "hi", **PAIR, "demonstration": "so"},
        {**CHAT, "demonstration": "so"},
    ),
    "messages": ({"prompt": [user("hi")], "chosen": [reply("yo")], "rejected": [reply("no")]}, TEXT, CHAT),
    "text, answered by messages": ({"prompt": "hi", "chosen": [reply("yo")], "rejected": [reply("no")]}, TEXT, CHAT),
    "a system prompt beside it": (
        {"system": "Be kind.", "prompt": "hi", **PAIR},
        {**TEXT, "prompt": f"Be kind.{HH}"},
        {**CHAT, "prompt": [system("Be kind."), user("hi")]},
    ),
    "OpenAI's": (
        {
            "input": {"messages": [user("hi")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [reply("yo")],
            "non_preferred_output": [reply("no")],
        },
        TEXT,
        CHAT,
    ),
    "ShareGPT's": (
        {"conversations": [turn("human", "hi")], "chosen": turn("gpt", "yo"), "rejected": turn("gpt", "no")},
        TEXT,
        CHAT,
    ),
    "ShareGPT's with a system prompt": (
        {
            "conversations": [turn("human", "hi")],
            "chosen": turn("gpt", "yo"),
            "rejected": turn("gpt", "no"),
            "system": "Be kind.",
        },
        {**TEXT, "prompt": f"Be kind.{HH}"},
        {**CHAT, "prompt": [system("Be kind."), user("hi")]},
    ),
    "dialogues of messages": (
        {"chosen": [user("hi"), reply("yo")], "rejected": [user("hi"), reply("no")]},
        TEXT,
        CHAT,
    ),
    "dialogues of turns": (
        {
            "chosen": [turn("human", "hi"), turn("gpt", "yo")],
            "rejected": [turn("human", "hi"), turn("gpt", "no")],
        },
        TEXT,
        CHAT,
    ),
    "dialogues of text": ({"chosen": f"{HH} yo", "rejected": f"{HH} no"}, TEXT, CHAT),
    "a question": ({"question": "hi", **PAIR}, TEXT, CHAT),
    "an instruction with completions": (
        {"instruction": "Add.", **PAIR},
        {
            "prompt": "Below is an instruction that describes a task. Write a response that appropriately completes "
            "the request.\n\n### Instruction:\nAdd.\n\n### Response:\n",
            **PAIR,
        },
        {"prompt": [user("Add.")], **PAIR},
    ),
    "SFT: messages": ({"messages": [user("hi"), reply("yo")]}, OURS, CHAT_OURS),
    "SFT: turns": ({"conversations": [turn("human", "hi"), turn("gpt", "yo")]}, OURS, CHAT_OURS),
    "SFT: a completion": (
        {"prompt": "hi", "completion": " yo"},
        {"prompt": "hi", "demonstration": " yo"},
        CHAT_OURS,
    ),
    "SFT: plain text": (
        {"text": "a b c d e f g h i", "label": 1},
        {"prompt": "a b c d e f g h", "demonstration": " i"},
        {"prompt": [user("a b c d e f g h")], "demonstration": "i"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_common_form_is_recognised_without_columns(form, tmp_path):
    row, text, chat = FORMS[form]
    path = write(tmp_path / "rows.jsonl", [row, row])
    assert [completions(each) for each in loaded("json", path)["train"]] == [text, text]
    assert [completions(each) for each in loaded("json", path, chat=True)["train"]] == [chat, chat]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.jsonl", "list.json", "a.jsonl.gz", "folder/train.jsonl"])
def test_a_copy_may_be_of_any_kind(name, tmp_path):
    row = {"asked": "a, b\n\u201cc\u201d", "good": " yo", "bad": " no"}
    write(tmp_path / name, [row, row])
    path = tmp_path / name.split("/")[0]
    columns = "dataset.columns={prompt: asked, chosen: good, rejected: bad}"
    rows = loaded("json", path, columns)["train"]
    assert [completions(each) for each in rows] == [{"prompt": row["asked"], "chosen": " yo", "rejected": " no"}] * 2
    assert len({each["origin"] for each in rows}) == 2


def test_columns_are_paths_templates_and_names_with_dots(tmp_path):
    row = {
        "ask": {"title": "T", "turns": [{"text": "one"}, {"text": "two"}], "year": 2020},
        "out.0": " yo",
        "marked": [{"by": "a.b", "text": " bad"}, {"by": "me", "text": " own"}],
    }
    columns = (
        'dataset.columns={prompt: "{ask.title} ({ask.year}): {ask.turns.-1.text}", chosen: out.0, '
        'rejected: "marked[by=a.b].text", demonstration: "marked[by=you].text"}'
    )
    rows = loaded("json", write(tmp_path / "a.jsonl", [row]), columns)["train"]
    assert completions(rows[0]) == {"prompt": "T (2020): two", "chosen": " yo", "rejected": " bad"}


def test_a_second_file_is_the_test_split_and_may_have_another_form(tmp_path):
    train = write(tmp_path / "a.jsonl", [FORMS["text"][0]] * 3)
    test = write(tmp_path / "b.jsonl", [FORMS["OpenAI's"][0]])
    found = loaded("json", train, f"dataset.test_path={test}")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 3, "test": 1}
    assert completions(found["test"][0]) == TEXT


def test_nulls_are_told_not_read_as_text(tmp_path):
    rows = [{"q": "hi", "s": None, **PAIR}, {"q": None, "s": "x", **PAIR}, {"q": "hi", "s": "", "chosen": None}]
    path = write(tmp_path / "a.jsonl", rows)
    columns = "dataset.columns={question: q, system: s, chosen: chosen, rejected: rejected}"
    assert completions(loaded("json", write(tmp_path / "b.jsonl", rows[:1]), columns)["train"][0]) == TEXT
    with pytest.raises(PipelineError, match="a.jsonl, line 2: question is null, not text"):
        loaded("json", path, columns)
    path = write(tmp_path / "c.jsonl", rows[2:])
    with pytest.raises(PipelineError, match="c.jsonl, line 1: chosen is null, not text"):
        loaded("json", path, columns)


def test_a_tie_is_left_out_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**SHP, "labels": 3}, {**SHP, "labels": None}, SHP])
    rows = loaded("shp", path)["train"]
    assert [row["reason"] for row in rows] == ["a tie (labels is neither 1 nor 0)"] * 2 + [None]
    assert rows[0]["kind"] == "filtered"


GIVEN = "dataset.columns={prompt: q, chosen: a.0.text, rejected: b}"


@pytest.mark.parametrize(
    ("name", "rows", "columns", "sentence"),
    [
        (
            "a.csv",
            [{"prompt": "p", "chosen": "c"}],
            "",
            "a.csv, line 2 has the columns prompt, chosen, which are no form",
        ),
        ("a.csv", [{"q": "p", "b": "c"}], GIVEN, "a.csv, line 2: columns.chosen=a.0.text: there is no a, found q, b$"),
        (
            "a.jsonl",
            [{"q": "p", "a": [{"content": "x", "role": "y"}], "b": ""}],
            GIVEN,
            "line 1: columns.chosen=a.0.text: there is no text, found content, role$",
        ),
        ("a.jsonl", [{"q": "p", "a": [], "b": ""}], GIVEN, r"there is no 0, found \[\]$"),
        ("a.jsonl", [{"q": "p", "a": "x", "b": ""}], GIVEN, 'there is no 0, found "x"$'),
        (
            "a.jsonl",
            [{"query": "p", "a": [{"text": ""}], "b": ""}],
            GIVEN.replace("q,", "qury,"),
            "columns.prompt=qury: there is no qury, found query, a, b: did you mean query",
        ),
        (
            "a.jsonl",
            [FORMS["text"][0], {"prompt": "p", "chosen": "c"}],
            "",
            "line 2 has the columns prompt, chosen, which are no form known",
        ),
        (
            "a.jsonl",
            [FORMS["text"][0], {"prompt": "p", "chosen": 3, "rejected": ""}],
            "",
            "line 2: chosen is 3, not text or messages",
        ),
        ("a.jsonl", [{"question": 3, **PAIR}], "", "prompt, message 1: its content is 3, not text"),
        ("a.jsonl", [{"text": ["a"]}], "", "line 1: text is .*, not text: correct it"),
        ("a.jsonl", [{"instruction": {}, **PAIR}], "", "line 1: instruction is {}, not text"),
        (
            "a.jsonl",
            [{"messages": [user("hi"), {"role": "oracle", "content": "x"}]}],
            "",
            "demonstration, message 2: its role is 'oracle', none of system, user",
        ),
        ("a.jsonl", [{"messages": [user("hi")]}], "", "demonstration does not end with a reply"),
        ("a.jsonl", [{"asked": "q", **PAIR}], "", "has the columns asked, chosen, rejected, which are no form"),
        (
            "a.jsonl",
            [{"q": {"x": 1}, "b": ""}],
            "dataset.columns={prompt: '<{q}>'}",
            "q is .*, not text: name a",
        ),
        ("a.jsonl", [{"q": ["by x"]}], "dataset.columns={prompt: 'q[by=me]'}", 'there is no by, found "by x"'),
        ("a.jsonl", [{"q": ""}], "dataset.columns={promt: q}", "columns.promt is no part of a row: .*mean prompt"),
        ("a.jsonl", [{"q": ""}], "dataset.columns={choice: q}", "dataset.columns needs all three .*choices:"),
        (
            "a.jsonl",
            [{"q": ""}],
            "dataset.columns=q",
            "dataset.columns=q: .*dictionary",
        ),
        ("a.jsonl", [{"text": "a b"}], "dataset.at_least={text: 2}", 'line 1: text is "a b", not a number'),
        ("a.jsonl", [{"text": "a b"}], "dataset.at_least={text: x}", "dataset.at_least.text=x: .*number"),
    ],
)
def test_bad_input_is_one_sentence(name, rows, columns, sentence, tmp_path):
    path = write(tmp_path / name, rows)
    with pytest.raises(PipelineError, match=sentence) as error:
        loaded("json", path, *[columns] if columns else [])
    assert "\n" not in str(error.value)


def test_rows_of_a_folder_may_differ_in_form_and_not_in_what_is_no_text(tmp_path):
    path = write(tmp_path / "train.jsonl", [FORMS["messages"][0], {"prompt": HH, "chosen": " yo", "rejected": " no"}])
    assert [completions(row) for row in loaded("json", tmp_path)["train"]] == [TEXT, TEXT]
    write(tmp_path / "train.jsonl", [FORMS["text"][0], {"prompt": "hi", "chosen": 3, "rejected": "no"}])
    for place in (path, tmp_path):
        with pytest.raises(PipelineError, match="(line 2|row 1): chosen is 3, not text or messages"):
            loaded("json", place)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("shp", ("stanfordnlp/SHP", None, None, None)),
        (
            "summarize_from_feedback",
            (
                "openai/summarize_from_feedback",
                "comparisons",
                "refs/convert/parquet",
                {"train": "train", "test": "validation"},
            ),
        ),
        (
            "ultrafeedback_binarized",
            ("HuggingFaceH4/ultrafeedback_binarized", None, None, {"train": "train_prefs", "test": "test_prefs"}),
        ),
        ("orca_dpo_pairs", ("Intel/orca_dpo_pairs", None, None, None)),
        ("truthy_dpo", ("jondurbin/truthy-dpo-v0.1", None, None, None)),
        ("stack_exchange_paired", ("lvwerra/stack-exchange-paired", "data/rl", None, None)),
        ("imdb", ("stanfordnlp/imdb", None, None, None)),
        ("alpaca", ("tatsu-lab/alpaca", None, None, None)),
    ],
)
def test_what_is_asked_of_the_hub(name, asked, monkeypatch):
    calls = []
    monkeypatch.setattr(formats, "read_source", lambda *given: calls.append(given) or {})
    node = compose([f"dataset={name}"]).dataset
    instantiate_node({key: value for key, value in node.items() if key not in ROW_KEYS}, chat=False, source="it")
    assert calls == [(*asked, None)]


# What a reader could lose, or trip over, without a word.
PAIRED = '{"prompt": "p", "chosen": "c", "rejected": "r"}\n'
RAW = {
    "unclosed.csv": ('prompt,chosen,rejected\np,c,r\np,c,"r\np,c,r\n', "line 2 is no CSV.*double quotes"),
    "fields.csv": ("prompt,chosen,rejected\np,c\n", "line 2 is no CSV: not 3 fields.*double quotes"),
    "twice.csv": ("prompt,chosen,chosen\np,c,r\n", r"two of its columns have one name \(prompt, chosen, chosen\)"),
    "half.jsonl": (PAIRED + PAIRED.replace('"c"', '"\\ud800"'), "line 2 is no JSON .*surrogates"),
    "long.jsonl": (PAIRED + PAIRED.replace('"c"', "1" * 5000), "line 2 is no JSON .Exceeds the limit"),
    "deep.jsonl": (PAIRED + PAIRED.replace('"c"', "[" * 99999), "line 2 is no JSON"),
    "role.jsonl": (PAIRED.replace('"c"', '[{"role": ["user"], "content": "c"}]'), r"its role is \['user'\], none of"),
}


@pytest.mark.parametrize("name", RAW)
def test_a_file_that_is_not_what_it_seems_is_one_sentence(name, tmp_path):
    text, sentence = RAW[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(PipelineError, match=sentence) as error:
        loaded("json", tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("dataset.rows=-5", "dataset.rows=-5: .*or equal to 0"),
        ("dataset.rows=50.5", "dataset.rows=50.5: .*integer"),
        ("dataset.per_prompt=-1", "dataset.per_prompt=-1: .*or equal to 0"),
        ("dataset.prompt_words=0", "dataset.prompt_words=0: .*greater than 0"),
        ("dataset.splits={train: [train]}", "dataset.splits.train=.*string"),
        ("dataset.splits={validation: train}", "dataset.splits.validation=validation: .*'train' or 'test'"),
        ("dataset.splits=train", "dataset.splits=train: .*dictionary"),
        (
            "dataset.columns={prompt: prompt, answers: [0, 1], choice: x, choices: [0, 1]}",
            "there is no x, found prompt",
        ),
    ],
)
def test_an_option_that_cannot_be_is_one_sentence(typed, sentence, tmp_path):
    write(tmp_path / "train.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 3)
    with pytest.raises(PipelineError, match=sentence):
        loaded("json", tmp_path, typed)


def test_what_may_stand_beside_a_form_is_looked_for_in_each_row(tmp_path):
    """Not in the first alone: the inputs and systems of all others would be gone without a word."""
    rows = [{"instruction": "a", "output": "x"}, {"instruction": "b", "input": "in", "output": "y"}]
    first, second = loaded("json", write(tmp_path / "a.jsonl", rows), chat=True)["train"]
    assert (first["prompt"], second["prompt"]) == ([user("a")], [user("b\n\nin")])
    rows = [{"question": "q", "chosen": "c", "rejected": "r"}, {"question": "q", "chosen": "c", "rejected": "r"}]
    rows[1]["system"] = "s"
    for order in (rows, rows[::-1]):
        found = loaded("json", write(tmp_path / "b.jsonl", order), chat=True)["train"]
        assert [len(row["prompt"]) for row in found] == [1 + ("system" in row) for row in order]


def test_a_prompt_is_empty_whatever_frame_is_put_around_it(tmp_path):
    for i, row in enumerate(({"question": " "}, {"instruction": "", "input": "x"}, {"prompt": "\n"}, {"text": " "})):
        full = row | ({"chosen": "c", "rejected": "r"} if "text" not in row else {})
        for chat in (False, True):
            (found,) = loaded("json", write(tmp_path / f"{i}.jsonl", [full]), chat=chat)["train"]
            assert found["problem"] == "empty prompt"


def test_content_in_parts_is_joined(tmp_path):
    content = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    rows = [{"prompt": [{"role": "user", "content": content}], "chosen": "c", "rejected": "r"}]
    assert loaded("json", write(tmp_path / "a.jsonl", rows), chat=True)["train"][0]["prompt"] == [user("hi")]


def test_a_test_path_that_is_a_folder_gives_its_own_test_rows(tmp_path):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    write(tmp_path / "all" / "train.jsonl", [pair] * 9)
    write(tmp_path / "all" / "test.jsonl", [pair] * 2)
    train = write(tmp_path / "a.jsonl", [pair] * 3)
    assert len(loaded("json", train, f"dataset.test_path={tmp_path / 'all'}")["test"]) == 2


def test_an_empty_file_in_a_folder_is_one_sentence(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(PipelineError, match="train.jsonl is empty"):
        loaded("json", tmp_path)


def test_a_split_that_is_not_there_is_one_sentence(tmp_path):
    write(tmp_path / "validation.jsonl", [FORMS["text"][0]])
    with pytest.raises(PipelineError, match="no split train, only validation: type 'dataset.splits="):
        loaded("json", tmp_path)
    assert set(loaded("json", tmp_path, "dataset.splits={train: validation}")) == {"train"}


def test_a_folder_without_data_is_one_sentence(tmp_path):
    (tmp_path / "pydir").mkdir()
    (tmp_path / "pydir" / "pydir.py").write_text("import datasets\n")
    with pytest.raises(PipelineError, match="pydir cannot be read as a data set: it holds no .json"):
        loaded("json", tmp_path / "pydir")


def test_a_file_may_begin_with_a_byte_order_mark_and_hold_long_fields(tmp_path):
    """As Excel writes it; csv takes 131,072 characters unless told."""
    long = "word " * 50_000
    (tmp_path / "a.csv").write_text(f"prompt,chosen,rejected\np,{long},r\n", encoding="utf-8-sig")
    (row,) = loaded("json", tmp_path / "a.csv")["train"]
    assert (row["prompt"], row["chosen"]) == ("p", long)
    (tmp_path / "a.jsonl").write_text(PAIRED, encoding="utf-8-sig")
    assert loaded("json", tmp_path / "a.jsonl")["train"][0]["prompt"] == "p"


def test_a_folder_is_read_whole_or_says_what_is_not(tmp_path, caplog):
    pair = {"prompt": "2020-01-01", "chosen": "None", "rejected": "NaN"}
    write(tmp_path / "a.jsonl", [pair])
    write(tmp_path / "more" / "b.csv", [pair, pair])
    write(tmp_path / "validation.jsonl", [pair])
    (tmp_path / "c.tsv").write_text("prompt\tchosen\n")
    (tmp_path / ".hidden.jsonl").write_text("{")
    rows = loaded("json", tmp_path)["train"]
    assert [completions(row) for row in rows] == [pair] * 3  # text stays text, and no column is made up
    assert rows[0]["origin"] == f"{tmp_path}/a.jsonl, line 1"
    assert "c.tsv cannot be read" in caplog.text
    assert "validation is not read; 'dataset.splits=" in caplog.text


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list([{"prompt": "hi", **PAIR}] * 2)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
    (row, _) = loaded("json", tmp_path / "one")["train"]
    assert completions(row) == {"prompt": "hi", **PAIR}
    assert row["origin"].endswith("train row 1")
    assert {split: len(rows) for split, rows in loaded("json", tmp_path / "two").items()} == {"train": 2, "test": 2}


CARD = """---
configs:
- config_name: one
  data_files: one/*.jsonl.gz
- config_name: two
  data_files: two/*.jsonl
---
"""


@pytest.fixture
def configs(tmp_path):
    """A folder as the hub has it, of two configs."""
    for name in ("one", "two"):
        rows = [
            {"prompt": f"the {GENRES[i % 8]} {NOUNS[i % 17]} .", "chosen": "it", "rejected": "cold", name: "x"}
            for i in range(20)
        ]
        write(tmp_path / "set" / name / f"train.jsonl{'.gz' if name == 'one' else ''}", rows)
    (tmp_path / "set" / "README.md").write_text(CARD)
    return tmp_path / "set"


def test_a_set_of_several_configs_lists_them(configs, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", configs.parent / "cache")
    for typed in ([], ["dataset.config=three"]):
        with pytest.raises(PipelineError, match="set has the configs one, two: type dataset.config=NAME"):
            loaded("json", configs, *typed)
    rows = loaded("json", configs, "dataset.config=two")["train"]
    assert len(rows) == 20
    assert "two" in rows[0]["unused"]
    assert len(loaded("json", configs, "dataset.data_dir=one")["train"]) == 20


def test_what_datasets_writes_lies_under_root(configs, small, monkeypatch):
    """A plain file stands for an HF_HOME that is read-only, since root may write everywhere."""
    home = configs.parent / "home"
    home.write_text("")
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH", "HF_MODULES_CACHE"):
        monkeypatch.setattr(f"datasets.config.{name}", home / "datasets")
    run = small("dataset=json", f"dataset.path={configs}", "dataset.config=one")
    assert len(prepare_run(run, "dpo", "train").tables["train"]) > 10
    assert list((Path(run.root) / ".cache" / "datasets").rglob("*.arrow"))


@pytest.mark.parametrize("ending", ["tsv", "xlsx", "jsonl.zst"])
def test_a_file_of_another_kind_is_named_as_such(ending, tmp_path):
    (tmp_path / f"a.{ending}").write_text("prompt\tchosen\n")
    with pytest.raises(PipelineError, match=f".{ending.split('.')[-1]} files are not supported.*save it as"):
        loaded("json", tmp_path / f"a.{ending}")


def test_a_sentence_names_ten_columns_at_most(tmp_path):
    path = write(tmp_path / "a.jsonl", [{f"column{i}": "x" for i in range(200)}])
    with pytest.raises(PipelineError, match="column9 and 190 more, which are no form"):
        loaded("json", path)
    many = {f"column{i}": "x" for i in range(200)}
    rows = loaded("json", write(tmp_path / "b.jsonl", [{"prompt": "p", **PAIR, **many}]))["train"]
    report = print_report(count_rows([{**rows[0], "split": "train"}]), rows)
    assert "column9 and 190 more |" in report
