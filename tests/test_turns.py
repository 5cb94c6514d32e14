"""`sft_loss=all`: every reply of a dialogue is learned with its end token, and nothing else."""

from pathlib import Path

import pytest
import torch
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from dpo_pipeline.data import prepare
from dpo_pipeline.data.report import kept_rows
from dpo_pipeline.data.token_table import LengthLimits, tokenize
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.sft import run_sft
from dpo_pipeline.training import trainer
from dpo_pipeline.training.callbacks import ValidationPerplexity
from dpo_pipeline.training.trainer import label_completions, make_trainer
from tests.test_data import CHATML, WIDE, characters, prepared, rows_of, write

HEAD = "{% for m in messages %}<s>{{ m.role }}\n"
ASK = "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
MARKED = (
    HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}%s{% endgeneration %}%s"
    "{% else %}{{ m.content }}</s>{% endif %}{{ '\n' }}{% endfor %}" + ASK
)
TEMPLATES = {
    "without marks": CHATML,
    "marks with the end token": MARKED.replace("%s", "</s>", 1).replace("%s", ""),
    "marks before the end token": MARKED.replace("%s", "", 1).replace("%s", "</s>"),
    "marks behind the line break": MARKED.replace("%s", "</s>{{ '\n' }}", 1).replace("%s", ""),
    "a prompt that opens the reasoning": CHATML.replace("<s>assistant\n", "<s>assistant\n[think]\n"),
    "a last reply with more than earlier ones": CHATML.replace(
        "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}[]{% endif %}{{ m.content }}"
    ),
}
DIALOGUE = "system:S user:one assistant:two user:three assistant:see user:four".split()


def messages(*turns: str) -> list[dict]:
    return [dict(zip(("role", "content"), turn.split(":"), strict=True)) for turn in turns]


def chat_tokenizer(template: str = CHATML):
    tokenizer = characters(pad_token="<pad>", bos_token="<s>", eos_token="</s>")  # as the embedded base numbers them
    tokenizer.chat_template = template
    return tokenizer


def table_of(rows: list[dict], tokenizer, limits=WIDE):
    table = tokenize(rows, ("demonstration",), tokenizer, [2], limits, True)
    return table.rename_column("demonstration_ids", "completion_ids")


def learned_text(row: dict, tokenizer) -> str:
    """What a row learns, with a bar where it does not."""
    tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
    pairs = zip(tokens, row["labels"], strict=True)
    return "|".join("".join(t if label != -100 else "\0" for t, label in pairs).replace("\0", " ").split())


def plain_loop(prompt: list[dict], last: str) -> tuple[list[str], list[bool]]:
    """Tokens of a dialogue in CHATML, and which of them are an assistant's words and end token, one by one."""
    tokens, is_learned = [], []
    for message in [*prompt, {"role": "assistant", "content": last}]:
        is_reply = message["role"] == "assistant"
        head = ["<s>", *message["role"], "\n"]
        tokens += [*head, *message["content"], "</s>", "\n"]
        is_learned += [False] * len(head) + [is_reply] * (len(message["content"]) + 1) + [False]
    return tokens[:-1], is_learned[:-1]  # nothing follows the last end token


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_reply_is_learned_as_a_plain_loop_marks_it(name):
    short = {"prompt": messages("user:x"), "demonstration": "y"}
    rows = rows_of({"prompt": messages(*DIALOGUE), "demonstration": "five"}, short)
    tokenizer = chat_tokenizer(TEMPLATES[name])
    table = table_of(rows, tokenizer)
    labelled = label_completions(table, all_turns=True)
    for row, labels in zip(rows, labelled, strict=True):
        if name in list(TEMPLATES)[:3]:  # the others write more than CHATML
            tokens, is_learned = plain_loop(row["prompt"], row["demonstration"])
            assert tokenizer.convert_ids_to_tokens(labels["input_ids"]) == tokens
            assert [label != -100 for label in labels["labels"]] == is_learned
    assert learned_text(labelled[0], tokenizer).split("|")[:2] == ["two</s>", "see</s>"]
    if name in list(TEMPLATES)[:4]:
        assert learned_text(labelled[0], tokenizer).split("|")[2:] == ["five</s>"]
        last = [learned_text(row, tokenizer) for row in label_completions(table, all_turns=False)]
        assert last == ["five</s>", "y</s>"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 1}])
