"""Results of judges: each item is judged once and cached on disk; choices are judged in both orders."""

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
from dpo_pipeline.judges.judge import Completion, Judge, Results


def scores(judge: Judge, completions: list[Completion], cache: Path, label: str) -> list[float | None]:
    """The score of each completion; None where the judge gave none that can be read.

    Each score of a judge with a version is cached under `cache` as it arrives, and not asked for again. `label` names
    a progress bar. Raises PipelineError for a score that is NaN or inf.
    """

    def ask(items: list[tuple[Completion, ...]]) -> Results:
        return judge.score([completion for (completion,) in items])

    return cached_results(ask, [(each,) for each in completions], cache_file(judge, "scores", cache), label)


def choices(judge: Judge, pairs: list[tuple[Completion, Completion]], cache: Path, label: str) -> list[float | None]:
    """1 if the first completion of a pair is better, 0 if the second is, 0.5 for a tie; else as `scores`.

    Both orders are judged, against position bias (arXiv:2306.05685, section 3.4); if they disagree it is a tie. A text
    against itself is a tie without a question. A judge that cannot choose chooses by its scores.
    """
    verdicts: list[float | None] = [0.5] * len(pairs)
    different = [i for i, (a, b) in enumerate(pairs) if (a.text, a.ended) != (b.text, b.ended)]
    if judge.choose is None:
        results = scores(judge, [completion for i in different for completion in pairs[i]], cache, label)
    else:
        orders = [order for i in different for order in (pairs[i], pairs[i][::-1])]
        results = cached_results(judge.choose, orders, cache_file(judge, "choices", cache), label)
    for i, first, second in zip(different, results[::2], results[1::2], strict=True):
        if first is None or second is None:
            verdicts[i] = None
        elif judge.choose is None:
            verdicts[i] = 0.5 if first == second else float(first > second)
        else:
            verdicts[i] = first if first + second == 1 else 0.5
    return verdicts


def cached_results(
    ask: Callable[[list[Any]], Results], items: list[tuple[Completion, ...]], file: Path | None, label: str
) -> list[float | None]:
    """The result of each item, one completion or two; `ask` gets each item once, and only if `file` lacks it."""
    results = load_cache(file) if file else {}
    keys = [cache_key(item) for item in items]
    missing = {key: item for key, item in zip(keys, items, strict=True) if key not in results}
    missing_keys = list(missing)
    with tqdm(total=len(missing), desc=label, leave=False, disable=not missing) as bar:
        for index, result in ask(list(missing.values())) if missing else ():
            key = missing_keys[index]
            if result is not None and not math.isfinite(result):
                prompt = prompt_to_text(missing[key][0].prompt).strip()[:60]
                texts = " or ".join(repr(completion.text.strip()[:60]) for completion in missing[key])
                raise PipelineError(
                    f"{label}: the judge gives {result} for the prompt {prompt!r} and the completion {texts}: correct "
                    "that judge or leave it out of judge=; its results so far are kept"
                )
            results[key] = result
            if file:
                with file.open("a") as stream:
                    stream.write(json.dumps({"key": key, "result": result}) + "\n")
            bar.update()
    return [results[key] for key in keys]


def cache_key(item: tuple[Completion, ...]) -> str:
    """A hash of everything that a judge may see of an item."""
    content = [[completion.prompt, completion.text, completion.ended] for completion in item]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def cache_file(judge: Judge, kind: str, cache: Path) -> Path | None:
    """The file of a judge's results, with its version beside it; None if they are not cached."""
    if judge.version is None:
        return None
    folder = cache / hashlib.sha256(judge.version.encode()).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "version.txt").write_text(judge.version, encoding="utf-8")
    return folder / f"{kind}.jsonl"


def load_cache(file: Path) -> dict[str, float | None]:
    """The results in a file by key; a line that an interrupt cut short is skipped, and ended for the next one."""
    text = file.read_text(errors="replace") if file.exists() else ""
    if text and not text.endswith("\n"):
        with file.open("a") as stream:
            stream.write("\n")
    results = {}
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            results[row["key"]] = row["result"]
    return results
