"""Evaluation of a whole name or one folder: what it writes, that it measures once, and that nothing is lost."""

import contextlib
import csv
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from dpo_pipeline import formatting, record
from dpo_pipeline.cli import main
from dpo_pipeline.dpo import run_dpo
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.evaluate import run_evaluate
from dpo_pipeline.evaluation import gate, judging, measure, policies, statistics
from dpo_pipeline.evaluation.eval_set import load_eval_sets
from dpo_pipeline.judges import build
from dpo_pipeline.judges import judge as judging_calls
from dpo_pipeline.judges.implicit_reward import implicit_reward
from dpo_pipeline.judges.judge import Judge
from dpo_pipeline.models import load_options
from dpo_pipeline.report import build as report
from dpo_pipeline.report import comparison
from tests.commands import run, run_two_ranks
from tests.helpers import prepare_run

STEPS = ("++dpo.max_steps=4", "dpo.learning_rate=1e-3")
JUDGES = "judge=[truth,length]"
WITH_REPORT = report.report_or_warn


@pytest.fixture(scope="module", autouse=True)
def no_report():
    """A report takes longer than all else of an evaluation: only a test that looks at one makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "report_or_warn", lambda *args, **options: None)
        yield


@pytest.fixture
def reports(monkeypatch):
    monkeypatch.setattr(report, "report_or_warn", WITH_REPORT)


@pytest.fixture(scope="module")
def typed(small, sft, tmp_path_factory):
    """The options of a name of its own: a base, a full and a LoRA SFT, and a DPO of each."""
    root = tmp_path_factory.mktemp("evaluated")
    for folder in ("base", "sft/full", "sft/r8"):  # other tests train further SFTs in this home
        unmeasured = shutil.ignore_patterns("records", "eval.json", "*.parquet")
        shutil.copytree(small().home / folder, root / "small" / folder, ignore=unmeasured)
    options = (f"root={root}", "evaluation.prompts=6", JUDGES)
    for lora in ("none", "r8"):
        run_dpo(small(*options, f"lora={lora}", f"variant={lora}", *STEPS))
    return options


@pytest.fixture(scope="module")
def evaluated(small, typed):
    return run_evaluate(small(*typed, "best_of.n=4", "variant=none"))


@pytest.fixture
def parts(monkeypatch):
    """The parts that are measured while a test runs, not found on disk: `none/completions`."""
    files, write = [], measure.write_table

    def write_and_count(table, file):
        files.append(f"{file.parent.parent.name}/{file.name.rsplit('-', 1)[0]}")
        write(table, file)

    monkeypatch.setattr(measure, "write_table", write_and_count)
    return files


def completions(folder, temperature=1.0, draw=0) -> pd.DataFrame:
    """The lines of a policy's completions of test prompts."""
    table = pd.read_parquet(folder / "completions.parquet")
    is_asked = (table["temperature"] == temperature) & (table["draw"] == draw) & (table["prompt_set"] == "test")
    return table[is_asked & ~table["policy"].str.startswith("best of")].set_index("row").sort_index()


def test_a_whole_name_is_measured_against_the_base_and_each_dpo_against_its_own(small, typed, evaluated):
    policies = evaluated["policies"]
    assert set(policies) == {"base", "sft/full", "sft/r8", "dpo/none", "dpo/r8"}
    home = small(*typed).home
    assert evaluated == record.read_json(home / "results.json")
    for name, result in policies.items():
        assert result == record.read_json((home / "base" if name == "base" else home / name) / "eval.json")
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
    samples = record.read_json(home / "generation_samples.json")
    assert len(samples) == 6
    assert set(samples[0]["answers"]) == set(policies)


def test_win_rates_are_those_of_the_scores_by_hand(small, typed, evaluated):
    home = small(*typed).home
    for dpo, sft in (("dpo/none", "sft/full"), ("dpo/r8", "sft/r8")):
        ours, theirs = completions(home / dpo), completions(home / sft)
        for judge in ("truth", "length"):
            both = list(zip(ours[f"score.{judge}"], theirs[f"score.{judge}"], strict=True))
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
        assert ours["score.length"].tolist() == (ours["tokens"] - ours["ended"]).tolist()


