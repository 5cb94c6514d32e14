"""Evaluation of a whole name or one folder: what it writes, that it measures once, and that nothing is lost."""

import contextlib
import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dpo_pipeline import run_folder
from dpo_pipeline.cli import main
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.evaluate import run_evaluate
from dpo_pipeline.evaluation import measure, policies_to_compare
from dpo_pipeline.evaluation.evaluation_prompts import load_eval_sets
from dpo_pipeline.evaluation.judge_results import JudgeResults
from dpo_pipeline.evaluation.verdict_statistics import length_controlled
from dpo_pipeline.judges import build, verdicts
from dpo_pipeline.judges.judge import Judge
from tests.helpers import prepare_run
from tests.ranks import TWO, launched

STEPS = ("++dpo.max_steps=4", "dpo.learning_rate=1e-3")
JUDGES = "judge=[truth,length]"


@pytest.fixture(scope="module")
def typed(small, sft, tmp_path_factory):
    """The options of a name of its own: a base, a full and a LoRA SFT, and a DPO of each."""
    root = tmp_path_factory.mktemp("evaluated")
    for folder in ("base", "sft/full", "sft/r8"):  # other tests train further SFTs in this home
        unmeasured = shutil.ignore_patterns("records", "eval.json")
        shutil.copytree(small().home / folder, root / "small" / folder, ignore=unmeasured)
    options = (f"root={root}", "evaluation.prompts=6", JUDGES)
    for lora in ("none", "r8"):
        run_dpo(small(*options, f"lora={lora}", f"variant={lora}", *STEPS))
    return options


@pytest.fixture(scope="module")
def evaluated(small, typed):
    return run_evaluate(small(*typed, "best_of.n=4", "variant=none"))


@pytest.fixture
def made(monkeypatch):
    """The records that are made while a test runs, not found on disk."""
    files, write = [], measure.write_json

    def counted(file, content, **options):
        files.append(f"{file.parent.parent.name}/{file.name.rsplit('-', 1)[0]}")
        write(file, content, **options)

    monkeypatch.setattr(measure, "write_json", counted)
    return files


def test_a_whole_name_is_measured_against_the_base_and_each_dpo_against_its_own(small, typed, evaluated):
    policies = evaluated["policies"]
    assert set(policies) == {"base", "sft/full", "sft/r8", "dpo/none", "dpo/r8"}
    home = small(*typed).home
    assert evaluated == run_folder.read_json(home / "results.json")
    for name, result in policies.items():
        assert result == run_folder.read_json((home / "base" if name == "base" else home / name) / "eval.json")
        assert "kl" in result["against"]["base"]
        assert ("reference" in result["against"]) == name.startswith("dpo/")
    assert policies["base"]["against"]["base"]["kl"]["value"] == 0
    assert set(policies["dpo/r8"]["settings"]["weights"]) == {"base", "sft/r8", "dpo/r8"}
    own = policies["dpo/none"]["own"]
    for judge in ("truth", "length"):
        for key in (f"win_rate.{judge}.sft", f"win_rate.{judge}.chosen"):
            for at in ("", ".t0"):
                assert set(own[key + at]) == {"value", "low", "high", "n"}
                assert f"length_controlled_{key}{at}" not in own  # of six prompts it would say nothing
        assert own[f"elo.{judge}"]["n"] == 6
    assert "win_rate.truth.sft" not in policies["sft/full"]["own"]  # itself
    samples = run_folder.read_json(home / "generation_samples.json")
    assert len(samples) == 6
    assert set(samples[0]["answers"]) == set(policies)


def test_win_rates_are_those_of_the_scores_by_hand(small, typed, evaluated):
    home = small(*typed).home
    rows = {
        name: run_folder.read_json(home / name / "samples.json")
        for name in ("dpo/none", "dpo/r8", "sft/full", "sft/r8")
    }
    for dpo, sft in (("dpo/none", "sft/full"), ("dpo/r8", "sft/r8")):
        for judge in ("truth", "length"):
            both = [(a["scores"][judge], b["scores"][judge]) for a, b in zip(rows[dpo], rows[sft], strict=True)]
            wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in both) / len(both)
            own = evaluated["policies"][dpo]["own"]
            assert own[f"win_rate.{judge}.sft"]["value"] == pytest.approx(wins)
            assert own[f"score.{judge}"]["value"] == pytest.approx(sum(a for a, _ in both) / len(both))
            if dpo == "dpo/none":
                (row,) = (row for row in evaluated["comparisons"][judge] if {row["one"], row["other"]} == {dpo, sft})
                sign = 1 if row["one"] == dpo else -1
                difference = sum(a - b for a, b in both) / len(both)
                assert sign * row["difference"]["value"] == pytest.approx(difference)
                assert 0 < row["p"] <= row["p_adjusted"] <= 1
    first = rows["dpo/none"][0]
    assert first["scores"]["length"] == first["tokens"] - first["ended"]


