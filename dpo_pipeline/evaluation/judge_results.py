"""What judges said of policies, as estimates with their intervals."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dpo_pipeline import estimates
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.evaluation.verdict_statistics import elo, holm, length_controlled, paired_test, win_rate
from dpo_pipeline.judges.judge import drop_unparsed

Verdicts = list[float | None]  # by prompt: scores, or 1 if the first is better, 0.5, 0; None if unreadable
Games = dict[tuple[str, str], Verdicts]  # of two policies
MIN_WINS_AND_LOSSES = 10  # a fit on length needs as many


@dataclass
class JudgeResults:
    """Estimates by policy; comparisons of any two policies, by judge; Best-of-N; counts by judge; failures."""

    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    comparisons: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    best_of: dict[str, Any] | None = None
    scores: dict[str, dict[str, Verdicts]] = field(default_factory=dict)  # by policy and judge, of its samples
    judges: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def catch_failure(self, label: str) -> Iterator[None]:
        """Notes an error in `failures`, so that the other judges go on."""
        try:
            yield
        except (PipelineError, RuntimeError) as error:
            self.failures[label] = " ".join(str(error).split())

    def count_replies(self, judge: str, version: str | None, replies: Verdicts) -> None:
        """Count what a judge gave; raises PipelineError if it gave something and none could be read."""
        self.judges[judge] = {"version": version, "results": len(replies), "unreadable": replies.count(None)}
        if replies and not drop_unparsed(replies) and judge != "human":
            raise PipelineError(
                f"none of its {len(replies)} results could be read: look at what it says, and at "
                f"judge.{judge}.wording and .verdict, or take a stronger model"
            )

    def add_scores(self, policy: str, judge: str, values: Verdicts) -> None:
        """Add a judge's scores of a policy's samples and their mean, unless none could be read."""
        if readable := drop_unparsed(values):
            self.scores.setdefault(policy, {})[judge] = values
            self.own.setdefault(policy, {})[f"score.{judge}"] = estimates.mean(readable)

    def add_win_rate(self, policy: str, key: str, verdicts: Verdicts, length_differences: list[int]) -> None:
        """Add a policy's win rate, and that at equal length if there are enough wins and losses.

        `key` names the judge and the opponent; `length_differences` are in tokens.
        """
        wins = drop_unparsed(verdicts)
        if wins:
            self.own[policy][f"win_rate.{key}"] = win_rate(wins)
        if min(sum(wins), len(wins) - sum(wins)) >= MIN_WINS_AND_LOSSES:
            readable = [verdict is not None for verdict in verdicts]
            lengths = list(itertools.compress(length_differences, readable))
            self.own[policy][f"length_controlled_win_rate.{key}"] = length_controlled(wins, lengths)

    def add_comparisons(self, judge: str, games: Games, scores: dict[str, Verdicts], anchor: str) -> None:
        """Add Elo ratings of all policies, and whether any two differ, by their scores or else by the verdicts."""
        if any(drop_unparsed(verdicts) for pair, verdicts in games.items() if anchor in pair):
            for policy, rating in elo(games, anchor).items():
                self.own[policy][f"elo.{judge}"] = rating
        rows = []
        for (one, other), verdicts in games.items():
            values = (scores[one], scores[other]) if scores else (verdicts, [0.5] * len(verdicts))
            readable = [pair for pair in zip(*values, strict=True) if None not in pair]
            if readable and (wins := drop_unparsed(verdicts)):
                test = paired_test(*map(list, zip(*readable, strict=True)))
                rows.append({"one": one, "other": other, "win_rate": win_rate(wins), **test})
        for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
            row["p_adjusted"] = p
        self.comparisons[judge] = rows
