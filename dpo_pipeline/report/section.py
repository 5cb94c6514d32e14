"""What a page is made of, and the words and numbers in its tables."""

import re
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dpo_pipeline.formatting import format_estimate, format_number

ROWS = {
    "preference_accuracy": "preference accuracy",
    "margin": "margin (with beta)",
    "margin_nats": "margin_nats",
    "kl": "KL from samples, nats",
    "kl_per_token": "KL per token, nats",
    "perplexity_chosen": "perplexity of chosen",
    "completion_tokens": "completion length, tokens",
    "stop_rate": "stop rate",
    "length_normalised_accuracy": "length-normalised accuracy",
    "reward_chosen": "reward of chosen",
    "reward_rejected": "reward of rejected",
    "logprob_change_chosen_per_token": "log-prob change of chosen, per token",
    "logprob_change_rejected_per_token": "log-prob change of rejected, per token",
    "repetition": "repetition, 3-grams",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "refusal_unsafe": "refusal, unsafe prompts",
    "over_refusal_safe": "over-refusal, safe prompts",
}
SHORT_KEYS = ("preference_accuracy", "margin_nats", "kl", "completion_tokens", "stop_rate")  # and what a judge says
JUDGE_KEYS = re.compile(r"(score|noise_floor|win_rate|length_controlled_win_rate|elo)\.")


@dataclass(frozen=True)
class Panel:
    """One picture of a figure, with what it shows and how to read it."""

    title: str
    png: bytes
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page; a cell of its table is a text, a number or an estimate.

    `panels` stand beside each other, and are one PNG, `figure`, outside of HTML. `tokens` are rows that `show_tokens`
    makes. `short` is what a terminal shows of it, if anything.
    """

    title: str
    text: str = ""
    table: pd.DataFrame | None = None
    panels: tuple[Panel, ...] = ()
    figure: str = ""
    tokens: tuple[dict[str, Any], ...] = ()
    short: str = ""


def label_of(key: str) -> str:
    """A key in words: `win_rate.truth.sft.t0.5` is `wins over sft by truth, temperature 0.5`."""
    if not JUDGE_KEYS.match(key):
        return ROWS[key]
    kind, judge, *rest = key.split(".", 3)
    if kind in (words := {"score": "score", "elo": "Elo", "noise_floor": "wins over itself (noise floor)"}):
        return f"{words[kind]} by {judge}"
    temperature = f", temperature {rest[1].removeprefix('t')}" if len(rest) > 1 else ""
    control = " at equal length (logistic fit)" if kind.startswith("length") else ""
    return f"wins over {rest[0]} by {judge}{control}{temperature}"


def split_cell(value: Any) -> tuple[str, str]:
    """A cell as its value and what stands in small beside it: an estimate's interval, or how few it is of."""
    if isinstance(value, dict):
        if value["low"] is None:
            return format_number(value["value"]), f"(of {value['n']})"
        number, _, interval = format_estimate(value).partition(" ")
        return number, interval
    if isinstance(value, float):
        return ("" if value != value else f"{value:.3g}"), ""  # NaN: a cell that is not there
    return f"{value:,}" if isinstance(value, int) else str(value), ""


def format_cell(value: Any) -> str:
    """A cell as one text."""
    return " ".join(filter(None, split_cell(value)))


def table_rows(table: pd.DataFrame) -> list[list[Any]]:
    """The lines of a table below its header, with Python's own numbers."""
    return table.astype(object).to_numpy().tolist()


def shorten(name: str, limit: int = 36) -> str:
    """A name without its middle where it is too long for a figure."""
    return name if len(name) <= limit else f"{name[: limit - 13]}…{name[-12:]}"