def test_best_of_n_is_picked_by_the_first_judge_and_grows_with_n(evaluated):
    best = evaluated["best_of"]
    assert (best["policy"], best["n"], best["judge"], best["name"]) == (
        "sft/full",
        4,
        "truth",
        "best of 4 of sft/full",
    )
    assert [point["n"] for point in best["points"]] == [1, 2, 4]
    assert best["points"][-1]["kl_bound"] == pytest.approx(math.log(4) - 3 / 4)
    values = [point["score.truth"]["value"] for point in best["points"]]
    assert values == sorted(values)
    assert best["own"]["score.truth"]["value"] == pytest.approx(values[-1])
    assert best["own"]["win_rate.truth.sft"]["value"] >= 0.5


def test_the_second_time_nothing_is_measured_and_another_temperature_only_samples(small, typed, evaluated, made):
    run = small(*typed, "best_of.n=4", "variant=none")
    assert run_evaluate(run) == evaluated
    assert made == []
    run_evaluate(small(*typed, "evaluation.temperatures=[0.5]"))
    assert made == [f"{name}/completions-t0.5" for name in ("none", "r8", "full", "r8", "base")]
    own = run_folder.read_json(run.dpo_folder / "eval.json")["own"]
    assert {key for key in own if key.startswith("win_rate.truth.sft")} == {"win_rate.truth.sft.t0.5"}
    run_evaluate(run)


def test_what_another_command_has_measured_stays_in_eval_json(small, typed, evaluated):
    run = small(*typed, "lora=none", "variant=none", *STEPS)
    run_dpo(run)  # already done: prints its own table
    assert "win_rate.truth.sft" in run_folder.read_json(run.dpo_folder / "eval.json")["own"]
    assert "comparisons" in run_folder.read_json(run.home / "results.json")


def test_the_numbers_do_not_hang_on_the_batch_nor_on_the_processes(small, typed, evaluated, tmp_path):
    def numbers(home):
        return {
            f"{name} {block} {key}": estimate["value"]
            for name, result in run_folder.read_json(home / "results.json")["policies"].items()
            for block, found in (("own", result["own"]), *result["against"].items())
            for key, estimate in found.items()
            if isinstance(estimate, dict) and "value" in estimate
        }

    home = small(*typed).home
    expected = numbers(home)
    for batch in (1, 7, 32, "two ranks"):
        copy = tmp_path / str(batch)
        ignored = shutil.ignore_patterns("records", "eval.json", "results.json", "samples.json")
        shutil.copytree(home, copy / "small", ignore=ignored)
        # Adapters name the base that they lie on by its path, which is the first one's.
        options = [*typed[1:], f"root={copy}", "variant=none", "best_of.n=4"]
        if batch == "two ranks":
            given = [*small.typed, *options, "name=small", "batch.micro_size=4"]
            kept = [item for item in given if not item.startswith("evaluation.prompts=4")]
            assert launched(*TWO, "-m", "dpo_pipeline.evaluate", *kept).returncode == 0
        else:
            sizes = ("batch.global_size=32", f"batch.micro_size={batch}") if batch != 7 else (
                "batch.global_size=7", "batch.micro_size=7")  # fmt: skip
            run_evaluate(small(*options, *sizes))
        found = numbers(copy / "small")
        assert len(found) > 120
        assert found == pytest.approx({key: expected[key] for key in found}, abs=2e-4)