def test_the_noise_floor_of_a_judge_is_a_policy_against_a_second_draw_of_its_own(small, typed, evaluated):
    for name in ("dpo/none", "base"):
        folder = small(*typed).home / name
        first, second = completions(folder), completions(folder, draw=judging.SECOND_DRAW)
        assert first["text"].tolist() != second["text"].tolist()
        wins = sum((np.sign(first["score.truth"] - second["score.truth"]) + 1) / 2) / 6
        floor = evaluated["policies"][name]["own"]["noise_floor.truth"]
        assert floor == {"value": pytest.approx(wins), "low": None, "high": None, "n": 6}  # too few for an interval


def test_what_another_command_has_measured_stays_in_eval_json(small, typed, evaluated):
    run = small(*typed, "lora=none", "variant=none", *STEPS)
    results = run_dpo(run)  # already done: prints its own table
    own = record.read_json(run.dpo_folder / "eval.json")["own"]
    assert {"win_rate.truth.sft", "elo.truth"} <= set(own)
    assert results["policies"]["dpo/r8"]["against"] == evaluated["policies"]["dpo/r8"]["against"]
    rows = {frozenset((row["one"], row["other"])) for row in results["comparisons"]["truth"]}
    assert rows == {frozenset((row["one"], row["other"])) for row in evaluated["comparisons"]["truth"]}


def test_the_numbers_do_not_hang_on_the_batch_nor_on_the_processes(small, typed, evaluated, tmp_path):
    def numbers(home):
        return {
            f"{name} {block} {key}": estimate["value"]
            for name, result in record.read_json(home / "results.json")["policies"].items()
            for block, found in (("own", result["own"]), *result["against"].items())
            for key, estimate in found.items()
            if isinstance(estimate, dict) and "value" in estimate
        }

    home = small(*typed).home
    expected = numbers(home)
    for batch in (7, "two ranks"):  # the batch was 16
        copy = tmp_path / str(batch)
        ignored = shutil.ignore_patterns("records", "eval.json", "results.json", "*.parquet")
        shutil.copytree(home, copy / "small", ignore=ignored)
        # Adapters name the base that they lie on by its path, which is the first one's.
        options = [*typed[1:], f"root={copy}", "variant=none", "best_of.n=4"]
        if batch == "two ranks":
            given = [*small.typed, *options, "name=small", "batch.micro_size=4"]
            kept = [item for item in given if not item.startswith("evaluation.prompts=4")]
            assert run_two_ranks("dpo_pipeline.evaluate", *kept).returncode == 0
        else:
            run_evaluate(small(*options, "evaluation.batch_size=7"))
        found = numbers(copy / "small")
        assert len(found) > 120
        assert found == pytest.approx({key: expected[key] for key in found}, abs=2e-4, nan_ok=True)


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


def test_without_a_reference_it_is_what_a_folder_was_trained_from_and_another_version_measures_anew(
    small, typed, evaluated, parts, monkeypatch
):
    run = small(*typed)
    monkeypatch.setattr(measure, "measuring_versions", lambda: {"torch": "another"})
    results = run_evaluate(small(*typed, f"evaluation.policy={run.home}/dpo/none"))  # its run's folder will do
    assert Counter(part.split("/")[1] for part in parts) == {"logprobs": 7, "completions": 6}
    assert set(results["policies"]) == {"policy/none", "policy/full"}
    expected = evaluated["policies"]["dpo/none"]["against"]["reference"]["kl"]
    assert results["policies"]["policy/none"]["against"]["reference"]["kl"] == expected
    itself = f"{run.home}/dpo/none/final"
    with pytest.raises(PipelineError, match="would be measured against itself"):
        run_evaluate(small(*typed, f"evaluation.policy={itself}", f"evaluation.reference={run.home}/dpo/none"))
    with pytest.raises(PipelineError, match="type evaluation.policy=FOLDER"):
        small(*typed, f"evaluation.reference={itself}")


