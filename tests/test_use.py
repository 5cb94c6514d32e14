"""A model in use: pairs from a policy's completions, a whole model for any library, and a chat in the terminal."""

import io
import json
import logging

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from dpo_pipeline import chat
from dpo_pipeline.chat import run_chat
from dpo_pipeline.data import reviews
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.export import run_export
from dpo_pipeline.pairs import choose_pairs, run_pairs
from dpo_pipeline.record import read_json
from tests.helpers import prepare_run


@pytest.fixture(scope="module")
def paired(small, sft):
    """The rows that `pairs` writes from the small SFT, and the run that it was called with."""
    run = small("lora=none", "pairs.completions=4", "pairs.prompts=12", "evaluation.max_new_tokens=32")
    file = run_pairs(run)
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()], run, file


def test_pairs_hold_the_best_and_worst_of_a_policys_own_completions_of_train_prompts(paired):
    rows, run, _ = paired
    data = prepare_run(run, "dpo")
    train, test = ({row["prompt"] for row in data.rows[split]} for split in ("train", "test"))
    assert 0 < len(rows) <= 12
    for row in rows:
        assert row["prompt"] in train - test
        assert row["score_chosen"] > row["score_rejected"]
        for side in ("chosen", "rejected"):
            assert row[f"score_{side}"] == pytest.approx(reviews.reward(row[side]))
        assert row["judge"] == "truth"
        assert row["policy"] == str(run.sft_folder / "final")


def test_dpo_reads_what_pairs_wrote(paired, small):
    rows, _, file = paired
    data = prepare_run(small("lora=none", "dataset=json", f"dataset.path={file}", "dataset.rows=0"), "dpo")
    assert sum(len(data.rows[split]) for split in data.rows) == len(rows)
    kept = {(row["prompt"], row["chosen"], row["rejected"]) for split in data.rows for row in data.rows[split]}
    assert kept == {(row["prompt"], row["chosen"], row["rejected"]) for row in rows}
    assert set(data.report["sources"].popitem()[1]["unused_columns"]) == {
        "score_chosen", "score_rejected", "judge", "policy", "temperature"
    }  # fmt: skip


@pytest.mark.parametrize("keep", ["best_worst", "all"])
@pytest.mark.parametrize("only_ended", [True, False])
def test_pairs_are_those_of_a_plain_loop(keep, only_ended):
    lines = [
        (
            row,
            f"text {draw % 3}",
            float((row * 7 + draw * 5) % 4) if (row, draw) != (1, 2) else float("nan"),
            draw != 3,
        )
        for row in range(5)
        for draw in range(5)
    ]
    table = pd.DataFrame(lines, columns=["row", "text", "score", "ended"])
    expected = set()
    for row in range(5):
        usable = {}
        for line in lines:
            if line[0] == row and line[2] == line[2] and (line[3] or not only_ended):
                usable.setdefault(line[1], line[2])
        gaps = [(usable[a] - usable[b], a, b) for a in usable for b in usable if usable[a] - usable[b] > 1]
        if keep == "best_worst":
            gaps = [gap for gap in gaps if gap[0] == max(usable.values()) - min(usable.values())][:1]
        expected |= {(row, usable[a], usable[b]) for _, a, b in gaps}
    pairs = choose_pairs(table, keep, 1.0, only_ended)
    assert {(best["row"], best["score"], worst["score"]) for best, worst in pairs} == expected


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("judge=[refusal] pairs.judge=lenght", "lenght.* judge="),
        ("pairs.min_gap=3", "pairs.min_gap"),
        ("sft_variant=none-there", "make sft"),
    ],
)
def test_pairs_that_cannot_be_are_refused(small, sft, typed, sentence):
    settings = ["pairs.completions=2", "pairs.prompts=2"]
    with pytest.raises(PipelineError, match=sentence):
        run_pairs(small("lora=none", *settings, *typed.split()))


