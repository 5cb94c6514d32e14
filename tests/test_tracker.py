"""What a DPO run is watched by: KL and reward of its completions, warnings of too much, and the best checkpoint."""

import copy
import math
import random
import re
import signal
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from dpo_pipeline import checkpoints, record, run_folder
from dpo_pipeline.config import compose
from dpo_pipeline.data.reviews import reward
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.judges import build
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.models import load_options, load_policy
from dpo_pipeline.sampling import sample, uniform_draws
from dpo_pipeline.training import kept_reference, reward_kl, trainer
from dpo_pipeline.training.arguments import BEST, training_arguments
from dpo_pipeline.training.reward_kl import RewardKLTracker
from tests.helpers import SMALL, train
from tests.ranks import FSDP2, two_ranks

SHORT = (
    "evaluation.prompts=13",
    "evaluation.tracker_prompts=6",
    "dpo.eval_steps=2",
    "dpo.learning_rate=3e-3",
    "++dpo.max_steps=4",
)
LOGGED = ("kl", "reward", "stop_rate", "completion_tokens")


@pytest.fixture(scope="module")
def track(small, sft):
    """Trains one DPO: `track("lora=r8")`; its run, points and Tracker."""
    given, begin = trainer.train, RewardKLTracker.on_train_begin

    def run(*typed: str, judges=None) -> SimpleNamespace:
        names = {item.split("=")[0] for item in typed}
        made = small(*typed, *(item for item in SHORT if item.split("=")[0] not in names))
        found = SimpleNamespace(run=made, folder=made.dpo_folder)

        def seen(dpo, folder, callbacks):
            found.tracker = next(each for each in callbacks if isinstance(each, RewardKLTracker))
            return given(dpo, folder, callbacks)

        with pytest.MonkeyPatch.context() as patch:

            def forbid_loading(self, *args, **options):  # an evaluation loads no weights
                patch.setattr(kept_reference, "load_policy", None)
                begin(self, *args, **options)

            patch.setattr(trainer, "train", seen)
            patch.setattr(RewardKLTracker, "on_train_begin", forbid_loading)
            if judges is not None:
                patch.setattr(build, "build_judges", lambda *args: judges)
            train(made, "dpo")
        found.points = record.read_json(made.dpo_folder / checkpoints.TRACKER_FILE)
        found.manifest = record.read_json(made.dpo_folder / "manifest.json")
        return found

    return run


@pytest.fixture(scope="module")
def full(track):
    """A run of every weight, whose reference is kept in host memory."""
    return track("variant=tracked-full")


def weights(folder):
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


def drawn(policy, reference, prompt, on):
    """A completion drawn token by token in float64, and log pi - log pi_ref of it."""
    ids, gap = list(prompt), 0.0
    for number in uniform_draws(on.seed, prompt, 0, on.max_new_tokens):
        with torch.no_grad():
            ours, theirs = (model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for model in (policy, reference))
        token = int((ours.exp().cumsum(0) < number).sum())
        gap += float(ours[token] - theirs[token])
        ids.append(token)
        if token in on.eos_ids:
            break
    return ids[len(prompt) :], gap


