"""Rows reach the trainer as they should: prompt, answer, one end token, splits that share no prompt."""

import gzip
import json

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dpo_pipeline.data import hh_rlhf, instruction_preference, json_file
from dpo_pipeline.data.splits import hold_out, load_splits
from dpo_pipeline.data.tokens import Lengths, end_tokens, tokenize
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.runs import content_hash
from dpo_pipeline.training.tiny import word_tokenizer

WIDE = Lengths(512, 256)
SPLIT = {"test_rows": 2, "split_seed": 0, "sft_target": "chosen"}
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


def write(path, rows) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def pairs(count: int, prompts: int | None = None) -> list[dict]:
    return [
        {"prompt": f"p{i % (prompts or count)}", "chosen": f" good{i}", "rejected": f" bad{i}"} for i in range(count)
    ]


def test_prompt_ids_are_those_of_the_prompt_alone_and_answers_end_once():
    tokenizer = word_tokenizer()
    end = tokenizer.eos_token_id
    rows = [
        {"prompt": "film : the silent river . review :", "chosen": " i loved it .", "rejected": " it was flat . </s>"}
    ]
    table = tokenize(rows, ("chosen", "rejected"), tokenizer, [end], WIDE)
    assert table[0]["prompt_ids"] == tokenizer(rows[0]["prompt"])["input_ids"]
    assert table[0]["prompt_ids"][0] == tokenizer.bos_token_id
    for name in ("chosen", "rejected"):
        ids = table[0][f"{name}_ids"]
        assert ids[-1] == end
        assert ids.count(end) == 1
        assert tokenizer.bos_token_id not in ids
        assert tokenizer.decode(ids[:-1]) == rows[0][name].replace("</s>", "").strip()


def test_an_answer_that_holds_the_end_token_is_cut_there_and_told(caplog):
    rows = [{"prompt": "the", "chosen": " i see </s> it was flat", "rejected": " it </s>"}]
    with caplog.at_level("WARNING"):
        table = tokenize(rows, ("chosen", "rejected"), word_tokenizer(), [2], WIDE)
    assert len(table[0]["chosen_ids"]) == 3
    assert "1 of 1 rows: an answer holds the end token '</s>' before its end" in caplog.text


def test_an_answer_is_tokenized_with_its_prompt_before_it():
    tokenizer = characters(eos_token="</s>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("_")  # as Llama 2 marks where a text begins
    assert tokenizer.tokenize("ab") == ["_", "ab"]
    joined = tokenize([{"prompt": "x ", "chosen": "ab", "rejected": "b"}], ("chosen",), tokenizer, [0], WIDE)
    assert tokenizer.convert_ids_to_tokens(joined[0]["prompt_ids"]) == ["_", "x", " "]
    assert tokenizer.convert_ids_to_tokens(joined[0]["chosen_ids"]) == ["ab", "</s>"]


def test_an_answer_that_merges_into_its_prompt_is_tokenized_alone_and_told(caplog):
    tokenizer = characters(eos_token="</s>")
    rows = [{"prompt": "xa", "chosen": "b", "rejected": "c"}]
    with caplog.at_level("WARNING"):
        table = tokenize(rows, ("chosen", "rejected"), tokenizer, [0], WIDE)
    assert tokenizer.convert_ids_to_tokens(table[0]["prompt_ids"]) == ["x", "a"]
    assert tokenizer.convert_ids_to_tokens(table[0]["chosen_ids"]) == ["b", "</s>"]
    assert "1 of 1 rows: the prompt's tokens change" in caplog.text


def test_a_prompt_is_cut_from_the_left_only_where_the_pair_is_too_long_and_keeps_its_bos(caplog):
    tokenizer = word_tokenizer()
    end = tokenizer.eos_token_id
    words = ["silent", "broken", "golden", "last", "hidden", "lonely", "crimson", "distant"]
    rows = [
        {"prompt": " ".join(words), "chosen": " i see", "rejected": " it"},  # 9 + 3 fits 12
        {"prompt": " ".join(words), "chosen": " it", "rejected": " i would see"},  # 9 + 4 does not: cut to 5
        {"prompt": "the film", "chosen": " i" * 9, "rejected": " it"},  # 3 + 10: the prompt is short, the answer long
    ]
    with caplog.at_level("INFO"):
        table = tokenize(rows, ("chosen", "rejected"), tokenizer, [end], Lengths(12, 5))
    assert [len(row["prompt_ids"]) for row in table] == [9, 5]
    assert tokenizer.decode(table[1]["prompt_ids"]) == "<s> hidden lonely crimson distant"
    assert "1 prompts cut from the left to 5 tokens, 1 rows dropped" in caplog.text


def test_rows_that_are_all_too_long_are_an_error():
    with pytest.raises(PipelineError, match="all 1 rows have no prompt or are longer than length.max=4"):
        tokenize([{"prompt": "the", "chosen": " it" * 9}], ("chosen",), word_tokenizer(), [2], Lengths(4, 2))


def test_a_prompt_without_a_token_is_dropped_and_told(caplog):
    rows = [{"prompt": "", "chosen": "a", "rejected": "b"}, {"prompt": "x", "chosen": "a", "rejected": "b"}]
    with caplog.at_level("WARNING"):
        table = tokenize(rows, ("chosen", "rejected"), characters(eos_token="</s>"), [0], WIDE)
    assert len(table) == 1
    assert "1 of 2 rows dropped: their prompt has no token" in caplog.text


def test_a_split_that_keeps_no_row_is_an_error(tmp_path):
    rows = [{**row, "chosen": row["rejected"]} for row in pairs(30)]
    node = {
        "_target_": "dpo_pipeline.data.json_file.load",
        "path": write(tmp_path / "a.jsonl", rows),
        "test_path": None,
    }
    with pytest.raises(PipelineError, match="no rows are left for train, of 30 read"):
        load_splits({**node, **SPLIT}, ("chosen", "rejected"))


def test_lengths_default_to_the_context_and_may_not_exceed_it():
    assert Lengths.of(None, None, 2048) == Lengths(512, 256)
    assert Lengths.of(None, None, 256) == Lengths(256, 128)
    with pytest.raises(PipelineError, match="length.max=300 exceeds the model's context of 256"):
        Lengths.of(300, None, 256)
    with pytest.raises(PipelineError, match="leaves no room for an answer"):
        Lengths.of(100, 100, 256)


def test_messages_go_through_the_template_once_and_end_at_the_end_of_turn():
    tokenizer = characters(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHATML
    prompt = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "so"},
    ]
    rows = [{"prompt": prompt, "chosen": [{"role": "assistant", "content": "ok"}], "rejected": "no"}]
    row = tokenize(rows, ("chosen", "rejected"), tokenizer, [1], WIDE)[0]
    assert tokenizer.decode(row["prompt_ids"]).replace(" ", "") == (
        "<s>user\nhi</s>\n<s>assistant\nyo</s>\n<s>user\nso</s>\n<s>assistant\n"
    )
    assert tokenizer.convert_ids_to_tokens(row["chosen_ids"]) == ["o", "k", "</s>"]
    assert tokenizer.convert_ids_to_tokens(row["rejected_ids"]) == ["n", "o", "</s>"]


