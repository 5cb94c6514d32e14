"""Rows reach the trainer as they should: prompt, completion, one end token, splits that share no prompt."""

import csv
import gzip
import json
import random
import re
from datetime import datetime
from functools import cache, partial

import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from dpo_pipeline.base_model import base_model
from dpo_pipeline.config import ROW_KEYS, compose, instantiate_node
from dpo_pipeline.content_hash import content_hash
from dpo_pipeline.data import messages, prepare, tokens
from dpo_pipeline.data.prompts import prompt_ids
from dpo_pipeline.data.report import SPLITS, count_rows, find_errors, find_warnings, kept_rows
from dpo_pipeline.data.splits import find_test_names, hold_out, load_splits
from dpo_pipeline.data.token_table import LengthLimits, cut_text, tokenize
from dpo_pipeline.data.tokens import encode_rows, eos_ids_of
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.run_folder import identity
from dpo_pipeline.schema import Length
from dpo_pipeline.training.tiny import word_tokenizer

WIDE = LengthLimits(512, 256)
PAIR = ("chosen", "rejected")
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def characters(**special: str) -> PreTrainedTokenizerFast:
    """One token for each character, `ab` merged into one, and the special tokens given."""
    letters = [chr(i) for i in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate([*special.values(), *letters, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\x00", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write(path, rows, schema=None) -> str:
    """A file of rows by its name's ending; the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows), schema), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = json.dumps(rows) if path.name == "list.json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@cache
def composed(option: str, *overrides: str) -> dict:
    """The node of an option of conf/dataset, which nothing may change."""
    return compose([f"dataset={option}", *(["dataset.path=x"] * (option != "mixture")), *overrides]).dataset


def loaded(option: str, path, *overrides: str, chat: bool = False) -> dict:
    """What the loader of an option of conf/dataset makes of its files."""
    node = {**composed(option, *overrides), "path": str(path)}
    return instantiate_node({k: v for k, v in node.items() if k not in ROW_KEYS}, chat=chat, source="s")


def prepared(run, stage: str, *splits: str) -> prepare.Prepared:
    """What a stage of this run works on; its base stays untrained."""
    with base_model(run, trained=False) as run:
        return prepare.prepare(run, stage, splits)


def rows_of(*rows: dict) -> list[dict]:
    """Rows as a loader gives them, numbered."""
    marks = {"source": "s", "split": "train", "reason": None}
    return [{**marks, "origin": f"row {i}", **row} for i, row in enumerate(rows)]


def counts_of(rows: list[dict], source: str = "s") -> dict:
    """What became of the rows of one source."""
    return count_rows(rows)["sources"][source]


def splits_of(path, *overrides: str, completions: tuple[str, ...] = PAIR, **kwargs) -> list[dict]:
    """What `dataset=json` makes of a file."""
    node = composed("json", "dataset.test_rows=2", *overrides)
    return load_splits({**node, "path": str(path)}, completions, False, **kwargs)


def by_split(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows that are kept, by split."""
    return {split: kept_rows(rows, split) for split in SPLITS}


def prompts_of(rows: list[dict]) -> list[set[str]]:
    """The prompts of each split."""
    return [{row["prompt"] for row in part} for part in by_split(rows).values()]


def pairs(count: int, prompts: int | None = None) -> list[dict]:
    return [
        {"prompt": f"p{i % (prompts or count)}", "chosen": f" good{i}", "rejected": f" bad{i}"} for i in range(count)
    ]


def adds_up(rows: list[dict]) -> bool:
    parts = count_rows(rows)["sources"].values()
    return all(part["read"] == sum(part["kept"].values()) + sum(part["dropped"].values()) for part in parts)


def test_a_completion_that_holds_the_end_token_before_its_end_is_dropped():
    rows = rows_of(
        {"prompt": "the", "chosen": " i see </s> it was flat", "rejected": " it </s>"},
        {"prompt": "the", "chosen": " i see </s>", "rejected": " it"},
    )
    table = tokenize(rows, PAIR, word_tokenizer(), [2], WIDE)
    assert table["row"] == [1]
    assert counts_of(rows)["dropped"] == {"completion without its one end token": 1}
    assert table[0]["chosen_ids"].count(2) == 1


def test_a_completion_that_merges_into_its_prompt_is_tokenized_alone_and_told():
    tokenizer = characters(eos_token="</s>")
    rows = rows_of({"prompt": "xa", "chosen": "b", "rejected": "c"})
    table = tokenize(rows, PAIR, tokenizer, [0], WIDE)
    assert tokenizer.convert_ids_to_tokens(table[0]["prompt_ids"]) == ["x", "a"]
    assert tokenizer.convert_ids_to_tokens(table[0]["chosen_ids"]) == ["b", "</s>"]
    assert rows[0]["retokenized"]
    assert "1 of 1 rows: the prompt's tokens change" in find_warnings(rows, 512, 512)[0]


TALK = "\n\nHuman: a, b?\n  then\tc\n\nAssistant: it's d.\n\nHuman: and é 1234?\n\nAssistant:"
TEXTS = [
    {"prompt": TALK, "chosen": " Yes, ab.\n\nSure", "rejected": "\nno"},
    {"prompt": "one line only", "chosen": " x", "rejected": "y"},
    {"prompt": "ends with breaks\n\n", "chosen": "\nab", "rejected": "ab"},
    {"prompt": "### Response:\n", "chosen": " ab", "rejected": "ab\n"},
    {"prompt": "spaces at the end\nhere  ", "chosen": " b", "rejected": "b"},
    {"prompt": "\nA", "chosen": "b", "rejected": "ssistant"},
    {"prompt": "a line\n of spaces first\n  then", "chosen": " b", "rejected": "\n\nb"},
]


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "unigram", "over lines", "words"])
def test_ids_are_those_of_the_whole_text_tokenized_at_once(kind, monkeypatch):
    """However much of a prompt is tokenized with its completions: what comes out is what a plain loop makes."""
    tokenizer = trained(kind)
    behind, ids_of = [], tokens.tokenize_texts
    monkeypatch.setattr(tokens, "tokenize_texts", lambda texts, each: behind.append(texts) or ids_of(texts, each))
    opening = tokenizer("a")["input_ids"][: 1 if tokenizer.bos_token else 0]
    rows, seen = rows_of(*TEXTS), []
    for row, (prompt, completions, merged, _) in zip(rows, encode_rows(rows, PAIR, tokenizer, [0]), strict=True):
        plain = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        assert prompt == opening + plain
        whole = [tokenizer(row["prompt"] + row[name], add_special_tokens=False)["input_ids"] for name in PAIR]
        assert merged == any(ids[: len(plain)] != plain for ids in whole)
        if merged:
            expected = [tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in PAIR]
        else:
            expected = [ids[len(plain) :] for ids in whole]
        assert completions == [[*ids, 0] for ids in expected]
        seen.append(merged)
    longest = max(len(text) for texts in behind for text in texts)
    assert (longest < len(TALK + TEXTS[0]["chosen"])) == (kind in ("byte-level", "metaspace", "words"))


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of a kind that models have, with a BOS where it is `metaspace`."""
    text = [row[name] for row in TEXTS for name in ("prompt", *PAIR)] * 3 + ["ab abab Assistant: Human: response"] * 9
    special = ["<e>", "<s>", "<u>"]
    common = {"special_tokens": special, "vocab_size": 400, "show_progress": False}
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **common)
    elif kind == "over lines":  # no pre-tokenizer: tokens such as `:\nA`
        tokenizer = Tokenizer(models.BPE(unk_token="<u>"))
        trainer = trainers.BpeTrainer(**common)
    elif kind == "metaspace":
        tokenizer = Tokenizer(models.BPE(unk_token="<u>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
        )
        trainer = trainers.BpeTrainer(**common)
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(unk_token="<u>", **common)
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<u>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(**common)
    tokenizer.train_from_iterator(text, trainer)
    names = {"eos_token": "<e>", "unk_token": "<u>", **({"bos_token": "<s>"} if kind == "metaspace" else {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def test_a_prompt_is_cut_from_the_left_only_where_the_pair_is_too_long_and_keeps_its_bos():
    tokenizer = word_tokenizer()
    end = tokenizer.eos_token_id
    words = ["silent", "broken", "golden", "last", "hidden", "lonely", "crimson", "distant"]
    rows = rows_of(
        {"prompt": " ".join(words), "chosen": " i see", "rejected": " it"},  # 9 + 3 fits 12
        {"prompt": " ".join(words), "chosen": " it", "rejected": " i would see"},  # 9 + 4 does not: cut to 5
        {"prompt": "the film", "chosen": " i" * 9, "rejected": " it"},  # 3 + 10: a short prompt, a long completion
    )
    table = tokenize(rows, PAIR, tokenizer, [end], LengthLimits(12, 5))
    assert [len(ids) for ids in table["prompt_ids"]] == [9, 5]
    assert tokenizer.decode(table[1]["prompt_ids"]) == "<s> hidden lonely crimson distant"
    assert counts_of(rows)["cut"] == {"prompt cut": 1}
    assert counts_of(rows)["dropped"] == {"too long": 1}
    assert count_rows(rows)["examples"] == {"prompt cut": ["row 1"], "too long": ["row 2"]}
    assert [row["tokens"] for row in rows] == [12, 13, 13]
    tokenize(rows, PAIR, tokenizer, [end], LengthLimits(12, 5, prompt="drop"))
    assert counts_of(rows)["dropped"] == {"too long": 2}


def test_a_completion_too_long_is_dropped_or_cut_with_or_without_its_end():
    tokenizer = word_tokenizer()
    rows = rows_of(
        {"prompt": "the film", "chosen": " i" * 9, "rejected": " it"},  # 3 + 10 of 8: 5 are left
        {"prompt": "the film", "chosen": " i" * 9, "rejected": " i" * 8},  # the same once cut
        {"prompt": "the " * 6, "chosen": " i it", "rejected": " it i"},  # 7 + 3 of 8: one is left
    )
    known = tokenizer.convert_tokens_to_ids(["i", "it"])
    table = tokenize(rows, PAIR, tokenizer, [2], LengthLimits(8, 7, completion="keep_eos"))
    assert table["row"] == [0]
    assert (table[0]["chosen_ids"], table[0]["rejected_ids"]) == ([known[0]] * 4 + [2], [known[1], 2])
    assert counts_of(rows)["dropped"] == {"identical after cutting": 1, "no completion token left": 1}
    assert counts_of(rows)["cut"] == {"completion cut": 1}
    rows = [{**row, "reason": None} for row in rows]
    cut = tokenize(rows, PAIR, tokenizer, [2], LengthLimits(8, 7, completion="cut"))
    assert cut["row"] == [0, 2]
    assert (cut[0]["chosen_ids"], cut[1]["rejected_ids"]) == ([known[0]] * 5, [known[1]])
    assert counts_of(rows)["dropped"] == {"identical after cutting": 1}


def lengths_of(lengths: list[int], limit: int) -> list[dict]:
    """Rows of a prompt of two tokens, and completions of these and an end token, tokenized within a limit."""
    rows = rows_of(*({"prompt": "x", "chosen": " i" * n} for n in lengths))
    tokenize(rows, ("chosen",), word_tokenizer(), [2], LengthLimits(limit, limit // 2))
    return rows


def test_what_is_too_long_is_warned_of_above_5_percent_and_ends_a_run_above_half():
    five, six, half, more = (lengths_of([9] * n + [2] * (100 - n), 6) for n in (5, 6, 50, 51))
    assert (find_warnings(five, 6, 64), find_errors(five, "drop", 6, 64)) == ([], [])
    assert re.search("6% of 100 rows .* 6 dropped, 0 cut: `length.max=12` would keep 99%", *find_warnings(six, 6, 64))
    assert not find_errors(half, "drop", 6, 64)
    assert not find_warnings(more, 6, 64)
    assert "51 dropped, 0 cut: `length.max=8`, all that the model reads" in find_errors(more, "drop", 6, 8)[0]
    assert "length.max" not in find_errors(more, "drop", 8, 8)[0]  # which is its value


@pytest.mark.parametrize("count", [1, 7, 100, 250])
def test_the_limit_named_is_the_smallest_that_keeps_99_percent(count):
    lengths = [3 + (7 * i) % 19 for i in range(count)]
    total = [2 + n + 1 for n in lengths]  # BOS and x, the completion, its end
    least = min(n for n in total if sum(m <= n for m in total) >= 0.99 * count)
    assert f"`length.max={least}`" in find_errors(lengths_of(lengths, 4), "drop", 4, 512)[0]


def test_a_prompt_without_a_token_or_with_two_bos_is_dropped():
    rows = rows_of({"prompt": "", "chosen": "a", "rejected": "b"}, {"prompt": "x", "chosen": "a", "rejected": "b"})
    table = tokenize(rows, PAIR, characters(eos_token="</s>"), [0], WIDE)
    assert table["row"] == [1]
    assert counts_of(rows)["dropped"] == {"prompt without a token": 1}
    rows = rows_of({"prompt": "<s> the film", "chosen": " it"}, {"prompt": "the film", "chosen": " <s> it"})
    table = tokenize(rows, ("chosen",), word_tokenizer(), [2], WIDE)
    assert counts_of(rows)["dropped"] == {"more than one BOS": 2}


def test_a_split_that_keeps_no_row_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", pairs(2))
    with pytest.raises(PipelineError, match="no rows are left for train: 1 are held out as test: lower"):
        splits_of(path)


def test_lengths_default_to_the_context_and_may_not_exceed_it():
    asked = Length(prompt="drop", completion="cut")
    assert LengthLimits.resolve(asked, 2048) == LengthLimits(512, 256, "drop", "cut")
    assert LengthLimits.resolve(asked, 256) == LengthLimits(256, 128, "drop", "cut")
    with pytest.raises(PipelineError, match="length.max=300 exceeds the model's context of 256"):
        LengthLimits.resolve(Length(max=300, prompt="left", completion="drop"), 256)
    with pytest.raises(PipelineError, match="leaves no room for a completion"):
        LengthLimits.resolve(Length(max=100, max_prompt=100, prompt="left", completion="drop"), 256)


def test_end_tokens_are_the_tokenizers_and_the_generation_configs():
    tokenizer = characters(bos_token="<s>", eos_token="</s>")
    assert eos_ids_of(tokenizer, GenerationConfig(eos_token_id=[7, 1])) == [1, 7]
    assert eos_ids_of(tokenizer, GenerationConfig(eos_token_id=None)) == [1]
    assert tokens.append_eos_once([5, 7, 3, 1], [1, 7]) == [5, 7]
    assert tokens.append_eos_once([5, 1, 3, 7], [1, 7]) == [5, 1]
    assert tokens.append_eos_once([5, 3], [7, 1]) == [5, 3, 7]


def test_hh_splits_at_the_last_reply_and_finds_prompts_that_differ(tmp_path):
    talk = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    rows = [{"chosen": f"{talk} yes", "rejected": f"{talk} no"}, {"chosen": f"{talk} yes", "rejected": f"x{talk} no"}]
    write(tmp_path / "train.jsonl.gz", [*rows, {"chosen": "just text", "rejected": "other"}])
    write(tmp_path / "test.jsonl", rows[:1])
    first, second, third = loaded("hh_rlhf", tmp_path, "dataset.subsets=null")["train"]
    assert (first["prompt"], first["chosen"], first["rejected"]) == (talk, " yes", " no")
    assert first["origin"] == f"{tmp_path}/train.jsonl.gz, line 1"
    assert (second["problem"], third["problem"]) == ("prompt differs", "no reply")
    messages = loaded("hh_rlhf", tmp_path, "dataset.subsets=null", chat=True)["test"][0]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert (messages["prompt"], messages["chosen"], messages["rejected"]) == (turns, "yes", "no")


def test_hh_subsets_are_folders_of_the_set_and_sources_and_a_copy_may_lack_them(tmp_path):
    talk = [{"chosen": f"\n\nHuman: {i}\n\nAssistant: a", "rejected": f"\n\nHuman: {i}\n\nAssistant: b"} for i in "12"]
    copy = write(tmp_path / "copy" / "mine.jsonl", talk)
    for place in (copy, tmp_path / "copy"):
        assert [row["source"] for row in loaded("hh_rlhf", place)["train"]] == ["s"] * 2
    write(tmp_path / "set" / "harmless-base" / "train.jsonl.gz", talk)
    with pytest.raises(PipelineError, match="no file or folder .*helpful-base"):  # one of two is missing
        loaded("hh_rlhf", tmp_path / "set")
    write(tmp_path / "set" / "helpful-base" / "train.jsonl.gz", talk[:1])
    path, test = tmp_path / "set", write(tmp_path / "test.jsonl", talk[:1])
    both = loaded("hh_rlhf", path, f"dataset.test_path={test}")
    assert [row["source"] for row in both["train"]] == ["s/helpful-base", "s/harmless-base", "s/harmless-base"]
    assert len(both["test"]) == 1  # which is read once
    assert len(loaded("hh_rlhf", path, "dataset.subsets=[harmless-base]")["train"]) == 2


def test_turns_of_one_speaker_are_one_message(tmp_path):
    talk = "\n\nHuman: a\n\nHuman: b\n\nAssistant:"
    path = write(tmp_path / "a.jsonl", [{"chosen": f"{talk} yes", "rejected": f"{talk} no"}])
    (row,) = loaded("hh_rlhf", path, chat=True)["train"]
    assert row["prompt"] == [{"role": "user", "content": "a\n\nb"}]


def test_splits_share_no_prompt_and_hold_out_by_prompt(tmp_path):
    path = write(tmp_path / "pairs.jsonl", pairs(200, prompts=70))
    rows = splits_of(path, "dataset.test_rows=12")
    prompts, sizes = prompts_of(rows), [len(part) for part in by_split(rows).values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 70
    assert 12 <= sizes[2] <= 14
    assert 9 <= sizes[1] <= 12
    assert sum(sizes) == 200
    assert splits_of(path, "dataset.test_rows=12") == rows
    other = splits_of(path, "dataset.test_rows=12", "dataset.split_seed=1")
    assert prompts_of(other)[2] != prompts[2]


@pytest.mark.parametrize(("test_rows", "held_out"), [(500, 20), (20, 20), (7, 7), (0, 0)])
def test_at_most_a_tenth_of_a_set_without_a_test_split_is_held_out(test_rows, held_out, tmp_path):
    rows = splits_of(write(tmp_path / "pairs.jsonl", pairs(200)), f"dataset.test_rows={test_rows}")
    assert len(kept_rows(rows, "test")) == held_out


def test_hold_out_of_more_than_there_is_takes_all():
    rows = [{"key": row["prompt"], "reason": None} for row in pairs(3)]
    assert hold_out(rows, 9, random.Random(0))[0] == []


BAD = [
    {"prompt": "a", "chosen": "same", "rejected": "same"},
    {"prompt": "b", "chosen": " ", "rejected": "x"},
    {"prompt": "c", "chosen": "this", "rejected": "that"},
    {"prompt": "c", "chosen": "that", "rejected": "this"},
    {"prompt": "c", "chosen": "this", "rejected": "other"},
    {"prompt": "c", "chosen": "this", "rejected": "other"},
]


def test_rows_that_teach_nothing_are_dropped_and_counted(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [*BAD, *pairs(94)])
    rows = splits_of(path)
    assert len(kept_rows(rows)) == 95
    assert counts_of(rows, "pairs.jsonl")["dropped"] == {
        "identical completions": 1, "empty completion": 1, "contradiction": 2, "exact duplicate": 1
    }  # fmt: skip
    assert count_rows(rows)["examples"]["empty completion"] == [f"{path}, line 2"]
    assert counts_of(rows, "pairs.jsonl")["read"] == 100
    assert adds_up(rows)


def test_more_than_5_percent_that_teach_nothing_end_a_run(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [*BAD, *pairs(70)])
    with pytest.raises(PipelineError, match=r"4 of 76 rows of pairs.jsonl teach nothing, more than 5%: .*line 2\)"):
        splits_of(path)
    rows = splits_of(path, strict=False)
    assert adds_up(rows)
    # Two alike cost one row and damn no set.
    twice = write(tmp_path / "twice.jsonl", pairs(40) * 2)
    rows = splits_of(twice)
    assert counts_of(rows, "twice.jsonl")["dropped"] == {"exact duplicate": 40}


@pytest.mark.parametrize("i", range(4))
def test_a_bad_row_ends_the_run_where_it_is_to(i, tmp_path):
    rows = {0: BAD[:1], 1: BAD[1:2], 2: BAD[2:4], 3: BAD[4:]}[i]
    path = write(tmp_path / "pairs.jsonl", [*rows, *pairs(94)])
    with pytest.raises(PipelineError, match=r"pairs.jsonl, line [12]: \w.*dataset.on_bad_row=drop"):
        splits_of(path, "dataset.on_bad_row=error")


def test_sft_learns_one_completion_of_each_prompt_the_last_sound_one(tmp_path):
    rows = [{"prompt": "a", "chosen": f" {text}", "rejected": " x"} for text in ("one", "two", "three", " ")]
    path = write(tmp_path / "pairs.jsonl", [*rows, *pairs(90)])
    rows = splits_of(path, completions=("chosen",))
    assert [row["chosen"] for row in kept_rows(rows) if row["prompt"] == "a"] == [" three"]
    assert counts_of(rows, "pairs.jsonl")["dropped"] == {"empty completion": 1, "another completion of its prompt": 2}


def test_sft_and_dpo_hold_out_the_same_prompts_whatever_each_drops(tmp_path):
    rows = [{**row, "chosen": row["rejected"]} if i % 25 == 0 else row for i, row in enumerate(pairs(100))]
    path = write(tmp_path / "a.jsonl", rows)
    sft, dpo = (splits_of(path, "dataset.test_rows=20", completions=names) for names in (("chosen",), PAIR))
    assert len(kept_rows(sft)) == 100
    assert len(kept_rows(dpo)) == 96
    assert all(map(set.issubset, prompts_of(dpo), prompts_of(sft)))


def test_a_prompt_of_the_sets_own_test_split_is_not_trained_on(tmp_path):
    train, test = write(tmp_path / "a.jsonl", pairs(50)), write(tmp_path / "b.jsonl", pairs(7))
    rows = splits_of(train, f"dataset.test_path={test}")
    assert len(kept_rows(rows, "train")) + len(kept_rows(rows, "validation")) == 43
    assert len(set.union(*prompts_of(rows))) == sum(map(len, prompts_of(rows)))
    assert counts_of(rows, "a.jsonl")["dropped"] == {"prompt also in test": 7}
    assert adds_up(rows)


def test_a_file_named_as_a_test_split_is_told(tmp_path):
    for name, count in (("latest.jsonl", 0), ("test.jsonl.gz", 1), ("hh_test-00.jsonl", 1), ("contest.jsonl", 0)):
        node = compose(["dataset=json", f"dataset.path={write(tmp_path / name, pairs(5))}"]).dataset
        assert len(find_test_names(node)) == count, name


def test_pairs_labelled_both_ways_are_left_out_where_asked(tmp_path):
    both = [{"prompt": f"c{i // 2}", "chosen": "ab"[i % 2], "rejected": "ba"[i % 2]} for i in range(20)]
    path = write(tmp_path / "pairs.jsonl", [*both, *pairs(40)])
    with pytest.raises(PipelineError, match="20 contradiction.*dataset.on_contradiction=drop"):
        splits_of(path)
    rows = splits_of(path, "dataset.on_contradiction=drop")
    dropped = sum(counts_of(rows, "pairs.jsonl")["dropped"].values())
    assert 18 <= dropped <= 20  # a prompt of which one row alone is held out keeps none


def test_faults_are_weighed_against_the_rows_in_which_they_were_looked_for(tmp_path):
    """No filter, nor debug, which draws 100 of the rows, nor SFT's one completion a prompt makes 2% of faults 50%."""
    rows = [{**row, "chosen": " "} if i % 50 == 0 else row for i, row in enumerate(pairs(1000, prompts=60))]
    path = write(tmp_path / "pairs.jsonl", rows)
    assert counts_of(splits_of(path, debug=True), "pairs.jsonl")["dropped"]["debug=true"] > 700
    rows = splits_of(path, completions=("chosen",))
    assert counts_of(rows, "pairs.jsonl")["dropped"]["another completion of its prompt"] > 800
    assert adds_up(rows)
    rows = [{**row, "votes": 3 * (i % 4 == 0)} for i, row in enumerate(pairs(80))]
    for i in (4, 8):  # 2 of the 20 that are meant
        rows[i]["chosen"] = " "
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(PipelineError, match="2 of 20 rows of a.jsonl teach nothing"):
        splits_of(path, "dataset.at_least={votes: 3}")


def mixed(tmp_path, *overrides: str):
    one, two = write(tmp_path / "one.jsonl", pairs(60)), write(tmp_path / "two.jsonl.gz", pairs(130)[30:])
    sets = [f"+dataset@dataset.sets.{name}=json" for name in ("a", "b")]
    paths = [f"dataset.sets.a.path={one}", f"dataset.sets.b.path={two}", "dataset.sets.a.test_rows=5"]
    node = compose(["dataset=mixture", *sets, *paths, "dataset.sets.b.test_rows=10", *overrides]).dataset
    return load_splits(node, PAIR, False)


def test_a_mixture_keeps_its_sources_apart_and_shares_no_prompt(tmp_path):
    rows = mixed(tmp_path)
    assert [counts_of(rows, name)["read"] for name in ("a", "b")] == [60, 100]
    assert adds_up(rows)
    prompts = prompts_of(rows)
    assert len(set.union(*prompts)) == sum(map(len, prompts))  # 30 prompts are in both sets
    assert {row["source"] for row in kept_rows(rows, "test")} == {"a", "b"}
    assert mixed(tmp_path) == rows


def test_a_mixture_draws_by_weight_and_at_most_so_many_rows(tmp_path):
    # Of train 55 and 90 rows are left; 3 to 1 in weight is 55 and 18. All of test is kept.
    rows = mixed(tmp_path, "dataset.weights={a: 3, b: 1}")
    assert adds_up(rows)
    assert counts_of(rows, "b")["dropped"]["not drawn"] == 90 - 18
    assert len(kept_rows(rows, "test")) == 15
    assert "not drawn" not in counts_of(rows, "a")["dropped"]
    other = mixed(tmp_path, "dataset.weights={a: 3, b: 1}", "dataset.seed=1")
    assert kept_rows(other, "train") != kept_rows(rows, "train")
    rows = mixed(tmp_path, "dataset.rows={b: 5}")
    assert counts_of(rows, "b")["dropped"]["not drawn"] == 85
    assert adds_up(rows)
    rows = mixed(tmp_path, "dataset.weights={a: 1, b: 1}", "dataset.sets.b.test_rows=0")
    assert len(kept_rows(rows, "test")) == 5


def test_a_mixture_keeps_the_reasons_of_its_sets(tmp_path):
    path = write(tmp_path / "votes.jsonl", [{**row, "votes": i % 2} for i, row in enumerate(pairs(80))])
    more = ["+dataset@dataset.sets.c=json", f"dataset.sets.c.path={path}", "dataset.sets.c.at_least={votes: 1}"]
    rows = mixed(tmp_path, *more, "dataset.sets.c.test_rows=0", "dataset.rows={c: 10}")
    assert counts_of(rows, "c")["dropped"]["votes below 1"] == 40
    assert counts_of(rows, "c")["dropped"]["not drawn"] == 30
    assert adds_up(rows)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["dataset.weights={a: 0, b: 1}"], "dataset.weights.a=0: .*greater than 0"),
        (["dataset.weights={a: 1}"], "dataset.weights names no weight for b"),
        (["dataset.weights={a: 1, c: 2}"], "dataset.weights.c: there are only the sets a, b"),
        (["dataset.rows={a: x}"], "dataset.rows.a=x: .*valid integer"),
        (["+dataset@dataset.sets.c=jsn"], "jsn.*did you mean json"),
        (["+dataset.sets.c=3"], "dataset.sets.c=3 is no data set"),
    ],
)
def test_a_mixture_that_cannot_be_is_one_sentence(overrides, sentence, tmp_path):
    with pytest.raises(PipelineError, match=sentence):
        mixed(tmp_path, *overrides)


