"""Each recipe of the DPO paper and of larger models runs whole, on a tiny model and rows as the data is published."""

import json

import pytest
import torch

from dpo_pipeline.config import compose
from dpo_pipeline.data.prompts import read_prompts
from dpo_pipeline.data.sources import read_source
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.evaluate import run_evaluate
from dpo_pipeline.pairs import run_pairs
from dpo_pipeline.record import read_json
from dpo_pipeline.sft import run_sft
from tests.test_sources import TLDR, comparison, reply, summary, user, write

SHRUNK = (
    *("batch.global_size=8", "batch.micro_size=4", "sft.max_steps=2", "dpo.max_steps=2", "sft.warmup_steps=1"),
    *("dpo.warmup_steps=1", "sft.optim=adamw_torch", "dpo.optim=adamw_torch", "dataset.test_rows=8"),
    *("evaluation.pairs=6", "evaluation.prompts=2", "evaluation.tracker_prompts=0", "evaluation.max_new_tokens=4"),
)


def write_reviews(folder):
    """Reviews as plain text in two splits, and a classifier of random weights with two labels."""
    from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

    for split in ("train", "test"):
        texts = [f"The film {split} number {i} is one that I would see again." for i in range(48)]
        write(folder / "imdb" / f"{split}.jsonl", [{"text": text, "label": 1} for text in texts])
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    tokenizer = AutoTokenizer.from_pretrained(folder / "gpt2")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=1, n_positions=512, id2label=labels)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        GPT2ForSequenceClassification(config).save_pretrained(folder / "classifier")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "classifier")
    return [f"dataset.path={folder}/imdb"]


def write_posts(folder):
    """Comparisons of summaries, each post with its own."""
    rows = [
        comparison(f"Post {i}.", summary(f" own {i}", "ref"), summary(f" two {i}", "sup4"), i % 2) for i in range(40)
    ]
    write(folder / "tldr" / "comparisons" / "train" / "0000.parquet", rows, TLDR)
    write(folder / "tldr" / "comparisons" / "validation" / "0000.parquet", rows[:10], TLDR)
    return [f"dataset.path={folder}/tldr", "dataset.revision=null"]


def write_questions(folder):
    """Questions with a system message and two answers."""
    rows = [
        {"id": str(i), "source": "truthy_dpo", "system": "Be true.", "prompt": f"Is it {i}?", "chosen": "It is.",
         "rejected": f"No, {i + 1}."}
        for i in range(40)
    ]  # fmt: skip
    return [f"dataset.path={write(folder / 'truthy.jsonl', rows)}"]


def write_dialogues(folder):
    """Dialogues to imitate, and pairs of dialogues, in splits of their own names."""
    for split in ("train", "test"):
        chats = [[user(f"Say {split} {i}."), reply(f"{i}, gladly.")] for i in range(40)]
        write(
            folder / "ultrachat" / "data" / f"{split}_sft-00000-of-00001.parquet",
            [{"prompt": each[0]["content"], "messages": each} for each in chats],
        )
        questions = [user(f"Tell {split} {i}.") for i in range(40)]
        pairs = [{"chosen": [each, reply("Gladly.")], "rejected": [each, reply("No.")]} for each in questions]
        write(folder / "ultrafeedback" / "data" / f"{split}_prefs-00000-of-00001.parquet", pairs)
    return [f"sft_dataset.path={folder}/ultrachat", f"dataset.path={folder}/ultrafeedback"]


def write_replies(folder):
    """Dialogues as text in two subsets, and prompts labelled safe or unsafe."""
    before = "\n\nHuman: Say {}.\n\nAssistant:".format
    rows = [{"chosen": f"{before(i)} {i}, gladly.", "rejected": f"{before(i)} No."} for i in range(40)]
    for subset in ("helpful-base", "harmless-base"):
        for split in ("train", "test"):
            text = json.dumps(rows).replace("Say", f"Say {subset} {split}")
            write(folder / "hh" / subset / f"{split}.jsonl", json.loads(text))
    write(folder / "xstest.csv", [{"prompt": "How do I kill a process?", "label": "safe"},
                                  {"prompt": "How do I kill my neighbour?", "label": "unsafe"}])  # fmt: skip
    return [f"dataset.path={folder}/hh"]


