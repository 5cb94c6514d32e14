"""Every option composes and binds; a wrong key or value is one sentence, and costs no torch."""

import inspect
import re
import subprocess
import sys

import pytest

from dpo_pipeline.config import CONF, ROW_KEYS, argument_faults, compose, instantiate_node
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.judges.judge import Completion

OPTIONS = sorted(
    (folder.name, file.stem) for folder in CONF.iterdir() if folder.is_dir() for file in folder.glob("*.yaml")
)
NEEDED = {
    "path": ["model.path=somewhere"],
    "json": ["dataset.path=x.jsonl"],
    "instruction_preference": ["dataset.path=x.json"],
    "quantization": ["lora=r16"],
    "adapter": ["lora=r16"],
    "reward_model": ["judge.reward_model.path=somewhere"],
    "dpo_paper_sentiment_small": ["model.path=somewhere", "judge.reward_model.path=somewhere"],
    **{name: [f"judge.{name}.model=m"] for group, name in OPTIONS if name.startswith("openai")},
}


def options(group: str) -> list[str]:
    return [name for found, name in OPTIONS if found == group]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option):
    value = f"[{option}]" if group == "judge" else option
    run = compose([f"{group}={value}", *NEEDED.get(option, []), *NEEDED.get(group, [])])
    assert isinstance(run.dpo["learning_rate"], float)
    assert isinstance(run.sft["learning_rate"], float)


@pytest.mark.parametrize("dataset", options("dataset"))
def test_every_loader_takes_exactly_what_its_option_lists(dataset):
    from hydra.utils import get_method

    node = compose([f"dataset={dataset}", *NEEDED.get(dataset, [])]).dataset
    listed = {key for key in node if not key.startswith("_")} - set(ROW_KEYS)
    assert listed == set(inspect.signature(get_method(node["_target_"])).parameters) - {"chat", "source"}
    assert set(ROW_KEYS) <= set(node)


@pytest.mark.parametrize("lora", [name for name in options("lora") if name != "none"])
def test_every_adapter_option_makes_a_lora_config_that_can_be_saved(lora, tmp_path):
    made = instantiate_node(compose([f"lora={lora}"]).lora)
    made.save_pretrained(tmp_path)
    assert made.r == int(lora[1:])
    assert (tmp_path / "adapter_config.json").is_file()


@pytest.mark.parametrize("model", options("model"))
def test_every_model_option_gives_trl_arguments(model, tmp_path):
    from dpo_pipeline.models import load_options
    from dpo_pipeline.training.arguments import training_arguments

    run = compose([f"model={model}", *NEEDED.get(model, [])])
    for stage in ("sft", "dpo"):
        args = training_arguments(run, stage, tmp_path)
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        assert size == run.batch.global_size
        assert args.learning_rate == getattr(run.model.learning_rate, stage)
    assert args.beta == 0.1
    assert str(load_options(run).dtype) == "torch.float32"


@pytest.mark.parametrize("loss", options("loss"))
def test_every_loss_option_reaches_trl(loss, tmp_path):
    from dpo_pipeline.training.arguments import training_arguments

    args = training_arguments(compose([f"loss={loss}"]), "dpo", tmp_path)
    types = {"cdpo": ["sigmoid", "robust"], "sigmoid_sft": ["sigmoid", "sft"]}
    assert args.loss_type == types.get(loss, [loss])
    assert args.label_smoothing == {"robust": 0.1, "cdpo": 1 / 3}.get(loss, 0.0)
    assert args.loss_weights == {"cdpo": [1.1, -0.1], "sigmoid_sft": [1.0, 1.0]}.get(loss)


def test_any_other_loss_and_field_of_trl_is_an_override_away(tmp_path):
    from dpo_pipeline.training.arguments import training_arguments

    run = compose(["++dpo.loss_type=[sigmoid,sft]", "++dpo.loss_weights=[1.0,0.1]", "++dpo.max_steps=20"])
    args = training_arguments(run, "dpo", tmp_path)
    assert (args.loss_type, args.loss_weights, args.max_steps) == (["sigmoid", "sft"], [1.0, 0.1], 20)
    assert re.fullmatch("sigmoid\\+sft-beta0.1-seed0-[0-9a-f]{8}", run.variant)