def test_a_mixture_of_nothing_is_one_sentence():
    with pytest.raises(PipelineError, match="dataset.sets is empty: type "):
        load_splits(compose(["dataset=mixture"]).dataset, PAIR, False)


def test_a_content_hash_follows_names_and_bytes(tmp_path):
    (tmp_path / "a").write_text("1")
    first = content_hash(tmp_path)
    assert content_hash(tmp_path) == first
    (tmp_path / "a").rename(tmp_path / "b")
    second = content_hash(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, second, content_hash(tmp_path)}) == 3


def test_sft_on_another_set_leaves_out_what_dpo_is_tested_on(tmp_path):
    paths = [write(tmp_path / "pairs.jsonl", pairs(60)), write(tmp_path / "other.jsonl", pairs(90))]
    sets = [f"dataset.path={paths[0]}", "dataset@sft_dataset=json", f"sft_dataset.path={paths[1]}"]
    run = compose(["dataset=json", *sets, "dataset.test_rows=20", "sft_dataset.test_rows=5"])
    rows = prepare.load_rows(run, "sft", word_tokenizer())
    train, validation, _ = prompts_of(rows)
    _, watched, tested = prompts_of(prepare.load_rows(run, "dpo", word_tokenizer()))
    assert len(tested) == 6
    assert not tested & (train | validation)
    assert not watched & train
    assert counts_of(rows, "other.jsonl")["dropped"]["prompt held out for DPO"] >= 6
    assert adds_up(rows)