def test_a_dpo_of_an_sft_that_was_trained_anew_is_left_out(small, typed, evaluated, tmp_path, caplog):
    shutil.copytree(small(*typed).home, tmp_path / "small", ignore=shutil.ignore_patterns("evaluated"))
    file = tmp_path / "small" / "sft" / "full" / "manifest.json"
    manifest = record.read_json(file)
    record.write_json(file, {**manifest, "final": {**manifest["final"], "sha256": "another"}})
    (tmp_path / "small" / "sft" / "r8" / "final" / "adapter_model.safetensors").unlink()
    with caplog.at_level("WARNING"):
        found = policies.policies_of_name(small(*typed[1:], f"root={tmp_path}", "dataset.split_seed=3"))
    assert [policy.name for policy in found] == ["sft/full", "base"]
    assert "dpo/none started from another" in caplog.text
    assert "sft/r8 holds no weights in final/" in caplog.text


def test_a_dpo_of_other_data_is_told_of(small, typed, evaluated, caplog):
    with caplog.at_level("WARNING"):
        policies.policies_of_name(small(*typed, "dataset.split_seed=3"))
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
        policies.dpo_with_references(tmp_path / "dpo" / name, small(*typed), None, places) for name in ("one", "two")
    ]
    assert [line[0].reference for line in lines] == ["policy/full", "policy/full-2"]
    assert [Path(line[1].path).parts[-3] for line in lines] == ["one", "two"]


def test_the_data_s_own_completions_look_like_sampled_ones(small, typed, evaluated):
    run = small(*typed)
    eval_set, _ = load_eval_sets(run, prepare_run(run, "dpo", "test"))
    written = eval_set.prompt_set.data_completions
    assert all(completion.text.startswith(" ") and completion.ended for completion in written)
    assert [each.text.split() for each in written] == [eval_set.rows[i]["chosen"].split() for i in range(6)]


def test_an_sft_on_chosen_completions_is_named_preferred_ft(small, typed, evaluated, tmp_path):
    shutil.copytree(small(*typed).home / "sft", tmp_path / "small" / "sft")
    file = tmp_path / "small" / "sft" / "full" / "config.yaml"
    file.write_text(file.read_text().replace("sft_target: demonstration", "sft_target: chosen"))
    assert comparison.preferred_ft(tmp_path / "small") == ["sft/full"]


def test_best_of_n_picks_the_best_of_other_draws_and_grows_with_n(small, typed, evaluated):
    folder, best = small(*typed).home / "sft" / "full", evaluated["best_of"]
    draws = [completions(folder, draw=draw) for draw in range(5)]
    assert len({tuple(lines["text"]) for lines in draws}) == 5
    table = pd.read_parquet(folder / "completions.parquet")
    picks = table[table["policy"] == best["name"]].set_index("row")
    assert len(picks) == 6
    for row, pick in picks.iterrows():
        texts = {lines["text"][row]: lines["score.truth"][row] for lines in draws[1:]}
        assert pick["text"] == max(texts, key=texts.get)
    assert [best[key] for key in ("policy", "n", "judge", "name")] == ["sft/full", 4, "truth", "best of 4 of sft/full"]
    assert [point["n"] for point in best["points"]] == [1, 2, 4]
    assert best["points"][-1]["kl_bound"] == pytest.approx(math.log(4) - 3 / 4)
    values = [point["score.truth"]["value"] for point in best["points"]]
    assert values == sorted(values)
    assert best["own"]["score.truth"]["value"] == pytest.approx(values[-1])
    assert best["own"]["win_rate.truth.sft"]["value"] >= 0.5