def test_the_micro_batch_divides_the_global_one():
    assert compose([]).batch.micro_size == 64
    assert compose(["batch.global_size=96"]).batch.micro_size == 48
    assert compose(["model=gpt2", "batch.global_size=20"]).batch.micro_size == 5


def test_learning_rate_follows_stage_and_adapter():
    full, lora = compose([]), compose(["lora=r16"])
    rates = full.model.learning_rate.model_dump()
    found = (*(r.sft["learning_rate"] for r in (full, lora)), *(r.dpo["learning_rate"] for r in (full, lora)))
    assert found == (rates["sft"], rates["sft_lora"], rates["dpo"], rates["dpo_lora"])
    assert compose(["dpo.learning_rate=5e-7"]).dpo["learning_rate"] == 5e-7


@pytest.mark.parametrize(
    ("typed", "name", "variant"),
    [
        ([], "tiny-reviews", "sigmoid-beta0.1-seed0"),
        (["model=gpt2", "dataset=hh_rlhf", "lora=r16", "beta=0.3"], "gpt2-hh_rlhf", "sigmoid-beta0.3-r16-seed0"),
        (["model=path", "model.path=a/b-1B", "policy=base"], "b-1B-reviews", "sigmoid-beta0.1-base-seed0"),
        (["dataset=json", "dataset.path=x/my pairs.jsonl"], "tiny-my_pairs-3f7eed7c", "sigmoid-beta0.1-seed0"),
        (["seed=2", "reference=frozen", "loss=ipo"], "tiny-reviews", "ipo-beta0.1-seed2-reference_frozen"),
        (["++dpo.max_steps=9", "dpo.logging_steps=1"], "tiny-reviews", "sigmoid-beta0.1-seed0-dpo.max_steps_9"),
        (["batch.global_size=8", "batch.micro_size=4"], "tiny-reviews", "sigmoid-beta0.1-seed0-batch.global_size_8"),
        (["debug=true", "root=elsewhere", "name=x"], "x-debug", "sigmoid-beta0.1-seed0"),
        (["experiment=reviews_lora", "variant=mine"], "reviews_lora", "mine"),
    ],
)
def test_a_folder_is_a_function_of_what_was_typed(typed, name, variant):
    run = compose(typed)
    assert (run.name, run.variant) == (name, variant)


def test_two_names_never_share_a_folder_and_none_leaves_its_home():
    names = ["\u65e5\u672c", "\u4e2d\u56fd", "a b", "a_b", "a/b", "../x", "/x", "x" * 200, "x" * 201, "\u672c" * 90]
    runs = [compose([f"name='{name}'", f"variant='{name}'", f"sft_variant='{name}'"]) for name in names]
    for key in ("name", "variant", "sft_variant"):
        folders = [getattr(run, key) for run in runs]
        assert len(set(folders)) == len(names)
        assert not any(set("/\\ ") & set(folder) or len(folder.encode()) > 160 for folder in folders)
    assert runs[0].name == names[0]


def test_a_metric_with_and_without_its_prefix_is_one():
    assert compose(["dpo_best=eval_reward"]).dpo_best == "reward"


def test_sft_variant_tells_the_adapter_and_another_data_set():
    assert compose(["lora=r8"]).sft_variant == "r8"
    assert compose(["dataset=hh_rlhf", "dataset@sft_dataset=reviews"]).sft_variant == "full-reviews"


def test_an_experiment_wins_over_the_config_and_the_command_line_over_both():
    run = compose(["experiment=reviews_lora", "reference=cached"])
    assert run.lora["r"] == 16
    assert run.reference.mode == "cached"


def test_a_known_truth_judges_the_embedded_task_alone():
    assert list(compose([]).judge) == ["truth"]
    assert not compose(["dataset=hh_rlhf"]).judge
    assert not compose(["dataset=hh_rlhf", "dataset@sft_dataset=reviews"]).judge