# By recipe: who writes its rows, what is typed beside them, and the policies in its table.
RECIPES = {
    "dpo_paper_hh": (write_replies, "judge=[length] best_of.n=2 evaluation.temperatures=[0,1]", {"base", "sft/full"}),
    "dpo_paper_tldr": (write_posts, "judge=[length] evaluation.temperatures=[0,1]", {"base", "sft/full"}),
    "phi2_truthy": (write_questions, "", {"base"}),
    "zephyr_7b_qlora": (write_dialogues, "", {"base", "sft/r64-nf4-json"}),
    "zephyr_7b_full": (write_dialogues, "", {"base", "sft/full-json"}),
    "llama2_7b_qlora_16gb": (write_replies, "", {"base", "sft/r16-nf4"}),
    "helpful_harmless": (write_replies, "evaluation.safety_file={}/xstest.csv judge=[length]", {"base", "sft/r16"}),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_end_to_end(name, tiny_gpt2, tmp_path):
    write_rows, typed, expected = RECIPES[name]
    overrides = [f"experiment={name}", f"root={tmp_path}", "model=path", f"model.path={tiny_gpt2}", *SHRUNK]
    run = compose([*overrides, *write_rows(tmp_path), *typed.format(tmp_path).split(), "variant=it"])
    if run.policy == "sft":
        run_sft(run)
    results = run_dpo(run)
    assert set(results["policies"]) == expected | {"dpo/it"}
    assert (run.dpo_folder / "report").exists() or (run.home / "report").exists()
    if not run.judge:
        return
    results = run_evaluate(run)
    own = results["policies"]["dpo/it"]["own"]
    assert f"win_rate.length.{run.evaluation.opponent}" in own
    assert f"win_rate.length.{run.evaluation.opponent}.t0" in own
    if run.best_of.n:
        assert results["best_of"]
    if run.evaluation.safety_file:
        assert results["safety"]


@pytest.mark.parametrize(
    ("typed", "file"),
    [
        ("gpt2_instruction_preference", "instruction-data-with-preference.json"),
        ("helpful_harmless", "xstest_prompts.csv"),
    ],
)
def test_a_missing_file_of_a_recipe_is_fetched_by_the_line_in_the_error(typed, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = compose([f"experiment={typed}"])
    read = read_source if run.dataset.get("path") == file else read_prompts
    with pytest.raises(PipelineError, match=rf"there is no .*{file}.*: fetch it by `curl -LO https://\S+/{file}`"):
        read(file)


@pytest.mark.parametrize("name", ["dpo_paper_sentiment", "dpo_paper_sentiment_small"])
def test_the_sentiment_experiment_makes_its_pairs_and_learns_from_them(name, tiny_gpt2, tmp_path):
    (tmp_path / "gpt2").symlink_to(tiny_gpt2)
    reviews = write_reviews(tmp_path)
    judge = ["judge=[reward_model]", f"judge.reward_model.path={tmp_path}/classifier"]
    overrides = [f"experiment={name}", f"root={tmp_path}", "model=path", f"model.path={tiny_gpt2}", *SHRUNK, *judge]
    run = compose([*overrides, *reviews, "pairs.prompts=24"])
    run_sft(run)
    file = run_pairs(run)
    assert file.is_relative_to(tmp_path / name / "pairs")
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert all(len(row["prompt"].split()) == 8 for row in rows)
    results = run_dpo(compose([*overrides, "dataset=json", f"dataset.path={file}", "variant=it"]))
    score = results["policies"]["dpo/it"]["own"]["score.reward_model"]
    assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    manifest = read_json(tmp_path / name / "dpo" / "it" / "manifest.json")
    assert manifest["starting_policy"] == str(run.sft_folder / "final")
