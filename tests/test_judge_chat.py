"""The chat judge against `transformers serve` and against a server that misbehaves; what judges said, kept on disk."""

import contextlib
import functools
import itertools
import json
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from dpo_pipeline.config import CONF, compose, instantiate_node
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.judges.build import build_judges
from dpo_pipeline.judges.judge import Completion, Judge
from dpo_pipeline.judges.verdicts import choices, scores

OPTIONS = sorted(file.stem for file in (CONF / "judge").glob("openai*.yaml"))
CHOOSING = ["openai", "openai_tldr_concise", "openai_tldr_simple"]
KEY = "sk-very/secret+key"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def completion(text, prompt="Why?", ended=True):
    return Completion(prompt, text, ended, (1,), (2,))


@functools.cache
def node_of(option):
    return compose([f"judge=[{option}]", f"judge.{option}.model=m"]).judge[option]


def judge(option, url, **keys):
    """The option on this server, with no retry and one question at a time unless asked for."""
    return instantiate_node({**node_of(option), "base_url": url, "retries": 0, "concurrency": 1, "timeout": 5, **keys})


class Server(ThreadingHTTPServer):
    """Answers a request by `reply(question, number)`: a text, a status and body, or what it does to the socket."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.asked, self.sent, self.lock = reply, [], [], threading.Lock()
        self.now = self.most = 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question, server = sent["messages"][0]["content"], self.server
        with server.lock:
            number = len(server.asked)
            server.asked.append(question)
            server.sent.append({"path": self.path, "key": self.headers["Authorization"], **sent})
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            made = server.reply(question, number)
        finally:
            with server.lock:
                server.now -= 1
        if callable(made):
            return made(self)
        self.respond(*(made if isinstance(made, tuple) else (200, said(made))))

    def respond(self, status, body, headers=(), cut=None):
        body = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body[:cut])

    def log_message(self, *args):
        pass


def said(content):
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}


@pytest.fixture
def serve():
    servers = []

    def start(reply):
        servers.append(Server(reply))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def shown(question):
    """The two completions of a pairwise question, in their order."""
    return re.search(
        r"(?:Response|Summary) A:\n(.*?)\n\n(?:Response|Summary) B:\n(.*?)\n\nFIRST", question, re.S
    ).groups()


def kept_lines(folder):
    return sum(len(file.read_text().splitlines()) for file in folder.rglob("*.jsonl"))


def longer(question, number):
    first, second = shown(question)
    return f'Comparison: one is longer.\nMore helpful: "{"A" if len(first) >= len(second) else "B"}"'


# The options


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_and_makes_a_judge_of_its_kind(option):
    node = compose([f"judge=[{option}]", f"judge.{option}.model=x"]).judge
    made = instantiate_node(node[option])
    assert list(node) == [option]
    assert (made.choose is not None, made.score is not None) == (option in CHOOSING, option not in CHOOSING)
    assert made.post_training_only
    assert json.loads(made.version)["base_url"] == "https://api.openai.com/v1/"


def test_without_the_package_openai_the_command_to_type_is_told_before_anything_is_asked(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)  # as if it were not installed
    run = compose(["judge=[length,openai]", "judge.openai.model=x"])
    with pytest.raises(
        PipelineError, match=r'judge=.openai. needs the package openai: type pip install -e ".\[openai]"'
    ):
        build_judges(run, load_options=None)
    assert list(build_judges(compose(["judge=[length]"]), load_options=None)) == ["length"]


def test_options_stand_beside_each_other():
    typed = [f"judge.{option}.model=x" for option in OPTIONS]
    assert sorted(compose([f"judge=[{','.join(OPTIONS)}]", *typed]).judge) == OPTIONS


@pytest.mark.parametrize("option", OPTIONS)
def test_a_model_has_to_be_named(option):
    with pytest.raises(PipelineError, match=f"judge.{option}.model has no value: type judge.{option}.model="):
        compose([f"judge=[{option}]"])


REPLIES = {
    'Comparison: B is odd.\nMore helpful: "A"': 1,
    "Comparison: A is good, B is bad.\nMore helpful: B": 0,
    "Comparison: good.\nPreferred: A": 1,
    "**Comparison:** good.\n**Preferred:** B.": 0,
    "preferred: Summary A": 1,
    "More helpful: <Response B>\n": 0,
    "A": 1,
    "I think so.\n\nB\n": 0,
    "More helpful: A\nMore helpful: A": 1,
    "More helpful: A\nMore helpful: B": None,
    "A\nB": None,
    'More helpful: <"A" or "B">': None,
    "Preferred: A or B": None,
    "Preferred: neither A nor B": None,
    "Preferred: both": None,
    "Response A is better.": None,
    "More helpful: C": None,
    "More helpful: a": None,
    "": None,
    "   ": None,
}
RATINGS = {
    "Reason: good.\nRating: 4": 4,
    "**Rating:** 1": 1,
    "rating: 5/5": 5,
    "Rating: 3 out of 5.": 3,
    "2": 2,
    "Reason: 2 of 3 are good.\nRating: <5>": 5,
    "Rating: 0": None,
    "Rating: 6": None,
    "Rating: 45": None,
    "Rating: 4.5": None,
    "Rating: 4/10": None,
    "Rating: 4\nRating: 2": None,
    "Rating: <1, 2, 3, 4 or 5>": None,
    "It is a 4.": None,
    "": None,
}
REFUSALS = {"Reason: so.\nRefusal: 1": 1, "Refusal: 0.": 0, "1": 1, "Refusal: 2": None, "Refusal: <1 or 0>": None}


@pytest.mark.parametrize(
    ("option", "replies"),
    [*((o, REPLIES) for o in CHOOSING), ("openai_refusal", REFUSALS)]
    + [(f"openai_{kind}", RATINGS) for kind in ("relevance", "helpfulness", "harmlessness")],
)
def test_a_verdict_is_read_and_never_guessed(serve, option, replies):
    server = serve(lambda question, number: re.search("case ([0-9]+)", question) and list(replies)[number])
    made = judge(option, server.url)
    items = [completion(f"case {number}") for number in range(len(replies))]
    if option in CHOOSING:
        found = dict(made.choose([(item, completion("other")) for item in items]))
    else:
        found = dict(made.score(items))
    assert [found[number] for number in range(len(replies))] == list(replies.values())


@pytest.mark.parametrize(
    ("option", "sentence", "label"),
    [
        ("openai", "For the following query to a chatbot, which response is more helpful?", "More helpful"),
        ("openai_tldr_simple", "most important points in the given forum post?", "Preferred"),
        ("openai_tldr_concise", "irrelevant details? A good summary is both precise and concise.", "Preferred"),
    ],
)
def test_a_pair_is_shown_as_in_the_paper(serve, option, sentence, label):
    server = serve(lambda question, number: "A")
    messages = [{"role": "user", "content": "Say {a} or {answer}."}, {"role": "assistant", "content": "{b}?"}]
    made = judge(option, server.url)
    assert list(made.choose([(completion(" the first {b}\n", messages), completion("second {prompt}"))])) == [(0, 1.0)]
    (question,) = server.asked
    assert shown(question) == ("the first {b}", "second {prompt}")
    assert "user: Say {a} or {answer}.\nassistant: {b}?\n" in question
    assert sentence in question
    assert question.endswith(f'\nComparison: <one-sentence comparison and explanation>\n{label}: <"A" or "B">')
    (sent,) = server.sent
    assert sent["path"] == "/v1/chat/completions"
    assert {key: sent[key] for key in sent if key not in ("path", "key", "messages")} == {
        "model": "m", "temperature": 0, "max_tokens": 512,
    }  # fmt: skip


def test_what_is_sampled_with_goes_into_the_request_and_into_the_version(serve):
    server = serve(lambda question, number: "3")
    plain = judge("openai_relevance", server.url)
    thinking = judge("openai_relevance", server.url, sampling={"temperature": None, "max_completion_tokens": 9})
    assert list(thinking.score([completion("x")])) == [(0, 3.0)]
    assert server.sent[0]["max_completion_tokens"] == 9
    assert not {"temperature", "max_tokens"} & set(server.sent[0])
    versions = {
        *(plain.version, thinking.version, judge("openai_helpfulness", server.url).version),
        judge("openai_relevance", server.url, model="n").version,
        judge("openai_relevance", server.url, verdict="([1-3])").version,
        judge("openai_relevance", "http://127.0.0.1:1/v1").version,
    }
    assert len(versions) == 6
    same = judge("openai_relevance", server.url + "/", retries=3, concurrency=2, timeout=9).version
    assert same == plain.version


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"wording": "Is it good?"}, r"wording holds \[\]: type {answer} for a score, or {a} and {b}"),
        ({"wording": "{answer} or {a}?"}, r"wording holds \['a', 'answer'\]: type"),
        ({"wording": "{prompt} {a}"}, r"wording holds \['a'\]: type"),
        ({"verdict": "(A|B"}, r"verdict=\(A\|B \(missing \), unterminated subpattern"),
        ({"verdict": "A|B"}, r"verdict=A\|B \(0 groups\): type"),
        ({"verdict": "(A)|(B)"}, "2 groups.*: type"),
        ({"concurrency": 0}, "concurrency of at least 1"),
        ({"timeout": 0}, "timeout above 0"),
        ({"retries": -1}, "retries of at least 0"),
        ({"url": "127.0.0.1:8000/v1"}, "base_url is not a plain address: type one like http://127.0.0.1:8000/v1"),
        ({"url": "http://x:abc/v1"}, "base_url is not a plain address"),
        ({"concurrency": "many"}, "concurrency=many: must be a number"),
    ],
)
def test_an_option_that_cannot_be_is_one_sentence(keys, sentence):
    with pytest.raises(PipelineError, match=sentence):
        judge("openai", **{"url": "http://127.0.0.1:1/v1", **keys})


@pytest.mark.parametrize(
    "url", ["http://me:secret@127.0.0.1/v1", "http://secret@127.0.0.1/v1", "http://127.0.0.1/v1?key=secret"]
)
def test_a_key_in_an_address_is_refused_and_not_repeated(monkeypatch, url):
    for base_url, environment in ((url, ""), (None, url)):
        monkeypatch.setenv("OPENAI_BASE_URL", environment)
        with pytest.raises(PipelineError, match="put a key into the environment variable OPENAI_API_KEY") as error:
            judge("openai", base_url)
        assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "key", [f"{KEY}\n", f"{KEY}\r\nother", f"my {KEY}", f"{KEY}\u201d", f'"{KEY}"', f"'{KEY}'", f"{KEY}\\"]
)
def test_a_key_that_no_header_holds_is_told_and_not_repeated(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(PipelineError, match="OPENAI_API_KEY holds a space, quote, line end") as error:
        judge("openai", "http://127.0.0.1:1/v1")
    assert "secret" not in str(error.value)


def test_the_environment_s_address_counts_only_where_none_is_given(serve, monkeypatch):
    ours, theirs = serve(lambda question, number: "A"), serve(lambda question, number: "B")
    monkeypatch.setenv("OPENAI_BASE_URL", theirs.url)
    pairs = [(completion("x"), completion("y"))]
    assert list(judge("openai", ours.url).choose(pairs)) == [(0, 1.0)]
    assert not theirs.asked
    environment = judge("openai", None)
    assert list(environment.choose(pairs)) == [(0, 0.0)]
    assert json.loads(environment.version)["base_url"] == theirs.url + "/"
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    assert json.loads(judge("openai", None).version)["base_url"] == "https://api.openai.com/v1/"


# A server that misbehaves

PASSING = {
    "429": lambda handler: handler.respond(429, {"error": {"message": "slow down"}}, {"Retry-After": "1"}),
    "500": lambda handler: handler.respond(500, "oops"),
    "cut in its body": lambda handler: handler.respond(200, said("A"), cut=20),
    "cut before its head": lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
    "silent": lambda handler: time.sleep(3),
}


@pytest.mark.parametrize("trouble", PASSING)
def test_what_passes_is_tried_again(serve, trouble):
    server = serve(lambda question, number: PASSING[trouble] if number == 0 else "A")
    made, began = judge("openai", server.url, retries=1, timeout=1 if trouble == "silent" else 30), time.monotonic()
    assert list(made.choose([(completion("x"), completion("y"))])) == [(0, 1.0)]
    assert len(server.asked) == 2
    assert time.monotonic() - began >= (1 if trouble == "429" else 0.37)


def test_tries_are_further_apart_each_time(serve):
    times = []
    server = serve(lambda question, number: times.append(time.monotonic()) or (500, "no"))
    with pytest.raises(PipelineError, match="fails .no.: start it"):
        list(judge("openai", server.url, retries=2).choose([(completion("x"), completion("y"))]))
    assert len(times) == 3
    first, second = (after - before for before, after in itertools.pairwise(times))
    assert first > 0.37  # 0.5 s and 1 s, of which chance takes up to a quarter
    assert second > 0.74


UNUSABLE = {
    "401": ((401, {"error": {"message": f"bad {KEY}, {KEY[:6]}***"}}), "key is refused.: set .* OPENAI_API_KEY"),
    "403": ((403, f"not you, {KEY}"), "key is refused.: set .* OPENAI_API_KEY"),
    "404": ((404, {"error": {"message": f"no model m for {KEY}"}}), "fails .*no model.*: correct its model or base"),
    "500": ((500, f"failed for {KEY}"), r"fails \(failed for \*\*\*\): start it"),
    "429": ((429, {"error": {"message": f"no quota {KEY}"}}), "no quota .*raise timeout or lower"),
    "silent": (lambda handler: time.sleep(1), r"\(Request timed out. timed out\): start it"),
    "cut": (PASSING["cut in its body"], "Connection error. peer closed connection"),
    "400": ((400, {"error": {"message": f"no temperature {KEY}"}}), "no temperature.*correct its model, sampling"),
    "garbage": ((200, "{" + KEY), r"\(the reply holds no text\): correct its"),
    "page": ((200, f"<p>{KEY}</p>", {"Content-Type": "text/html"}), r"base_url .most end in /v1"),
    "no choice": ((200, {"choices": [], "key": KEY}), "the reply holds no text"),
    "null choices": ((200, {"choices": None}), "the reply holds no text"),
    "no message": ((200, {"choices": [{"index": 0}]}), "the reply holds no text"),
    "no content": ((200, said(None)), "the reply holds no text"),
    "parts": ((200, said([{"type": "text", "text": "A"}])), "the reply holds no text"),
    "number": ((200, "7"), "the reply holds no text"),
    "list": ((200, "[1]"), "the reply holds no text"),
}  # fmt: skip


@pytest.mark.parametrize("trouble", UNUSABLE)
def test_an_endpoint_that_cannot_be_used_is_one_sentence_without_the_key(
    serve, trouble, tmp_path, monkeypatch, caplog, capsys
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    reply, sentence = UNUSABLE[trouble]
    server = serve(lambda question, number: reply)
    made = judge("openai", server.url, timeout=0.3 if trouble == "silent" else 30)
    with pytest.raises(PipelineError, match=sentence) as error:
        choices(made, [(completion("x"), completion("y")), (completion("z"), completion("y"))], tmp_path, "judge")
    assert {sent["key"] for sent in server.sent} == {f"Bearer {KEY}"}
    written = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert "wording" in written
    told = [written, caplog.text, *capsys.readouterr(), *traceback.format_exception(error.value)]
    assert KEY[:4] not in "".join(told)
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("before", [282, 290, 298])
def test_a_long_complaint_is_cut_and_no_part_of_the_key_is_left(serve, monkeypatch, before):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda question, number: (500, "x" * before + KEY + "y" * 1000))
    with pytest.raises(PipelineError) as error:
        list(judge("openai", server.url).choose([(completion("x"), completion("y"))]))
    assert len(str(error.value)) < 600
    assert KEY[:4] not in str(error.value)


def test_a_server_that_is_not_there_is_one_sentence():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(PipelineError, match=f"the judge m at {url}/ fails .*Connection refused.*: start it"):
        list(judge("openai", url).choose([(completion("x"), completion("y"))]))


def test_a_reply_that_repeats_the_key_leaves_it_nowhere(serve, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server = serve(lambda question, number: f"{KEY}\nPreferred: A")
    assert choices(judge("openai", server.url), [(completion("x"), completion("y"))], tmp_path, "judge") == [0.5]
    assert "secret" not in caplog.text + "".join(f.read_text() for f in tmp_path.rglob("*") if f.is_file())


def test_a_server_without_a_key_is_sent_a_placeholder(serve):
    server = serve(lambda question, number: "A")
    list(judge("openai", server.url).choose([(completion("x"), completion("y"))]))
    assert server.sent[0]["key"] == "Bearer no-key"


@pytest.mark.parametrize(
    "refusal",
    [(400, {"error": "too long"}), (413, "too large"), (422, {"detail": "too long"}), (200, said(None)), (200, "{")],
)
def test_a_question_that_is_refused_is_none_and_the_others_stand(serve, tmp_path, refusal):
    server = serve(lambda question, number: refusal if "long" in question else "4")
    made = judge("openai_relevance", server.url, retries=2)
    texts = ["a", "a long one", "b", "another long one", "c"]
    assert scores(made, [completion(text) for text in texts], tmp_path, "judge") == [4, None, 4, None, 4]
    assert len(server.asked) == 5
    assert scores(made, [completion(text) for text in texts], tmp_path, "judge") == [4, None, 4, None, 4]
    assert len(server.asked) == 5


def test_where_all_are_refused_a_short_question_tells_whether_it_is_they(serve, tmp_path):
    server = serve(lambda question, number: (400, "too long") if len(question) > 100 else "hello to you")
    made = judge("openai_relevance", server.url)
    assert scores(made, [completion("a"), completion("b")], tmp_path, "judge") == [None, None]
    assert [len(question) > 100 for question in server.asked] == [True, True, False]


def test_an_endpoint_that_fails_keeps_no_refusal(serve, tmp_path):
    server = serve(
        lambda question, number: (400, "overloaded") if number == 0 else (503, "down") if number > 1 else "2"
    )
    made = judge("openai_relevance", server.url)
    with pytest.raises(PipelineError, match="down"):
        scores(made, [completion(text) for text in "abc"], tmp_path, "judge")
    server.reply = lambda question, number: "5"
    assert scores(made, [completion(text) for text in "abc"], tmp_path, "judge") == [5, 2, 5]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_so_many_questions_are_under_way_at_a_time(serve, tmp_path, concurrency):
    together = threading.Barrier(concurrency)

    def reply(question, number):
        together.wait(20)  # fails where fewer come
        time.sleep(0.05)
        return "3"

    server = serve(reply)
    made = judge("openai_relevance", server.url, concurrency=concurrency, timeout=30)
    assert scores(made, [completion(str(n)) for n in range(8)], tmp_path, "judge") == [3.0] * 8
    assert server.most == concurrency


def test_results_come_in_the_order_of_the_completions_whichever_reply_is_first(serve, tmp_path):
    def reply(question, number):
        grade = int(re.search("grade ([1-5])", question)[1])
        time.sleep(0.1 * (5 - grade))
        return f"Rating: {grade}"

    server = serve(reply)
    made = judge("openai_relevance", server.url, concurrency=5)
    grades = [1, 4, 2, 5, 3]
    assert scores(made, [completion(f"grade {grade}") for grade in grades], tmp_path, "judge") == grades
    assert [place for place, _ in made.score([completion("grade 1"), completion("grade 5")])] == [1, 0]


def test_a_server_that_stops_half_way_loses_nothing(serve, tmp_path):
    alive = 7
    server = serve(lambda question, number: longer(question, number) if number < alive else (500, "out of memory"))
    made = judge("openai", server.url)
    pairs = [(completion("a" * n), completion("b" * (12 - n))) for n in range(12)]
    with pytest.raises(PipelineError, match="out of memory.*results so far are kept"):
        choices(made, pairs, tmp_path, "judge")
    assert kept_lines(tmp_path) == alive == len(server.asked) - 1
    had, server.reply, server.asked = set(server.asked[:alive]), longer, []
    again = choices(judge("openai", server.url), pairs, tmp_path, "judge")
    assert again == [0.0] * 6 + [0.5] + [1.0] * 5
    assert len(server.asked) == len(set(server.asked)) == 2 * 12 - alive
    assert not had & set(server.asked)


def test_what_is_under_way_when_another_fails_is_kept_and_nothing_more_is_asked(serve, tmp_path):
    failed = threading.Event()

    def reply(question, number):
        if "fails" in question:
            failed.set()
            return 401, "no"
        failed.wait(20)
        time.sleep(0.5)
        return "4"

    server = serve(reply)
    made = judge("openai_relevance", server.url, concurrency=3, timeout=30)
    texts = ["one", "two", "fails", *map(str, range(20))]
    with pytest.raises(PipelineError, match="the key is refused"):
        scores(made, [completion(text) for text in texts], tmp_path, "judge")
    assert kept_lines(tmp_path) == 2
    assert len(server.asked) == 3


def test_an_interrupt_ends_the_process_at_once_and_keeps_what_was_said(serve, tmp_path):
    server = serve(lambda question, number: "2" if number < 3 else time.sleep(60))
    script = f"""