@pytest.mark.parametrize("lora", ["none", "r8"])
def test_an_export_loads_with_transformers_alone_and_is_the_same_policy(small, sft, lora, caplog):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo_pipeline.models import load_options, load_policy

    caplog.set_level(logging.INFO)
    run = small(f"lora={lora}", "target=sft")
    folder = run_export(run)
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert exported.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("film : the quiet garden , a romance about a lost widow . review :", return_tensors="pt").input_ids
    policy = load_policy(sft[lora] / "final", load_options(run))
    with torch.inference_mode():
        gap = exported(ids).logits.float() - policy(ids).logits.float()
    assert gap.abs().max() < 0.1
    facts = read_json(folder / "export.json")
    assert 0 <= facts["kl_per_token"] < 1e-3
    assert not list(folder.parent.glob("export.*.partial"))
    assert "already exported" not in caplog.text
    assert run_export(run) == folder
    assert "already exported" in caplog.text


def test_a_model_card_holds_results_recipe_and_versions(small, sft, tmp_path):
    folder = run_export(small("lora=none", "target=sft"))
    card = (folder / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: transformers")
    for part in ("# sft/full", "SFT", "## Recipe", "sft.learning_rate", "## Versions", "torch"):
        assert part in card


def test_a_head_that_was_trained_apart_from_tied_embeddings_is_kept(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from dpo_pipeline.config import compose
    from dpo_pipeline.export import merge_policy

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=True, **shape))
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapter = get_peft_model(base, LoraConfig(r=2, modules_to_save=["lm_head"], target_modules=["q_proj"]))
    for name, weight in adapter.named_parameters():
        if "modules_to_save" in name:
            weight.data += torch.randn_like(weight)
    adapter.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapter.save_pretrained(tmp_path / "adapter")
    rows = [[1, 2, 3, 4, 5]]
    run = compose(["model=path", f"model.path={tmp_path}/base", "lora=r8"])
    merged, logprobs = merge_policy(run, tmp_path / "adapter", {}, rows)
    merged.save_pretrained(tmp_path / "merged")
    assert "lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.inference_mode():
        again = loaded(torch.tensor(rows)).logits[0].log_softmax(-1)
    torch.testing.assert_close(again, logprobs[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("target=dpo variant=none-there", "make dpo"),
        ("target=nowhere/at/all", "nowhere"),
        ("target=sft push=user/repo", "hf auth login"),
    ],
)
def test_exports_that_cannot_be_are_refused(small, sft, typed, sentence, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(PipelineError, match=sentence):
        run_export(small("lora=none", *typed.split()))


def test_an_export_that_differs_leaves_nothing(small, sft, monkeypatch):
    from dpo_pipeline import export

    monkeypatch.setattr(export, "MAX_KL", -1.0)
    run = small("lora=none", "target=sft", "export.dtype=float16")
    earlier = read_json(run.sft_folder / "export" / "export.json")
    with pytest.raises(PipelineError, match=r"export\.dtype=float32"):
        run_export(run)
    assert read_json(run.sft_folder / "export" / "export.json") == earlier
    assert not list(run.sft_folder.glob("export.*"))


def talk(run, text, monkeypatch, capsys):
    """What a chat prints where a person types this text."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    run_chat(run)
    return capsys.readouterr().out


PROMPT = "film : the quiet garden , a romance about a lost widow . review :"


def test_a_chat_shows_both_completions_with_their_implicit_rewards(small, sft, monkeypatch, capsys):
    from dpo_pipeline.models import load_options, load_policy
    from dpo_pipeline.tokenizer import load_tokenizer

    run = small("lora=none", "target=sft", "compare=true", "chat.temperature=0", "chat.max_new_tokens=8")
    lines = talk(run, f"{PROMPT}\n", monkeypatch, capsys).splitlines()
    text = lines[lines.index("> [sft/full]") + 1]
    other = lines[lines.index("[base]") + 1]
    rewards = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("implicit reward of")]
    tokenizer = load_tokenizer(run.model)
    prompt = tokenizer(PROMPT).input_ids
    models = [load_policy(path, load_options(run)) for path in (sft["none"] / "final", run.model.path)]
    for completion, reward in zip((text, other), rewards, strict=True):
        ids = tokenizer(completion, add_special_tokens=False).input_ids
        ids = ids if len(ids) == 8 else [*ids, tokenizer.eos_token_id]
        sums = []
        for model in models:
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(ids)))
        assert reward == pytest.approx(0.1 * (sums[0] - sums[1]), abs=1e-3)


def test_a_prompt_longer_than_the_context_is_one_sentence_and_the_chat_goes_on(small, sft, monkeypatch, capsys):
    run = small("lora=none", "target=sft", "chat.max_new_tokens=4")
    text = talk(run, f"{PROMPT * 30}\n{PROMPT}\n/new\n", monkeypatch, capsys)
    assert "the model reads 256" in text
    assert text.count("\n> ") == 4


def test_a_line_that_cannot_be_a_prompt_is_one_sentence_and_the_chat_goes_on(small, sft, monkeypatch, capsys):
    run = small("lora=none", "target=sft", "chat.max_new_tokens=4")
    text = talk(run, f"<s> <s> {PROMPT}\n{PROMPT}\n", monkeypatch, capsys)
    assert "cannot be answered" in text
    assert text.count("\n> ") == 3


def test_an_export_goes_with_the_run_that_is_replaced(tmp_path):
    from dpo_pipeline.run_folder import remove_run

    for name in ("old/export", "new"):
        (tmp_path / name).mkdir(parents=True)
    remove_run(tmp_path / "old", tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_ctrl_c_ends_an_answer_and_then_the_chat(small, sft, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.GenerationMixin.generate", interrupted)
    assert "(stopped)" in talk(small("lora=none", "target=sft"), f"{PROMPT}\n", monkeypatch, capsys)
    monkeypatch.setattr(chat, "input", interrupted, raising=False)
    run_chat(small("lora=none", "target=sft"))


def test_a_chat_model_remembers_the_dialogue(tmp_path, small, sft, monkeypatch, capsys):
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(sft["none"] / "final", tmp_path / "chat-model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat-model")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} . {% endfor %}{% if add_generation_prompt %}review :{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat-model")
    prompts = []

    def remember(model, prompt, tokenizer, eos_ids, room, temperature):
        prompts.append(tokenizer.decode(prompt, skip_special_tokens=True))
        return tokenizer("loved it", add_special_tokens=False).input_ids

    monkeypatch.setattr(chat, "stream_completion", remember)
    talk(small(f"target={tmp_path}/chat-model"), "the acting\n\nthe plot\n/new\nthe cast\n", monkeypatch, capsys)
    assert prompts == [
        "the acting . review :", "the acting . loved it . the plot . review :", "the cast . review :"
    ]  # fmt: skip


def test_compare_needs_a_reference(small, sft):
    with pytest.raises(PipelineError, match="target=dpo"):
        run_chat(small("target=base", "compare=true"))


def test_two_rounds_of_pairs_and_dpo_raise_the_true_reward_each(small, tmp_path):
    """Iterative DPO: each round learns from completions of the policy before it, which is its reference."""
    from dpo_pipeline.dpo import run_dpo
    from dpo_pipeline.evaluate import run_evaluate
    from dpo_pipeline.sft import run_sft

    model = "model.builder.hidden_size=64 model.builder.steps=100 dataset.rows=1000".split()
    training = "sft.num_train_epochs=4 sft.learning_rate=4e-3 dpo.num_train_epochs=2 dpo.learning_rate=3e-4".split()
    settings = "pairs.completions=4 pairs.prompts=500 evaluation.max_new_tokens=40 evaluation.pairs=60".split()
    typed = [*model, *training, *settings, "evaluation.prompts=60", f"root={tmp_path}", "name=rounds"]
    run = small(*typed)
    run_sft(run)
    policy = "sft"
    for variant in ("round1", "round2"):
        file = run_pairs(small(*typed, f"policy={policy}"))
        data = ["dataset=json", f"dataset.path={file}", "dataset.rows=0"]
        trained = small(*typed[:2], *typed[3:], *data, f"policy={policy}", f"variant={variant}")
        run_dpo(trained)
        policy = str(trained.dpo_folder / "final")
    results = run_evaluate(small(*typed, "evaluation.temperatures=[1]"))["policies"]
    assert list(results) == ["base", "sft/full", "dpo/round1", "dpo/round2"]  # each once
    sft, first, second = (results[name]["own"]["score.truth"] for name in list(results)[1:])
    assert sft["high"] < first["low"]
    assert first["value"] < second["value"]
    for name, reference in (("dpo/round1", "sft/full"), ("dpo/round2", "dpo/round1")):
        assert results[name]["against"]["reference"]["kl"]["value"] > 0, reference