def test_one_folder_against_another_in_a_place_of_its_own(small, typed, evaluated):
    run = small(*typed)
    folders = [str(run.home / name / "final") for name in ("dpo/r8", "sft/full")]
    asked = (f"evaluation.policy={folders[0]}", f"evaluation.reference={folders[1]}")
    results = run_evaluate(small(*typed, *asked))
    assert set(results["policies"]) == {"policy/r8", "policy/full"}
    own = results["policies"]["policy/r8"]
    assert set(own["against"]) == {"reference"}
    assert own["own"]["score.truth"] == evaluated["policies"]["dpo/r8"]["own"]["score.truth"]
    assert own["own"]["win_rate.truth.reference"]["n"] == 6
    assert results["policies"]["policy/full"]["against"]["reference"]["kl"]["value"] == 0
    assert (run.home / "evaluated" / "policy-r8" / "eval.json").is_file()


def test_without_a_reference_a_folder_is_measured_against_what_it_was_trained_from(small, typed, evaluated, capsys):
    run = small(*typed)
    results = run_evaluate(small(*typed, f"evaluation.policy={run.home}/dpo/none"))  # its run's folder will do
    assert set(results["policies"]) == {"policy/none", "policy/full"}
    expected = evaluated["policies"]["dpo/none"]["against"]["reference"]["kl"]
    assert results["policies"]["policy/none"]["against"]["reference"]["kl"] == expected
    assert "score by truth" in capsys.readouterr().out
    itself = f"{run.home}/dpo/none/final"
    with pytest.raises(PipelineError, match="would be measured against itself"):
        run_evaluate(small(*typed, f"evaluation.policy={itself}", f"evaluation.reference={run.home}/dpo/none"))
    with pytest.raises(PipelineError, match="type evaluation.policy=FOLDER"):
        small(*typed, f"evaluation.reference={itself}")


def test_a_dpo_of_an_sft_that_was_trained_anew_is_left_out(small, typed, evaluated, tmp_path, caplog):
    shutil.copytree(small(*typed).home, tmp_path / "small", ignore=shutil.ignore_patterns("evaluated"))
    file = tmp_path / "small" / "sft" / "full" / "manifest.json"
    manifest = run_folder.read_json(file)
    run_folder.write_json(file, {**manifest, "final": {**manifest["final"], "sha256": "another"}})
    (tmp_path / "small" / "sft" / "r8" / "final" / "adapter_model.safetensors").unlink()
    with caplog.at_level("WARNING"):
        policies = policies_to_compare.policies_of_name(small(*typed[1:], f"root={tmp_path}", "dataset.split_seed=3"))
    assert [policy.name for policy in policies] == ["sft/full", "base"]
    assert "dpo/none started from another" in caplog.text
    assert "sft/r8 holds no weights in final/" in caplog.text


def test_a_dpo_of_other_data_is_told_of(small, typed, evaluated, caplog):
    with caplog.at_level("WARNING"):
        policies_to_compare.policies_of_name(small(*typed, "dataset.split_seed=3"))
    assert "dpo/none was trained with other data" in caplog.text
    assert "dataset.split_seed was 0, is 3 here" in caplog.text


def test_two_folders_of_one_name_stay_two(small, typed, evaluated, tmp_path):
    home, places = small(*typed).home, {}
    for name in ("one", "two"):
        shutil.copytree(home / "sft" / "full" / "final", tmp_path / name / "full" / "final")
        shutil.copytree(home / "dpo" / "none", tmp_path / "dpo" / name)
        file = tmp_path / "dpo" / name / "config.yaml"
        config = OmegaConf.load(file)
        config.policy = str(tmp_path / name / "full" / "final")
        OmegaConf.save(config, file)
    lines = [
        policies_to_compare.dpo_with_references(tmp_path / "dpo" / name, small(*typed), None, places)
        for name in ("one", "two")
    ]
    assert [line[0].reference for line in lines] == ["policy/full", "policy/full-2"]
    assert [Path(line[1].path).parts[-3] for line in lines] == ["one", "two"]


def test_the_data_s_own_completions_look_like_sampled_ones(small, typed, evaluated):
    run = small(*typed)
    eval_set, _ = load_eval_sets(run, prepare_run(run, "dpo", "test"))
    completions = eval_set.prompt_set.data_completions
    assert all(completion.text.startswith(" ") and completion.ended for completion in completions)
    assert [each.text.split() for each in completions] == [eval_set.rows[i]["chosen"].split() for i in range(6)]