from pathlib import Path
from tests.test_judge_chat import completion, judge, scores
scores(judge("openai_relevance", {server.url!r}, concurrency=2, timeout=60),
       [completion(str(n)) for n in range(40)], Path({str(tmp_path)!r}), "judge")
"""
    child = subprocess.Popen([sys.executable, "-c", script], cwd=CONF.parent, stderr=subprocess.PIPE, text=True)
    while len(server.asked) < 5 or kept_lines(tmp_path) < 3:
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.02)
    began = time.monotonic()
    child.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in child.communicate(timeout=20)[1]
    assert time.monotonic() - began < 5
    assert len(server.asked) == 5
    assert kept_lines(tmp_path) == 3


# Both orders


def test_a_judge_that_likes_a_place_gives_ties(serve, tmp_path):
    server = serve(lambda question, number: "More helpful: A")
    pairs = [(completion("x"), completion("a longer one")), (completion("y"), completion("z"))]
    assert choices(judge("openai", server.url), pairs, tmp_path, "judge") == [0.5, 0.5]
    assert [shown(question)[0] for question in server.asked] == ["x", "a longer one", "y", "z"]


def test_a_judge_that_likes_the_longer_is_right_about_it(serve, tmp_path):
    server = serve(longer)
    made = judge("openai", server.url, concurrency=4, timeout=30)
    short, middle, long = completion("x"), completion("xxxx"), completion("xxxxxxxx")
    pairs = [(short, long), (long, short), (middle, short), (middle, middle), (long, completion("y" * 8))]
    assert choices(made, pairs, tmp_path, "judge") == [0, 1, 1, 0.5, 0.5]
    # The second is the first in the other order; the fourth is not asked.
    assert Counter(map(shown, server.asked)) == Counter(
        (a.text, b.text) for x, y in (pairs[0], pairs[2], pairs[4]) for a, b in ((x, y), (y, x))
    )


VIEWS = {(1, 0): 1, (0, 1): 0, (1, 1): 0.5, (0, 0): 0.5, (0.5, 0.5): 0.5, (1, 0.5): 0.5, (0.5, 1): 0.5, (0, 0.5): 0.5}
VIEWS |= {(None, 1): None, (0, None): None, (None, None): None}


@pytest.mark.parametrize(("views", "verdict"), VIEWS.items())
def test_only_what_both_orders_say_is_a_verdict(tmp_path, views, verdict):
    order = {("x", "y"): views[0], ("y", "x"): views[1]}
    made = Judge(choose=lambda pairs: ((i, order[a.text, b.text]) for i, (a, b) in enumerate(pairs)))
    assert choices(made, [(completion("x"), completion("y"))], tmp_path, "judge") == [verdict]
    flipped = None if verdict is None else 1 - verdict
    assert choices(made, [(completion("y"), completion("x"))], tmp_path, "judge") == [flipped]


def test_a_judge_of_scores_chooses_by_them(tmp_path):
    values = {"low": -1.5, "high": 2.0, "also high": 2.0, "unread": None}
    made = counting(lambda each: values[each.text])
    low, high, also, unread = map(completion, values)
    pairs = [(low, high), (high, low), (high, also), (low, unread), (unread, unread)]
    assert choices(made, pairs, tmp_path, "judge") == [0, 1, 0.5, None, 0.5]
    assert Counter(each.text for each in made.score.asked) == dict.fromkeys(values, 1)


def test_a_text_that_ended_and_one_that_was_cut_are_two(tmp_path):
    made = counting(lambda each: float(each.ended), version="v")
    assert choices(made, [(completion("x"), completion("x", ended=False))], tmp_path, "judge") == [1]
    assert scores(made, [completion("x", ended=False), completion("x")], tmp_path, "judge") == [0, 1]
    assert len(made.score.asked) == 2


# What is kept


def counting(value, version=None):
    """A judge that remembers what it was asked."""

    def score(completions):
        for number, each in reversed(list(enumerate(completions))):
            score.asked.append(each)
            yield number, value(each)

    score.asked = []
    return Judge(score=score, version=version)


def test_each_completion_is_asked_once_in_a_list_and_over_calls(tmp_path):
    made = counting(lambda each: None if each.text == "b" else float(ord(each.text)), version="one")
    assert scores(made, [completion(text) for text in "abab"], tmp_path, "judge") == [97, None, 97, None]
    assert scores(made, [completion(text) for text in "cba"], tmp_path, "judge") == [99, None, 97]
    assert sorted(each.text for each in made.score.asked) == ["a", "b", "c"]
    assert scores(made, [completion("a", prompt=[{"role": "user", "content": "Why?"}])], tmp_path, "judge") == [97]
    assert len(made.score.asked) == 4
    assert scores(made, [], tmp_path, "judge") == []
    assert len(made.score.asked) == 4


def test_another_version_is_another_judge_and_each_can_be_read(tmp_path):
    for version, value in (("one", 1.0), ("two", 2.0), ("one", 3.0)):
        found = scores(counting(lambda each, value=value: value, version), [completion("x")], tmp_path, "judge")
        assert found == [1.0 if version == "one" else 2.0]
    assert sorted(file.read_text() for file in tmp_path.glob("*/version.txt")) == ["one", "two"]


def test_what_is_had_for_nothing_is_not_kept(tmp_path):
    made = counting(lambda each: 1.0)
    for _ in range(2):
        assert scores(made, [completion("x")], tmp_path / "cache", "judge") == [1.0]
    assert len(made.score.asked) == 2
    assert not (tmp_path / "cache").exists()


def test_scores_and_choices_of_one_judge_do_not_mix(tmp_path):
    made = Judge(
        score=lambda completions: ((i, 7.0) for i in range(len(completions))),
        choose=lambda pairs: ((i, float(a.text == "x")) for i, (a, b) in enumerate(pairs)),
        version="both",
    )
    assert choices(made, [(completion("x"), completion("y"))], tmp_path, "judge") == [1.0]
    assert scores(made, [completion("x"), completion("y")], tmp_path, "judge") == [7.0, 7.0]
    assert {file.name: len(file.read_text().splitlines()) for file in tmp_path.rglob("*.jsonl")} == {
        "scores.jsonl": 2, "choices.jsonl": 2,
    }  # fmt: skip


def test_a_line_torn_anywhere_costs_that_line_alone(tmp_path):
    values = {"a": 1.0, "b": None, "c": 3.5}
    given = [completion(text) for text in "cba"]  # asked from its end
    scores(counting(lambda each: values[each.text], "v"), given, tmp_path, "judge")
    (file,) = tmp_path.rglob("scores.jsonl")
    whole = file.read_bytes()
    last = whole[: whole.rindex(b"\n", 0, -1) + 1]
    for cut in range(len(last), len(whole) + 1):
        file.write_bytes(whole[:cut])
        again = counting(lambda each: values[each.text], "v")
        assert scores(again, given, tmp_path, "judge") == [3.5, None, 1.0]
        assert [each.text for each in again.score.asked] == (["c"] if cut < len(whole) - 1 else [])
        then = counting(lambda each: values[each.text], "v")
        assert scores(then, given, tmp_path, "judge") == [3.5, None, 1.0]
        assert not then.score.asked


def test_each_result_is_on_disk_before_the_next_is_asked(tmp_path):
    lines = []

    def score(completions):
        for number in range(len(completions)):
            lines.append(kept_lines(tmp_path))
            yield number, 1.0

    scores(Judge(score=score, version="v"), [completion(text) for text in "abcd"], tmp_path, "judge")
    assert lines == [0, 1, 2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_is_one_sentence_and_the_others_are_kept(tmp_path, value):
    values = {"fine": 1.0, "bad": value, "never": 2.0}
    made = counting(lambda each: values[each.text], "v")
    given = [completion(text, prompt=[{"role": "user", "content": "Why not?"}]) for text in ("never", "bad", "fine")]
    with pytest.raises(PipelineError, match=rf"mine: the judge gives {value} for .*'user: Why not\?'.*'bad'"):
        scores(made, given, tmp_path, "mine")
    (file,) = tmp_path.rglob("scores.jsonl")
    assert [json.loads(line)["result"] for line in file.read_text().splitlines()] == [1.0]


def test_a_bar_with_the_judge_s_name_counts_what_is_asked_and_goes(tmp_path, capsys):
    made = counting(lambda each: time.sleep(0.15) or 1.0, "v")
    scores(made, [completion(text) for text in "abca"], tmp_path, "score of mine")
    seen = capsys.readouterr().err
    assert re.findall(r"score of mine: .*?([0-9]/3)", seen)[:2] == ["0/3", "1/3"]
    assert seen.endswith("\r")
    scores(made, [completion(text) for text in "abc"], tmp_path, "score of mine")
    assert not capsys.readouterr().err


# A real server

REPLY_TOKENS = 6


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """`transformers serve` with a random model whose letters and digits are likely, so that some verdicts parse."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    characters = ["<unk>", "<s>", "</s>", "\n", *map(chr, range(32, 127))]
    made = Tokenizer(models.WordLevel({token: i for i, token in enumerate(characters)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(characters), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=4096, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(list("AB12345"))] *= 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)

        def reply(question):
            """What the model says, by itself."""
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
            ).input_ids
            made = model.generate(ids, max_new_tokens=REPLY_TOKENS, do_sample=False, pad_token_id=0)
            return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

        yield SimpleNamespace(url=f"http://127.0.0.1:{port}/v1", model=str(folder), reply=reply)
    finally:
        process.terminate()
        process.wait()


