"""Prompts files, refusals and bias against counts by hand and enumeration, and what is told as success or failure."""

import csv
import gzip
import json
import math
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet
from scipy.stats import norm, t
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpo_pipeline.config import CONF
from dpo_pipeline.data.normalize import normalize_row
from dpo_pipeline.data.prompts import prompt_ids, prompts_to_rows, read_prompts
from dpo_pipeline.data.token_table import LengthLimits, tokenize
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.evaluation.subsets import bias, largest_changes, safety
from dpo_pipeline.report import comparison, details, page
from dpo_pipeline.tokenizer import load_tokenizer
from dpo_pipeline.training.tiny import word_tokenizer
from tests.helpers import runs_of

SHARED = CONF.parent.parent / "shared"
ASKED = [{"role": "user", "content": "Who?"}]
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def characters(opened: bool) -> PreTrainedTokenizerFast:
    """One token for each character; `opened`: texts begin with <s>."""
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    vocabulary = {token: i for i, token in enumerate([*special.values(), *map(chr, range(32, 127)), "\n"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\x00", "isolated")
    if opened:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML, **special)


def write(file, rows) -> str:
    """Rows in the form that the file's name says."""
    if ".csv" in file.name:
        lines = [",".join(rows[0])] + [",".join(json.dumps(value) for value in row.values()) for row in rows]
        text = "\n".join(lines)
    else:
        text = json.dumps(rows) if ".json" in file.suffixes else "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    return str(file)


# Prompts files


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl", "p.json", "p.parquet", "p.csv.gz", "p.jsonl.gz"])
def test_every_form_of_a_prompts_file_gives_the_same_rows(name, tmp_path):
    rows = [{"id": "1", "prompt": " How, so?", "label": "safe"}, {"id": "2", "prompt": "Why?", "label": "unsafe"}]
    found = read_prompts(write(tmp_path / name, rows), ("label",))
    assert [{key: row[key] for key in ("prompt", "label")} for row in found] == [
        {"prompt": row["prompt"], "label": row["label"]} for row in rows
    ]
    assert all(set(row) == {"prompt", "label", "origin"} and name in row["origin"] for row in found)
    assert [row["prompt"] for row in read_prompts(str(tmp_path / name))] == [" How, so?", "Why?"]


def test_a_prompt_may_be_messages_in_any_of_their_forms(tmp_path):
    rows = [{"prompt": ASKED}, {"prompt": [{"from": "human", "value": "Who?"}]}, {"prompt": "Who?"}]
    found = read_prompts(write(tmp_path / "p.jsonl", rows))
    assert [row["prompt"] for row in found] == [ASKED, ASKED, "Who?"]


BIAS = ("template", "group")


@pytest.mark.parametrize(
    ("rows", "columns", "sentence"),
    [
        ([{"text": "a"}], (), "p.jsonl, line 1: there is no prompt, found text"),
        ([{"prompt": "a"}, {"prompt": None}], (), "p.jsonl, line 2: prompt is null, not text"),
        ([{"prompt": 3}], (), "p.jsonl, line 1: prompt is 3, not text"),
        ([{"prompt": "a"}, {"prompt": " \n"}], (), "p.jsonl, line 2: its prompt is empty: write one, or take the row"),
        ([{"prompt": []}], (), "p.jsonl, line 1: its prompt is empty"),
        ([{"prompt": [{"role": "user", "content": " "}]}], (), "p.jsonl, line 1: its prompt is empty"),
        ([{"prompt": ["a"]}], (), "p.jsonl, line 1: prompt is .*, not text or messages"),
        ([{"prompt": "a"}], ("label",), "there is no label, found prompt"),
        ([{"prompt": ASKED}], ("label",), "there is no label, found prompt"),
        (
            [{"prompt": "a", "label": "safe"}, {"prompt": "a", "label": "Unsafe"}],
            ("label",),
            "p.jsonl, line 2: its label is 'Unsafe', neither safe nor unsafe: correct it",
        ),
        (
            [{"prompt": "a", "template": "t", "group": "men"}] * 2,
            BIAS,
            "p.jsonl: all rows are of the group 'men': give each template for two",
        ),
        (
            [{"prompt": "a", "template": x, "group": g} for x, g in ("tm", "tw", "um", "tm")],
            BIAS,
            "p.jsonl, line 3: its template 'u' has no row for the group 'w': add that row",
        ),
        ([{"prompt": "a", "template": "t", "group": 1}], BIAS, "p.jsonl, line 1: group is 1, not text"),
        ([], (), "p.jsonl is empty"),
    ],
)
def test_what_a_prompts_file_cannot_be_is_told_with_file_and_row(rows, columns, sentence, tmp_path):
    with pytest.raises(PipelineError, match=sentence) as told:
        read_prompts(write(tmp_path / "p.jsonl", rows), columns)
    assert "\n" not in str(told.value)


def test_a_file_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "p.jsonl", [{"prompt": "a"}])
    assert read_prompts("~/p.jsonl") == [{"prompt": "a", "origin": "~/p.jsonl, line 1"}]


def test_a_file_that_is_not_there_or_has_no_row_is_told(tmp_path):
    with pytest.raises(PipelineError, match="there is no prompts file .*/none .from .*: check the path"):
        read_prompts(str(tmp_path / "none"))
    (tmp_path / "p.csv").write_text("id,prompt,label\n")
    with pytest.raises(PipelineError, match="p.csv is empty"):
        read_prompts(str(tmp_path / "p.csv"), ("label",))
    table = pa.Table.from_pylist([], pa.schema([("prompt", pa.string())]))
    parquet.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(PipelineError, match="p.parquet is empty"):
        read_prompts(str(tmp_path / "p.parquet"))


@pytest.mark.real
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED.name}/ beside the checkout")
def test_xstest_reads_as_it_is_and_every_prompt_is_tokenized_as_it_stands():
    file = SHARED / "data" / "xstest" / "xstest_prompts.csv"
    rows = read_prompts(str(file), ("label",))
    assert Counter(row["label"] for row in rows) == {"safe": 250, "unsafe": 200}
    with file.open(newline="", encoding="utf-8") as stream:
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in csv.DictReader(stream)]
    from dpo_pipeline.config import compose

    tokenizer = load_tokenizer(compose(["model=path", f"model.path={SHARED}/models/stories15M"]).model)
    prompts = [row["prompt"] for row in rows]
    assert prompt_ids(prompts, False, tokenizer) == tokenizer(prompts)["input_ids"]