def test_a_judge_that_fails_or_cannot_be_read_costs_no_other_result_and_no_report(
    small, typed, evaluated, monkeypatch, capsys, reports
):
    every = [2]  # of its completions get no score

    def score(items):
        return ((i, None if i % every[0] == 0 else 0.5) for i, _ in enumerate(items))

    truth = build.build_judges(small(*typed), None)["truth"]
    monkeypatch.setattr(build, "build_judges", lambda *args: {"mute": Judge(score), "truth": truth})
    asked = small(*typed, "evaluation.temperatures=[1]", "best_of.n=2", "best_of.judge=truth")
    best_of = run_evaluate(asked)["best_of"]
    assert [key for key in best_of["points"][0] if key.startswith("score")] == ["score.truth"]
    assert "results of mute are unreadable" in capsys.readouterr().out
    every[0] = 1
    files = {file: file.read_bytes() for file in (asked.home / "report").iterdir()}
    late = implicit_reward("/not/there", "/not/there", 0.1, load_options(asked))
    monkeypatch.setattr(build, "build_judges", lambda *args: {"mute": Judge(score), "late": late, "truth": truth})
    with pytest.raises(PipelineError) as told:
        run_evaluate(asked)
    reasons = r"judge mute: none of its \d+ results .*judge late: .*/not/there.*all other results are written"
    assert re.search(reasons, str(told.value))
    assert "\n" not in str(told.value)
    assert files == {file: file.read_bytes() for file in (asked.home / "report").iterdir()}
    results = record.read_json(asked.home / "results.json")
    assert "truth" in results["comparisons"]
    assert "late" not in results["comparisons"]
    assert results["best_of"]["points"] == best_of["points"]


def test_a_judge_that_chooses_is_asked_in_both_orders_and_a_paid_one_for_its_noise_floor_on_demand_alone(
    small, typed, evaluated, monkeypatch
):
    asked = []

    def choose(pairs):
        asked.extend((a.text, b.text) for a, b in pairs)
        return ((i, float(len(a.text) > len(b.text))) for i, (a, b) in enumerate(pairs))

    def rate(one, other):
        return sum((np.sign(len(a) - len(b)) + 1) / 2 for a, b in zip(one, other, strict=True)) / len(one)

    monkeypatch.setattr(build, "build_judges", lambda *args: {"chat": Judge(choose=choose, post_training_only=True)})
    once, home = (*typed, "evaluation.temperatures=[1]", "evaluation.all_pairs=true"), small(*typed).home
    results = run_evaluate(small(*once))
    own, count = results["policies"]["dpo/none"]["own"], len(asked)
    assert count > 100
    assert all((b, a) in asked for a, b in asked)
    texts = [completions(home / name)["text"] for name in ("dpo/none", "sft/full")]
    assert own["win_rate.chat.sft"]["value"] == pytest.approx(rate(*texts))
    assert len(results["comparisons"]["chat"]) == 10
    assert own["elo.chat"]["n"] == 6
    assert "noise_floor.chat" not in own
    own = run_evaluate(small(*once, "evaluation.noise_floor=all"))["policies"]["dpo/none"]["own"]
    lines = [completions(home / "dpo/none", draw=draw)["text"] for draw in (0, judging.SECOND_DRAW)]
    assert own["noise_floor.chat"]["value"] == pytest.approx(rate(*lines))
    assert {*zip(*lines, strict=True), *zip(*lines[::-1], strict=True)} <= {*asked[count:]}  # in both orders