def on_real(real, option, **keys):
    keys = {"model": real.model, "sampling": {"temperature": 0, "max_tokens": REPLY_TOKENS}, **keys}
    return judge(option, real.url, concurrency=3, timeout=60, **keys)


def test_a_real_server_s_unreadable_replies_are_counted(real, tmp_path):
    made = on_real(real, "openai_relevance")
    given = [completion(letter * 20) for letter in "abcdefghijkl"]
    found = scores(made, given, tmp_path, "judge")
    wording = json.loads(made.version)["wording"]
    replies = [real.reply(wording.replace("{prompt}", "Why?").replace("{answer}", each.text)) for each in given]
    readable = [reply for reply in replies if any(line.strip() in list("12345") for line in reply.splitlines())]
    assert len(set(replies)) > 2
    assert found.count(None) == len(given) - len(readable) > 6


def test_a_real_server_s_scores_and_choices_are_what_the_model_says(real, tmp_path):
    rating = on_real(real, "openai_relevance", wording="{prompt} {answer}", verdict=r"\A[^1-5]*([1-5])")
    given = [completion(f"completion {n}") for n in range(20)]

    def first(allowed, reply):
        return next((character for character in reply if character in allowed), None)

    expected = [first("12345", real.reply(f"Why? {each.text}")) for each in given]
    assert scores(rating, given, tmp_path, "judge") == [None if mark is None else int(mark) for mark in expected]
    assert None in expected
    assert len(set(expected)) > 2
    choosing = on_real(real, "openai", wording="{a} or {b}", verdict=r"\A[^AB]*(A|B)")
    pairs = [(completion(f"one {n}"), completion(f"two {n}")) for n in range(20)]
    verdicts = []
    for a, b in pairs:
        views = first("AB", real.reply(f"{a.text} or {b.text}")), first("AB", real.reply(f"{b.text} or {a.text}"))
        verdicts.append(None if None in views else {("A", "B"): 1, ("B", "A"): 0}.get(views, 0.5))
    assert choices(choosing, pairs, tmp_path, "judge") == verdicts
    assert {None, 0.5} < set(verdicts)


def test_a_real_server_with_another_model_says_so(real, tmp_path):
    made = on_real(real, "openai", model="gpt-4")
    with pytest.raises(PipelineError, match="the judge gpt-4 at .* fails .*Server is pinned to"):
        choices(made, [(completion("x"), completion("y"))], tmp_path, "judge")