# Their tokens

TALK = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: so?\n\nAssistant:"
PROMPTS = ["Who?", " two\nlines ", TALK, "I see .\n"]
TURNS = [ASKED, [{"role": "system", "content": "Be brief."}, *ASKED], [*ASKED, {"role": "assistant", "content": "I"}]]


@pytest.mark.parametrize("prompts", [PROMPTS, TURNS, [*PROMPTS, *TURNS]], ids=["text", "messages", "both"])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("tokenizer", [characters(True), characters(False), word_tokenizer()])
def test_the_ids_of_a_prompt_are_those_that_a_pair_s_prompt_has(prompts, chat, tokenizer):
    if chat and not tokenizer.chat_template:
        with pytest.raises(PipelineError, match="no chat template"):
            prompt_ids(prompts, chat, tokenizer)
        return
    completions = {"chosen": "I see", "rejected": "it was"}
    rows = [normalize_row(f"row {i}", "s", chat, prompt, completions) for i, prompt in enumerate(prompts)]
    table = tokenize(rows, tuple(completions), tokenizer, [tokenizer.eos_token_id], LengthLimits(10_000, 9_000))
    ids = prompt_ids(prompts, chat, tokenizer)
    assert ids == table["prompt_ids"]
    if not chat:
        texts = [row["prompt"] for row in rows]
        assert ids == [tokenizer(text)["input_ids"] for text in texts]
        assert sum(own.count(tokenizer.bos_token_id) for own in ids) in (0, len(ids))


def test_a_chat_prompt_ends_with_the_opening_of_a_reply():
    (ids,) = prompt_ids(["Who?"], True, characters(True))
    assert "".join(characters(True).convert_ids_to_tokens(ids)) == "<s>user\nWho?</s>\n<s>assistant\n"


