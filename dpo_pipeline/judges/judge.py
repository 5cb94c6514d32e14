"""What a judge is: it scores a completion, or chooses between two, in both orders; each item once, cached on disk."""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dpo_pipeline.data.normalize import prompt_to_text
from dpo_pipeline.errors import PipelineError

log = logging.getLogger(__name__)

# Index and result, in any order, each as soon as it is known; None where the judge gave none that can be read.
# A result is a score, or a choice: 1 if the first completion is better, 0.5 for a tie, 0 if the second is better.
Results = Iterator[tuple[int, float | None]]


@dataclass(frozen=True)
class Completion:
    """A completion to judge: the prompt as its row has it (text or messages), the text, and the ids of both."""

    prompt: Any
    text: str
    ended: bool  # its last id is an end token
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]  # with the end token


@dataclass(frozen=True)
class Judge:
    """Scores completions, chooses the better of two, or both; a judge that only scores prefers the higher score.

    `version` is the cache key (model, wording, settings); None disables the cache. `post_training_only`: it asks an
    external service, or needs a trained policy, so it is not used during training.
    """

    score: Callable[[list[Completion]], Results] | None = None
    choose: Callable[[list[tuple[Completion, Completion]]], Results] | None = None
    version: str | None = None
    post_training_only: bool = False


def score_each(score_completion: Callable[[Completion], float | None]) -> Callable[[list[Completion]], Results]:
    """A `Judge.score` that scores each completion by itself."""
    return lambda completions: ((index, score_completion(each)) for index, each in enumerate(completions))


def scores(judge: Judge, completions: list[Completion], cache: Path, label: str) -> list[float | None]:
    """The score of each completion; None where the judge gave none that can be read.

    Each score of a judge with a version is cached under `cache` as it arrives, and not asked for again; None is. Equal
    completions are asked once. `label` names a progress bar. Raises PipelineError for a score that is NaN or inf.
    """
    return cached_results(judge, "scores", [(each,) for each in completions], cache, label)


def choices(judge: Judge, pairs: list[tuple[Completion, Completion]], cache: Path, label: str) -> list[float | None]:
    """1 if the first completion of a pair is better, 0 if the second is, 0.5 for a tie; else as `scores`.

    Both orders are judged, against position bias (arXiv:2306.05685, section 3.4); if they disagree it is a tie. A text
    against itself is a tie without a question.
    """
    verdicts: list[float | None] = [0.5] * len(pairs)
    different = [i for i, (a, b) in enumerate(pairs) if (a.text, a.ended) != (b.text, b.ended)]
    orders = [order for i in different for order in (pairs[i], pairs[i][::-1])]
    results = cached_results(judge, "choices", orders, cache, label)
    for i, first, second in zip(different, results[::2], results[1::2], strict=True):
        is_read = first is not None and second is not None
        verdicts[i] = (first if first + second == 1 else 0.5) if is_read else None
    return verdicts


def cached_results(
    judge: Judge, kind: str, items: list[tuple[Completion, ...]], cache: Path, label: str
) -> list[float | None]:
    """The result of each item, one completion or two, from the cache or else from the judge."""
    file, results = open_cache(judge, kind, cache)
    keys = [sha256(json.dumps([[each.prompt, each.text, each.ended] for each in item])) for item in items]
    missing = {key: item for key, item in zip(keys, items, strict=True) if key not in results}
    missing_keys, missing_items = list(missing), list(missing.values())
    ask = judge.choose if kind == "choices" else lambda singles: judge.score([single for (single,) in singles])
    with tqdm(total=len(missing), desc=label, leave=False, disable=not missing) as bar:
        for index, result in ask(missing_items) if missing else ():
            if result is not None and not math.isfinite(result):
                texts = [prompt_to_text(missing_items[index][0].prompt), *(each.text for each in missing_items[index])]
                raise PipelineError(
                    f"{label}: the judge gives {result} for {', '.join(repr(text.strip()[:60]) for text in texts)}: "
                    "correct that judge or leave it out of judge=; its results so far are kept"
                )
            results[missing_keys[index]] = result
            if file and result is not None:
                with file.open("a", encoding="utf-8") as stream:  # a line that was cut short must not reach into it
                    stream.write("\n" + json.dumps({"key": missing_keys[index], "result": result}))
            bar.update()
    if file and (unread := sum(results[key] is None for key in missing)):
        log.warning("%s: %d of %d replies hold no verdict: the next run asks again", label, unread, len(missing))
    return [results[key] for key in keys]


def open_cache(judge: Judge, kind: str, cache: Path) -> tuple[Path | None, dict[str, float | None]]:
    """The file of a judge's results, with its version beside it, and the results by key; no file without a version."""
    if judge.version is None:
        return None, {}
    folder = cache / sha256(judge.version)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "version.txt").write_text(judge.version, encoding="utf-8")
    file, results = folder / f"{kind}.jsonl", {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if row["result"] is not None:  # earlier versions cached unreadable replies
                results[row["key"]] = row["result"]
    return file, results


def sha256(text: str) -> str:
    """The hash of a text, as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()