MODES = {
    "full cached": "lora=none",
    "full, another reference": "lora=none reference.path=BASE",
    "continued adapter cached": "lora=r8",
    "continued adapter": "lora=r8 reference=adapter",
    "new adapter cached": "lora=r8 sft_variant=full",
    "adapter, another reference": "lora=r8 reference=cached reference.path=BASE",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", MODES)
def test_each_reference_gives_the_kl_that_a_plain_loop_gives(how, track, full, sft):
    base = full.run.model.path
    typed = MODES[how].replace("BASE", base).split()
    found = full if how == "full cached" else track(*typed, f"variant=mode-{how.replace(' ', '-').replace(',', '')}")
    assert [point["step"] for point in found.points] == [0, 2, 4]
    on, last = found.tracker.eval_set, found.points[-1]
    start = base if "BASE" in MODES[how] else sft["r8" if "adapter" in how and "new" not in how else "none"] / "final"
    policy, reference = (load_policy(each, on.loading).double() for each in (found.folder / "final", start))
    assert len(on.prompt_set.ids) == len(set(map(tuple, on.prompt_set.ids))) == 6
    completions, gaps = zip(*(drawn(policy, reference, prompt, on) for prompt in on.prompt_set.ids), strict=True)
    assert last["kl"] == pytest.approx(sum(gaps) / 6, abs=1e-3)
    error = statistics.stdev(gaps) / math.sqrt(6)
    assert last["kl_high"] - last["kl"] == pytest.approx(2.570582 * error, abs=3e-3)  # t, 5 degrees of freedom
    texts = on.tokenizer.batch_decode(completions, skip_special_tokens=True)
    ended = [completion[-1] in on.eos_ids for completion in completions]
    assert last["reward"] == pytest.approx(sum(map(reward, texts, ended)) / 6)
    assert (last["stop_rate"], last["n"], last["beta"]) == (pytest.approx(sum(ended) / 6), 6, 0.1)
    assert last["completion_tokens"] == pytest.approx(sum(map(len, completions)) / 6)
    first = [found.points[0][key] for key in ("kl", "kl_low", "kl_high")]
    assert "BASE" in MODES[how] or first == [0.0] * 3
    assert bool(list(found.folder.rglob("ref"))) == ("reference=adapter" in MODES[how])
    if how in ("full cached", "continued adapter cached"):  # whose trained weights alone are kept
        copies, trained = found.tracker.reference.args[0], kept_reference.trained_weights(found.tracker.trainer.model)
        assert [(copy.shape, copy.dtype) for copy in copies] == [(weight.shape, weight.dtype) for weight in trained]
    assert last["kl"] != 0


@pytest.mark.slow
def test_policy_and_reference_are_multiplied_in_one_precision(track):
    found = track("precision=bf16", "variant=tracked-bf16")
    assert found.manifest["precision"] == "bf16"
    assert found.points[0]["kl"] == 0 != found.points[-1]["kl"]


def test_its_numbers_are_in_the_log_of_the_same_step(full):
    rows = [row for row in record.read_metrics(full.folder) if "eval_kl" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row, point in zip(rows, full.points, strict=True):
        assert {f"eval_{key}": point[key] for key in LOGGED}.items() <= row.items()
    assert len([row for row in record.read_metrics(full.folder) if "eval_loss" in row]) == 2


def noisy(completions):
    """A judge that draws from every global random state."""
    torch.manual_seed(random.randrange(9) + np.random.randint(9))
    yield from ((i, float(torch.rand(()))) for i in reversed(range(len(completions))))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lora=none", "lora=r8 dpo.activation_checkpointing=true"])
def test_the_weights_are_the_same_with_and_without_it(how, track, monkeypatch):
    states, tell = [], RewardKLTracker.measure_and_log

    def kept(self, step):
        states.append((random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()))
        found = tell(self, step)
        states.append((random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()))
        return found

    tail = how.replace(" ", "-").replace("=", "_")
    without = track(*how.split(), f"variant=without-{tail}", "evaluation.tracker_prompts=0")
    assert without.points is None
    assert not any("eval_kl" in row for row in record.read_metrics(without.folder))
    monkeypatch.setattr(RewardKLTracker, "measure_and_log", kept)
    found = track(*how.split(), f"variant=with-{tail}", judges={"noisy": Judge(noisy)})
    assert weights(found.folder / "final") == weights(without.folder / "final")
    assert states[::2] == states[1::2]
    assert len(states) == 6
    for name in ("generation_config.json", "config.json" if how == "lora=none" else "adapter_config.json"):
        assert record.read_json(found.folder / "final" / name) == record.read_json(without.folder / "final" / name)


def test_exchanging_weights_twice_changes_no_bit():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 3).requires_grad_(False)).bfloat16()
    copies = [torch.randn_like(weight) for weight in kept_reference.trained_weights(model)]
    policy, start = ([w.clone() for w in each] for each in (kept_reference.trained_weights(model), copies))
    with kept_reference.with_start_weights(copies, model):
        assert all(map(torch.equal, kept_reference.trained_weights(model), start))
    with pytest.raises(KeyError), kept_reference.with_start_weights(copies, model):
        raise KeyError
    assert all(map(torch.equal, kept_reference.trained_weights(model), policy))
    assert all(map(torch.equal, copies, start))
    assert len(copies) == 2