def test_messages_without_a_template_are_an_error():
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "chosen": "a", "rejected": "b"}]
    with pytest.raises(PipelineError, match="no chat template"):
        tokenize(rows, ("chosen",), characters(eos_token="</s>"), [0], WIDE)


def test_end_tokens_are_the_tokenizers_and_the_generation_configs():
    from transformers import GenerationConfig

    tokenizer = characters(bos_token="<s>", eos_token="</s>")
    assert end_tokens(tokenizer, GenerationConfig(eos_token_id=[7, 1])) == [1, 7]
    assert end_tokens(tokenizer, GenerationConfig(eos_token_id=None)) == [1]
    with pytest.raises(PipelineError, match="no end token"):
        end_tokens(characters(unk_token="?"), GenerationConfig())


def test_hh_splits_at_the_last_reply_and_finds_prompts_that_differ(tmp_path):
    talk = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    rows = [{"chosen": f"{talk} yes", "rejected": f"{talk} no"}, {"chosen": f"{talk} yes", "rejected": f"x{talk} no"}]
    write(tmp_path / "train.jsonl.gz", rows)
    write(tmp_path / "test.jsonl", rows[:1])
    loaded = hh_rlhf.load(str(tmp_path), None)
    assert loaded["train"][0] == {"prompt": talk, "chosen": " yes", "rejected": " no"}
    assert loaded["train"][1]["problem"] == "prompts differ"
    assert len(loaded["test"]) == 1


def test_hh_subsets_are_folders_of_the_set(tmp_path):
    for subset, rows in (("harmless-base", 2), ("helpful-base", 3)):
        (tmp_path / subset).mkdir()
        talk = f"\n\nHuman: {subset}\n\nAssistant:"
        write(
            tmp_path / subset / "train.jsonl.gz",
            [{"chosen": f"{talk} {i}", "rejected": f"{talk} no"} for i in range(rows)],
        )
    assert len(hh_rlhf.load(str(tmp_path), ["harmless-base", "helpful-base"])["train"]) == 5
    assert len(hh_rlhf.load(str(tmp_path), ["harmless-base"])["train"]) == 2


