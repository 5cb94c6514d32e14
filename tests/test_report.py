"""The report shows what the run folders hold, each text as text, and a failure costs no earlier report."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from dpo_pipeline import record
from dpo_pipeline.cli import main
from dpo_pipeline.config import compose
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.record import read_json, write_json
from dpo_pipeline.report import betas, build, curves, details, figures, frontier, page, runs
from dpo_pipeline.report.__main__ import run_report
from dpo_pipeline.report.page import Panel, Section, format_cell

SCRIPT = '<script>document.title="run"</script>'
NASTY = f"{SCRIPT} \x1b[31mred\x07 \u202eback <img src=x onerror=alert(2)> | [a](javascript:b) `&amp;`"
STEPS = range(0, 101, 10)


def estimate(value: float, half: float = 0.05, n: int = 100) -> dict:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def lay_policy(home: Path, name: str, kl: float, reward: float, judge: str, reference: str | None = None) -> dict:
    """The eval.json of a policy, as evaluate writes it."""
    block = {"preference_accuracy": estimate(0.9), "margin_nats": estimate(2 * kl), "margin": estimate(0.2 * kl)}
    quarter = {"from": 1.0, "to": 2.0, "accuracy": estimate(0.9), "predicted": estimate(0.8)}
    block |= {"kl": estimate(kl, 0.2), "accuracy_by_source": {NASTY: estimate(0.9), "b": estimate(0.8)}}
    block |= {"accuracy_by_length_difference": [quarter], "accuracy_by_reference_margin": [quarter]}
    own = {"completion_tokens": estimate(20), "stop_rate": estimate(0.9), f"score.{judge}": estimate(reward)}
    for suffix, wins in (("", 0.8), (".t0", 0.6)):
        own[f"win_rate.{judge}.chosen{suffix}"] = estimate(wins)
    own[f"noise_floor.{judge}"] = estimate(0.5)
    settings = {"pairs": 100, "prompts": 50, "max_new_tokens": 8, "quantization": None, "prompts_file": None}
    settings |= {"data": "d", "beta": 0.1, "weights": {name: "x", "base": "b", "sft/full": "s"}}
    against = {"base": block, **({"reference": block} if reference else {})}
    result = {"policy": name, "reference": reference, "sft": "sft/full" if reference else None, "dataset": NASTY}
    result |= {"settings": settings, "against": against, "own": own}
    write_json(home / name / "eval.json", result)
    return result


def lay_run(home: Path, name: str, beta: float, metrics: list[dict]) -> Path:
    """What a finished run leaves behind, beside its policy."""
    folder = home / name
    identity = {"beta": beta, "seed": 0, "x": 1}
    manifest = {"identity": identity, "seconds": 61.4, "world_size": 1, "device": "cpu", "precision": "fp32"}
    manifest |= {"command": ["python", "-m", "dpo_pipeline.dpo", f"name={NASTY}"], "peak_memory_bytes": 2e9}
    counts = {"read": 9, "rows": 9, "kept": {"train": 5, "validation": 1, "test": 1}, "dropped": {NASTY: 2}}
    manifest["sources"] = {NASTY: counts | {"cut": {}, "unused_columns": [], "retokenized": 0}}
    write_json(folder / "manifest.json", manifest)
    write_json(folder / "status.json", {"state": "done", "step": 100, "error": None})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "train.log").write_text(f"said\nwarning: too far {NASTY}\nwarning: too far {NASTY}\n")
    config = {"model": {"builder": None, "path": NASTY}, "beta": beta, "sft_target": "chosen", "sft_dataset": None}
    config |= {"judge": {"truth": {}}, "dpo": {"loss_type": "sigmoid", "max_grad_norm": 1.0}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    return folder


def dpo_metrics(beta: float, final_loss: float = 0.5) -> list[dict]:
    """metrics.jsonl of a DPO whose margin grows to 4 nats, and whose validation loss falls to 0.5, then may rise."""
    lines = [{"step": 0, "eval_kl": 0.0}]
    for step in STEPS[1:]:
        share = step / 100
        numbers = {"rewards/chosen": -share * beta, "rewards/rejected": -5 * share * beta, "rewards/accuracies": 0.9}
        numbers |= {"loss": 0.69 - 0.2 * share, "rewards/margins": 4 * share * beta}
        loss = 0.69 - 0.19 * share if step < 100 else final_loss
        lines.append({"step": step, **numbers, "grad_norm": 0.5, "learning_rate": 1e-4, "num_tokens": 1000.0 * step})
        lines.append({"step": step, **{f"eval_{key}": value for key, value in numbers.items()}, "eval_loss": loss})
    return [*lines, {"step": 100, "train_runtime": 50.0}]


def tracked(kl: float, reward: float | None) -> list[dict]:
    """reward_kl_tracker.json of a run that goes straight to this KL and reward."""
    points = []
    for step in STEPS:
        values = {"kl": kl * step / 100, "reward": None if reward is None else reward * step / 100, "stop_rate": 0.9}
        point = {"step": step, "beta": 0.1, "completion_tokens": 20.0, "n": 64, **values}
        for key, value in values.items():
            point |= {f"{key}_low": value and value - 0.1, f"{key}_high": value and value + 0.1}
        points.append(point)
    return points


def lay_home(home: Path, judge: str = "truth", scored: bool = True) -> Path:
    """A base, an SFT, and two DPO of which the one of beta 0.1 has more reward for less KL."""
    policies = {name: lay_policy(home, name, kl, kl / 10, judge) for name, kl in (("base", 0.0), ("sft/full", 1.0))}
    loss = {"loss": 1.5, "grad_norm": 1.0, "learning_rate": 1e-3, "num_tokens": 500.0}
    lay_run(home, "sft/full", 0.1, [{"step": 1, **loss}, {"step": 2, **loss, "eval_perplexity": 3.0}])
    for beta, kl, reward in ((0.1, 3.0, 0.8), (0.05, 6.0, 0.7)):
        name = f"dpo/sigmoid-beta{beta:g}-seed0"
        folder = lay_run(home, name, beta, dpo_metrics(beta))
        policies[name] = lay_policy(home, name, kl, reward, judge, "sft/full")
        write_json(folder / "validation.json", policies[name])
        write_json(folder / "reward_kl_tracker.json", tracked(kl, reward if scored else None))
    best = {"name": "best of 4 of sft/full", "policy": "sft/full", "judge": judge, "n": 4, "own": {}}
    best["points"] = [{"n": n, "kl_bound": n / 10, f"score.{judge}": estimate(n / 8)} for n in (1, 2, 4)]
    best["own"] = policies["base"]["own"]
    example = {"prompt": NASTY, "texts": {"sft/full": NASTY, name: NASTY}, "before": -1.0, "after": 1.0}
    change = {"quantity": f"score.{judge}", "n": 9, "successes": {"count": 1, "examples": [example]}}
    change["failures"] = {"count": 0, "examples": []}
    row = {"one": "sft/full", "other": "dpo/sigmoid-beta0.1-seed0", "p": 0.001, "p_adjusted": 0.002}
    row |= {"difference": estimate(-0.5), "win_rate": estimate(0.2)}
    results = {"policies": policies, "comparisons": {judge: [row]}, "best_of": best}
    results["judges"] = {judge: {"version": None, "results": 9, "unreadable": 1}}
    results["notable"] = {"dpo/sigmoid-beta0.1-seed0": {"before": "sft/full", "x": change}}
    write_json(home / "results.json", results)
    samples = [{"prompt": f"{i} {NASTY}", "answers": dict.fromkeys(policies, NASTY * 9)} for i in range(12)]
    write_json(home / "generation_samples.json", samples)
    return home


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """A home whose every text is markup, its report, and what the terminal shows; `overlay` is drawn too."""
    home = lay_home(tmp_path_factory.mktemp("nasty") / "name", judge=NASTY.replace(".", ""))
    for file in home.glob("dpo/*/config.yaml"):
        config = OmegaConf.load(file)
        config.judge = {NASTY.replace(".", ""): {}}
        OmegaConf.save(config, file)
    write_json(home / "ppo.json", tracked(9.0, 0.5))
    text = build.write_report(home, 10.0, [f"PPO {NASTY.split(':')[0]}:{home / 'ppo.json'}"])
    return home, text


@pytest.fixture
def home(tmp_path):
    return lay_home(tmp_path / "name")


def load(home: Path, kl_budget: float = 10.0, subject: str | None = None, overlays: dict | None = None) -> runs.Runs:
    return runs.load_runs(home, kl_budget, subject, overlays or {}, {})


@pytest.fixture
def drawn(monkeypatch):
    """`drawn(module, call)`: the sets of axes, by title, that a call draws."""

    def record_axes(module, call):
        from matplotlib.figure import Figure

        axes, draw_png = {}, figures.draw_png

        def draw_and_keep(draw, title, *size):
            axes[title] = Figure().subplots()
            draw(axes[title])
            return draw_png(draw, title, *size)

        monkeypatch.setattr(module, "draw_png", draw_and_keep)
        return call(), axes

    return record_axes


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def test_html_shows_markup_as_text_and_fetches_nothing(nasty):
    html = (nasty[0] / "report" / "index.html").read_text()
    seen = Tags(html)
    assert {tag for tag, _ in seen.tags} == {
        *("html head meta title style body nav a section h1 h2 div ul li p code table tr th td".split()),
        *("figure figcaption img span small".split()),
    }
    assert not any(name.startswith("on") for _, attrs in seen.tags for name in attrs)
    assert all(attrs["href"].startswith("#s") for tag, attrs in seen.tags if tag == "a")
    images = [attrs["src"].partition("data:image/png;base64,")[2] for tag, attrs in seen.tags if tag == "img"]
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    png = (nasty[0] / "report" / "reward_kl_frontier.png").read_bytes()
    assert base64.b64encode(png).decode() in images  # the folder holds what the page shows
    assert not set("\x1b\x07\u202e") & set(html)
    shown = "".join(seen.text)
    assert shown.count(SCRIPT + " \\x1b[31mred\\x07 \\u202eback <img") > 50
    assert not re.search("https?:", html)


def test_markdown_has_no_tags_no_links_and_no_broken_tables(nasty):
    text = (nasty[0] / "report" / "report.md").read_text()
    assert not re.search(r"<\w", text)
    assert "](" not in re.sub(r"^!\[[^\n]*\]\(\w+\.png\)$", "", text, flags=re.MULTILINE)
    assert not set("\x1b\x07\u202e") & set(text)
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    figures_shown = set(re.findall(r"\((\w+\.png)\)", text))
    assert {"training_curves.png", "reward_kl_frontier.png", "betas.png", "temperatures.png"} <= figures_shown
    assert figures_shown == {file.name for file in (nasty[0] / "report").glob("*.png")}


def test_a_terminal_obeys_nothing_and_has_at_most_forty_lines(nasty):
    text = nasty[1]
    assert not set("\x1b\x07\u202e") & set(text)
    assert len(text.splitlines()) <= 40
    assert text.startswith("dpo/sigmoid-beta0.1-seed0 is better than sft/full by <script>")
    assert f"Report:  {nasty[0]}/report/index.html" in text
    assert (nasty[0] / "report" / "report.md").read_text().count("wins over itself (noise floor) by &lt;script") == 2
    assert text.count("\n> ") == 2


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium on this machine")
def test_a_browser_shows_every_figure_at_every_width_and_runs_nothing(nasty, tmp_path):
    """The page in frames of three widths; a page around them reads what the browser made of it."""
    file, widths = nasty[0] / "report" / "index.html", (1200, 800, 390)
    frames = "".join(f'<iframe src="file://{file}" style="width:{width}px;height:900px"></iframe>' for width in widths)
    script = """onload = () => document.body.textContent = JSON.stringify(
      [...document.querySelectorAll("iframe")].map(({ contentDocument: d }) => ({
      title: d.title, width: d.documentElement.scrollWidth, alerts: d.querySelectorAll("script, [onerror]").length,
      images: [...d.images].map((image) => image.naturalWidth) })))"""
    (tmp_path / "frames.html").write_text(f"<body>{frames}<script>{script}</script>")
    options = "--headless --no-sandbox --disable-gpu --disable-web-security --allow-file-access-from-files --dump-dom"
    options += f" --enable-logging=stderr --user-data-dir={tmp_path}/profile file://{tmp_path}/frames.html"
    done = subprocess.run(["chromium", *options.split()], capture_output=True, text=True, timeout=120)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    for seen, width in zip(json.loads(re.search(r"<body>(.*)</body>", done.stdout)[1]), widths, strict=True):
        assert seen["title"] == "name"
        assert seen["alerts"] == 0
        assert seen["width"] <= width
        assert len(seen["images"]) == file.read_text().count("<img ") > 14
        assert min(seen["images"]) > 300


@pytest.fixture
def verdict_alone(monkeypatch):
    """A report of the verdict: pictures take long."""
    monkeypatch.setattr(build, "SECTIONS", build.SECTIONS[:1])


def test_a_failure_leaves_the_report_as_it_was_and_is_a_warning_of_other_commands(
    home, monkeypatch, caplog, verdict_alone
):
    build.write_report(home, 10.0, [])
    files = {file: file.read_bytes() for file in (home / "report").iterdir()}

    def fail(runs):
        raise ValueError("a table\nis broken")

    monkeypatch.setattr(build, "SECTIONS", (*build.SECTIONS, fail))
    run = compose([f"root={home.parent}", "name=name"])
    with caplog.at_level("WARNING"):
        build.report_or_warn(run)
    assert "no new report" in caplog.text
    assert "(ValueError: a table is broken)" in caplog.text
    assert files == {file: file.read_bytes() for file in (home / "report").iterdir()}


def test_the_command_needs_a_run_of_this_version(home, monkeypatch, capsys, verdict_alone):
    typed = [f"root={home.parent}", "name=name"]
    assert run_report(compose(typed)) == home / "report" / "index.html"
    assert "dpo/sigmoid-beta0.1-seed0 is better than sft/full by truth: difference 0.500" in capsys.readouterr().out
    with pytest.raises(PipelineError, match="there is no run in .*none-such to report: .*run `make sft`"):
        run_report(compose([typed[0], "name=none-such"]))
    results = read_json(home / "results.json")
    write_json(home / "results.json", results | {"policies": {"base": {"own": {}}}})
    with pytest.raises(PipelineError, match="an older version: run `python -m dpo_pipeline.evaluate`"):
        run_report(compose(typed))
    (home / "results.json").write_text("{")
    monkeypatch.setattr("sys.argv", ["report", *typed])
    with pytest.raises(SystemExit, match="results.json is not what a run wrote"):
        main(run_report)


def test_after_sft_alone_there_are_its_curves(home):
    shutil.rmtree(home / "dpo")
    (home / "results.json").unlink()
    assert "Report:" in build.write_report(home, 10.0, [])
    text = (home / "report" / "report.md").read_text()
    titles = ["Training curves: SFT", "Data", "Warnings of the runs", "Cost, and how to repeat it"]
    assert re.findall("^## (.*)$", text, flags=re.MULTILINE) == titles


def test_the_frontier_has_each_path_the_finals_and_hollow_ones(home, drawn):
    overlays = {"PPO": tracked(9.0, 0.5)}
    (part,), axes = drawn(frontier, lambda: frontier.frontier(load(home, overlays=overlays)))
    axis = axes["Reward over KL"]
    assert part.figure == "reward_kl_frontier.png"
    lines = {line.get_label(): line for line in axis.lines if not line.get_label().startswith("_")}
    paths = [line.get_xydata().tolist() for line in axis.lines if len(line.get_xdata()) == len(STEPS)]
    for kl, reward in ((3.0, 0.8), (6.0, 0.7), (9.0, 0.5)):
        assert [[kl * step / 100, reward * step / 100] for step in STEPS] in paths
    finals = {bars.get_label(): bars.lines[0] for bars in axis.containers}
    assert finals["beta 0.1"].get_xydata().tolist() == [[3.0, 0.8]]
    assert finals["beta 0.1"].get_markerfacecolor() != "white"
    assert finals["beta 0.05"].get_markerfacecolor() == finals["PPO"].get_markerfacecolor() == "white"
    assert finals["PPO"].get_xydata().tolist() == [[9.0, 0.5]]
    assert finals["sft/full"].get_xydata().tolist() == [[0.0, 0.1]]
    assert lines["Best-of-N to 4"].get_xydata().tolist() == [[0.1, 0.125], [0.2, 0.25], [0.4, 0.5]]
    assert (axis.get_xlim()[0], axis.get_xlabel()) == (0, "KL from sft/full, nats")
    assert "Left out" not in part.text


def test_without_a_reward_the_frontier_is_one_of_the_margin_and_says_so(home, drawn):
    for file in home.glob("dpo/*/eval.json"):
        result = read_json(file)
        del result["own"]["score.truth"]
        write_json(file, result)
        write_json(file.with_name("validation.json"), result)
        write_json(file.with_name("reward_kl_tracker.json"), tracked(3.0, None))
    (part,), axes = drawn(frontier, lambda: frontier.frontier(load(home)))
    assert (part.title, part.figure) == ("Margin-KL frontier", "margin_kl_frontier.png")
    (axis,) = axes.values()
    paths = [line.get_xydata() for line in axis.lines if len(line.get_xdata()) == len(STEPS) - 1]
    assert len(paths) == 2
    assert np.allclose(paths[0], [[3.0 * step / 100, 4 * step / 100] for step in STEPS[1:]])
    assert axis.get_ylabel() == "margin_nats"


def test_a_path_of_another_judge_is_not_drawn_as_the_reward(home, drawn):
    for file in home.glob("dpo/*/config.yaml"):
        config = OmegaConf.load(file)
        config.judge = {"other": {}}
        OmegaConf.save(config, file)
        for name in ("eval.json", "validation.json"):
            result = read_json(file.with_name(name))
            if "beta0.1" in str(file):
                result["own"]["score.other"] = estimate(0.3)
            write_json(file.with_name(name), result)
    _, axes = drawn(frontier, lambda: frontier.frontier(load(home)))
    (axis,) = axes.values()
    assert axis.get_ylabel() == "score by truth"
    assert (
        sum(len(line.get_xdata()) == len(STEPS) for line in axis.lines) == 1
    )  # that of beta 0.05, which has no other


def test_one_run_has_a_frontier_and_one_of_another_reference_is_left_out(home):
    file = home / "dpo" / "sigmoid-beta0.05-seed0" / "eval.json"
    result = read_json(file)
    result["reference"], result["settings"]["weights"]["policy/x"] = "policy/x", "other"
    write_json(file, result)
    (part,) = frontier.frontier(load(home, subject="dpo/sigmoid-beta0.1-seed0"))
    assert "Left out: 1 with another reference" in part.text


@pytest.mark.parametrize("item", ["PPO", "PPO:/not/there.json", "PPO:{file}"])
def test_an_overlay_that_is_none_is_refused_and_one_changes_no_run(item, tmp_path):
    write_json(tmp_path / "x.json", [{"kl": 1.0}])
    item = item.format(file=tmp_path / "x.json")
    with pytest.raises(PipelineError, match=r"overlay=\[PPO.*give overlay=\[NAME:FILE\]"):
        frontier.read_overlays([item])
    assert compose([f"root={tmp_path}", f"overlay=[{item}]"]).variant == compose([f"root={tmp_path}"]).variant


def test_curves_are_those_of_the_metrics_on_axes_that_make_sense(home, drawn):
    (part, sft), axes = drawn(curves, lambda: curves.training_curves(load(home)))
    assert [panel.title for panel in part.panels] == list(axes)[:8] == list(curves.CURVES["dpo"])
    assert [panel.title for panel in sft.panels] == ["SFT loss", "perplexity of validation"]
    assert part.figure == "training_curves.png"
    change = {line.get_label(): line.get_ydata()[-1] for line in axes["log-prob change, nats"].lines[1:]}
    expected = {"chosen, train": -1, "chosen, validation": -1, "rejected, train": -5, "rejected, validation": -5}
    assert change == pytest.approx(expected)
    assert axes["preference accuracy"].get_ylim()[1] == 1
    assert axes["KL from samples, nats"].get_ylim()[0] == 0
    assert axes["KL from samples, nats"].lines[0].get_xydata()[-1].tolist() == [100, 3.0]
    assert axes["loss"].lines[0].get_ydata()[0] == pytest.approx(0.6931, abs=1e-4)
    assert all("Unusual" not in panel.caption for panel in part.panels)


def unusual(home: Path, kl_budget: float = 10.0, points=None, **changes) -> str:
    """What the captions say is unusual, where columns of the metrics, or the points of the tracker, are changed."""
    folder = home / "dpo" / "sigmoid-beta0.1-seed0"
    lines = dpo_metrics(0.1, changes.pop("final_loss", 0.5))
    lines[9] |= {"grad_norm": changes.pop("jump", 0.5)}
    for line in lines:
        line |= {key: value for key, value in changes.items() if key in line}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if points:
        write_json(folder / "reward_kl_tracker.json", points)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "draw_png", lambda *args: b"")
        part, _ = curves.training_curves(load(home, kl_budget, "dpo/sigmoid-beta0.1-seed0"))
    return " ".join(panel.caption for panel in part.panels if "Unusual" in panel.caption)


FALLING = tracked(3.0, 0.8)
FALLING[-1] = FALLING[-1] | {"reward": 0.3, "reward_low": 0.2, "reward_high": 0.4}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"final_loss": 0.6}, "validation rises from 0.519 at step 90"),
        ({"eval_rewards/accuracies": 0.7}, "0.90 on train, 0.70 on validation: over-fitting"),
        ({"rewards/accuracies": 0.99}, "it learns label noise"),
        ({"eval_rewards/chosen": -2.0}, "the chosen falls as much"),
        ({"kl_budget": 2.0}, "3.0, above evaluation.kl_budget=2"),
        ({"points": FALLING}, "falls from 0.72 at step 90"),
        ({"jump": 50.0}, "it jumps; above 1, so clipped, in 10% of the logged steps"),
    ],
)
def test_what_is_unusual_stands_beside_its_curve(changes, words, home):
    said = unusual(home, **changes)
    assert words in said
    assert said.count("Unusual") == 1


def test_win_rates_are_drawn_over_temperature_for_every_policy(home, drawn):
    _, axes = drawn(betas, lambda: betas.temperatures(load(home)))
    axis = axes["Wins over the chosen completion, by truth"]
    points = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axis.containers}
    names = ["base", "sft/full", "sigmoid-beta0.1-seed0", "sigmoid-beta0.05-seed0", "best of 4 of sft/full"]
    assert list(points) == names
    assert all(each == [[0.0, 0.6], [1.0, 0.8]] for each in points.values())
    assert axis.get_ylim() == (0, 1)


def test_a_terminal_names_the_jobs_of_its_command_before_other_gaps():
    problems = {"a": "failed at step 3: too high", "b": "not measured", "c": "failed: killed"}
    lines = [[name, "one", 0.1, 1, "base", problem, {}, {}] for name, problem in problems.items()]
    variants = pd.DataFrame(lines, columns=runs.COLUMNS)
    (part,) = betas.all_variants(runs.Runs(Path("none"), {}, {}, variants, "margin_nats", "", 10.0, {}))
    named = [line.split(": ", 1)[1] for line in part.short.splitlines() if line.startswith("Without numbers")]
    assert named == [f"{name}: {problems[name]}" for name in ("c", "a", "b")]


def test_each_quantity_is_drawn_over_beta(home, drawn):
    (part, validation), axes = drawn(betas, lambda: betas.all_variants(load(home)))
    (bars,) = axes["score by truth"].containers
    assert bars.lines[0].get_xydata().tolist() == [[0.05, 0.7], [0.1, 0.8]]
    assert axes["KL from samples, nats"].get_ylim()[0] == 0
    assert axes["preference accuracy"].get_ylim()[1] <= 1
    assert part.text.count("All against sft/full: 100 test pairs") == 1
    assert "Recommended: beta 0.1, reward 0.800 [0.750, 0.850]" in part.text
    assert len(validation.table) == 2


def test_the_terminal_form_is_about_the_policy_asked_for(home):
    text = build.write_report(home, 10.0, [], subject="dpo/sigmoid-beta0.05-seed0")
    assert text.startswith("dpo/sigmoid-beta0.05-seed0 prefers the chosen completion in 0.900")
    assert "Recommended: beta 0.1" in text
    assert "Preferred-FT, SFT on the chosen completions: sft/full" in (home / "report" / "report.md").read_text()


def test_warnings_are_marked_in_the_log_and_listed_once(home, tmp_path):
    with record.run_logging(tmp_path / "train.log"):
        record.log.warning("too %s", "far")
        record.log.info("fine")
    assert (tmp_path / "train.log").read_text() == "warning: too far\nfine\n"
    _, part, _ = details.run_facts(load(home))
    assert part.text.count("\n") == 2  # one for each of three runs
    assert part.text.startswith("- sft/full: too far")


def test_cost_is_that_of_the_manifests_and_a_resumed_run_has_no_speed(home):
    *_, part = details.run_facts(load(home))
    line = part.table.set_index("run").loc["dpo/sigmoid-beta0.1-seed0"]
    numbers = ["61 s", 100, "2.0 GB", "cpu, fp32, 1 process(es)"]
    assert line[["time", "steps", "peak memory", "on"]].tolist() == numbers
    assert (line["tokens trained on"], line["tokens a second"]) == ("100,000", "2,000")
    assert line["command"].startswith("python -m dpo_pipeline.dpo 'name=<script>")
    (home / "dpo" / "sigmoid-beta0.1-seed0" / "train.log").write_text("resuming from x\n")
    *_, part = details.run_facts(load(home))
    assert part.table.set_index("run")["tokens a second"]["dpo/sigmoid-beta0.1-seed0"] == ""


def test_completions_stand_side_by_side_and_long_ones_are_cut(home):
    (part,) = details.completions(load(home))
    assert list(part.table.columns) == ["prompt", "base", "sft/full", "dpo/sigmoid-beta0.1-seed0"]
    assert len(part.table) == 10
    assert len(part.table.iloc[0, 1]) == details.MAX_TEXT + 4
    assert len(part.short.splitlines()) == 9


def test_a_table_of_numbers_reads_alike_in_markdown_and_html():
    table = pd.DataFrame([{"a": estimate(0.5, 0.1), "b": 1234, "c": 0.000123, "d": float("nan"), "e": "x|y"}])
    parts = [Section("T `x`", "p\n\n- one\n- two", table)]
    assert "| 0.500 [0.400, 0.600] | 1,234 | 0.000123 |   | x\\|y |" in page.to_markdown("t", "l", parts)
    html = page.to_html("t", "l", parts)
    assert "0.500 <small>[0.400, 0.600]</small>" in html
    assert html.count("<li>") == 2
    assert format_cell({"value": 1.0, "low": None, "high": None, "n": 2}) == "1.000 (of 2)"


def test_panels_are_joined_two_beside_each_other():
    from matplotlib.image import imread

    png = figures.draw_png(lambda axis: axis.plot([0, 1], label="$x_1$ " + NASTY), "title")
    tile = imread(io.BytesIO(png)).shape
    grid = imread(io.BytesIO(figures.join_pngs([png] * 3))).shape
    assert grid[:2] == (2 * tile[0], 2 * tile[1])
    tall = figures.draw_png(lambda axis: [axis.plot([0, 1], label=f"{i} {'x' * 40}") for i in range(20)], "title")
    assert len(imread(io.BytesIO(figures.join_pngs([png, tall])))) == len(imread(io.BytesIO(tall))) > 2 * tile[0]
    assert figures.join_pngs([png]) == png
    assert figures.shorten("a" * 30 + "b" * 30) == "a" * 23 + "…" + "b" * 12
    assert Panel("t", png).caption == ""