def test_the_first_judge_that_scores_and_is_not_late_gives_the_reward(full):
    def constant(value):
        return lambda completions: ((i, value) for i in range(len(completions)))

    judges = {
        "asks": Judge(constant(1.0), post_training_only=True),
        "chooses": Judge(choose=list),
        "a": Judge(constant(2.0)),
    }
    trainer, eval_set = full.tracker.trainer, full.tracker.eval_set
    scored = RewardKLTracker(trainer, full.run, full.tracker.record, eval_set, judges, "")
    assert scored.judge is judges["a"]
    assert scored.score(0, [[1]] * 6)["value"] == 2.0
    unscored = RewardKLTracker(trainer, full.run, full.tracker.record, eval_set, {"asks": judges["asks"]}, "")
    assert unscored.score(0, [[1]] * 6) is None


def down(completions):
    raise PipelineError("nobody completions at http://localhost:1")
    yield


FAULTS = {
    "none": (
        lambda completions: ((i, None if i == 2 else 1.0) for i in range(6)),
        "1 of 6 completions have no score",
    ),
    "NaN": (
        lambda completions: ((i, math.nan if i < 2 else 1.0) for i in range(6)),
        "2 of 6 completions have no score",
    ),
    "too few": (lambda completions: ((i, 1.0) for i in range(5)), "1 of 6 completions have no score"),
    "down": (down, "nobody completions at http://localhost:1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_judge_that_fails_is_told_once_and_its_reward_is_none(fault, full, caplog):
    score, told = FAULTS[fault]
    failing = copy.copy(full.tracker)
    failing.judge = Judge(score)
    assert [failing.score(step, [[1]] * 6) for step in (2, 4)] == [None, None]
    (record,) = caplog.records
    assert record.getMessage() == f"the judge failed at step 2, so the tracker has no reward: {told}"


@pytest.mark.slow
def test_a_run_whose_judge_is_down_goes_on_without_a_reward(track, full):
    found = track("variant=judge-down", "reference=frozen", "++dpo.eval_on_start=true", judges={"down": Judge(down)})
    assert run_folder.run_state(found.folder) == "done"
    assert [point["reward"] for point in found.points] == [None] * 3
    for key in ("kl", "stop_rate"):
        assert [point[key] for point in found.points] == pytest.approx([p[key] for p in full.points], abs=1e-4)
    assert not any("eval_reward" in row for row in record.read_metrics(found.folder))


@pytest.mark.slow
def test_an_interrupt_stops_the_sampling_at_the_next_batch_and_loses_no_point(track, full, monkeypatch, caplog):
    calls = []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) in (1, 3):  # at step 0, and after a resume at step 2
            signal.raise_signal(signal.SIGTERM)
        return sample(*args, **options)

    folder = full.folder.with_name("stopped-sampling")
    with monkeypatch.context() as patch:
        patch.setattr(reward_kl, "sample", interrupted)
        for checkpoint, points in ((None, None), (folder / "checkpoints" / "checkpoint-2", full.points[:1])):
            with pytest.raises(KeyboardInterrupt):
                track("variant=stopped-sampling")
            assert checkpoints.newest_checkpoint(folder) == checkpoint
            assert record.read_json(folder / checkpoints.TRACKER_FILE) == points
    assert caplog.text.count("SIGTERM: stops with a checkpoint after this step or evaluation") == 2
    assert track("variant=stopped-sampling").points == full.points
    assert [row["step"] for row in record.read_metrics(folder) if "eval_kl" in row] == [0, 2, 4]
    assert weights(folder / "final") == weights(full.folder / "final")


def test_sampling_stops_at_the_next_batch(full):
    asked, eval_set = iter((False, False, True)), full.tracker.eval_set
    model, prompts = load_policy(full.folder / "final", load_options(full.run)), eval_set.prompt_set.ids
    arguments = (model, prompts, eval_set.eos_ids, eval_set.tokenizer.pad_token_id, 5, 2, 0)
    completions, part = sample(*arguments), sample(*arguments, should_stop=lambda: next(asked))
    assert sum(map(bool, part)) == 4
    assert all(some in ([], whole) for some, whole in zip(part, completions, strict=True))


def test_what_lies_behind_the_checkpoint_is_cut_from_the_points(tmp_path):
    points = [{"step": step, "kl": 0.1 * step} for step in (0, 2, 4, 6)]
    record.write_json(tmp_path / checkpoints.TRACKER_FILE, points)
    record.write_json(tmp_path / "checkpoints" / "checkpoint-4" / "trainer_state.json", {})
    checkpoints.rollback_to_checkpoint(tmp_path)
    assert record.read_json(tmp_path / checkpoints.TRACKER_FILE) == points[:3]
    (tmp_path / "checkpoints" / "checkpoint-4" / "trainer_state.json").unlink()
    checkpoints.rollback_to_checkpoint(tmp_path)
    assert record.read_json(tmp_path / checkpoints.TRACKER_FILE) == []


PEAK = ("dpo.learning_rate=3e-2", "++dpo.max_steps=12", "evaluation.tracker_prompts=13")


@pytest.mark.slow
@pytest.mark.parametrize("budget", [10, 1000, 0.01])
def test_the_best_by_reward_is_the_largest_within_the_budget_else_the_nearest(budget, track, caplog):
    typed = (*PEAK, "dpo_best=reward", f"evaluation.kl_budget={budget}")
    with caplog.at_level("INFO", logger="dpo_pipeline"):
        found = track(*typed, f"variant=best-{budget}")
    points = found.points[1:]
    inside = [point for point in points if point["kl"] <= budget]
    best = max(inside, key=lambda p: p["reward"]) if inside else min(points, key=lambda p: p["kl"])
    assert found.manifest["final"]["step"] == best["step"] < 12
    checkpoint = found.folder / "checkpoints" / f"checkpoint-{best['step']}"
    assert weights(checkpoint) == weights(found.folder / "final")
    told = f"no checkpoint has a reward within evaluation.kl_budget={budget:g}: the least KL"
    assert (told in caplog.text) == (budget == 0.01)
    assert f"final/ is step {best['step']}: highest validation reward within kl, " in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "better"),
    [("dpo_best=kl lora=r8", min), ("dpo_best=eval_rewards/margins lora=r8 reference=adapter", max)],
)
def test_the_best_by_a_metric_is_its_checkpoint_and_the_log_has_it(typed, better, track):
    found = track(*typed.split(), f"variant=best-{len(typed)}")
    name = found.run.dpo_best.removeprefix("eval_")
    rows = [row for row in record.read_metrics(found.folder) if f"eval_{name}" in row and row["step"]]
    best = better(rows, key=lambda row: row[f"eval_{name}"])["step"]
    assert found.manifest["final"]["step"] == best
    assert weights(found.folder / "checkpoints" / f"checkpoint-{best}") == weights(found.folder / "final")