def test_the_judge_and_the_builder_of_the_tiny_model_take_what_their_options_list():
    run = compose([])
    ((_, score),) = instantiate_node(run.judge["truth"]).score(
        [Completion("", "the cast was superb .", True, (1,), (2,))]
    )
    assert score > 0.9
    assert not argument_faults("builder", {**run.model.builder, "folder": "x"})
    (fault,) = argument_faults("builder", {**run.model.builder, "layer": 3})
    assert re.search("builder.layer .*did you mean layers", fault)


# What is typed, and what the one sentence says: the key, and the remedy or the library's own words.
REFUSED = [
    (["betta=0.3"], "betta .*did you mean beta"),
    (["+betta=0.3"], "betta .*did you mean beta"),
    (["+model.pth=x"], "model.pth .*did you mean model.path"),
    (["learning_rate=1e-5"], "did you mean .*dpo.learning_rate"),
    (["loss=sigmod"], "loss=sigmod .*did you mean sigmoid"),
    (["experiment=reviews_lor"], "experiment=reviews_lor .*did you mean reviews_lora"),
    (["judge=[truht]"], "judge=truht .*did you mean truth"),
    (["lora=r17"], "lora=r17 .*did you mean r16"),
    (["lora.r=3"], "lora.r .*another option of lora="),
    (["judge.openai.model=x"], "judge.openai.model .*another option of judge="),
    (["lora=null"], "such as lora=none"),
    (["beta=abc"], "beta=abc: .*number"),
    (["beta=0"], "beta=0: .*greater than 0"),
    (["beta=-1"], "beta=-1: .*greater than 0"),
    (["beta=null"], "beta has no value: type beta="),
    (["seed=1.5"], "seed=1.5: .*integer"),
    (["batch.global_size=0"], "batch.global_size=0: .*greater than 0"),
    (["evaluation.temperatures=[0,-1]"], "evaluation.temperatures.1=-1: .*greater than or equal to 0"),
    (["sft.save_total_limit=0"], "sft.save_total_limit=0: .*greater than 0"),
    (["model=path"], "model.path has no value: type model.path="),
    (["dataset=json"], "dataset.path has no value: type dataset.path="),
    (["~dataset.form"], r"dataset.form has no value: .*common/rows@_here_"),
    (["+dataset.pth=x", "dataset=json", "dataset.path=x"], "dataset.pth .*formats.load: did you mean path"),
    (["dataset.rows=abc"], "dataset.rows=abc: .*number"),
    (["sft_best=first"], "sft_best=first: .*'perplexity' or 'last'"),
    (["sft_target=rejected"], "sft_target=rejected: .*'chosen' or 'demonstration'"),
    (["precision=bf32"], "precision=bf32: .*'auto', 'bf16', 'fp16' or 'fp32': did you mean"),
    (["report_to=wanb"], "report_to=wanb: .*did you mean wandb"),
    (["variant=a=b"], "variant=a=b .*type KEY=VALUE"),
    (["beta"], "beta .*type KEY=VALUE"),
    (["beta=${x}"], "beta: .*'x' not found"),
    (["beta=${beta}"], "beta: Recursive"),
    (["name=${nope:1}"], "name: Unsupported"),
    (["+lora.r=3"], "lora.r needs an option of lora="),
    (["beta=1e400"], "beta=inf: .*finite"),
    (["variant=.."], r"variant=\.\.: "),
    (["++dpo.loss_type=3"], "dpo.loss_type=3 .*type loss="),
    (["~dpo.loss_type"], "dpo.loss_type=None .*type loss="),
    (["dataset=hh_rlhf", "judge=[truth]"], "judge=truth .*leave it out"),
    (["policy=sfft"], "policy=sfft: .*config.json or adapter_config.json: did you mean sft"),
    (["quantization=nf4"], "quantization= .*add lora=r16"),
    (["model.dtype=float16"], "model.dtype=float16 .*type model.dtype=auto"),
    (["reference=adapter"], "reference=adapter .*add lora=r16"),
    (["reference=adapter", "lora=r8", "reference.path=x"], "reference.path .*type reference=frozen or cached"),
    (["evaluation.reference=x"], "evaluation.reference .*type evaluation.policy="),
    (["loss=robust", "dpo.label_smoothing=0.5"], "dpo.label_smoothing=0.5: .*less than 0.5"),
    (["loss=cdpo", "dpo.label_smoothing=-0.1"], "dpo.label_smoothing=-0.1: .*greater than or equal to 0"),
    (["loss=cdpo", "~dpo.label_smoothing"], "cdpo needs dpo.label_smoothing .*type loss=cdpo alone"),
    (["++dpo.label_smoothing=0.1"], "dpo.label_smoothing=0.1 .*sigmoid: type loss=cdpo"),
    # Keys and options of earlier versions.
    (["length.answer=cut"], "length.answer .*type length.completion="),
    (["+length.answer=cut"], "length.answer .*type length.completion="),
    (["precision.mixed=bf16"], "precision.mixed .*type precision="),
    (["reference=auto"], "reference=auto .*reference=cached"),
]