@pytest.mark.parametrize("name", list(TEMPLATES)[:2])
def test_a_reply_that_is_marked_is_not_learned(name, mark):
    prompt = messages(*DIALOGUE)
    prompt[2] |= mark
    tokenizer = chat_tokenizer(TEMPLATES[name])
    (row,) = label_completions(table_of(rows_of({"prompt": prompt, "demonstration": "five"}), tokenizer), True)
    words = ["two</s>"] if mark == {"weight": 1} else []
    assert learned_text(row, tokenizer) == "|".join([*words, "see</s>", "five</s>"])


@pytest.mark.parametrize(("limit", "learned"), [(98, ["two-two-two", "see"]), (95, ["see"]), (60, ["see"]), (34, [])])
def test_a_reply_that_a_cut_reaches_is_not_learned(limit, learned):
    """Of 98 tokens 95 reach into the first reply, 60 into the user's second turn, 34 are the last turn."""
    tokenizer, prompt = chat_tokenizer(), messages(*DIALOGUE)
    prompt[2]["content"] = "two-two-two"
    table = table_of(
        rows_of({"prompt": prompt, "demonstration": "x" * 100}), tokenizer, LengthLimits(limit + 101, limit)
    )
    assert len(table[0]["prompt_ids"]) == len(table[0]["prompt_mask"]) == limit
    texts = learned_text(label_completions(table, True)[0], tokenizer).split("|")[:-1]
    assert texts == [f"{text}</s>" for text in learned]


def test_a_reply_without_an_end_token_drops_the_row():
    template = CHATML.replace("</s>", "{% if m.role != 'assistant' or loop.last %}</s>{% endif %}")
    rows = rows_of({"prompt": messages(*DIALOGUE), "demonstration": "five"}, {"prompt": messages("user:x"),
                   "demonstration": "y"})  # fmt: skip
    table = table_of(rows, chat_tokenizer(template))
    assert table["row"] == [1]
    assert "without an end token" in rows[0]["reason"]
    assert len(kept_rows(rows)) == 1


def tiny_llama(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_loss_and_perplexity_are_means_over_exactly_these_tokens(tmp_path):
    tokenizer = chat_tokenizer()
    dialogues = [(messages(*DIALOGUE), "five"), (messages("user:x"), "y"), (messages(*DIALOGUE[1:4]), "last words")]
    rows = rows_of(*({"prompt": prompt, "demonstration": last} for prompt, last in dialogues))
    table = label_completions(table_of(rows, tokenizer), all_turns=True)
    args = SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=3, per_device_eval_batch_size=2, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = make_trainer(
        SFTTrainer, model=tiny_llama(tokenizer), args=args, train_dataset=table, eval_dataset=table,
        processing_class=tokenizer,
    )  # fmt: skip
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    model = tiny_llama(tokenizer).double()
    model.load_state_dict(trainer.model.state_dict())
    losses = []
    for prompt, last in dialogues:
        tokens, is_learned = plain_loop(prompt, last)
        ids = torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
        logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        losses += [-logprobs[i - 1, ids[i]].item() for i in range(len(ids)) if is_learned[i]]
    expected = sum(losses) / len(losses)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    metrics = {}
    ValidationPerplexity(trainer).on_evaluate(args, trainer.state, trainer.control, metrics=metrics)
    assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-5)


def dialogues_file(folder, count: int = 40, **mark) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"the film {i}"}, {"role": "assistant", "content": "it", **mark},
                      {"role": "user", "content": "see"}, {"role": "assistant", "content": "the story"}]}
        for i in range(count)
    ]  # fmt: skip
    return write(folder / "dialogues.jsonl", rows)