def test_rows_are_tokenized_once_by_one_code_and_accounted_for_each_time(small, tmp_path, monkeypatch):
    long = [{**row, "chosen": " i" * (3 + i % 30), "rejected": " it"} for i, row in enumerate(pairs(94))]
    path = write(tmp_path / "pairs.jsonl", [*BAD, *long])
    given = ["dataset=json", f"dataset.path={path}", "dataset.test_rows=9", "length.max=24"]
    seen = []
    monkeypatch.setattr(prepare, "tokenize", lambda *args: seen.append(1) or tokenize(*args))
    first, second = (prepared(small(*given), "dpo", "train", "test") for _ in range(2))
    assert len(seen) == 2
    assert second.tables["train"].to_dict() == first.tables["train"].to_dict()
    rows = first.all_rows
    assert second.report == first.report
    assert [row.get("tokens") for row in second.all_rows] == [row.get("tokens") for row in rows]
    assert counts_of(rows, "pairs.jsonl")["dropped"]["too long"] > 5
    assert adds_up(rows)
    prepared(small(*given, "length.completion=keep_eos"), "dpo", "train", "test")
    assert len(seen) == 4
    monkeypatch.setattr(prepare, "version", lambda name: "another release")
    prepared(small(*given), "dpo", "train")
    assert len(seen) == 5