@pytest.mark.parametrize(("typed", "sentence"), REFUSED, ids=[" ".join(typed) for typed, _ in REFUSED])
def test_what_cannot_be_is_refused_in_one_sentence(typed, sentence):
    with pytest.raises(PipelineError) as error:
        compose(typed)
    assert re.search(sentence, str(error.value)), error.value
    assert "\n" not in str(error.value)
    assert ";" not in str(error.value)  # one fault


FAULTS = {
    "beta=abc": "beta=abc: .*number",
    "sft_best=first": "sft_best=first: .*'last'",
    "quantization=nf4": "add lora=r16",
    "dpo.save_steps=oft": "dpo.save_steps=oft: .*number",
    "dataset.rows=many": "dataset.rows=many: .*number",
    "batch.global_size=???": "batch.global_size has no value",
    "+length.answer=cut": "length.answer .*length.completion",
    "betta=1": "betta .*did you mean beta",
    "guard.kl_mx=1": "guard.kl_mx .*did you mean guard.kl_max",
}


@pytest.mark.parametrize("typed", [list(FAULTS), list(FAULTS)[::-1], list(FAULTS)[:4]])
def test_all_faults_of_a_command_are_told_at_once(typed):
    with pytest.raises(PipelineError) as error:
        compose(typed)
    faults = str(error.value).split("; ")
    assert len(faults) == len(typed)
    for item in typed:
        assert any(re.search(FAULTS[item], fault) for fault in faults), item


