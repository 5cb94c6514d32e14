"""A preference task whose truth is known: short film reviews from a grammar, and a reward that scores any completion.

The sentiment experiment of the DPO paper (arXiv:2305.18290, section 6) in miniature, whose ground truth is a formula,
not a classifier. Words are separated by single spaces, punctuation included, and all are in `VOCABULARY`.
"""

import math
import random
from typing import Annotated

from pydantic import Field, validate_call

from dpo_pipeline.data.files import Row
from dpo_pipeline.data.normalize import normalize_row

TITLES = "silent broken golden last hidden lonely crimson distant little burning frozen secret wild quiet".split()
NOUNS = """river garden station winter letter mountain harbor city road shadow mirror island bridge train forest
    desert castle clock""".split()
GENRES = "comedy drama western thriller musical mystery romance documentary".split()
KINDS = "young retired lost famous shy stubborn".split()
PEOPLE = "pilot teacher singer doctor farmer painter soldier dancer sailor widow".split()
ASPECTS = "acting story script music ending cast pacing dialogue humor camera plot direction".split()
ADJECTIVES = {
    **dict.fromkeys("superb wonderful brilliant delightful gripping magnificent".split(), 2.0),
    **dict.fromkeys("charming warm clever fresh solid funny".split(), 1.0),
    **dict.fromkeys("clumsy weak stale cold slow flat".split(), -1.0),
    **dict.fromkeys("dreadful boring terrible painful hopeless miserable".split(), -2.0),
}
VERBS = {"loved": 2.0, "enjoyed": 1.0, "disliked": -1.0, "hated": -2.0}
SENTIMENT = {**ADJECTIVES, **VERBS, "gladly": 1.0, "never": -1.0}
DEGREE = {"rather": 0.5, "very": 1.5, "truly": 1.5}
GRAMMAR = "film review : , . the a about was were and but i is what would see again felt seemed".split()
FILMS = len(TITLES) * len(NOUNS) * len(GENRES) * len(KINDS) * len(PEOPLE)
WORDS = {*TITLES, *NOUNS, *GENRES, *KINDS, *PEOPLE, *ASPECTS, *SENTIMENT, *DEGREE, *GRAMMAR, "it"}
VOCABULARY = sorted(WORDS)


def reward(completion: str, ended: bool = True) -> float:
    """True reward of a completion, in [-1, 1]: its sentiment, less what makes it a bad text.

    Sentiment is tanh of the signed word scores of a sentence in the mean, so that length does not pay; a degree word
    scales the score after it. Repeated three-word sequences cost their share of the text, each unknown word 0.2, and
    a completion that never ends (`ended`: it closed with its end token) 0.5; an empty completion is worth -1.
    """
    words = completion.split()
    if not words:
        return -1.0
    score, factor = 0.0, 1.0
    for word in words:
        if word in DEGREE:
            factor *= DEGREE[word]
        elif word in SENTIMENT:
            score, factor = score + factor * SENTIMENT[word], 1.0
        elif word in ".,":
            factor = 1.0
    triples = list(zip(words, words[1:], words[2:], strict=False))
    repeated = 1 - len(set(triples)) / len(triples) if triples else 0.0
    unknown = sum(word not in WORDS for word in words)
    return max(-1.0, math.tanh(score / max(1, words.count("."))) - repeated - 0.2 * unknown - 0.5 * (not ended))


def film_title(rng: random.Random) -> str:
    """A film with its genre and subject, one of `FILMS`, such as `the silent river , a western about a shy pilot`."""
    name = f"the {rng.choice(TITLES)} {rng.choice(NOUNS)}"
    return f"{name} , a {rng.choice(GENRES)} about a {rng.choice(KINDS)} {rng.choice(PEOPLE)}"


def sentence(rng: random.Random, good: bool) -> str:
    """One sentence of a review, of good or bad sentiment."""

    def word(scores: dict[str, float], positive: bool) -> str:
        return rng.choice([w for w, value in scores.items() if (value > 0) == positive])

    adjective, verb = word(ADJECTIVES, good), word(VERBS, good)
    degree = rng.choice(["", "", *DEGREE])
    first, second = rng.sample(ASPECTS, 2)
    forms = [
        f"the {first} was {degree} {adjective} .",
        f"the {first} felt {degree} {adjective} .",
        f"the {first} and the {second} were {degree} {adjective} .",
        f"the {first} seemed {adjective} .",
        f"the {first} was {adjective} but the {second} was {word(ADJECTIVES, rng.random() < 0.5)} .",
        f"i {verb} the {first} .",
        f"i {verb} the {first} and the {second} .",
        f"what a {adjective} {rng.choice(GENRES)} .",
        f"i would {'gladly' if good else 'never'} see it again .",
    ]
    return " ".join(rng.choice(forms).split())


def review(rng: random.Random) -> str:
    """A review of three sentences in a mood drawn evenly between bad and good, so sentiments are mixed."""
    mood = rng.random()
    return " ".join(sentence(rng, rng.random() < mood) for _ in range(3))


def plain_text(rng: random.Random) -> str:
    """Sentences of the same words in no order and without the form of a prompt: what the base model has read."""
    film = film_title(rng).replace(" , a ", " is a ") + " ."
    sentences = [sentence(rng, rng.random() < 0.5) for _ in range(3)]
    return " ".join(rng.sample([film, *sentences], 4))


@validate_call
def load(
    rows: Annotated[int, Field(ge=16, le=FILMS)], slope: float, seed: int, chat: bool, source: str
) -> dict[str, list[Row]]:
    """Pairs with a demonstration each: `{"train": [...], "test": [...]}`, prompts disjoint, drawn from `seed`.

    The completion of higher reward is chosen; in train with the chance that the Bradley-Terry model gives it with
    `slope` on the difference. `demonstration` is a third review. An eighth of `rows`, at most 1,000, are test.
    """
    rng = random.Random(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < rows:
        prompts[f"film : {film_title(rng)} . review :"] = None
    test_rows = min(rows // 8, 1000)
    splits: dict[str, list[Row]] = {"test": [], "train": []}
    for number, prompt in enumerate(prompts):
        split = "test" if number < test_rows else "train"
        first, second = review(rng), review(rng)
        while abs(reward(first) - reward(second)) < 0.5:
            second = review(rng)
        chosen, rejected = sorted((first, second), key=reward, reverse=True)
        if split == "train" and rng.random() > 1 / (1 + math.exp(-slope * (reward(chosen) - reward(rejected)))):
            chosen, rejected = rejected, chosen
        completions = {"chosen": f" {chosen}", "rejected": f" {rejected}", "demonstration": f" {review(rng)}"}
        splits[split].append(normalize_row(f"{split} row {len(splits[split]) + 1}", source, chat, prompt, completions))
    return splits
