"""One chat template for whatever is rendered: trained on, sampled from, measured; and what it does to a row."""

import json
import re
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import trl
from tokenizers import decoders
from transformers import AutoTokenizer

from dpo_pipeline.data.prompts import prompt_ids
from dpo_pipeline.data.report import count_rows, find_warnings, print_report
from dpo_pipeline.data.token_table import LengthLimits, tokenize
from dpo_pipeline.data.turns import cut_dialogue
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.evaluation.eval_set import make_eval_set
from dpo_pipeline.run_folder import identity
from dpo_pipeline.tokenizer import check_same_tokenizer, load_tokenizer, set_chat_template
from tests.helpers import prepare_run
from tests.test_data import CHATML, PAIR, characters, rows_of, trained

# Of words that the embedded model knows.
TEMPLATE = (
    "\n{% for m in messages %}{{ 'the ' if m.role == 'user' else 'and ' }}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}{{ mood }} {% endif %}"
)


@pytest.fixture
def typed(tmp_path):
    """The keys of a template of one's own, which is to read a value."""
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    return [
        "sft_variant=templates",
        f"model.chat_template={tmp_path}/own.jinja",
        "model.chat_template_kwargs={mood: good}",
    ]


def words(ids, tokenizer):
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_training_sampling_and_final_share_a_template_and_its_values(small, typed, tmp_path):
    from dpo_pipeline.sft import run_sft

    typed[-1] = "model.chat_template_kwargs={mood: very}"
    run = small(*typed, "++sft.max_steps=2")
    folder = run_sft(run) / "final"
    data = prepare_run(run, "dpo")
    asked = [{"role": "user", "content": "river ."}]
    assert words(prompt_ids([asked], True, data.tokenizer)[0], data.tokenizer) == "the river . very"
    eval_set = make_eval_set(run, data, "test", 5, 5)
    for prompt in (*data.tables["train"]["prompt_ids"][:5], *eval_set.prompts, *eval_set.prompt_set.ids):
        assert words(prompt, data.tokenizer).startswith("the film :")
        assert words(prompt, data.tokenizer).endswith("very")
    final = AutoTokenizer.from_pretrained(folder)  # as anybody loads it, and may still set the value
    assert final.apply_chat_template(asked, tokenize=False, add_generation_prompt=True) == "\nthe river . very "
    assert "flat" in final.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, mood="flat")
    check_same_tokenizer(data.tokenizer, run.model, folder)
    plain = small(*typed[:2])
    with pytest.raises(PipelineError, match=f"chat template.*model.chat_template={folder}/chat_template.jinja"):
        check_same_tokenizer(load_tokenizer(plain.model, data.tokenizer.name_or_path), plain.model, folder)
    found = json.loads((folder.parent / "manifest.json").read_text())["identity"]
    assert found["model.chat_template_kwargs.mood"] == "very"
    assert found["model.chat_template"].startswith("sha256:")


def test_a_template_is_part_of_what_a_run_is_and_of_its_tables(small, typed, tmp_path):
    def tables(*changes):
        run = small(*typed[:2], *changes)
        return identity(run, "sft"), prepare_run(run, "dpo", "train").tables["train"]["prompt_ids"][:]

    first = tables("model.chat_template_kwargs={mood: very}")
    assert tables("model.chat_template_kwargs={mood: very}") == first
    other = tables("model.chat_template_kwargs={mood: good}")
    (tmp_path / "own.jinja").write_text(TEMPLATE.replace("and", "but").replace("the", "but"))
    edited = tables("model.chat_template_kwargs={mood: very}")
    for fields, ids in (other, edited):
        assert fields != first[0]
        assert ids != first[1]


def test_a_template_that_cannot_be_is_one_sentence(small, typed):
    with pytest.raises(PipelineError, match="model.chat_template=gone.jinja: there is no such file"):
        small("model.chat_template=gone.jinja")
    run = small(*typed[:2], "model.chat_template_kwargs={moood: very}")
    with pytest.raises(PipelineError, match="kwargs.moood.*does not read it.*model.chat_template="):
        prepare_run(run, "dpo", "train")


# As Qwen3 writes them without thinking: before what is to be answered, and before the last reply or before none.
THINK = "<think>\n\n</think>\n\n"
ASKING = CHATML.replace("<s>assistant\n{%", f"<s>assistant\n{THINK}{{%")
REPLYING = "{% if m.role == 'assistant' and loop.last %}THINK{% endif %}{{ m.content }}".replace("THINK", THINK)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "<b>yo"},
    {"role": "user", "content": "so"},
]


@pytest.mark.parametrize("reply", ["{{ m.content }}", REPLYING])
def test_completions_start_where_sampling_starts(reply):
    """Whether a full dialogue has the tokens that the generation prompt ends with, or not."""
    tokenizer = characters(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = ASKING.replace("{{ m.content }}", reply)
    rows = rows_of(*[{"prompt": TALK, "chosen": "<t> yes", "rejected": "no"}] * 2)
    table = tokenize(rows, PAIR, tokenizer, [1], LengthLimits(512, 256))
    asked = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert asked.endswith(THINK)
    for row in table:
        assert "".join(tokenizer.convert_ids_to_tokens(row["prompt_ids"])) == asked
        assert row["prompt_ids"] == prompt_ids([TALK], True, tokenizer)[0]
        assert "".join(tokenizer.convert_ids_to_tokens(row["chosen_ids"])) == "<t> yes</s>"
    count = 0 if reply == REPLYING else 2
    report = count_rows(rows)
    assert report["sources"]["s"]["retokenized"] == count
    assert ("2 completion tokenized alone" in print_report(report, rows)) == bool(count)
    assert [text[:11] for text in find_warnings(rows, 512, 512)] == ["2 of 2 rows"] * bool(count)


PUBLISHED = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))