def test_a_judge_of_openai_without_a_key_is_refused_before_anything_is_measured(small, typed, parts, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    asked = ("judge=[truth,openai]", "judge.openai.model=x", "evaluation.temperatures=[0.8]")
    with pytest.raises(PipelineError, match="set the environment variable OPENAI_API_KEY"):
        run_evaluate(small(*typed[:2], *asked))
    assert parts == []


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


def test_a_prompts_file_safety_and_bias(small, typed, evaluated, tmp_path, reports):
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
    assert not [key for key in results["safety"]["base"] if "truth" in key]  # of film reviews alone
    text = (small(*typed).home / "report" / "report.md").read_text()
    assert "## Prompts labelled safe and unsafe" in text
    assert "over-refusal" in text


def test_the_implicit_reward_of_the_dpo_named_is_a_judge(small, typed, evaluated):
    asked = ("evaluation.temperatures=[1]", "judge=[implicit_reward]", "variant=none", "beta=0.1")
    results = run_evaluate(small(*typed[:2], *asked))
    own = results["policies"]["dpo/none"]
    kl = own["against"]["reference"]["kl"]["value"]
    assert own["own"]["score.implicit_reward"]["value"] == pytest.approx(0.1 * kl, abs=1e-4)


def test_an_evaluation_that_was_stopped_goes_on_where_it_was(small, typed, evaluated, parts, monkeypatch):
    asked = ("evaluation.temperatures=[0.75]",)
    sample, calls = measure.sample, []

    def stop(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(measure, "sample", stop)
    with pytest.raises(KeyboardInterrupt):
        run_evaluate(small(*typed, *asked))
    assert len(parts) == 2
    run_evaluate(small(*typed, *asked))
    assert len(parts) == 5


def test_an_interruption_loses_at_most_one_part(tmp_path):
    calls, rows = [], [[i] for i in range(10)]

    def compute(part):
        calls.append(part)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [float(row[0]) for row in part]

    with pytest.raises(KeyboardInterrupt):
        measure.in_parts(tmp_path, "x", [1], rows, compute, 4)
    assert measure.in_parts(tmp_path, "x", [1], rows, compute, 4) == list(range(10))
    assert calls == [rows[:4], rows[4:8], rows[8:], rows[8:]]
    measure.in_parts(tmp_path, "x", [2], rows, compute, 4)
    assert len(calls) == 7


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
        own = record.read_json(disk / "small" / "dpo" / "none" / "eval.json")["own"]
        assert "win_rate.truth.sft.t0.33" in own
    finally:
        subprocess.run(["umount", disk], check=True)


def test_check_measures_nothing(small, typed, evaluated, parts):
    assert run_evaluate(small(*typed, "check=true", "evaluation.temperatures=[0.9]")) == {}
    assert parts == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["name=none-such"], "there is no finished run in .*none-such: run `make sft dpo`"),
        (["evaluation.policy=/not/there"], "folder /not/there does not exist"),
        (["best_of.n=4", "best_of.judge=lenght"], "best_of.judge=lenght: it takes a judge .*did you mean length"),
        (["best_of.n=4", "judge=[]"], "best_of.n=4, .*: it takes a judge of judge="),
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


def test_a_half_written_policy_is_one_sentence_and_what_was_done_stays(small, typed, evaluated, tmp_path, parts):
    copy = tmp_path / "small"
    shutil.copytree(small(*typed).home, copy, ignore=shutil.ignore_patterns("records"))
    weights = copy / "sft" / "full" / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PipelineError, match="no model could be loaded from .*sft/full/final"):
        run_evaluate(small(*typed[1:], f"root={tmp_path}"))
    assert "none/logprobs" in parts


def test_the_command_shows_at_most_forty_lines_and_writes_all_tables(small, typed, evaluated):
    given = [item for item in small.typed if not item.startswith("evaluation.prompts")]
    done = run("dpo_pipeline.evaluate", *given, *typed, "name=small", "variant=none", "best_of.n=4")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    printed = done.stdout[done.stdout.index("evaluating dpo/") :].splitlines()[1:]
    assert len(printed) <= 40
    assert any(re.match(r"dpo/\w+ is (better than|worse than|no different from) sft/", line) for line in printed)
    assert "All against the base model: 20 test pairs and 6 sampled completions of reviews" in done.stdout
    (head,) = (line for line in printed if "preference accuracy" in line)
    labels = [cell.strip() for cell in head.split("|")[2:-1]]
    assert labels[2:-1] == ["KL from samples, nats", "completion length, tokens", "stop rate"]
    assert labels[-1].startswith("wins over sft by ")
    assert Path(done.stdout.split("Report:  ")[1].split(",")[0]).is_file()
    text = (small(*typed).home / "report" / "report.md").read_text()
    titles = re.findall("^## (.*)$", text, flags=re.MULTILINE)
    assert titles[:2] == ["Verdict", "Comparison"]
    expected = ["Training curves: DPO", "Win rate against temperature", "All variants"]
    expected += [
        "Validation, by which beta is chosen",
        "Completions side by side",
        "Flipped pairs",
        "Any two policies",
    ]
    assert [title for title in titles if title in expected] == expected
    assert titles[-3:] == ["Data", "Warnings of the runs", "Cost, and how to repeat it"]
    assert "temperature 0" in text
    assert "| reference margin" in text
    assert "Preferred-FT" not in text  # its SFT learnt demonstrations


