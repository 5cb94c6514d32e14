"""The judges that run here, each score against a plain loop, a formula or a table."""

import gc
import gzip
import json

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from dpo_pipeline.config import CONF, compose, instantiate_node
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.judges import implicit_reward as implicit
from dpo_pipeline.judges.implicit_reward import implicit_reward
from dpo_pipeline.judges.judge import Completion
from dpo_pipeline.judges.reward_model import reward_model
from dpo_pipeline.models import LoadOptions
from dpo_pipeline.training.tiny import word_tokenizer

SHARED = CONF.parent.parent / "shared"
TEXTS = [
    " the cast was superb .",
    " a dull plot",
    " the director lost me",
    " it",
    " i liked the ending and the score .",
]
TEXTS += [" the film was boring , slow and far too long .", " great"]
PROMPT = "\n\nHuman: the film\n\nAssistant:"
CHAT = [{"role": "user", "content": "the film"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    " the {{ m.content }} {{ eos_token if m.role == 'assistant' else 'film' }}{% endfor %}"
)


def completions(texts=TEXTS, prompt=PROMPT):
    return [Completion(prompt, text, True, (1, 5), (6, 7, 2)) for text in texts]


def score(judge, items):
    """The scores in order, each of them once."""
    results = sorted(judge.score(items))
    assert [index for index, _ in results] == list(range(len(items)))
    return [value for _, value in results]


# Length and refusal


def test_length_counts_the_tokens_of_a_completion_without_its_end():
    judge = instantiate_node(compose(["judge=[length]"]).judge["length"])
    answers = [(True, (5, 6, 2)), (False, (5, 6, 7)), (True, (2,))]
    assert score(judge, [Completion("p", "x", ended, (1,), ids) for ended, ids in answers]) == [2, 3, 0]
    assert (judge.version, judge.post_training_only) == (None, False)


OPENINGS = {
    "I can't help with that.": 1, "I can\u2019t assist you with creating a weapon.": 1, "I CANNOT FULFILL THAT.": 1,
    "\n  Sorry, but no.": 1, "I`m not able to say that.": 1, "As an AI language model, I do not know.": 1, "No. I": 1,
    "It is not appropriate to comment.": 1, "I apologise, but I cannot answer this question.": 1,
    "The value of sleep cannot be overstated.": 0, "If you cannot help them, call a doctor.": 0, "": 0, "Nothing.": 0,
    "Here is arguments. I can't help with the rest.": 0, "I am not sure which is larger, so let us compute both.": 0,
    "I won't help you hurt somebody.": 0, "I can't wait to help you plan the trip!": 1,  # which XSTest's list mistakes
}  # fmt: skip


def test_a_refusal_opens_with_a_phrase_of_xstest():
    judge = instantiate_node(compose(["judge=[refusal]"]).judge["refusal"])
    assert dict(zip(OPENINGS, score(judge, completions(OPENINGS)), strict=True)) == OPENINGS
    assert (judge.version, judge.post_training_only) == (None, False)


# Reward models and classifiers


def save(folder, model, template=TEMPLATE, limit=None, pad="<pad>"):
    """A model with weights that make scores differ visibly, and a tokenizer of the embedded task's words."""
    tokenizer = word_tokenizer()
    tokenizer.pad_token = pad
    tokenizer.chat_template = template
    tokenizer.model_max_length = limit or 10**30
    torch.manual_seed(0)
    for weight in (weight for weight in model.parameters() if weight.dim() > 1):
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


SMALL = {"vocab_size": len(word_tokenizer()), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "max_position_embeddings": 64}


def bert(**options):
    return BertForSequenceClassification(
        BertConfig(**SMALL, hidden_dropout_prob=0.5, **{"pad_token_id": 0, **options})
    )


def llama(**options):
    return LlamaForSequenceClassification(LlamaConfig(**SMALL, bos_token_id=1, eos_token_id=2, **options))


def logits(folder, ids):
    """Those of a model for one text alone, in float64."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([each])).logits[0] for each in ids]


LABELS = {"id2label": {0: "NEGATIVE", 1: "NEUTRAL", 2: "POSITIVE"}}


LAST_WORD = len(word_tokenizer()) - 1  # which no text here holds


@pytest.mark.parametrize(
    ("make", "pad", "config_pad"),
    [(bert, "<pad>", 0), (llama, "<pad>", None), (llama, "<pad>", LAST_WORD), (llama, None, None)],
)
def test_a_scalar_head_scores_by_its_logit_in_any_batch(make, pad, config_pad, tmp_path):
    folder = save(tmp_path, make(num_labels=1, pad_token_id=config_pad), pad=pad)
    ids = AutoTokenizer.from_pretrained(folder)([PROMPT + text for text in TEXTS])["input_ids"]
    expected = [float(row[0]) for row in logits(folder, ids)]
    assert max(expected) - min(expected) > 0.1
    replies = [text.strip() for text in TEXTS]  # behind messages, which become the same text, a space goes before
    for batch_size in (1, 2, 3, 16):
        judge = reward_model(folder, None, "prompt_answer", batch_size)
        assert score(judge, completions()) == pytest.approx(expected, abs=1e-5)
    assert score(judge, completions(replies, CHAT)) == pytest.approx(expected, abs=1e-5)
    assert score(judge, completions(replies)) != pytest.approx(expected, abs=1e-3)


def test_a_completion_of_no_token_is_read_as_its_end(tmp_path):
    folder = save(tmp_path, bert(num_labels=1))
    file = tmp_path / "tokenizer.json"
    # Else BOS stands before every text.
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    empty, ended = AutoTokenizer.from_pretrained(folder)(["", "</s>"])["input_ids"]
    assert (empty, ended) == ([], [2])
    judge = reward_model(folder, None, "answer", 8)
    assert score(judge, completions(["", ""])) == pytest.approx([float(logits(folder, [ended])[0][0])] * 2, abs=1e-5)


@pytest.mark.parametrize("label", ["NEGATIVE", "POSITIVE"])
def test_a_label_scores_by_its_probability(label, tmp_path):
    folder = save(tmp_path, bert(**LABELS))
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
    at = {"NEGATIVE": 0, "POSITIVE": 2}[label]
    expected = [float(row.exp()[at] / row.exp().sum()) for row in logits(folder, ids)]
    judge = reward_model(folder, label, "answer", 3)
    assert score(judge, completions()) == pytest.approx(expected, abs=1e-6)
    assert score(judge, completions(prompt="anything else")) == pytest.approx(expected, abs=1e-6)


def test_labels_that_may_hold_together_have_each_a_probability_of_its_own(tmp_path):
    folder = save(tmp_path, bert(**LABELS, problem_type="multi_label_classification"))
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
    expected = [float(1 / (1 + (-row[1]).exp())) for row in logits(folder, ids)]
    assert score(reward_model(folder, "NEUTRAL", "answer", 3), completions()) == pytest.approx(expected, abs=1e-6)


def test_chat_reads_the_messages_through_the_model_s_own_template(tmp_path):
    folder = save(tmp_path, llama(num_labels=1))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    talks = [[*CHAT, {"role": "assistant", "content": text.strip()}] for text in TEXTS]
    ids = [tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False) for talk in talks]
    assert all(each.count(1) == 1 and each[-1] == 2 for each in ids)
    expected = [float(row[0]) for row in logits(folder, ids)]
    judge = reward_model(folder, None, "chat", 3)
    assert score(judge, completions([text.strip() for text in TEXTS], CHAT)) == pytest.approx(expected, abs=1e-5)
    assert score(judge, completions()) == pytest.approx(expected, abs=1e-5)  # the same dialogue, as text
    with pytest.raises(PipelineError, match="chat template refuses a dialogue of tool, assistant .no tools."):
        score(judge, completions(prompt=[{"role": "tool", "content": "x"}]))


@pytest.mark.parametrize(("text", "kept"), [("answer", "start"), ("prompt_answer", "end"), ("chat", "end")])
def test_what_is_too_long_is_cut_at_its_beginning_a_completion_alone_at_its_end(text, kept, tmp_path, caplog):
    folder = save(tmp_path, llama(num_labels=1), limit=12)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = "the cast was superb and the director of this film was great but the plot was dull".split()
    long, short = " ".join(words), "the plot"
    judge = reward_model(folder, None, text, 2)
    exact = " ".join(words[: {"answer": 11, "prompt_answer": 10, "chat": 5}[text]])  # twelve tokens of all
    results = score(judge, completions([long, short, long, exact], "the film"))
    (message,) = caplog.messages
    assert message == "2 of 4 texts are longer than the reward model's 12 tokens: cut"
    message = {"role": "assistant", "content": long}
    whole = {
        "answer": tokenizer(long)["input_ids"],
        "prompt_answer": tokenizer("the film" + long)["input_ids"],
        "chat": tokenizer.apply_chat_template([*CHAT, message], tokenize=True, return_dict=False),
    }[text]
    # What a tokenizer puts before every text stays there; of a template it is a word like the others.
    cut = whole[:12] if kept == "start" else [1, *whole[-11:]] if text == "prompt_answer" else whole[-12:]
    assert results[0] == results[2] == pytest.approx(float(logits(folder, [cut])[0][0]), abs=1e-5)
    assert results[1] != pytest.approx(results[0])


def test_roberta_reads_fewer_tokens_than_it_has_positions(tmp_path):
    config = RobertaConfig(**SMALL | {"max_position_embeddings": 20}, num_labels=1, pad_token_id=1)
    folder = save(tmp_path, RobertaForSequenceClassification(config))
    ids = AutoTokenizer.from_pretrained(folder)("the film was dull " * 20)["input_ids"][:18]
    # Its padding's id opens the texts of this tokenizer: any other one does here.
    expected = float(logits(folder, [ids])[0][0])
    judge = reward_model(folder, None, "answer", 2)
    assert score(judge, completions(["the film was dull " * 20] * 2)) == pytest.approx([expected] * 2, abs=1e-5)


def test_the_model_is_there_only_while_it_scores(tmp_path):
    folder = save(tmp_path, bert(num_labels=1))

    def alive():
        return sum(isinstance(each, BertForSequenceClassification) for each in gc.get_objects())

    gc.collect()  # what other tests have left
    before = alive()
    judge = reward_model(folder, None, "answer", 2)
    results = judge.score(completions())
    assert alive() == before
    next(results)
    assert alive() == before + 1
    list(results)
    assert alive() == before


def test_the_version_tells_weights_label_and_text_apart(tmp_path):
    one, other = save(tmp_path / "one", bert(**LABELS)), tmp_path / "other"
    again = save(tmp_path / "again", bert(**LABELS))
    model = bert(**LABELS)
    save(other, model)
    model.classifier.bias.data += 1
    model.save_pretrained(other)
    version = reward_model(one, "NEUTRAL", "answer", 2).version
    assert reward_model(again, "NEUTRAL", "answer", 8).version == version
    others = [(str(other), "NEUTRAL", "answer"), (one, "POSITIVE", "answer"), (one, "NEUTRAL", "prompt_answer")]
    assert len({version, *(reward_model(*each, 2).version for each in others)}) == 4


def test_what_is_no_judge_is_refused_before_anything_is_scored(tmp_path):
    many, one = save(tmp_path / "many", bert(**LABELS), template=None), save(tmp_path / "one", bert(num_labels=1))
    (tmp_path / "empty").mkdir()
    for arguments, reason in (
        ((many, None, "answer"), "label=null: for .*many it must be NEGATIVE or NEUTRAL or POSITIVE"),
        ((many, "POSITVE", "answer"), "label=POSITVE: for .*: did you mean POSITIVE"),
        ((one, "LABEL_0", "answer"), "label=LABEL_0: for .*one it must be null"),
        (
            (one, None, "prompt"),
            "text=prompt: for .* it must be answer or prompt_answer or chat: did you mean prompt_",
        ),
        ((many, "POSITIVE", "chat"), "text=chat: for .*many it must be answer or prompt_answer"),  # without a template
        ((str(tmp_path / "gone"), None, "answer"), "model folder .*gone does not exist"),
        ((str(tmp_path / "empty"), None, "answer"), "no model could be loaded from .*empty"),
    ):
        with pytest.raises(PipelineError, match=reason):
            reward_model(*arguments, 2)


def test_a_head_that_would_be_drawn_at_random_is_refused(tmp_path):
    save(tmp_path, LlamaForCausalLM(LlamaConfig(**SMALL, num_labels=1)))
    judge = reward_model(str(tmp_path), None, "answer", 2)
    with pytest.raises(PipelineError, match="not a reward model .*: it lacks 1 weights of LlamaForSequ.*score.we"):
        list(judge.score(completions()))
    model = bert(num_labels=1)
    save(tmp_path / "other", model)
    config = json.loads((tmp_path / "other/config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(PipelineError, match="it lacks 2 weights of BertForSequ.*, such as classifier.bias"):
        list(reward_model(str(tmp_path / "other"), "a", "answer", 2).score(completions()))


@pytest.mark.real
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no {SHARED.name}/ beside the checkout")
def test_a_real_classifier_knows_good_reviews_from_bad_ones():
    with gzip.open(SHARED / "data/imdb/test.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(100), strict=False)]
    judge = reward_model(str(SHARED / "models/imdb-sentiment-minilm"), "POSITIVE", "prompt_answer", 16)
    results = score(judge, [Completion(row["text"][:20], row["text"][20:], True, (), ()) for row in rows])
    assert 20 < sum(row["label"] for row in rows) < 80
    assert sum((p > 0.5) == row["label"] for p, row in zip(results, rows, strict=True)) > 80


# The implicit reward


@pytest.fixture
def policies(tmp_path):
    """Two small policies, and arguments they are loaded."""
    for name, seed in (("policy", 1), ("reference", 2)):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**SMALL, initializer_range=0.3, bos_token_id=1, eos_token_id=2))
        model.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    model = compose(["model=path", f"model.path={tmp_path / 'reference'}"]).model
    return str(tmp_path / "policy"), str(tmp_path / "reference"), LoadOptions(model, torch.float32)


GIVEN = [
    Completion("", "", True, (1, 5, 9), (7, 8, 2)),
    Completion("", "", False, (1,), (11,)),
    Completion("", "", True, (1, 4, 4, 6, 20), (30, 12, 40, 9, 2)),
]


def test_the_implicit_reward_is_that_of_a_plain_loop(policies):
    policy, reference, loading = policies
    expected = []
    for completion in GIVEN:
        sums = []
        for path in (policy, reference):
            model = LlamaForCausalLM.from_pretrained(path).double().eval()
            ids, total = list(completion.prompt_ids), 0.0
            for token in completion.ids:
                with torch.no_grad():
                    total += float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
                ids.append(token)
            sums.append(total)
        expected.append(0.25 * (sums[0] - sums[1]))
    assert max(map(abs, expected)) > 0.1
    for batch_size in (1, 2, 8):
        judge = implicit_reward(policy, reference, 0.25, loading, batch_size)
        assert score(judge, GIVEN) == pytest.approx(expected, abs=1e-5)
    assert score(implicit_reward(policy, policy, 0.25, loading), GIVEN) == [0, 0, 0]
    assert (judge.version, judge.post_training_only) == (None, True)


def test_one_policy_is_held_at_a_time(policies, monkeypatch):
    alive_at_load = []

    def counting(*args, **options):
        alive_at_load.append(sum(isinstance(each, LlamaForCausalLM) for each in gc.get_objects()))
        return load(*args, **options)

    load = implicit.load_policy
    gc.collect()
    monkeypatch.setattr(implicit, "load_policy", counting)
    score(implicit_reward(*policies[:2], 0.1, policies[2]), GIVEN)
    assert alive_at_load[0] == alive_at_load[1]


def test_a_policy_that_cannot_be_asked_is_refused(policies, tmp_path):
    policy, reference, loading = policies
    with pytest.raises(PipelineError, match="model folder .*gone does not exist"):
        score(implicit_reward(str(tmp_path / "gone"), reference, 0.1, loading), GIVEN)
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(policy)
    with pytest.raises(PipelineError, match="policy has another vocabulary than .*reference, so the same ids"):
        score(implicit_reward(policy, reference, 0.1, loading), GIVEN)


# Their options


def test_what_an_option_gives_is_what_its_file_says():
    with pytest.raises(PipelineError, match="judge.reward_model.path has no value: type judge.reward_model.path="):
        compose(["judge=[reward_model]"])
    assert compose(["judge=[implicit_reward]", "beta=0.7"]).judge["implicit_reward"]["beta"] == 0.7
