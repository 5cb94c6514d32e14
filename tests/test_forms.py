"""Nothing in a row disappears: each form that people publish is read as meant, or refused with what to type."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_pipeline.config import CONF
from dpo_pipeline.data.normalize import check_template, completion_message
from dpo_pipeline.data.report import count_rows, print_report
from dpo_pipeline.data.splits import drop_invalid, load_splits
from dpo_pipeline.data.tokens import encode_rows
from dpo_pipeline.errors import PipelineError
from tests.test_data import characters, composed, loaded, write

FORMS = CONF.parent.parent / "shared" / "data" / "forms"
# Writes each message with its calls and reasoning, and the functions before them.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.reasoning_content or '' }}{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TOKENIZER = characters(bos_token="<s>", eos_token="</s>")
TOKENIZER.chat_template = TEMPLATE


def read(path, *typed, chat=True):
    """The train rows of a file, as the loader and the check of its fields leave them."""
    rows = loaded("json", path, *typed, chat=chat)["train"]
    if chat:
        check_template(rows, TEMPLATE)
    return rows


def read_row(tmp_path, row, *typed, chat=True):
    return read(write(tmp_path / "a.jsonl", [row]), *typed, chat=chat)[0]


def texts_of(encoded):
    """What the tokens of prompt and completions say."""
    return ["".join(TOKENIZER.convert_ids_to_tokens(ids)) for ids in (encoded[0], *encoded[1])]


def user(content="U0"):
    return {"role": "user", "content": content}


def reply(content="C", **fields):
    return {"role": "assistant", "content": content, **fields}


def system(content="S"):
    return {"role": "system", "content": content}


U0, A0, U1, C, D, S = user(), reply("A0"), user("U1"), reply(), reply("D"), system()
WHOLE = {"chosen": [U0, C], "rejected": [U0, D]}
PAIR = {"chosen": "C", "rejected": "D"}
HH = "\n\nHuman: U0\n\nAssistant:"
CALL = [{"type": "function", "function": {"name": "tide", "arguments": {"port": "Dover"}}}]
TOOLS = [{"type": "function", "function": {"name": "tide", "description": "x"}}]
# A row, and the prompt of its pair C and D.
READ = {
    "a prompt with completions of several turns": (
        {"prompt": [U0], "chosen": [A0, U1, C], "rejected": [A0, U1, D]},
        [U0, A0, U1],
    ),
    "a prompt of text with completions of several turns": (
        {"prompt": "U0", "chosen": [A0, U1, C], "rejected": [A0, U1, D]},
        [U0, A0, U1],
    ),
    "system beside whole dialogues": ({"system": "S", **WHOLE}, [S, U0]),
    "one system twice": ({"system": "S", "prompt": [S, U0], "chosen": [C], "rejected": [D]}, [S, U0]),
    "a system message alone as prompt": ({"prompt": [S], **WHOLE}, [S, U0]),
    "axolotl with text": ({"messages": [U0], **PAIR}, [U0]),
    "ms-swift": ({"messages": [U0, C], "rejected_response": "D"}, [U0]),
    "ms-swift with messages": ({"messages": [U0, A0, U1, C], "rejected_messages": [U0, A0, U1, D]}, [U0, A0, U1]),
    "messages as JSON text": ({"prompt": "U0", **{name: json.dumps(value) for name, value in WHOLE.items()}}, [U0]),
    "messages as Python writes them": ({"prompt": "U0", **{name: str(value) for name, value in WHOLE.items()}}, [U0]),
    "one message as JSON text": ({"prompt": json.dumps([U0]), "chosen": json.dumps(C), "rejected": str(D)}, [U0]),
    "history": (
        {"instruction": "U1", "input": "", "system": "S", "history": [["U0", "A0"]], **PAIR},
        [S, U0, A0, U1],
    ),
    "a prompt that its answers repeat": ({"prompt": HH, "chosen": f"{HH} C", "rejected": f"{HH} D"}, [U0]),
    "HH without its first line break": (
        {"chosen": f"{HH} C".lstrip(), "rejected": f"{HH} D".lstrip()},
        [U0],
    ),
    "images that are none": ({"prompt": "U0", **PAIR, "images": []}, [U0]),
    "a field that names a message": ({"prompt": [{**U0, "id": 7}], **PAIR}, [{**U0, "id": 7}]),
    "ids that differ": (
        {"chosen": [{**U0, "id": 1}, C], "rejected": [{**U0, "id": 2}, D]},
        [{**U0, "id": 1}],
    ),
    "a call and its result": (
        {"prompt": [U0, reply(None, tool_calls=CALL), {"role": "tool", "content": "4"}], "tools": TOOLS, **PAIR},
        [U0, reply("", tool_calls=CALL), {"role": "tool", "content": "4"}],
    ),
}
# A row, and what its refusal says.
REFUSED = {
    "two prompts": ({"prompt": "P", **WHOLE}, "which of the two is the prompt.*dataset.columns"),
    "two systems": (
        {"system": "S", "prompt": [system("T"), U0], "chosen": [C], "rejected": [D]},
        "its system differs",
    ),
    "unpaired": ({"prompt": "U0", "completion": "C", "label": False}, "label.*unpaired"),
    "unpaired messages": ({"messages": [U0, C], "label": "true"}, "label.*unpaired"),
    "images": ({"prompt": "U0", **PAIR, "images": ["a.png"]}, "images.*vision"),
    "an image part": ({"prompt": [user([{"type": "image"}, {"type": "text", "text": "U0"}])], **PAIR}, "images"),
    "an image part without text": ({"prompt": [user([{"type": "image", "text": None}])], **PAIR}, "images"),
    "input beside prompt": ({"prompt": "U0", "input": "I", **PAIR}, "claim to be the prompt.*dataset.columns"),
    "instruction beside prompt": (
        {"instruction": "I", "output": "O", "prompt": "U0", **PAIR},
        "claim to be the prompt",
    ),
    "a dialogue without its prompt": ({"prompt": "P", "messages": [U0, C]}, "which of the two is the prompt"),
    "an array of messages as text": ({"prompt": "U0", "chosen": f"[{C}\n {D}]", "rejected": "D"}, "save them as JSON"),
}
# A row from which nothing can be learned, and why.
PROBLEMS = {
    "rendered text": (
        {
            "prompt": "<|im_start|>user\nU0<|im_end|>\n<|im_start|>assistant\n",
            "chosen": "C<|im_end|>",
            "rejected": "D",
        },
        "text that a chat template has written",
    ),
    "weight 0": ({"prompt": [U0], "chosen": [{**C, "weight": 0}], "rejected": [D]}, "not trained on"),
    "train false": ({"prompt": [U0], "chosen": [C], "rejected": [{**D, "train": False}]}, "not trained on"),
}


@pytest.mark.parametrize("form", READ)
def test_a_row_is_read_whole(form, tmp_path):
    row, prompt = READ[form]
    found = read_row(tmp_path, row)
    assert (found["prompt"], found["chosen"], found["rejected"]) == (prompt, "C", "D")
    assert "problem" not in found


@pytest.mark.parametrize("form", REFUSED)
def test_a_row_that_may_mean_two_things_is_refused(form, tmp_path):
    row, sentence = REFUSED[form]
    for chat in (True, False):
        with pytest.raises(PipelineError, match=sentence):
            read_row(tmp_path, row, chat=chat)


@pytest.mark.parametrize("form", PROBLEMS)
def test_a_row_that_cannot_be_meant_is_counted(form, tmp_path):
    row, sentence = PROBLEMS[form]
    rows = [read_row(tmp_path, row)]
    drop_invalid(rows, ("chosen", "rejected"), "invalid")
    assert sentence in rows[0]["reason"]


def test_a_system_message_of_some_rows_is_theirs(tmp_path):
    rows = [{"prompt": f"U{i}", **PAIR, **({"system": "S"} if i else {})} for i in range(2)]
    for order in (rows, rows[::-1]):
        for found, row in zip(read(write(tmp_path / "a.jsonl", order)), order, strict=True):
            assert [message["role"] for message in found["prompt"]] == ["system", "user"][1 - ("system" in row) :]


def test_a_line_may_be_one_list_of_messages(tmp_path):
    for text in (f"{json.dumps([U0, C])}\n{json.dumps([U1, D])}\n", json.dumps([[U0, C], [U1, D]])):
        (tmp_path / "a.jsonl").write_text(text)
        rows = read(tmp_path / "a.jsonl")
        assert [(row["prompt"], row["demonstration"]) for row in rows] == [([U0], "C"), ([U1], "D")]


def test_calls_and_reasoning_reach_the_template_or_are_refused(tmp_path):
    row = {"prompt": [U0], "tools": json.dumps(TOOLS), "chosen": [reply(None, tool_calls=CALL)]}
    row["rejected"] = [reply("D", reasoning_content="Hm. ")]
    found = read_row(tmp_path, row)
    (encoded,) = encode_rows([found], ("chosen", "rejected"), TOKENIZER, [1])
    prompt, chosen, rejected = texts_of(encoded)
    assert "tide" in prompt
    assert "Dover" in chosen
    assert rejected.startswith("Hm.")
    assert rejected.endswith("D</s>")
    rows = [found]
    drop_invalid(rows, ("chosen", "rejected"), "invalid")
    assert rows[0]["reason"] is None  # a call alone is an answer
    for name in ("tools", "tool_calls", "reasoning_content"):
        with pytest.raises(PipelineError, match=f"does not write {name}"):
            check_template([found], TEMPLATE.replace(name, "x"))
    with pytest.raises(PipelineError, match="only chat models.*model="):
        read_row(tmp_path, row, chat=False)


def test_what_nothing_reads_is_listed(tmp_path):
    row = {"prompt": [{**U0, "id": 7}], **PAIR, "score": 3, "note": None, "votes": 2}
    found = read_row(tmp_path, row, "dataset.at_least={votes: 1}")
    assert found["unused"] == ("score", "id of messages")
    report = count_rows([{**found, "split": "train"}] * 2)
    assert report["sources"]["s"]["unused_columns"] == ["score", "id of messages"]
    assert "score, id of messages" in print_report(report, [found])
    assert read_row(tmp_path, row, "dataset.columns={prompt: prompt, chosen: chosen}", chat=False)["unused"] == (
        *("rejected", "score", "votes"),
    )


def test_indentation_of_text_stays(tmp_path):
    row = {"prompt": "Write f.", "chosen": "\n    def f():\n        pass\n", "rejected": " no"}
    found = read_row(tmp_path, row)
    assert (found["chosen"], found["rejected"]) == ("    def f():\n        pass", "no")


@st.composite
def marked_rows(draw):
    """A row in one of the forms, its prompt's markers in their order, and those of its two completions."""
    turns = draw(st.integers(0, 2))
    history = [f"h{i}q" for i in range(2 * turns)]
    messages = [(user, reply)[i % 2](text) for i, text in enumerate(history)] + [user("ask")]
    has_system, start = draw(st.booleans()), draw(st.integers(0, 2 * turns + 1))
    first = [system("sqz")] if has_system else []
    text = "".join(f"\n\n{'Human' if i % 2 == 0 else 'Assistant'}: {m['content']}" for i, m in enumerate(messages))
    whole = {name: [*messages, reply(name)] for name in ("chosen", "rejected")}
    split = {name: [*messages[start:], reply(name)] for name in whole}
    beside = {"system": "sqz"} if has_system else {}
    forms = [
        {"prompt": first + messages, "chosen": [reply("chosen")], "rejected": [reply("rejected")]},
        {name: first + value for name, value in whole.items()},
        {**beside, **whole},
        {**beside, "conversations": messages, "chosen": reply("chosen"), "rejected": "rejected"},
        {**beside, "messages": messages, "chosen": "chosen", "rejected": reply("rejected")},
        {**beside, "messages": whole["chosen"], "rejected_response": "rejected"},
        {**beside, "messages": whole["chosen"], "rejected_messages": whole["rejected"]},
        {**beside, "chosen": f"{text}\n\nAssistant: chosen", "rejected": f"{text}\n\nAssistant: rejected"},
        {**beside, **{name: json.dumps(value) for name, value in whole.items()}},
        {"input": {"messages": first + messages}, "preferred_output": whole["chosen"][-1:],
         "non_preferred_output": whole["rejected"][-1:]},
    ]  # fmt: skip
    if start % 2:  # the completions go on with the assistant's next reply
        forms.append({**beside, "prompt": messages[:start], **split})
    return draw(st.sampled_from(forms)), [*(["sqz"] if has_system else []), *history, "ask"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(marked=marked_rows(), chat=st.booleans())
def test_every_text_of_a_row_is_once_where_it_belongs(marked, chat, tmp_path_factory):
    row, prompt_words = marked
    found = read_row(tmp_path_factory.getbasetemp(), row, chat=chat)
    assert "problem" not in found
    assert found["unused"] == ()
    (encoded,) = encode_rows([found], ("chosen", "rejected"), TOKENIZER, [1])
    texts = texts_of(encoded)
    markers = [*prompt_words, "chosen", "rejected"]
    places = [[text.count(marker) for text in texts] for marker in markers]
    assert places == [[1, 0, 0]] * len(prompt_words) + [[0, 1, 0], [0, 0, 1]]
    order = [texts[0].index(marker) for marker in prompt_words]
    assert order == sorted(order)


EXPECTED = []
if FORMS.is_dir():
    EXPECTED = [json.loads(line) for line in (FORMS / "expected.jsonl").read_text().splitlines()]


@pytest.mark.real
@pytest.mark.parametrize("case", EXPECTED, ids=lambda case: case["file"])
def test_a_published_form_is_read_right_or_refused(case):
    typed = []
    if "conf/dataset" in case.get("columns", ""):
        columns = composed(case["columns"].split("/")[-1].removesuffix(".yaml"))["columns"]
        typed = [f"dataset.columns={json.dumps(columns).replace(chr(34), '')}"]
    if "refuse" in case:
        with pytest.raises(PipelineError, match=case["refuse"]):
            load_splits(
                {**composed("json"), "path": str(FORMS / case["file"]), "test_rows": 0}, ("chosen", "rejected"), True
            )
        return
    row = read(FORMS / case["file"], *typed)[0]
    assert row["prompt"] == case["prompt"]
    for name in {"chosen", "rejected", "demonstration"} & set(case):
        if isinstance(case[name], dict):
            calls = completion_message(row, name)["tool_calls"]
            assert [call["function"]["name"] for call in calls] == [case[name]["tool_calls"]]
        else:
            assert row[name] == case[name]
    assert [tool["function"]["name"] for tool in row.get("tools", ())] == case.get("tools", [])
    if "reasoning" in case:
        messages = [completion_message(row, name) for name in ("chosen", "rejected")]
        assert [message["reasoning_content"] for message in messages] == case["reasoning"]
