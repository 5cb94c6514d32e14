"""Every option composes and binds; a wrong key or value is one sentence, and costs no torch."""

import dataclasses
import inspect
import subprocess
import sys

import pytest

from dpo_pipeline.config import CONF, ROW_KEYS, check_arguments, compose, instantiate_node
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
    from dpo_pipeline.training.arguments import training_arguments, weights_dtype

    run = compose([f"model={model}", *NEEDED.get(model, [])])
    for stage in ("sft", "dpo"):
        args = training_arguments(run, stage, tmp_path)
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        assert size == run.batch.global_size
        assert args.learning_rate == getattr(run.model.learning_rate, stage)
    assert args.beta == 0.1
    assert str(weights_dtype(run)) == "torch.float32"


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
    assert run.variant.startswith("sigmoid+sft-beta0.1-seed0-dpo.loss_weights__1.0_0.1_-dpo.max_steps_20")


def test_the_micro_batch_divides_the_global_one():
    assert compose([]).batch.micro_size == 64
    assert compose(["batch.global_size=96"]).batch.micro_size == 48
    assert compose(["model=gpt2", "batch.global_size=20"]).batch.micro_size == 5


def test_learning_rate_follows_stage_and_adapter():
    full, lora = compose([]), compose(["lora=r16"])
    rates = dataclasses.asdict(full.model.learning_rate)
    found = (*(r.sft["learning_rate"] for r in (full, lora)), *(r.dpo["learning_rate"] for r in (full, lora)))
    assert found == (rates["sft"], rates["sft_lora"], rates["dpo"], rates["dpo_lora"])
    assert compose(["dpo.learning_rate=5e-7"]).dpo["learning_rate"] == 5e-7


@pytest.mark.parametrize(
    ("typed", "name", "variant"),
    [
        ([], "tiny-reviews", "sigmoid-beta0.1-seed0"),
        (["model=gpt2", "dataset=hh_rlhf", "lora=r16", "beta=0.3"], "gpt2-hh_rlhf", "sigmoid-beta0.3-r16-seed0"),
        (["model=path", "model.path=a/b-1B", "policy=base"], "b-1B-reviews", "sigmoid-beta0.1-base-seed0"),
        (["dataset=json", "dataset.path=x/my pairs.jsonl"], "tiny-my_pairs", "sigmoid-beta0.1-seed0"),
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
    check_arguments("builder", {**run.model.builder, "folder": "x"})
    with pytest.raises(PipelineError, match="builder.layer is no option of .*did you mean layers"):
        check_arguments("builder", {**run.model.builder, "layer": 3})


REFUSED = [
    (["betta=0.3"], "betta is no key of the config: did you mean beta"),
    (["+betta=0.3"], "betta is no key of the config: did you mean beta"),
    (["+model.pth=x"], "model.pth is no key of the config"),
    (["learning_rate=1e-5"], "dpo.learning_rate"),
    (["loss=sigmod"], "loss=sigmod is no option: did you mean sigmoid"),
    (["experiment=reviews_lor"], "experiment=reviews_lor is no option: did you mean reviews_lora"),
    (["judge=[truht]"], "judge=truht is no option: did you mean truth"),
    (["lora=r17"], "did you mean r16"),
    (["beta=abc"], "beta: value 'abc' of type 'str' could not be converted to Float"),
    (["beta=0"], "beta=0.0: it must be larger than 0"),
    (["beta=-1"], "beta=-1.0: it must be larger than 0"),
    (["batch.global_size=0"], "batch.global_size=0: it must be larger than 0"),
    (["model=path"], "model.path has no value: type model.path="),
    (["dataset=json"], "dataset.path has no value: type dataset.path="),
    (
        ["+dataset.pth=x", "dataset=json", "dataset.path=x"],
        "dataset.pth is no option of dpo_pipeline.data.json_file.load: did you mean path",
    ),
    (["sft_best=first"], "sft_best=first is none of its values: perplexity, last"),
    (["sft_target=rejected"], "sft_target=rejected is none of its values: null, chosen, demonstration"),
    (["lora.r=3"], "a key was set under a group that is none"),
    (["variant=a=b"], "variant=a=b cannot be read"),
    (["beta"], "beta cannot be read"),
    (["report_to=wanb"], "report_to=wanb is none of its values: none, wandb, tensorboard, trackio, mlflow: did you"),
    (["++dpo.loss_type=3"], "dpo.loss_type=3 names no loss"),
    (["~dpo.loss_type"], "dpo.loss_type is missing"),
    (["lora=null"], "a config group cannot be null"),
    (["dataset.rows=abc"], "dataset.rows=abc is no number"),
    (["dataset=hh_rlhf", "judge=[truth]"], "judge=truth knows the truth of dataset=reviews alone"),
    (
        ["policy=sfft"],
        "policy=sfft is neither sft, base nor a folder with config.json or adapter_config.json: did you",
    ),
    (["quantization=nf4"], "quantized weights cannot be trained, only an adapter on them: add lora=r16"),
    (["model.dtype=float16"], "updates round to nothing: type model.dtype=auto"),
    (["reference=adapter"], "reference=adapter needs an adapter: set lora=r16"),
    (["reference=adapter", "lora=r8", "reference.path=x"], "reference.path names another model, which no adapter is"),
    (["loss=robust", "dpo.label_smoothing=0.5"], "dpo.label_smoothing=0.5 is the share of labels believed wrong"),
    (["loss=cdpo", "dpo.label_smoothing=-0.1"], "dpo.label_smoothing=-0.1 is the share of labels believed wrong"),
    (["++dpo.label_smoothing=0.1"], "dpo.label_smoothing=0.1 has no effect in TRL with sigmoid: choose loss=cdpo"),
]


@pytest.mark.parametrize(("typed", "sentence"), REFUSED, ids=[" ".join(typed) for typed, _ in REFUSED])
def test_what_cannot_be_is_refused_in_one_sentence(typed, sentence):
    with pytest.raises(PipelineError) as error:
        compose(typed)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("++dpo.lerning_rate=1", "dpo.lerning_rate is no field of trl.DPOConfig: did you mean learning_rate"),
        ("++dpo.beta=0.3", "dpo.beta is decided by beta="),
        ("++dpo.per_device_train_batch_size=3", "dpo.per_device_train_batch_size is decided by batch.micro_size="),
        ("++dpo.save_steps=oft", "dpo.save_steps=oft is no number"),
        ("dpo.learning_rate=abc", "dpo.learning_rate=abc is no number"),
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
    """Of its two steps the first is at a rate of 0: were that the best, DPO would refuse it as the bare base."""
    assert compose(["debug=true"]).sft_best == "last"
    assert compose([]).sft_best == "perplexity"