def test_a_template_that_writes_the_date_writes_that_of_the_first_run_of_a_name(small, tmp_path, monkeypatch):
    rows = [
        {"prompt": [{"role": "user", "content": f"say {i}"}]}
        | {name: [{"role": "assistant", "content": name}] for name in PAIR}
        for i in range(20)
    ]
    given = ["dataset=json", f"dataset.path={write(tmp_path / 'pairs.jsonl', rows)}", f"root={tmp_path}"]

    def tables_on(day: str, *typed: str) -> tuple:
        tokenizer = characters(bos_token="<s>", eos_token="</s>")
        tokenizer.chat_template, tokenizer.pad_token = "{{ strftime_now('%d %b %Y') }}" + CHATML, "</s>"
        today = type("Today", (datetime,), {"now": classmethod(lambda _: datetime.fromisoformat(day))})
        monkeypatch.setattr(messages, "datetime", today)
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", today)
        monkeypatch.setattr(prepare, "load_tokenizer", lambda model: tokenizer)
        data = prepared(small(*given, *typed), "dpo", "train")
        return data.tables["train"]["prompt_ids"][:], prompt_ids([rows[0]["prompt"]], True, data.tokenizer)

    first = tables_on("2026-01-31")
    assert "31Jan2026" in characters(bos_token="<s>", eos_token="</s>").decode(first[1][0]).replace(" ", "")
    assert tables_on("2026-02-01") == first
    assert tables_on("2026-02-01", "check=true") == first
    other = tables_on("2026-02-01", "name=other")
    assert other[0] != first[0]
    assert other[1] != first[1]