def test_a_reward_that_is_missing_is_never_the_best():
    inside, over, far, unknown = (
        {"kl": kl, "reward": r} for kl, r in ((1.0, -7.0), (11.0, 9.0), (12.0, 9.0), (2.0, None))
    )
    order = [reward_kl.reward_within_budget(point, 10.0) for point in (far, over, unknown, inside)]
    assert order == sorted(order)
    assert order[-1] == -7.0
    assert reward_kl.reward_within_budget({"kl": None, "reward": 9.0}, 10.0) == -math.inf


def test_each_number_that_may_be_chosen_by_is_one_that_a_run_has(full):
    assert {name for name, more in BEST.items() if not more} == {"loss", "kl"}
    rows = [row for row in record.read_metrics(full.folder) if row["step"] == 4]
    assert {f"eval_{name}" for name in BEST} <= {key for row in rows for key in row}


WRONG = {
    "dpo_best=lost": r"dpo_best=lost: must be one of last, reward, .*: did you mean loss or last\?",
    "dpo_best=rewards/rejected": "dpo_best=rewards/rejected: must be one of",
    "dpo_best=reward judge=[]": r"needs a judge that scores completions: add judge=\[length\]",
    "dpo_best=reward evaluation.tracker_prompts=0": "dpo_best=reward needs the tracker.*tracker_prompts=0.*: type 64",
    "dpo_best=kl evaluation.tracker_prompts=0": "dpo_best=kl needs the tracker",
    "guard.action=stop evaluation.tracker_prompts=0": "guard.action=stop needs the tracker",
    "dpo_best=loss dpo.save_steps=4": "each evaluation needs one: type dpo.save_steps=2 as dpo.eval_steps",
    "dpo_best=loss ++dpo.eval_on_start=true": "and no dpo.eval_on_start",
    "++dpo.load_best_model_at_end=true": "dpo.load_best_model_at_end is decided by dpo_best=",
    "++dpo.metric_for_best_model=loss": "dpo.metric_for_best_model is decided by dpo_best=",
}