def test_a_text_becomes_a_dialogue_for_a_base_model_only_where_the_policy_has_learnt_from_those():
    plain, dialogue = "Who? ", "\n\nHuman: Who?\n\nAssistant:"
    assert [row["prompt"] for row in prompts_to_rows([plain, TALK, ASKED], False, "s")] == [plain, TALK, dialogue]
    assert [row["prompt"] for row in prompts_to_rows([plain, TALK, ASKED], False, "s", True)] == [
        dialogue,
        TALK,
        dialogue,
    ]
    assert [row["prompt"] for row in prompts_to_rows([plain, ASKED], True, "s", True)] == [ASKED, ASKED]
    row = prompts_to_rows(["a", "b"], False, "xstest")[1]
    assert (row["prompt"], row["source"], row["origin"]) == ("b", "xstest", "xstest, prompt 2")


def test_a_prompt_that_holds_bos_is_told_by_its_number():
    with pytest.raises(
        PipelineError, match=r"prompt 2, cannot be answered \(more than one BOS\): take special tokens"
    ):
        prompt_ids(["a", "<s>b"], False, characters(True))
    assert prompt_ids([], False, characters(True)) == []


# Safety


def wilson(p: float, n: int) -> tuple[float, float]:
    """The ends of Wilson's interval: the two p0 with |p - p0| = z sqrt(p0 (1 - p0) / n)."""
    z2 = norm.ppf(0.975) ** 2
    return tuple(sorted(np.roots([1 + z2 / n, -2 * p - z2 / n, p * p]).real.tolist()))


LABELS = ["safe"] * 10 + ["unsafe"] * 8
REFUSED = [1.0] * 2 + [0.0] * 7 + [None] + [1.0] * 6 + [0.0, 0.5]
HARM = [0.1, 0.3] * 5 + [0.5, 0.9, None, 0.7] * 2


def table(scores, **columns) -> pd.DataFrame:
    """Lines of completions with these columns and scores by judge."""
    scores = {"tokens" if name == "tokens" else f"score.{name}": np.array(v, float) for name, v in scores.items()}
    return pd.DataFrame({**columns, **scores})


def test_refusals_are_shares_by_label_and_the_unreadable_are_counted():
    found = safety(table({"refusal": REFUSED, "harm": HARM}, label=LABELS))
    for key, p, n in (("over_refusal_safe", 2 / 9, 9), ("refusal_unsafe", 6.5 / 8, 8)):
        low, high = wilson(p, n)
        assert found[key] == pytest.approx({"value": p, "low": low, "high": high, "n": n})
    half = t.ppf(0.975, 9) * np.std([0.1, 0.3] * 5, ddof=1) / math.sqrt(10)
    assert found["score.harm.safe"] == pytest.approx({"value": 0.2, "low": 0.2 - half, "high": 0.2 + half, "n": 10})
    assert (found["score.harm.unsafe"]["value"], found["score.harm.unsafe"]["n"]) == (pytest.approx(0.7), 6)
    assert found["unread"] == {"refusal": 1, "harm": 2}
    json.dumps(found)
    assert safety(table({"refusal": [None]}, label=["unsafe"])) == {"unread": {"refusal": 1}}


def cells_of(**results) -> dict[str, list[str]]:
    """The cells of the report's table on other prompts, by label."""
    (part,) = comparison.other_prompts(runs_of({}, **results))
    return {label: [page.format_cell(cell) for cell in cells] for label, *cells in page.table_rows(part.table)}


def changes_of(found):
    """The section of the report on what changed from `sft` to `dpo`."""
    (part,) = details.changes(
        runs_of({}, "dpo", notable={"dpo": {"before": "sft", "x": json.loads(json.dumps(found))}})
    )
    return part


def test_the_table_of_safety_has_a_column_for_each_policy_and_tells_what_nobody_could_read():
    base = safety(table({"refusal": REFUSED, "har.m": HARM}, label=LABELS))
    dpo = safety(table({"refusal": [1.0] * 8, "har.m": [0.5] * 8}, label=LABELS[10:]))
    cells = cells_of(safety={"base": base, "dpo/b0.1": dpo})
    expected = [(6.5 / 8, *wilson(6.5 / 8, 8)), (1, *wilson(1, 8))]
    assert cells["refusal, unsafe prompts"] == [f"{p:.3f} [{low:.3f}, {high:.3f}]" for p, low, high in expected]
    assert cells["over-refusal, safe prompts"][1] == ""
    assert cells["score by har.m, unsafe prompts"][1] == "0.500 [0.500, 0.500]"
    assert (cells["unreadable: refusal"], cells["unreadable: har.m"][1]) == (["1", ""], "")
    assert len(cells) == 6


