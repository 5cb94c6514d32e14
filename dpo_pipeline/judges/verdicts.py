"""What judges say, each thing asked once and kept on disk: scores, and choices with both orders judged."""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dpo_pipeline.data.normalize import prompt_to_text
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.judges.judge import Completion, Judge


def scores(judge: Judge, completions: list[Completion], cache: Path, label: str) -> list[float | None]:
    """The score of each completion; None where the judge has given none that could be read.

    Of a judge with a version each is kept under `cache` as it comes, so that no later call asks it again. `label`
    names a progress bar. Raises PipelineError for a score that is no number.
    """
    return cached_results(judge.score, completions, cache_file(judge, "scores", cache), label)


def choices(judge: Judge, pairs: list[tuple[Completion, Completion]], cache: Path, label: str) -> list[float | None]:
    """1 where the first completion of a pair is better, 0 where the second is, 0.5 for a tie; the rest as in `scores`.

    Both orders are judged, against a liking for a place (arXiv:2306.05685, section 3.4): two that disagree are a tie.
    A text against itself is a tie unasked. A judge that cannot choose chooses by its scores.
    """
    differ = [(a.text, a.ended) != (b.text, b.ended) for a, b in pairs]
    asked = [pair for pair, other in zip(pairs, differ, strict=True) if other]
    if judge.choose is None:
        found = scores(judge, [completion for pair in asked for completion in pair], cache, label)
    else:
        orders = [order for a, b in asked for order in ((a, b), (b, a))]
        found = cached_results(judge.choose, orders, cache_file(judge, "choices", cache), label)
    verdicts: list[float | None] = []
    for first, second in zip(found[::2], found[1::2], strict=True):
        if first is None or second is None:
            verdicts.append(None)
        elif judge.choose is None:
            verdicts.append(0.5 if first == second else float(first > second))
        else:
            verdicts.append(first if first + second == 1 else 0.5)
    rest = iter(verdicts)
    return [next(rest) if other else 0.5 for other in differ]


def cache_file(judge: Judge, kind: str, cache: Path) -> Path | None:
    """The file of a judge's results; None for those that are had again for nothing."""
    if judge.version is None:
        return None
    folder = cache / hashlib.sha256(judge.version.encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "version.txt").write_text(judge.version, encoding="utf-8")
    return folder / f"{kind}.jsonl"


def cached_results(
    ask: Callable[[list[Any]], Any], items: list[Any], file: Path | None, label: str
) -> list[float | None]:
    """What `ask` gives for each item, a completion or two, each asked once and only where `file` has it not."""
    shown = [item if isinstance(item, tuple) else (item,) for item in items]
    seen = [
        json.dumps([[completion.prompt, completion.text, completion.ended] for completion in item]) for item in shown
    ]
    keys = [hashlib.sha256(each.encode()).hexdigest() for each in seen]
    had = load_cache(file) if file else {}
    missing = {key: item for key, item in zip(keys, items, strict=True) if key not in had}
    if not missing:
        return [had[key] for key in keys]
    names = list(missing)
    with tqdm(total=len(missing), desc=label, leave=False, disable=False) as bar:
        for number, result in ask(list(missing.values())):
            key = names[number]
            if result is not None and not math.isfinite(result):
                completions = shown[keys.index(key)]
                prompt = prompt_to_text(completions[0].prompt).strip()[:60]
                text = " or ".join(repr(completion.text.strip()[:60]) for completion in completions)
                raise PipelineError(
                    f"{label}: the judge gives {result}, which is no number, for the prompt {prompt!r} and the "
                    f"completion {text}: correct that judge or leave it out of judge=; what it gave before is kept"
                )
            had[key] = result
            if file:
                with file.open("a") as out:
                    out.write(json.dumps({"key": key, "result": result}) + "\n")
            bar.update()
    return [had[key] for key in keys]


def load_cache(file: Path) -> dict[str, float | None]:
    """What a file of results holds; a line that a kill has torn counts for nothing, and the next begins anew."""
    text = file.read_text(errors="replace") if file.exists() else ""
    if text and not text.endswith("\n"):
        with file.open("a") as out:
            out.write("\n")
    found = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            found[row["key"]] = row["result"]
    return found
