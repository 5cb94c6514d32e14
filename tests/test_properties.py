"""Whatever rows a file holds: one sentence, or every row accounted for and every completion ended once."""

import json
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dpo_pipeline.config import compose
from dpo_pipeline.data.report import SPLITS, count_rows, kept_rows
from dpo_pipeline.data.reviews import VOCABULARY
from dpo_pipeline.data.splits import load_splits
from dpo_pipeline.data.token_table import LengthLimits, tokenize
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.training.tiny import word_tokenizer

TOKENIZER = word_tokenizer()
BOS, END = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
CHAT = word_tokenizer()
CHAT.chat_template = (
    "{{ bos_token }}{% for m in messages %} {{ m.role }} : {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)
WORDS = [
    "the",
    "film",
    "i",
    "see",
    "\n",
    " ",
    "",
    "</s>",
    "<s>",
    "\xe9\u2028",
    "\n\nHuman:",
    "\n\nAssistant:",
    "\x00",
    ".",
]

words = st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=9).map(" ".join)
texts = st.one_of(words, words, words, st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join))
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", ""])
turns = st.one_of(
    st.builds(lambda role, content: {"role": role, "content": content}, roles, texts),
    st.builds(lambda role, content: {"from": role, "value": content}, roles, texts),
)
messages = st.lists(turns, max_size=4)
odd = st.one_of(st.none(), st.integers(), st.booleans(), st.lists(st.integers(), max_size=2), st.just({"a": 1}))
values = st.one_of(texts, texts, texts, texts, messages, odd)
NAMES = ("prompt", "chosen", "rejected", "demonstration", "messages", "conversations", "text", "instruction", "output")
wild = st.dictionaries(st.sampled_from(NAMES), values, max_size=5)
good = st.fixed_dictionaries({"prompt": words, "chosen": words, "rejected": words})
pair = st.one_of(good, good, good, st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts}))
talk = st.builds(
    lambda prompt, *completions: {"prompt": prompt, "chosen": completions[0], "rejected": completions[1]},
    messages, texts, texts,
)  # fmt: skip
dialogues = st.fixed_dictionaries({"chosen": st.one_of(texts, messages), "rejected": st.one_of(texts, messages)})
# Of few texts, so that they meet again: the same, both ways, two completions to one prompt.
FEW = [{"prompt": p, "chosen": c, "rejected": r} for p in ("the", "film") for c in "iawe" for r in "iawe"]
GOOD = [{"prompt": f"film {word}", "chosen": "i", "rejected": "it"} for word in VOCABULARY[:40]]
files = st.one_of(
    st.lists(pair, min_size=1, max_size=40),
    st.lists(pair, min_size=20, max_size=40),
    st.lists(good, min_size=30, max_size=40),
    st.lists(st.sampled_from(FEW), min_size=10, max_size=40),
    st.lists(st.one_of(pair, talk), min_size=4, max_size=30),
    st.lists(dialogues, min_size=4, max_size=30),
    st.lists(wild, min_size=1, max_size=20),
)
lengths = st.builds(
    lambda most, prompt, *how: LengthLimits(most, min(prompt, most - 1), *how),
    st.one_of(st.integers(2, 24), st.just(24)), st.integers(1, 24), st.sampled_from(["left", "drop"]),
    st.sampled_from(["drop", "keep_eos", "cut"]),
)  # fmt: skip
seen: dict[str, int] = {}


@settings(max_examples=180, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@example(rows=[*FEW, *GOOD], limits=LengthLimits(24, 9), sft=False, chat=False, test_rows=0)
@given(rows=files, limits=lengths, sft=st.booleans(), chat=st.booleans(), test_rows=st.integers(0, 5))
def test_no_row_is_lost_and_no_completion_ends_otherwise(rows, limits, sft, chat, test_rows):
    names = ("chosen",) if sft else ("chosen", "rejected")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        node = {**NODE, "path": str(path), "test_rows": test_rows}
        try:
            every_row = load_splits(node, names, chat, strict=False)
            splits = {split: kept_rows(every_row, split) for split in SPLITS}
            table = tokenize(
                [row for part in splits.values() for row in part], names, CHAT if chat else TOKENIZER, [END], limits
            )
            refusal = ""
        except PipelineError as error:
            refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        assert len(refusal) > 20
        seen["refused"] = seen.get("refused", 0) + 1
        return
    (part,) = count_rows(every_row)["sources"].values()
    count = len(table)
    assert part["read"] == len(rows) == count + sum(part["dropped"].values())
    assert sum(part["kept"].values()) == count
    prompts = [{json.dumps(row["prompt"]) for row in splits[split]} for split in splits]
    assert len(set.union(*prompts)) == sum(map(len, prompts))
    for row in table:
        completions = [row[f"{name}_ids"] for name in names]
        assert len(row["prompt_ids"]) + max(map(len, completions)) <= limits.max
        assert row["prompt_ids"][:2].count(BOS) == 1
        assert len(completions) == 1 or completions[0] != completions[1]
        for ids in completions:
            whole = ids.count(END) == 1 and ids[-1] == END and len(ids) > 1
            assert whole or (limits.completion == "cut" and END not in ids and ids)
    seen["kept"] = seen.get("kept", 0) + count
    for reason in part["dropped"]:
        seen[reason] = seen.get(reason, 0) + 1


def test_the_rows_thrown_were_of_every_kind():
    """Runs after the one above, or throws them itself: a property that only ever saw refusals would prove nothing."""
    if not seen:
        test_no_row_is_lost_and_no_completion_ends_otherwise()
    assert seen["kept"] > 500, seen
    reasons = {"refused", "empty completion", "identical completions", "contradiction", "exact duplicate", "too long"}
    assert reasons <= seen.keys()


NODE = compose(["dataset=json", "dataset.path=rows.jsonl"]).dataset