def test_completions_cut_without_their_end_are_trained_on_where_asked(small, tmp_path):
    """As the DPO authors did; preflight, which wants one end token of each completion, lets these pass, no others."""
    from dpo_pipeline.sft import run_sft

    run = small(
        "length.completion=cut", "length.max=39", "length.max_prompt=16", "++sft.max_steps=2", f"root={tmp_path}"
    )
    folder = run_sft(run)
    cut = json.loads((folder / "manifest.json").read_text())["sources"]["reviews"]["cut"]
    assert cut["completion cut"] > 20
    assert json.loads((folder / "status.json").read_text())["state"] == "done"


def test_completions_that_nothing_cut_are_not_said_to_be_cut():
    tokenizer = characters(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHATML.replace("m.content", "m.content | trim")
    prompt = [{"role": "user", "content": "hi"}]
    rows = rows_of({"prompt": prompt, "chosen": "ok", "rejected": "ok\n"})
    tokenize(rows, PAIR, tokenizer, [1], WIDE)
    assert counts_of(rows)["dropped"] == {"identical completions": 1}


def test_what_is_done_with_bad_rows_is_no_part_of_what_a_run_is(tmp_path):
    path = write(tmp_path / "pairs.jsonl", pairs(9))
    given = ["dataset=json", f"dataset.path={path}", "dataset@sft_dataset=json", f"sft_dataset.path={path}"]
    runs = [compose([*given, *more]) for more in ([], ["dataset.on_bad_row=error"])]
    for stage in ("sft", "dpo"):
        assert identity(runs[0], stage) == identity(runs[1], stage)
    assert runs[0].variant == runs[1].variant
    before = identity(runs[0], "sft")
    write(tmp_path / "pairs.jsonl", pairs(8))
    after = identity(runs[0], "sft")
    assert [name for name in before if before[name] != after[name]] == ["dataset.path", "sft_dataset.path"]


def test_two_mixtures_have_two_folders(tmp_path):
    one, two = (
        compose(["dataset=mixture", f"+dataset@dataset.sets.a={name}", f"dataset.sets.a.path={tmp_path}"])
        for name in ("json", "shp")
    )
    assert one.variant != two.variant


def test_a_prompt_at_its_limit_is_not_cut():
    def fit(limits, prompt, completions):
        return limits.fit(prompt, completions, 2, partial(cut_text, prompt, 1))

    completions = [[8] * 6]
    assert fit(LengthLimits(10, 4), [1, 5, 9, 6, 7], completions) == ([1, 9, 6, 7], completions, "prompt cut", "")
    assert fit(LengthLimits(9, 4), [1, 5, 6, 7], completions)[2:] == ("", "too long")
    expected = ([1, 5, 6, 7], [[8] * 4 + [2]], "completion cut", "")
    assert fit(LengthLimits(9, 4, completion="keep_eos"), [1, 5, 6, 7], completions) == expected
    assert fit(LengthLimits(9, 5, prompt="drop"), [1, 5, 6, 7, 9], completions)[3] == "too long"
    assert fit(LengthLimits(9, 5, "drop", "cut"), [1, 5, 6, 7, 9], completions)[1] == [[8] * 4]


def test_rows_of_unknown_words_are_refused(small, tmp_path):
    path = write(tmp_path / "pairs.jsonl", [{**row, "chosen": " unheard of"} for row in pairs(40)])
    with pytest.raises(PipelineError, match="of the tokens of these rows are unknown .*embedded model: type model="):
        prepared(small("dataset=json", f"dataset.path={path}"), "dpo", "train")