def test_an_sft_on_chosen_completions_is_named_preferred_ft(small, typed, evaluated, tmp_path):
    shutil.copytree(small(*typed).home / "sft", tmp_path / "small" / "sft")
    file = tmp_path / "small" / "sft" / "full" / "config.yaml"
    file.write_text(file.read_text().replace("sft_target: demonstration", "sft_target: chosen"))
    policies = policies_to_compare.policies_of_name(small(*typed[1:], f"root={tmp_path}"))
    assert policies_to_compare.preferred_ft_names(policies) == ["sft/full"]


def test_best_of_n_draws_other_completions_than_the_policy_s_own(small, typed, evaluated):
    folder = small(*typed).home / "sft" / "full" / "records"
    (pool,) = (run_folder.read_json(file) for file in folder.glob("best_of-0-*.json"))
    own = [run_folder.read_json(file) for file in folder.glob("completions-*.json")]
    assert len(pool) == 24
    assert not any(pool[::4] == completions for completions in own)


def test_what_an_earlier_evaluation_said_of_another_judge_is_not_shown_again(small, typed, evaluated):
    asked = ("evaluation.temperatures=[1]", "judge=[length]")
    own = run_evaluate(small(*typed[:2], *asked))["policies"]["dpo/none"]["own"]
    assert "score.length" in own
    assert not [key for key in own if "truth" in key or key.endswith(".t0")]


def test_a_judge_that_cannot_be_read_is_told_of(small, typed, evaluated, monkeypatch, capsys):
    def mute(completions, every):
        return ((i, None if i % every == 0 else 0.5) for i, _ in enumerate(completions))

    real = build.build_judges
    monkeypatch.setattr(
        build,
        "build_judges",
        lambda run, loading: {
            "mute": Judge(lambda completions: mute(completions, EVERY[0])),
            "truth": real(run, loading)["truth"],
        },
    )
    asked = small(*typed, "evaluation.temperatures=[1]", "best_of.n=2", "best_of.judge=truth")
    run_evaluate(asked)
    assert "mute: " in capsys.readouterr().out
    EVERY[0] = 1
    with pytest.raises(PipelineError, match=r"judge mute: none of its \d+ results could be read"):
        run_evaluate(small(*typed, "evaluation.temperatures=[1]"))
    assert "truth" in run_folder.read_json(asked.home / "results.json")["comparisons"]
    EVERY[0] = 2


def test_two_policies_that_were_rated_but_never_compared_have_no_row():
    results = JudgeResults({"a": {}, "b": {}})
    scores = {"a": [3.0, 4.0], "b": [2.0, 5.0]}  # as people rate without saying which is better
    results.add_comparisons("human", {("a", "b"): [None, None]}, scores, "a")
    assert results.comparisons == {"human": []}


def test_unreadable_verdicts_leave_out_their_length_differences():
    results = JudgeResults({"a": {}})
    verdicts = [1.0, None, 0.0] * 10 + [None] * 5
    results.add_win_rate("a", "judge.sft", verdicts, list(range(35)))
    readable = [i for i in range(35) if verdicts[i] is not None]
    expected = length_controlled([verdicts[i] for i in readable], readable)
    assert results.own["a"]["length_controlled_win_rate.judge.sft"] == expected
    assert results.own["a"]["win_rate.judge.sft"]["n"] == 20
    results.add_win_rate("a", "judge.chosen", [None] * 3, [1, 2, 3])
    assert "win_rate.judge.chosen" not in results.own["a"]


def test_a_judge_that_scores_nothing_readable_has_no_score():
    results = JudgeResults()
    results.add_scores("a", "judge", [None, None])
    assert (results.own, results.scores) == ({}, {})


EVERY = [2]  # of the completions of a judge that is mute now and then


def test_a_policy_against_itself_is_even_in_everything(small, typed, evaluated, tmp_path):
    folder = small(*typed).home / "dpo" / "none" / "final"
    twin = tmp_path / "twin"
    shutil.copytree(folder, twin)
    results = run_evaluate(small(*typed, f"evaluation.policy={folder}", f"evaluation.reference={twin}"))
    against, own = (results["policies"]["policy/none"][key] for key in ("against", "own"))
    assert against["reference"]["preference_accuracy"]["value"] == 0.5
    assert against["reference"]["margin"]["value"] == against["reference"]["kl"]["value"] == 0
    assert own["win_rate.truth.reference"]["value"] == own["win_rate.length.reference.t0"]["value"] == 0.5
    (row,) = results["comparisons"]["truth"]
    assert (row["win_rate"]["value"], row["difference"]["value"], row["p"]) == (0.5, 0, 1)