def test_verdicts_of_a_scoring_judge_are_not_asked_twice(small, typed, evaluated, monkeypatch):
    asked, results = [], judging_calls.cached_results

    def counted(judge, kind, items, *rest):
        asked.append(len(items))
        return results(judge, kind, items, *rest)

    monkeypatch.setattr(judging_calls, "cached_results", counted)
    run_evaluate(small(*typed, "variant=none"))
    assert len(asked) == 2  # one call for each judge, of all sides together


def test_the_gate_says_with_numbers_whether_a_policy_is_worse(small, typed, evaluated, caplog):
    """By hand: the paired test of the scores; the other policy may be named by its folder."""
    home = small(*typed).home
    test = statistics.paired_test(*(completions(home / n)["score.truth"].tolist() for n in ("dpo/none", "sft/full")))
    with caplog.at_level("INFO"):
        run_evaluate(small(*typed, "variant=none", f"gate.against={home}/sft/full", "gate.metric=score.truth"))
    (sentence,) = (message for message in caplog.messages if message.startswith("gate: "))
    assert sentence.startswith("gate: dpo/none is not worse than sft/full by score.truth: ")
    assert f"paired difference {formatting.format_estimate(test['difference'])} (n 6), p {test['p']:.2g}" in sentence


@pytest.mark.parametrize(
    ("typed_gate", "reason"),
    [
        (["gate.against=sft/fall"], "gate.against=sft/fall: type one of base, dpo/r8, .*did you mean sft/full"),
        (["gate.against=dpo/none"], "gate.against=dpo/none: type one of"),  # itself
        (["gate.against=sft/full", "gate.metric=acuracy"], "gate.metric=acuracy: type one of preference_accuracy"),
        (["gate.against=sft/full", "gate.metric=win_rate.truth.sft.t0.7"], "did you mean win_rate.truth.sft.t0"),
        (["gate.against=sft/r8", "gate.metric=win_rate.truth.chosen", "judge=[length]"], "win_rate.length.chosen"),
        (["gate.against=sft/full", "variant=other"], "gate: dpo/other is no finished run: type the arguments"),
    ],
)
def test_a_gate_that_cannot_be_is_refused_before_anything_is_measured(
    typed_gate, reason, small, typed, evaluated, parts
):
    judges = [typed[2]] if not any(item.startswith("judge") for item in typed_gate) else []
    variant = [] if any(item.startswith("variant") for item in typed_gate) else ["variant=none"]
    with pytest.raises(PipelineError, match=reason):
        run_evaluate(small(*typed[:2], *judges, *variant, *typed_gate, "evaluation.prompts=5"))
    assert parts == []


def gated(first, second, metric="score.truth", verdicts=(), sft=None):
    """What the gate says of two policies with these scores of the same prompts, or verdicts."""
    names = ("dpo/new", "dpo/old")
    lines = [
        {
            "policy": name,
            "row": row,
            "score.truth": value,
            "ended": value > 0,
            "prompt_set": "test",
            "temperature": 1.0,
            "draw": 0,
        }
        for name, values in zip(names, (first, second), strict=True)
        for row, value in enumerate(values)
    ]
    eval_set = SimpleNamespace(prompt_set=SimpleNamespace(name="test"))
    table = pd.DataFrame(verdicts, columns="policy judge label temperature row verdict distinct".split())
    comparison = measure.Comparison(eval_set, [], "base", [], completions=pd.DataFrame(lines), verdicts=table)
    new, old = (policies.Policy(name, "", None, sft=sft) for name in names)
    gate.check_gate(new, old, metric, comparison)