# Bias


def test_planted_bias_is_shown_by_paired_intervals_and_none_is_not():
    rng = np.random.default_rng(0)
    groups, templates = ["women", "men", "others"] * 30, [f"t{i}" for i in range(30) for _ in range(3)]
    hard = np.repeat(rng.normal(0, 5, 30), 3)  # some templates are harder: pairing removes it
    planted = hard + rng.normal(0, 0.5, 90) + np.tile([-1.0, 0.0, 0.0], 30)
    refused = (rng.random(90) < np.tile([0.9, 0.2, 0.2], 30)).astype(float)
    scores = {"harm": planted, "refusal": refused, "tokens": hard}
    found = bias(table(scores, template=templates, group=groups))
    assert set(found) == {"harm", "refusal", "completion_tokens"}
    assert found["harm"]["largest"]["groups"][1] == "women"
    assert found["refusal"]["largest"]["groups"][0] == "women"
    assert all(found[name]["largest"]["difference"]["low"] > 0 for name in ("harm", "refusal"))
    grid = planted.reshape(30, 3)
    gaps = grid[:, 0] - (grid[:, 1] + grid[:, 2]) / 2
    half = t.ppf(0.975, 29) * gaps.std(ddof=1) / math.sqrt(30)
    expected = {"value": gaps.mean(), "low": gaps.mean() - half, "high": gaps.mean() + half, "n": 30}
    assert found["harm"]["against_rest"]["women"] == pytest.approx(expected)
    assert found["harm"]["groups"]["women"]["high"] > found["harm"]["groups"]["men"]["value"]  # unpaired one sees none
    low, high = wilson(refused.reshape(30, 3)[:, 0].mean(), 30)
    assert [found["refusal"]["groups"]["women"][key] for key in ("low", "high")] == pytest.approx([low, high])
    assert found["completion_tokens"]["largest"]["difference"]["value"] == 0
    assert all(one["templates"] == 30 and one["unread"] == 0 for one in found.values())
    json.dumps(found)


def test_no_interval_of_a_length_runs_below_0():
    """Of lengths 0, 0 and 9 Student's t interval does."""
    lines = table({"tokens": [0, 0, 9] * 2, "length": [0, 0, 9] * 2}, template=list("abcabc"), group=list("mmmwww"))
    for name in ("completion_tokens", "length"):
        groups = bias(lines)[name]["groups"]
        assert [groups[group]["low"] for group in "mw"] == [0, 0]
    lows = safety(table({"length": [0, 0, 9] * 2, "harm": [0, 0, 9] * 2}, label=["safe"] * 3 + ["unsafe"] * 3))
    assert [lows[f"score.length.{label}"]["low"] for label in ("safe", "unsafe")] == [0, 0]
    assert lows["score.harm.safe"]["low"] < 0


def test_a_template_counts_where_every_group_has_a_value_and_several_are_averaged():
    scores = {"harm": [1.0, 3.0, 5.0, None, 9.0, 4.0, 4.0, 100.0], "refusal": [None] * 8}
    found = bias(table(scores, template=list("aaabbccd"), group=["m", "m", "w", "m", "w", "m", "w", "m"]))
    assert found["harm"]["groups"]["m"]["value"] == 3  # of template a (1 + 3) / 2, and c 4
    assert found["harm"]["groups"]["w"]["value"] == 4.5
    assert (found["harm"]["largest"]["groups"], found["harm"]["largest"]["difference"]["value"]) == (["w", "m"], 1.5)
    assert (found["harm"]["templates"], found["harm"]["unread"]) == (2, 1)
    assert found["refusal"] == {"templates": 0, "unread": 8}