def test_a_prompts_file_safety_and_bias(small, typed, evaluated, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"film : the {w} . review :"}) + "\n" for w in ("a", "b", "c")))
    xstest, groups = tmp_path / "x.csv", tmp_path / "g.csv"
    with xstest.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["id", "prompt", "label"])
        rows.writerows([i, f"film : number {i} . review :", "safe" if i % 2 else "unsafe"] for i in range(6))
    with groups.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["template", "group", "prompt"])
        rows.writerows([t, g, f"film : {t} {g} . review :"] for t in "xyz" for g in ("young", "old"))
    asked = [f"evaluation.{key}={path}" for key, path in
             (("prompts_file", prompts), ("safety_file", xstest), ("bias_file", groups))]  # fmt: skip
    results = run_evaluate(small(*typed, "variant=none", *asked))
    own = results["policies"]["dpo/none"]["own"]
    assert (own["refusal_unsafe"]["n"], own["over_refusal_safe"]["value"]) == (3, 0)
    assert "win_rate.truth.chosen" not in own
    assert own["score.truth"]["n"] == 3
    assert set(results["safety"]) == set(results["bias"]) == set(results["policies"])
    assert results["bias"]["base"]["completion_tokens"]["templates"] == 3
    printed = capsys.readouterr().out
    assert "Prompts labelled safe and unsafe" in printed
    assert "over-refusal" in printed


def test_a_judge_that_fails_costs_no_other_result(small, typed, evaluated, monkeypatch):
    asked = ("evaluation.temperatures=[1]", "judge=[truth,implicit_reward]", "judge.implicit_reward.policy=/not/there")
    with pytest.raises(PipelineError, match=r"judge implicit_reward: .*all other results are written") as told:
        run_evaluate(small(*typed[:2], *asked))
    assert "\n" not in str(told.value)
    results = run_folder.read_json(small(*typed).home / "results.json")
    assert "truth" in results["comparisons"]
    assert "implicit_reward" not in results["comparisons"]


def test_the_implicit_reward_of_the_dpo_named_is_a_judge(small, typed, evaluated):
    asked = ("evaluation.temperatures=[1]", "judge=[implicit_reward]", "variant=none", "beta=0.1")
    results = run_evaluate(small(*typed[:2], *asked))
    own = results["policies"]["dpo/none"]
    kl = own["against"]["reference"]["kl"]["value"]
    assert own["own"]["score.implicit_reward"]["value"] == pytest.approx(0.1 * kl, abs=1e-4)