def test_the_boundary_holds_for_published_templates():
    """Those that TRL brings, with thinking and without: prompts are what is sampled from, and replies are whole."""
    count = 0
    for file, thinking in product(PUBLISHED, (None, True, False)):
        tokenizer = characters(bos_token="<s>", eos_token="</s>")
        tokenizer.chat_template = file.read_text()
        if any(word in file.name for word in ("idefics", "llava", "smolvlm", "diffusion")):  # for images
            continue
        if thinking is not None and "enable_thinking" not in tokenizer.chat_template:
            continue
        kwargs = None if thinking is None else {"enable_thinking": thinking}
        set_chat_template(tokenizer, SimpleNamespace(chat_template=None, chat_template_kwargs=kwargs, path=file.name))
        rows = rows_of({"prompt": TALK, "chosen": "<t> yes", "rejected": "no"})
        (row,) = tokenize(rows, PAIR, tokenizer, [1], LengthLimits(4000, 2000))
        asked = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True, **(kwargs or {}))
        assert row["prompt_ids"] == tokenizer(asked, add_special_tokens=False)["input_ids"], file.name
        chosen = "".join(tokenizer.convert_ids_to_tokens(row["chosen_ids"]))
        assert "<t> yes" in chosen, file.name
        assert chosen.endswith("</s>")
        whole = tokenizer.apply_chat_template([*TALK, message("assistant", "<t> yes")], tokenize=False)
        assert rows[0]["retokenized"] == (not whole.startswith(asked))
        count += 1
    assert count > 80


def test_reasoning_that_would_be_lost_is_counted():
    tokenizer = characters(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = ASKING.replace("{{ m.content }}", "{{ m.reasoning_content }}{{ m.content }}")
    extra = {"chosen": {"reasoning_content": "Hm."}}
    rows = rows_of({"prompt": TALK, "chosen": "yes", "rejected": "no", "extra": extra})
    tokenize(rows, PAIR, tokenizer, [1], LengthLimits(512, 256))
    assert rows[0]["reason"].startswith("calls or reasoning")


def message(role, content):
    return {"role": role, "content": content}


REPLIES = {"chosen": "yes", "rejected": "no"}
LONG = [
    *(message("system", "Be kind, éé."), message("user", "日本語 é🙂 " * 9), message("assistant", "a b, é. " * 12)),
    *(message("user", "short"), message("assistant", "and é " * 7), message("user", "🙂 last one é?")),
]


@pytest.mark.parametrize("first", [0, 1])
def test_a_dialogue_is_cut_inside_its_oldest_turns(first):
    """Whatever its size: system message, roles and template stay, turns go from the oldest, characters are whole."""
    tokenizer = trained("byte-level")
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.chat_template = CHATML
    row = {"prompt": LONG[first:]}
    shown = [re.findall("<s>(\\w+)\n(.*?)</s>\n", text) for text in cut_to_every_size(row, tokenizer)]
    contents = [m["content"] for m in LONG]
    assert len(shown) > 100
    for turns in shown:
        system, turns = (turns[:1], turns[1:]) if first == 0 else ([], turns)
        assert system == [("system", contents[0])][first:]
        assert [role for role, _ in turns] == [m["role"] for m in LONG[-len(turns) :]]
        assert turns[0][0] == "user"
        cut = [i for i, (_, text) in enumerate(turns, len(LONG) - len(turns)) if text != contents[i]]
        assert len(cut) <= 2
        assert all(contents[i].endswith(turns[i - len(LONG)][1]) for i in cut)
        assert all(i - (len(LONG) - len(turns)) < 2 for i in cut)  # of the oldest exchange
    lengths = [sum(len(text) for _, text in turns) for turns in shown]
    assert all(longer >= shorter for longer, shorter in pairwise(lengths[::20]))
    assert len(set(lengths)) > 60  # it is cut to about the size asked for, not to whole turns


def cut_to_every_size(row, tokenizer):
    """The text of a prompt cut to each size that leaves anything of it."""
    whole = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    for size in range(len(whole), 0, -1):
        ids = cut_dialogue(row, tokenizer, size)
        if ids:
            assert len(ids) <= size
            text = tokenizer.decode(ids)  # a part of a character would be U+FFFD
            assert text.endswith("<s>assistant\n")
            assert "\ufffd" not in text
            yield text


def test_a_chat_row_that_is_too_long_keeps_its_template():
    tokenizer = characters(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHATML
    prompt = [message("user", "x" * 50), message("assistant", "y" * 50), message("user", "why so")]
    rows = rows_of({"prompt": prompt, **REPLIES}, {"prompt": prompt[:1], **REPLIES})
    table = tokenize(rows, PAIR, tokenizer, [1], LengthLimits(90, 80))
    text = "".join(tokenizer.convert_ids_to_tokens(table[0]["prompt_ids"]))
    assert re.fullmatch("<s>user\nx+</s>\n<s>assistant\ny+</s>\n<s>user\nwhy so</s>\n<s>assistant\n", text)
    assert len(table[0]["prompt_ids"]) == 80
    assert [row.get("cut") for row in rows] == ["prompt cut", None]
    rows = rows_of({"prompt": prompt, **REPLIES})
    assert len(tokenize(rows, PAIR, tokenizer, [1], LengthLimits(20, 12))) == 0
    assert rows[0]["reason"] == "too long"