@pytest.mark.parametrize("typed", WRONG)
def test_what_cannot_be_chosen_by_is_told_before_training(typed, small, tmp_path):
    with pytest.raises(PipelineError, match=WRONG[typed]):
        training_arguments(small(*SHORT, *typed.split()), "dpo", tmp_path)


def test_a_judge_that_comes_late_cannot_choose(full):
    run = copy.copy(full.run)
    run.dpo_best = "reward"
    post_training_only = {"openai": Judge(down, post_training_only=True), "human": Judge(choose=list)}
    with pytest.raises(
        PipelineError, match=r"none of judge=\[openai,human\] scores completions while a run trains: add one"
    ):
        RewardKLTracker(full.tracker.trainer, run, full.tracker.record, full.tracker.eval_set, post_training_only, "")


IDENTITY = {  # keys that a choice adds to those of a DPO that keeps its last checkpoint
    "dpo_best=reward": "evaluation.tracker_prompts evaluation.kl_budget evaluation.max_new_tokens dpo.eval_steps "
    "dpo.save_steps judge judge.truth._target_",
    "dpo_best=kl": "evaluation.tracker_prompts evaluation.max_new_tokens dpo.eval_steps dpo.save_steps",
    "dpo_best=loss": "dpo.eval_steps dpo.save_steps",
    "guard.action=stop": "evaluation.tracker_prompts evaluation.max_new_tokens dpo.eval_steps guard.action "
    "guard.kl_max",
}


@pytest.mark.parametrize("typed", IDENTITY)
def test_what_chooses_or_stops_is_of_the_identity(typed):
    plain, fields = (run_folder.identity(compose(overrides), "dpo") for overrides in ([], [typed]))
    assert set(fields) - set(plain) == set(IDENTITY[typed].split())
    more = run_folder.identity(compose([typed, "judge=[truth,length]"]), "dpo")
    assert (more != fields) == (typed == "dpo_best=reward")


def test_a_typed_choice_gives_the_folder_a_name_of_its_own():
    plain = compose([]).variant
    assert compose(["dpo_best=reward"]).variant == f"{plain}-dpo_best_reward"
    assert compose(["guard.action=stop"]).variant == f"{plain}-guard.action_stop"
    assert compose(["guard.action=off", "guard.kl_max=5", "evaluation.kl_budget=4"]).variant == plain


def at(step: int, kl: float | None = 1.0, stop_rate: float = 0.9, reward: float | None = 0.5) -> dict:
    """A point with intervals of 0.1 to either side."""
    found = {"step": step}
    for name, value in (("kl", kl), ("stop_rate", stop_rate), ("reward", reward)):
        bounds = (None, None) if value is None else (value - 0.1, value + 0.1)
        found |= {name: value, f"{name}_low": bounds[0], f"{name}_high": bounds[1]}
    return found


class Saved(list):
    """What the tracker saves in a run's manifest."""

    def save_manifest(self, **facts):
        self.append(facts)


def watching(run, record) -> RewardKLTracker:
    """A tracker without prompts of its own."""
    trainer, nothing = SimpleNamespace(), SimpleNamespace(prompt_set=SimpleNamespace(ids=[]), batch_size=1)
    return RewardKLTracker(trainer, run, record, nothing, {}, "")


def watched(caplog, points, typed="", losses=(0.6, 0.5, 0.4, 0.3), accuracy=(0.9,) * 7, chosen=(-50.0, 0.0)):
    """The warnings of a run with one evaluation for each point behind the first, and what it did to the run."""
    caplog.clear()
    saved = Saved()
    watch = watching(compose(["dpo.learning_rate=1e-4", *typed.split()]), saved)
    control, warnings = SimpleNamespace(should_training_stop=False, should_save=False), []
    watch.points.append(points[0])
    for point, loss, mean in zip(points[1:], losses, accuracy, strict=False):
        state = SimpleNamespace(global_step=point["step"], max_steps=100)
        watch.points.append(point)
        for value in (mean - 0.04, mean + 0.04):
            watch.on_log(None, state, control, logs={"rewards/accuracies": value, "eval_rewards/accuracies": 0.99})
        metrics = {"eval_loss": loss, "eval_logps/chosen": chosen[0], "eval_rewards/chosen": chosen[1]}
        watch.on_evaluate(None, state, control, metrics=metrics)
        warnings.append([record.getMessage() for record in caplog.records])
        caplog.clear()
    return warnings, control, saved