def test_instructions_take_the_alpaca_form_with_and_without_input(tmp_path):
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "chosen": "It is 3.", "rejected": "3, obviously."}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row, {**row, "input": ""}]))
    first, second = instruction_preference.load(str(path))["train"]
    assert first["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    assert second["prompt"].endswith("### Instruction:\nAdd.\n\n### Response:\n")
    assert (first["chosen"], first["demonstration"]) == ("It is 3.", "3")


def test_json_takes_a_second_file_as_test(tmp_path):
    train, test = write(tmp_path / "a.jsonl", pairs(3)), write(tmp_path / "b.jsonl.gz", pairs(2))
    loaded = json_file.load(train, test)
    assert (len(loaded["train"]), len(loaded["test"])) == (3, 2)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no file or folder"),
        ("", "is empty"),
        ('{"prompt": "a", "chosen": "b"}\n', "has no column 'rejected': found prompt, chosen"),
        ('{"prompt": "a", \n', "cannot be read as a data set"),
    ],
)
def test_a_file_that_holds_no_pairs_is_one_sentence(content, sentence, tmp_path):
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PipelineError, match=sentence) as error:
        json_file.load(str(path), None)
    assert "\n" not in str(error.value)


def test_splits_share_no_prompt_and_hold_out_by_prompt(tmp_path):
    path = write(tmp_path / "pairs.jsonl", pairs(200, prompts=70))
    node = {"_target_": "dpo_pipeline.data.json_file.load", "path": path, "test_path": None, **SPLIT, "test_rows": 30}
    splits = load_splits(node, ("chosen", "rejected"))
    prompts = [{row["prompt"] for row in splits[name]} for name in ("train", "validation", "test")]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 70
    assert 30 <= len(splits["test"]) <= 32
    assert 8 <= len(splits["validation"]) <= 11
    assert sum(map(len, splits.values())) == 200
    assert load_splits(node, ("chosen", "rejected")) == splits
    assert load_splits({**node, "split_seed": 1}, ("chosen", "rejected"))["test"] != splits["test"]


def test_hold_out_of_more_than_there_is_takes_all():
    import random

    assert hold_out(pairs(3), 9, random.Random(0))[0] == []


def test_rows_that_teach_nothing_are_dropped_and_counted(tmp_path, caplog):
    bad = [{"prompt": "a", "chosen": "same", "rejected": "same"}, {"prompt": "b", "chosen": " ", "rejected": "x"}]
    path = write(tmp_path / "pairs.jsonl", [*pairs(40), *bad])
    node = {"_target_": "dpo_pipeline.data.json_file.load", "path": path, "test_path": None, **SPLIT}
    with caplog.at_level("WARNING"):
        splits = load_splits(node, ("chosen", "rejected"))
    assert sum(map(len, splits.values())) == 40
    assert "2 of 42 rows dropped: " in caplog.text
    assert "1 identical answers" in caplog.text
    assert "1 empty answer" in caplog.text


def test_sft_and_dpo_hold_out_the_same_prompts_whatever_each_drops(tmp_path):
    rows = [{**row, "chosen": row["rejected"]} if i % 25 == 0 else row for i, row in enumerate(pairs(100))]
    path = write(tmp_path / "a.jsonl", rows)
    node = {"_target_": "dpo_pipeline.data.json_file.load", "path": path, "test_path": None, **SPLIT, "test_rows": 20}
    sft, dpo = load_splits(node, ("chosen",)), load_splits(node, ("chosen", "rejected"))
    assert sum(map(len, sft.values())) == 100
    assert sum(map(len, dpo.values())) == 96
    for split in ("train", "validation", "test"):
        assert {row["prompt"] for row in dpo[split]} <= {row["prompt"] for row in sft[split]}


def test_a_prompt_of_the_sets_own_test_split_is_not_trained_on(tmp_path, caplog):
    train, test = write(tmp_path / "a.jsonl", pairs(50)), write(tmp_path / "b.jsonl", pairs(7))
    node = {"_target_": "dpo_pipeline.data.json_file.load", "path": train, "test_path": test, **SPLIT}
    with caplog.at_level("WARNING"):
        splits = load_splits(node, ("chosen", "rejected"))
    assert len(splits["train"]) + len(splits["validation"]) == 43
    assert not {row["prompt"] for row in splits["train"]} & {row["prompt"] for row in splits["test"]}
    assert "7 prompt also in test" in caplog.text


def test_subsets_of_one_file_are_refused(tmp_path):
    path = write(tmp_path / "train.jsonl", [{"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}])
    with pytest.raises(PipelineError, match="is one file, without the folders harmless-base.*dataset.subsets=null"):
        hh_rlhf.load(path, ["harmless-base"])


def test_a_data_set_without_demonstrations_says_what_to_type(tmp_path):
    path = write(tmp_path / "pairs.jsonl", pairs(9))
    node = {"_target_": "dpo_pipeline.data.json_file.load", "path": path, "test_path": None, **SPLIT}
    with pytest.raises(PipelineError, match="no column 'demonstration'.*sft_target=chosen"):
        load_splits(node, ("demonstration",))


def test_a_content_hash_follows_names_and_bytes(tmp_path):
    (tmp_path / "a").write_text("1")
    first = content_hash(tmp_path)
    assert content_hash(tmp_path) == first
    (tmp_path / "a").rename(tmp_path / "b")
    second = content_hash(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({first, second, content_hash(tmp_path)}) == 3