def test_the_gate_fails_where_the_paired_test_says_worse():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 5, 40)  # some prompts are harder: pairing removes it
    worse, equal = hard - 0.5 + rng.normal(0, 0.5, 40), hard + rng.normal(0, 0.5, 40)
    with pytest.raises(
        PipelineError,
        match=r"gate: dpo/new is worse than dpo/old by score.truth: .* difference -0.* \(n 40\), p 0.*below 0.05",
    ):
        gated(worse, hard)
    gated(hard, worse)
    gated(equal, hard)
    with pytest.raises(PipelineError, match="by stop_rate"):
        gated([-1.0] * 20 + [1.0] * 20, [1.0] * 40, "stop_rate")


def verdict_lines(policy, values, distinct=None):
    rows = range(len(values)) if distinct is None else distinct
    return [(policy, "truth", "sft", 0.0, i, value, rows[i]) for i, value in enumerate(values)]


def test_a_gate_on_win_rates_is_of_the_same_prompts_and_counts_a_comparison_once():
    key = ("win_rate.truth.sft.t0",)
    old, new = verdict_lines("dpo/old", [1.0] * 30), verdict_lines("dpo/new", [0.0] * 30)
    with pytest.raises(PipelineError, match=r"by win_rate.truth.sft.t0: 0.000 .* against 1.000 .*\(n 30\)"):
        gated([], [], *key, verdicts=[*old, *new])
    with pytest.raises(PipelineError, match=r"against 0.500 .*\(n 30\)"):  # the policy that it is to beat
        gated([], [], *key, verdicts=new, sft="dpo/old")
    # One text for all prompts is one comparison, which proves nothing.
    gated(
        [],
        [],
        *key,
        verdicts=[*verdict_lines("dpo/old", [1.0] * 30, [0] * 30), *verdict_lines("dpo/new", [0.0] * 30, [0] * 30)],
    )
    with pytest.raises(PipelineError, match="no row in common"):
        gated([], [], *key, verdicts=new)


# These change what the tests above read


def test_the_second_time_nothing_is_measured_and_another_temperature_only_samples(small, typed, evaluated, parts):
    run = small(*typed, "best_of.n=4", "variant=none")
    again = run_evaluate(run)
    assert parts == []
    for name, policy in evaluated["policies"].items():  # other tests may have asked other judges
        assert again["policies"][name] == policy | {"own": again["policies"][name]["own"] | policy["own"]}
    results = run_evaluate(small(*typed, "evaluation.temperatures=[0.5]"))
    assert parts == [f"{name}/completions" for name in ("none", "r8", "full", "r8", "base")]
    own = results["policies"]["dpo/none"]["own"]
    labels = {key for key in own if key.startswith("win_rate.truth.sft")}
    assert labels >= {f"win_rate.truth.sft{at}" for at in ("", ".t0", ".t0.5")}  # those of other settings stay
    assert results["best_of"] == evaluated["best_of"]


def test_other_judges_results_stay_and_those_of_another_version_go(small, typed, evaluated, monkeypatch):
    asked = small(*typed[:2], "evaluation.temperatures=[1]", "judge=[length]")
    both = (record.read_json(asked.home / "results.json"), results := run_evaluate(asked))
    before, own = (each["policies"]["dpo/none"]["own"] for each in both)
    assert [key for key in before if own[key] != before[key] and key != "elo.length"] == []  # rated in this company
    assert set(results["judges"]) >= {"truth", "length"}
    rows = [{(row["one"], row["other"]): row for row in each["comparisons"]["truth"]} for each in both]
    assert rows[0] == rows[1]
    assert "score.truth" in completions(asked.dpo_folder.parent / "none")
    shorter = Judge(lambda items: ((i, float(-len(each.ids))) for i, each in enumerate(items)), version="2")
    monkeypatch.setattr(build, "build_judges", lambda run, loading: {"length": shorter})
    own = run_evaluate(asked)["policies"]["dpo/none"]["own"]
    assert own["score.length"]["value"] < 0
    assert not [key for key in own if key.startswith("win_rate.length") and key.endswith(".t0")]
    assert "win_rate.truth.sft.t0" in own