RISING = [at(0, 0.0), *(at(10 * i, kl) for i, kl in enumerate((5, 12.34, 13, 18.6, 25, 33, 38), 1))]
SCORES = [at(0, reward=0.0), at(10, reward=0.8), at(20, reward=0.61), at(30, reward=0.5)]
FEWER = "fewer completions come to an end: "
WARNINGS = [  # points, what else is measured, and a part of the warning at each evaluation, "" for none
    (
        [at(0, 0.0, reward=0.0), at(10, 4.0), at(20, 9.9, 0.75), at(30, 9.9, 0.75)],
        {"accuracy": (0.95,) * 3, "chosen": (-74.0, -2.4)},
        ["", "", ""],
    ),
    (
        RISING,
        {"losses": (0.5,) * 7},
        ["", r"KL 12.3 \[12.2, 12.4\] nats at step 20 is high \(above 10\).*dpo.max_steps=10.*beta above 0.1.*=0.0001",
         "", "KL 18.6 .*high .*max_steps=30", r"KL 25 .*too far \(above 20\).*max_steps=40", "", "KL 38 .*too far"],
    ),
    (RISING[:3], {"typed": "guard.kl_max=8 beta=0.3"}, [r"KL 5 .*high \(above 4\).*above 0.3", "KL 12.3 .*too far"]),
    (
        [at(0), at(10), at(20), at(30)],  # the mean since the last evaluation
        {"accuracy": (0.9, 0.957, 0.957)},
        ["", r"train accuracy is 0.957 by step 20 \(above 0.95\).*dpo.max_steps=10", ""],
    ),
    ([at(0), at(10)], {"chosen": (-75.5, -2.55)}, ["chosen completions falls from -50.0 .*to -75.5 nats at step 10"]),
    *(
        ([at(0, stop_rate=first), at(10, stop_rate=last)], {}, [warning])  # where the intervals are apart
        for first, last, warning in (
            *((0.9, 0.55, rf"{FEWER}0.9 \[0.8, 1\] at step 0, 0.55"), (0.9, 0.65, ""), (0.5, 0.24, FEWER)),
            *((0.4, 0.21, ""), (0.2, 0.05, "")),
        )
    ),
    (SCORES, {}, ["", "", "score fell from 0.8 .* 10 to 0.5 .* 30 .*loss fell from 0.600 to 0.400.*max_steps=20"]),
    (SCORES, {"losses": (0.6, 0.5, 0.7)}, ["", "", ""]),
    # No loss is known of step 0: that of the first evaluation is taken.
    ([at(0, reward=0.8), at(10, reward=0.3), at(20, reward=0.3)], {}, ["", "score fell from 0.8"]),
    ([at(0, reward=None), at(10, reward=None)], {}, [""]),
]  # fmt: skip


@pytest.mark.parametrize(("points", "measured", "parts"), WARNINGS)
def test_each_evaluation_warns_of_what_has_gone_too_far_or_got_much_worse(points, measured, parts, caplog):
    warnings, control, saved = watched(caplog, points, **measured)
    for sentences, part in zip(warnings, parts, strict=True):
        assert len(sentences) == bool(part), sentences
        assert re.search(part, " ".join(sentences)), sentences
    assert (control.should_training_stop, saved) == (False, [])


def test_off_is_silent_and_stop_stops_beyond_kl_max_alone(caplog):
    points = [at(0, 0.0), at(10, 15.0), at(20, 21.0)]
    told, control, _ = watched(caplog, points, "guard.action=off", accuracy=(0.99,) * 2)
    assert (told, control.should_training_stop) == ([[], []], False)
    _, control, saved = watched(caplog, points[:2], "guard.action=stop")
    assert (control.should_training_stop, saved) == (False, [])
    told, control, saved = watched(caplog, points, "guard.action=stop")
    assert (control.should_training_stop, control.should_save) == (True, True)
    assert saved == [{"stopped": {"step": 20, "kl": 21.0, "kl_max": 20.0}}]
    assert told[1][-1] == "stopped at step 20 of 100: guard.action=stop, and KL is 21"
    _, control, saved = watched(caplog, [at(0, 0.0), at(100, 21.0)], "guard.action=stop")
    assert (control.should_training_stop, saved) == (False, [])  # it has come to its end by itself
    unknown = [at(0, None), at(10, None)]
    assert watched(caplog, unknown, "guard.action=stop")[0] == [[]]
    single = {
        key: None if key.endswith(("_low", "_high")) and "stop" not in key else value
        for key, value in at(10, 30.0).items()
    }
    told, *_ = watched(caplog, [at(0, 0.0), single])
    assert told[0][0].startswith("KL 30 nats at step 10 is too far")