def test_the_table_of_bias_shows_groups_gaps_and_what_was_unreadable():
    columns = {"template": np.repeat(list("abcd"), 3), "group": ["g0", "g1", "g2"] * 4}
    values = [1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 1]
    three = {"base": bias(table({"harm": values}, **columns)), "dpo": bias(table({"harm": [None] * 12}, **columns))}
    cells = cells_of(bias=three)
    rest = [f"harm, g{i} minus the rest" for i in range(3)]
    assert list(cells) == [*(f"harm, g{i}" for i in range(3)), *rest, "harm, largest gap", "harm, unreadable"]
    assert cells["harm, g0"][0].startswith("0.750 [")
    assert cells["harm, g1 minus the rest"][0].startswith("-0.375 [")
    assert cells["harm, largest gap"][0].startswith("g0 - g1: 0.500 [")
    assert cells["harm, unreadable"] == ["", "12"]
    two = cells_of(bias={"base": bias(table({"tokens": [3.0, 5.0]}, template=["t", "t"], group=["m", "w"]))})
    assert [label.partition(", ")[2] for label in two] == ["m", "w", "largest gap"]
    assert two["completion_tokens, largest gap"] == ["w - m: 2.000 (of 1)"]


# Successes and failures

PAIRS = [{"prompt": f"p{i}", "chosen": f" good{i}", "rejected": f" bad{i}"} for i in range(7)]


def changes(quantity, rows, before, after, count=20):
    frame = pd.DataFrame(rows).assign(before=np.array(before, float), after=np.array(after, float))
    return largest_changes(quantity, frame, [name for name in rows[0] if name != "prompt"], count)


def test_pairs_that_flipped_either_way_with_the_largest_change_first():
    before = [-1.0, -9.0, 3.0, 0.0, 1.0, -1.0, 2.0]
    after = [1.0, 0.5, -1.0, 4.0, 2.0, 1.0, 0.0]
    found = changes("margin_nats", PAIRS, before, after, 2)
    assert (found["n"], found["ties"], found["successes"]["count"]) == (7, 2, 3)
    assert [example["prompt"] for example in found["successes"]["examples"]] == ["p1", "p0"]  # p5 changed as p0 did
    failure = {"prompt": "p2", "texts": {"chosen": " good2", "rejected": " bad2"}, "before": 3.0, "after": -1.0}
    assert found["failures"] == {"count": 1, "examples": [failure]}
    part = changes_of(found)
    assert part.text.startswith("wrong with sft, right with dpo: 3 of 7; right with sft, wrong with dpo: 1 of 7.")
    assert part.table.iloc[0].tolist() == ["gain", "-9.000 to 0.500", "p1", " good1", " bad1"]
    assert part.table.iloc[-1].tolist()[:3] == ["loss", "3.000 to -1.000", "p2"]
    itself = changes("margin_nats", PAIRS, [0.0] * 7, [1.0] * 7)
    assert (itself["ties"], itself["successes"]["count"], itself["failures"]["count"]) == (7, 0, 0)


def test_the_largest_gains_and_losses_of_a_judge_s_score():
    samples = [{"prompt": f"p{i}", "sft": f"old {i}", "dpo": "x" * 800} for i in range(6)]
    samples[4]["prompt"] = ASKED
    found = changes("score.truth", samples, [0.0, 0.5, None, 1.0, -1.0, 0.2], [0.3, 0.5, 1.0, None, 2.0, 0.1], 1)
    assert {key: found[key] for key in ("n", "ties", "unread")} == {"n": 4, "ties": 1, "unread": 2}
    assert found["successes"]["count"] == 2
    texts = {"sft": "old 4", "dpo": "x" * 800}
    assert found["successes"]["examples"] == [{"prompt": "user: Who?", "texts": texts, "before": -1.0, "after": 2.0}]
    assert [example["prompt"] for example in found["failures"]["examples"]] == ["p5"]
    part = changes_of(found)
    assert part.text.startswith("dpo above sft by score.truth: 2 of 4; dpo below sft: 1 of 4")
    expected = ["gain", "-1.000 to 2.000", "user: Who?", "old 4", f"{'x' * 700} ..."]
    assert part.table.iloc[0].tolist() == expected
    assert "0 of 0" in changes_of(changes("score.truth", samples[:1], [None], [1.0])).text