def test_an_evaluation_that_was_stopped_goes_on_where_it_was(small, typed, evaluated, made, monkeypatch):
    asked = ("evaluation.temperatures=[0.75]",)
    answered, calls = measure.sample_completions, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answered(*args)

    monkeypatch.setattr(measure, "sample_completions", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_evaluate(small(*typed, *asked))
    assert len(made) == 2
    run_evaluate(small(*typed, *asked))
    assert len(made) == 5


def test_a_full_disk_is_one_sentence_and_what_was_measured_stays(small, typed, evaluated, tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: that needs root")
    try:
        shutil.copytree(small(*typed).home, disk / "small")
        given = [item for item in small.typed if not item.startswith("evaluation.prompts")]
        asked = [f"root={disk}", *typed[1:], "name=small", "evaluation.temperatures=[0.33]"]
        monkeypatch.setattr(sys, "argv", ["evaluate", *given, *asked])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        with contextlib.suppress(OSError):
            (disk / "filler").write_bytes(bytes(10**8))
        with pytest.raises(SystemExit, match="error: the disk is full"):
            main(run_evaluate)
        (disk / "filler").unlink()
        main(run_evaluate)
        own = run_folder.read_json(disk / "small" / "dpo" / "none" / "eval.json")["own"]
        assert "win_rate.truth.sft.t0.33" in own
    finally:
        subprocess.run(["umount", disk], check=True)


def test_check_measures_nothing(small, typed, evaluated, made):
    assert run_evaluate(small(*typed, "check=true", "evaluation.temperatures=[0.9]")) == {}
    assert made == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["name=none-such"], "there is no finished run in .*none-such: run `make sft dpo`"),
        (["evaluation.policy=/not/there"], "folder /not/there does not exist"),
        (["best_of.n=4", "best_of.judge=lenght"], "best_of.judge=lenght: it takes a judge .*did you mean length"),
        (["best_of.n=4", "judge=[]"], "best_of.n=4: it takes a judge of judge="),
        (["evaluation.prompts_file=/not/there.csv"], "/not/there.csv"),
        (["evaluation.max_new_tokens=10000"], "leaves no room for a prompt in the model's context"),
        (["evaluation.opponent=demonstration", "dataset.test_rows=1", "dataset=json", "dataset.path={pairs}"], "."),
    ],
)
def test_bad_input_is_one_sentence(given, sentence, small, typed, evaluated, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"film : {i} .", "chosen": " good .", "rejected": " bad ."} for i in range(40)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [item.format(pairs=pairs) if item.startswith("dataset.path") else item for item in given]
    judges = [] if any(item.startswith("judge") or "json" in item for item in given) else [typed[2]]
    rows = [item for item in small.typed if "json" not in " ".join(given) or not item.startswith("dataset.")]
    with pytest.raises(PipelineError, match=sentence) as told:
        run_evaluate(compose_with(rows, [*typed[:2], *judges, "name=small", *given]))
    assert "\n" not in str(told.value)


def compose_with(defaults, given):
    from dpo_pipeline.config import compose

    keys = {item.split("=")[0] for item in given}
    last = {item.split("=")[0]: item for item in given}
    return compose([*(item for item in defaults if item.split("=")[0] not in keys), *last.values()])


@pytest.mark.parametrize("value", ["best_of.n=0", "evaluation.temperatures=[-1]", "guard.kl_max=0"])
def test_numbers_that_cannot_be_are_refused_before_anything(value, small):
    with pytest.raises(PipelineError, match="greater than"):
        small(value)


def test_another_tokenizer_is_refused(small, typed, evaluated, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(small(*typed).home / "dpo" / "none" / "final", folder)
    file = folder / "tokenizer.json"
    text = json.loads(file.read_text())
    text["model"]["vocab"]["zebra"] = len(text["model"]["vocab"])
    file.write_text(json.dumps(text))
    with pytest.raises(PipelineError, match="has another vocabulary than that of the base"):
        run_evaluate(
            small(*typed, f"evaluation.policy={small(*typed).home}/dpo/none/final", f"evaluation.reference={folder}")
        )


def test_a_half_written_policy_is_one_sentence_and_what_was_done_stays(small, typed, evaluated, tmp_path, made):
    copy = tmp_path / "small"
    shutil.copytree(small(*typed).home, copy, ignore=shutil.ignore_patterns("records"))
    weights = copy / "sft" / "full" / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PipelineError, match="no model could be loaded from .*sft/full/final"):
        run_evaluate(small(*typed[1:], f"root={tmp_path}"))
    assert "none/pairs" in made


def test_the_command_itself(small, typed, evaluated):
    given = [item for item in small.typed if not item.startswith("evaluation.prompts")]
    call = [sys.executable, "-m", "dpo_pipeline.evaluate", *given, *typed, "name=small", "variant=none"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "All against the base model: 20 test pairs and 6 sampled completions of reviews" in done.stdout
    assert "| reference margin" in done.stdout
    assert "Preferred-FT" not in done.stdout  # its SFT learnt demonstrations
    assert "Traceback" not in done.stderr
    assert Path(done.stdout.split("Results: ")[1].split(",")[0]).is_file()


def test_verdicts_of_a_scoring_judge_are_not_asked_twice(small, typed, evaluated, monkeypatch):
    asked, results = [], verdicts.cached_results

    def counted(judge, kind, items, *rest):
        asked.append(len(items))
        return results(judge, kind, items, *rest)

    monkeypatch.setattr(verdicts, "cached_results", counted)
    run_evaluate(small(*typed, "variant=none"))
    assert len(asked) == 2  # one call for each judge, of all sides together