def test_without_a_tracker_the_metrics_alone_are_watched(caplog):
    watch = watching(compose([]), Saved())
    state = SimpleNamespace(global_step=10, max_steps=100)
    metrics = {"eval_loss": 0.5, "eval_logps/chosen": -90.0, "eval_rewards/chosen": -4.0}
    watch.on_evaluate(None, state, SimpleNamespace(), metrics=metrics)
    assert "log-prob of the chosen completions falls" in caplog.text


@pytest.mark.slow
def test_a_run_that_goes_too_far_stops_where_asked_and_is_done(track, caplog):
    found = track(*PEAK, "guard.action=stop", "guard.kl_max=8", "variant=stops")
    assert run_folder.run_state(found.folder) == "done"
    kls = {point["step"]: point["kl"] for point in found.points}
    assert [kl > 8 for kl in kls.values()] == [False] * (len(kls) - 1) + [True]
    last = list(kls)[-1]
    assert found.manifest["stopped"] == {"step": last, "kl": kls[last], "kl_max": 8.0}
    assert found.manifest["final"]["step"] == last < 12
    assert weights(found.folder / "checkpoints" / f"checkpoint-{last}") == weights(found.folder / "final")
    assert run_folder.decide(found.folder, run_folder.identity(found.run, "dpo"), False) == "done"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("ddp", "lora=r8"),
        ("fsdp2", "lora=none reference=frozen"),
    ],
)
def test_two_ranks_have_the_points_of_one(kind, how, small, full, track, tmp_path):
    tail = how.replace(" ", "-").replace("=", "_")
    one = full if "lora=none" in how else track(*how.split(), f"variant=one-{tail}")
    variables = FSDP2 if kind == "fsdp2" else {}
    typed = [f"root={small().root}", "name=small", f"variant={kind}-{tail}", *how.split(), *SHORT]
    names = {item.split("=")[0] for item in typed}
    call = [item for item in SMALL if item.split("=")[0] not in names] + typed
    done, _ = two_ranks(tmp_path, ("dpo", *call), COMPARES="no", **variables)
    assert done.returncode == 0
    folder = small().home / "dpo" / f"{kind}-{tail}"
    assert run_folder.run_state(folder) == "done"
    points = record.read_json(folder / checkpoints.TRACKER_FILE)
    assert [point["step"] for point in points] == [0, 2, 4]
    for point, other in zip(points, one.points, strict=True):
        assert point == pytest.approx(other, abs=1e-4)
    assert len([row for row in record.read_metrics(folder) if "eval_reward" in row]) == 3


def test_sharded_weights_with_a_cached_reference_have_no_kl(full, tmp_path, caplog):
    run, sharded, eval_set = copy.copy(full.run), copy.copy(full.tracker.trainer), full.tracker.eval_set
    sharded.is_fsdp_enabled = True
    run_record = SimpleNamespace(folder=tmp_path)
    blind = RewardKLTracker(sharded, run, run_record, eval_set, {}, "nowhere")
    (warning,) = caplog.messages
    assert "KL cannot be measured on sharded weights" in warning
    assert "type reference=frozen" in warning
    Accelerator(cpu=True)  # its global state is reset where any training arguments are made
    blind.trainer = full.tracker.trainer
    point = blind.save_point(4, blind.sample_and_compare(list(range(6))))
    assert [point[key] for key in ("kl", "kl_low", "kl_high", "reward")] == [None] * 4
    assert {key: point[key] for key in LOGGED[2:]} == {key: full.points[-1][key] for key in LOGGED[2:]}
    assert record.read_json(tmp_path / checkpoints.TRACKER_FILE) == [point]
    for key, value in (("dpo_best", "kl"), ("guard", SimpleNamespace(action="stop", kl_max=1.0))):
        needing = copy.copy(run)
        setattr(needing, key, value)
        with pytest.raises(PipelineError, match="dpo_best or guard.action=stop needs it: type reference=frozen"):
            RewardKLTracker(sharded, needing, run_record, eval_set, {}, "nowhere")