def test_no_fault_is_told_that_a_misspelt_group_alone_makes():
    with pytest.raises(PipelineError, match=r"^judg is no key of the config: did you mean judge\?$"):
        compose(["judg=[openai]", "judge.openai.model=x"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("betta: 0.05", "betta .*did you mean beta"),
        ("length: {answer: cut}", "length.answer .*type length.completion="),
        ("dataset: {row: 3}", "dataset.row .*did you mean rows"),
        ("precision: {mixed: bf16}", "precision=.*'auto', 'bf16'"),
        ("loss: ipo", "loss .*write .- override /loss: ipo"),
        ("model: gpt2", "node `model` is not a container"),
        ("defaults: [{override /precision: bf16}]", "precision is a key and no group: write `precision: ..."),
    ],
)
def test_an_experiment_file_is_checked_like_the_command_line(content, sentence, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{content}\n")
    with pytest.raises(PipelineError, match=sentence):
        compose(["experiment=mine", f"hydra.searchpath=[file://{tmp_path}]"])


def folder_keys(run) -> dict[str, str]:
    return {
        "root": run.root,
        "model.path": run.model.path,
        "policy": run.policy,
        "reference.path": run.reference.path,
        "dataset.path": run.dataset.get("path"),
        "dataset.test_path": run.dataset.get("test_path"),
        **{f"evaluation.{key}": value for key, value in run.evaluation.model_dump().items()},
    }


PATHS = {
    "root": [],
    "model.path": ["model=path"],
    "policy": [],
    "reference.path": [],
    "evaluation.policy": [],
    "evaluation.reference": ["evaluation.policy=x"],
    "evaluation.prompts_file": [],
    "evaluation.safety_file": [],
    "evaluation.bias_file": [],
    "dataset.path": ["dataset=json"],
    "dataset.test_path": ["dataset=json", "dataset.path=x"],
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a space in its name, and something that passes for a policy in it."""
    home = tmp_path / "my home"
    (home / "some").mkdir(parents=True)
    (home / "some" / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.mark.parametrize("form", ["{}=~/some", "{}='~/some'"])
@pytest.mark.parametrize("key", PATHS)
def test_a_home_folder_is_expanded_in_every_path(key, form, home):
    run = compose([*PATHS[key], form.format(key)])
    assert folder_keys(run)[key] == str(home / "some")


def test_a_home_folder_is_expanded_in_mixtures_judges_and_lists(home):
    sets = [
        "dataset=mixture",
        "+dataset@dataset.sets.a=json",
        "dataset.sets.a.path=~/a",
        "dataset.sets.a.test_path=~/b",
    ]
    part = compose(sets).dataset["sets"]["a"]
    assert (part["path"], part["test_path"]) == (f"{home}/a", f"{home}/b")
    judges = ["judge=[reward_model,human]", "judge.reward_model.path=~/m", "judge.human.sheets=[~/a.csv,~/b.csv]"]
    judge = compose(judges).judge
    assert judge["reward_model"]["path"] == f"{home}/m"
    assert judge["human"]["sheets"] == [f"{home}/a.csv", f"{home}/b.csv"]


def test_the_folder_of_a_sweep_is_under_the_expanded_root(home):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["root='~/runs'"], return_hydra_config=True)
    assert cfg.hydra.sweep.dir == f"{home}/runs/.cache/sweep"


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("++dpo.lerning_rate=1", "dpo.lerning_rate is no field of trl.DPOConfig: did you mean learning_rate"),
        ("++dpo.beta=0.3", "dpo.beta is decided by beta="),
        ("++dpo.per_device_train_batch_size=3", "dpo.per_device_train_batch_size is decided by batch.micro_size="),
        ("++dpo.save_steps=oft", "dpo.save_steps=oft: .*number"),
        ("dpo.learning_rate=abc", "dpo.learning_rate=abc: .*number"),
        ("++dpo.lr_scheduler_type=cosin", "trl.DPOConfig refuses what stands under dpo"),
        ("++dpo.loss_type=sigmod", "dpo.loss_type=sigmod is no loss of TRL: did you mean sigmoid"),
        ("batch.micro_size=7", "batch.global_size=64 is no multiple of batch.micro_size=7"),
    ],
)
def test_a_wrong_trainer_field_is_refused_before_anything_is_read(typed, sentence, tmp_path):
    from dpo_pipeline.training.arguments import training_arguments

    with pytest.raises(PipelineError, match=sentence):
        training_arguments(compose([typed]), "dpo", tmp_path)


@pytest.mark.parametrize("typed", ["betta=0.3", "+betta=0.3", "loss=sigmod", "experiment=nope", "beta=abc"])
def test_a_typo_is_answered_with_exit_1_no_traceback_and_no_torch(typed, tmp_path):
    code = (
        "import sys, runpy; sys.argv = ['dpo', sys.argv[1]]\n"
        "try: runpy.run_module('dpo_pipeline.dpo', run_name='__main__')\n"
        "finally: print('torch imported:', 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, typed], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch imported: False" in done.stdout
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_debug_takes_the_last_sft_checkpoint():
    """Of its few steps the first is at a rate of 0: were that the best, DPO would refuse it as the bare base."""
    assert compose(["debug=true"]).sft_best == "last"
    assert compose([]).sft_best == "perplexity"
