"""Each recipe on GPT-2 runs whole and teaches what it promises, on a tiny GPT-2 and rows as the data is published."""

import gzip
import json
import re
import shlex

import pytest

from dpo_pipeline import record
from dpo_pipeline.config import CONF, compose
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.logprobs import completion_logprobs
from dpo_pipeline.sft import run_sft

FILES = {file.stem: file.read_text().splitlines() for file in sorted((CONF / "experiment").glob("*.yaml"))}
MODEL = "openai-community/gpt2"
SHRUNK = (
    *("batch.global_size=8", "sft.num_train_epochs=3", "sft.learning_rate=1e-2", "dpo.learning_rate=3e-3"),
    *("sft.eval_steps=0.5", "dpo.eval_steps=0.5", "evaluation.prompts=4", "evaluation.max_new_tokens=8"),
)
GOOD, BAD, OUTPUT = "Gladly.", "Never!", "12345."


def write_hh(folder):
    """Two subsets of two splits each: dialogues of one turn, and of two."""
    for subset, before in {"helpful-base": "", "harmless-base": "\n\nHuman: Hi.\n\nAssistant: Hello."}.items():
        for split, size in {"train": 40, "test": 8}.items():
            file = folder / "hh" / subset / f"{split}.jsonl.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            asked = [f"{before}\n\nHuman: {split} {i}?\n\nAssistant: " for i in range(size)]
            with gzip.open(file, "wt") as lines:
                lines.writelines(json.dumps({"chosen": a + GOOD, "rejected": a + BAD}) + "\n" for a in asked)
    return ["dataset.path=hh"]


def write_instructions(folder):
    """One list of rows, half of them with an input; where the recipe looks for it."""
    rows = [
        {"instruction": f"Do {i}.", "input": "This." * (i % 2), "output": OUTPUT, "chosen": GOOD, "rejected": BAD}
        for i in range(96)
    ]
    (folder / "instruction-data-with-preference.json").write_text(json.dumps(rows, indent=2))
    return ["dataset.test_rows=16"]


# By recipe: who writes its rows, a prompt as the model sees it and what comes before each completion, what SFT learns.
RECIPES = {
    "gpt2_hh": (write_hh, "\n\nHuman: test 3?\n\nAssistant:", " ", GOOD),
    "gpt2_instruction_preference": (
        write_instructions,
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo 4.\n\n### Response:\n",
        "",
        OUTPUT,
    ),
}


def logprobs_of(folder, prompt: str, before: str) -> dict[str, float]:
    """Log-probs of the three completions to a prompt, under a policy as plain libraries load it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    completions = (GOOD, BAD, OUTPUT)
    ids = [tokenizer(before + completion)["input_ids"] for completion in completions]
    rows = completion_logprobs(
        AutoModelForCausalLM.from_pretrained(folder), [tokenizer(prompt)["input_ids"]] * 3, ids, 3
    )
    return dict(zip(completions, (float(row.sum()) for row in rows), strict=True))


@pytest.mark.parametrize("name", FILES)
def test_an_experiment_composes_by_the_command_in_its_second_line(name):
    first, second = FILES[name][:2]
    assert first == "# @package _global_"
    targets, typed = re.match(r'# make ([a-z ]+) ARGS="(.*?)"', second).groups()
    assert set(targets.split()) <= {"sft", "dpo", "pairs", "evaluate"}
    run = compose(shlex.split(typed))
    assert f"experiment={name}" in typed
    assert run.name == name


def test_the_recipes_name_the_published_model_and_data():
    hh, instructions = (compose([f"experiment={name}"]) for name in RECIPES)
    assert (hh.model.path, hh.beta, hh.sft_target) == (MODEL, 0.1, "chosen")
    assert (hh.dataset["path"], hh.dataset["subsets"]) == ("Anthropic/hh-rlhf", ["helpful-base", "harmless-base"])
    assert (instructions.model.path, instructions.beta, instructions.sft_target) == (MODEL, 0.1, "demonstration")


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_typed_wins_over_a_recipe(name):
    run = compose([f"experiment={name}", "beta=0.3", "dpo.learning_rate=2e-6", "sft_target=chosen", "lora=r8"])
    assert (run.beta, run.dpo["learning_rate"], run.sft_target, run.lora["r"]) == (0.3, 2e-6, "chosen", 8)
    assert run.variant.startswith("sigmoid-beta0.3-r8-")
    assert run.name == name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_whole_and_teaches_what_it_promises(name, tiny_gpt2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, *asked, learnt = RECIPES[name]
    typed = [f"experiment={name}", "model=path", f"model.path={tiny_gpt2}", *SHRUNK, *write(tmp_path)]
    run = compose([*typed, "variant=it"])
    run_sft(run)
    policies = run_dpo(run)["policies"]

    home = tmp_path / "outputs" / name
    assert json.loads((home / "results.json").read_text())["policies"] == policies
    assert list(policies) == ["base", "sft/full", "dpo/it"]
    for measured in policies.values():
        assert measured["settings"]["beta"] == 0.1
        for estimate in ("preference_accuracy", "margin", "kl"):
            assert set(measured["against"]["base"][estimate]) == {"value", "low", "high", "n"}
        assert measured["own"]["perplexity_chosen"]["value"] > 1
    samples = json.loads((home / "generation_samples.json").read_text())
    assert [set(row["answers"]) for row in samples] == [set(policies)] * 4

    # SFT imitates the completion that the recipe names: the chosen one of HH, the instruction's own output.
    sft, dpo = (record.read_json(home / stage / "manifest.json") for stage in ("sft/full", "dpo/it"))
    held_out = 9 if name == "gpt2_instruction_preference" else 16  # a tenth; the others have a test split
    assert sft["rows"] == dpo["rows"] == {"train": 92 - held_out, "validation": 4}
    imitated = logprobs_of(home / "sft/full/final", *asked)
    assert max(imitated, key=imitated.get) == learnt

    # DPO goes on from there towards the chosen completion; another beta starts from the same SFT.
    assert dpo["starting_policy"] == str(run.sft_folder / "final")
    cautious = run_dpo(compose([*typed, "variant=other", "beta=0.3"]))["policies"]["dpo/other"]
    for variant, beta, measured in (("it", 0.1, policies["dpo/it"]), ("other", 0.3, cautious)):
        preferred = logprobs_of(home / "dpo" / variant / "final", *asked)
        assert preferred[GOOD] - preferred[BAD] > imitated[GOOD] - imitated[BAD] + 2
        own = measured["against"]["reference"]
        assert own["margin_nats"]["low"] > 2
        assert own["margin"]["value"] == pytest.approx(beta * own["margin_nats"]["value"])