def test_the_choice_is_in_the_cache_key_and_needs_a_chat_model(small, tmp_path, monkeypatch):
    typed = ["dataset=json", f"dataset.path={dialogues_file(tmp_path)}", "sft_target=demonstration"]
    with pytest.raises(PipelineError, match="sft_loss=all needs a chat model.*sft_loss=last"):
        prepared(small(*typed, "sft_loss=all"), "sft", "train")
    monkeypatch.setattr(prepare, "load_tokenizer", lambda model: chat_tokenizer())
    learned, unused = [], []
    for mark in ({}, {"weight": 0}):
        dialogues_file(tmp_path, **mark)
        for choice in ("last", "all", "all"):
            data = prepared(small(*typed, f"sft_loss={choice}"), "sft", "train")
            (source,) = data.report["sources"].values()
            unused.append(source["unused_columns"])
            masks = data.tables["train"]["prompt_mask"][:] if choice == "all" else [[]]
            learned.append(sum(masks[0]))
    assert learned == [0, 3, 3, 0, 0, 0]
    assert unused == [[], [], [], ["weight of messages"], [], []]


@pytest.mark.parametrize("choice", ["last", "all"])
def test_a_run_learns_the_replies_of_its_choice(choice, small, tmp_path, monkeypatch):
    class Labelled(Exception):
        pass

    def label(table, all_turns):
        raise Labelled(all_turns)

    monkeypatch.setattr(prepare, "load_tokenizer", lambda model: chat_tokenizer())
    monkeypatch.setattr(trainer, "label_completions", label)
    path = f"dataset.path={dialogues_file(tmp_path)}"
    with pytest.raises(Labelled, match=str(choice == "all")):
        run_sft(small("dataset=json", path, "sft_target=demonstration", f"sft_loss={choice}", "sft_variant=turns"))


def byte_tokenizer(template: str, end: str):
    """One token for each byte, and for the token that ends a turn."""
    letters = [end, *pre_tokenizers.ByteLevel.alphabet()]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end)
    tokenizer.chat_template = template
    return tokenizer


ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "cohere2": "<|END_OF_TURN_TOKEN|>",
    "gemma": "<end_of_turn>", "gemma3": "<end_of_turn>", "lfm2": "<|im_end|>", "llama3": "<|eot_id|>",
    "phi3": "<|end|>", "phi3_5": "<|end|>", "qwen2_5": "<|im_end|>", "qwen3_instruct_2507": "<|im_end|>",
}  # fmt: skip


@pytest.mark.parametrize("family", ENDS)
def test_published_templates_have_the_replies_that_trl_marks_in_them(family):
    """TRL ships them as they are published, and with marks for training, which we do not read."""
    folder, texts = Path(trl.__file__).parent / "chat_templates", []
    prompt, options = messages(*DIALOGUE[1:]), {"return_dict": True, "return_assistant_tokens_mask": True}
    for name in (f"{family}.jinja", f"{family}_training.jinja"):
        tokenizer = byte_tokenizer((folder / name).read_text("utf-8"), ENDS[family])
        rows = rows_of({"prompt": prompt, "demonstration": "five"})
        table = tokenize(rows, ("demonstration",), tokenizer, [0], LengthLimits(4000, 2000), True)
        ids, mask = table[0]["prompt_ids"], table[0]["prompt_mask"]
        learned = tokenizer.decode([i for i, is_learned in zip(ids, mask, strict=True) if is_learned])
        texts.append([tokenizer.decode(ids), "".join(learned.split())])  # TRL marks a line break before some
    marked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
    trl_ids = [i for i, is_reply in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if is_reply]
    assert texts[0] == texts[1]
    assert texts[0][1].replace(ENDS[family], "") == "".join(tokenizer.decode(trl_ids).split()).replace(
        ENDS[family], ""
    )
    assert [texts[0][1].count(word) for word in ("two", "see", "one", "three", "four")] == [1, 1, 0, 0, 0]
    assert texts[0][1].count(ENDS[family]) == 2
