"""The chat judge against a server that misbehaves and a real one; what judges say, in both orders and cached."""

import contextlib
import functools
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

import pytest

from dpo_pipeline.config import CONF, compose, instantiate_node
from dpo_pipeline.errors import PipelineError
from dpo_pipeline.judges.build import build_judges
from dpo_pipeline.judges.chat import chat, parse_verdict
from dpo_pipeline.judges.judge import Completion, Judge, choices, scores

OPTIONS = sorted(file.stem for file in (CONF / "judge").glob("openai*.yaml"))
CHOOSING = ["openai", "openai_tldr_concise", "openai_tldr_simple"]
KEY = "sk-very/secret+key"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def completion(text, prompt="Why?", ended=True):
    return Completion(prompt, text, ended, (1,), (2,))


def completions(texts):
    return [completion(text) for text in texts]


PAIR = (completion("x"), completion("y"))


@functools.cache
def all_nodes():
    return compose([f"judge=[{','.join(OPTIONS)}]", "judge.common.model=m"]).judge


def judge(option, url, **keys):
    """The option on this server, with no retry and one question at a time unless the keys say otherwise."""
    return instantiate_node(
        {**all_nodes()[option], "base_url": url, "retries": 0, "concurrency": 1, "timeout": 5, **keys}
    )


def rating(server, **keys):
    return judge("openai_relevance", server.url, **keys)


class Server(ThreadingHTTPServer):
    """Answers a request by `reply(question, number)`: a text, a status and body, or what it does to the handler."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.url = threading.Lock(), f"http://127.0.0.1:{self.server_port}/v1"
        self.use(None)

    def use(self, reply):
        """Start anew with these replies."""
        self.reply, self.questions, self.requests, self.active, self.most_active = reply, [], [], 0, 0
        return self


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        question = request["messages"][0]["content"]
        with server.lock:
            number = len(server.questions)
            server.questions.append(question)
            server.requests.append({"path": self.path, "key": self.headers["Authorization"], **request})
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            reply = server.reply(question, number)
        finally:
            with server.lock:
                server.active -= 1
        if callable(reply):
            return reply(self)
        self.respond(*(reply if isinstance(reply, tuple) else (200, body_of(reply))))

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


def body_of(content, reason="stop"):
    return {"choices": [{"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": content}}]}


@pytest.fixture(scope="module")
def shared_server():
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def serve(shared_server):
    return shared_server.use


def pair_in(question):
    """The two completions of a pairwise question, in their order."""
    pattern = r"(?:Response|Summary) A:\n(.*?)\n\n(?:Response|Summary) B:\n(.*?)\n\nFIRST"
    return re.search(pattern, question, re.S).groups()


def longer(question, number):
    first, second = pair_in(question)
    return f'Comparison: one is longer.\nMore helpful: "{"A" if len(first) >= len(second) else "B"}"'


def cached_lines(folder):
    return [line for file in folder.rglob("*.jsonl") for line in file.read_text().splitlines() if line]


# The options


def test_the_options_share_settings_and_each_may_have_its_own(monkeypatch):
    typed = [
        "judge.common.model=m",
        "judge.common.base_url=http://127.0.0.1:1/v1",
        "judge.common.sampling.max_tokens=9",
    ]
    typed += ["judge.openai.model=own", "judge.openai.sampling.max_tokens=7"]
    run = compose([f"judge=[length,{','.join(OPTIONS)}]", *typed])
    judges = build_judges(run, load_options=None)
    assert sorted(judges) == ["length", *OPTIONS]
    for option in OPTIONS:
        built, version = judges[option], json.loads(judges[option].version)
        is_choosing = option in CHOOSING
        assert (built.choose is not None, built.score is not None) == (is_choosing, not is_choosing)
        assert built.post_training_only
        assert version["base_url"] == "http://127.0.0.1:1/v1/"
        model, limit = ("own", 7) if option == "openai" else ("m", 9)
        assert (version["model"], version["sampling"]) == (model, {"temperature": 0, "max_tokens": limit})


def test_what_cannot_be_asked_is_refused_when_the_judges_are_built(monkeypatch):
    run = compose(["judge=[length,openai]", "judge.common.model=x"])
    with pytest.raises(PipelineError, match="api.openai.com/v1 needs a key.*: set .* OPENAI_API_KEY"):
        build_judges(run, load_options=None)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert json.loads(build_judges(run, None)["openai"].version)["base_url"] == "https://api.openai.com/v1/"
    with pytest.raises(PipelineError, match="no model: type judge.common.model="):
        build_judges(compose(["judge=[openai]"]), load_options=None)
    monkeypatch.setitem(sys.modules, "openai", None)  # as if it were not installed
    with pytest.raises(PipelineError, match=r'type pip install -e ".\[openai]"'):
        build_judges(run, load_options=None)


REPLIES = {
    'Comparison: B is odd.\nMore helpful: "A"': 1, "Comparison: A is good, B is bad.\nMore helpful: B": 0,
    "Comparison: good.\nPreferred: A": 1, "**Comparison:** good.\n**Preferred:** B.": 0, "preferred: Summary A": 1,
    "More helpful: <Response B>\n": 0, "A": 1, "I think so.\n\nB\n": 0, "More helpful: A\nMore helpful: A": 1,
    "More helpful: A\nMore helpful: B": None, "A\nB": None, 'More helpful: <"A" or "B">': None,
    "Preferred: A or B": None, "Preferred: neither A nor B": None, "Preferred: both": None,
    "Response A is better.": None, "More helpful: C": None, "More helpful: a": None, "": None, "   ": None,
}  # fmt: skip
RATINGS = {
    "Reason: good.\nRating: 4": 4, "**Rating:** 1": 1, "rating: 5/5": 5, "Rating: 3 out of 5.": 3, "2": 2,
    "Reason: 2 of 3 are good.\nRating: <5>": 5, "Rating: 0": None, "Rating: 6": None, "Rating: 45": None,
    "Rating: 4.5": None, "Rating: 4/10": None, "Rating: 4\nRating: 2": None, "Rating: <1, 2, 3, 4 or 5>": None,
    "It is a 4.": None, "": None,
}  # fmt: skip
REFUSALS = {"Reason: so.\nRefusal: 1": 1, "Refusal: 0.": 0, "1": 1, "Refusal: 2": None, "Refusal: <1 or 0>": None}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_verdict_is_read_and_never_guessed(option):
    expected = REPLIES if option in CHOOSING else REFUSALS if option == "openai_refusal" else RATINGS
    pattern = re.compile(all_nodes()[option]["verdict"])
    assert {reply: parse_verdict(pattern, reply, option not in CHOOSING) for reply in expected} == expected


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
    pair = (completion(" the first {b}\n", messages), completion("second {prompt}", messages))
    assert list(judge(option, server.url).choose([pair])) == [(0, 1.0)]
    (question,), (request,) = server.questions, server.requests
    assert pair_in(question) == ("the first {b}", "second {prompt}")
    assert "user: Say {a} or {answer}.\nassistant: {b}?\n" in question
    assert sentence in question
    assert question.endswith(f'\nComparison: <one-sentence comparison and explanation>\n{label}: <"A" or "B">')
    assert (request.pop("path"), request.pop("key")) == ("/v1/chat/completions", "Bearer no-key")
    assert {**request, "messages": None} == {"model": "m", "temperature": 0, "max_tokens": 512, "messages": None}


def test_what_changes_a_verdict_is_in_the_version(serve):
    server = serve(lambda question, number: "3")
    sampling = {"temperature": None, "max_completion_tokens": 9}
    assert list(rating(server, sampling=sampling).score([completion("x")])) == [(0, 3.0)]
    assert server.requests[0]["max_completion_tokens"] == 9
    assert not {"temperature", "max_tokens"} & set(server.requests[0])
    changes = [{}, {"sampling": sampling}, {"model": "n"}, {"verdict": "([1-3])"}, {"wording": "{answer}"}]
    versions = {rating(server, **keys).version for keys in [*changes, {"base_url": "http://127.0.0.1:1/v1"}]}
    assert len(versions) == 6
    same = rating(server, base_url=server.url + "/", retries=3, concurrency=2, timeout=9)
    assert same.version in versions


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"wording": "Is it good?"}, r"holds \[\]: type {answer}"),
        ({"wording": "{answer} or {a}?"}, "holds .*: type"),
        ({"wording": "{prompt} {a}"}, "holds .*: type"),
        ({"verdict": "A|B"}, "0 groups: type"),
        ({"verdict": "(A)|(B)"}, "2 groups: type"),
        ({"base_url": "127.0.0.1:8000/v1"}, "base_url must be as http"),
        ({"base_url": "http://me:secret@127.0.0.1/v1"}, "a key belongs in OPENAI_API_KEY"),
        ({"base_url": "http://secret@127.0.0.1/v1"}, "a key belongs in OPENAI_API_KEY"),
        ({"base_url": "http://127.0.0.1/v1?key=secret"}, "a key belongs in OPENAI_API_KEY"),
        ({"concurrency": "many"}, "concurrency=many: must be a number"),
    ],
)
def test_an_option_that_cannot_be_is_refused_without_a_key_in_the_message(keys, reason):
    with pytest.raises(PipelineError, match=reason) as error:
        judge("openai", **{"url": "http://127.0.0.1:1/v1", **keys})
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("template", ["{}\n", "{}\r\nother", "my {}", "{}\u201d", '"{}"', "'{}'", "{}\\"])
def test_a_key_that_no_header_holds_is_not_repeated(monkeypatch, template):
    monkeypatch.setenv("OPENAI_API_KEY", template.format(KEY))
    with pytest.raises(PipelineError, match="set .* OPENAI_API_KEY") as error:
        judge("openai", "http://127.0.0.1:1/v1")
    assert "secret" not in str(error.value)


def test_the_address_in_the_environment_counts_only_without_another(serve, monkeypatch):
    server = serve(lambda question, number: "A")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    assert list(judge("openai", server.url).choose([PAIR])) == [(0, 1.0)]
    assert json.loads(judge("openai", None).version)["base_url"] == "http://127.0.0.1:1/v1/"


# A server that misbehaves

PASSING = {
    "429": lambda handler: handler.respond(429, {"error": {"message": "slow down"}}, {"Retry-After-Ms": "10"}),
    "500": lambda handler: handler.respond(500, "oops", {"Retry-After-Ms": "10"}),
    "cut in its body": lambda handler: handler.respond(200, body_of("A"), cut=20),
    "cut before its head": lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
    "silent": lambda handler: time.sleep(1),
}


@pytest.mark.parametrize("trouble", PASSING)
def test_what_passes_is_tried_again(serve, trouble):
    server = serve(lambda question, number: PASSING[trouble] if number == 0 else "A")
    asking = judge("openai", server.url, retries=1, timeout=0.3 if trouble == "silent" else 30)
    assert list(asking.choose([PAIR])) == [(0, 1.0)]
    assert len(server.questions) == 2


UNUSABLE = {
    "401": ((401, {"error": {"message": f"bad {KEY}, {KEY[:6]}***"}}), "key is refused.: set .* OPENAI_API_KEY"),
    "403": ((403, f"not you, {KEY}"), "key is refused.: set .* OPENAI_API_KEY"),
    "404": ((404, {"error": {"message": f"no model m for {KEY}"}}), "fails .*no model.*: correct its model"),
    "500": ((500, f"failed for {KEY}"), r"fails \(failed for \*\*\*\): start it"),
    "429": ((429, {"error": {"message": f"no quota {KEY}"}}), "no quota .*raise timeout or lower"),
    "silent": (lambda handler: time.sleep(1), r"\(Request timed out. timed out\): start it"),
    "cut": (PASSING["cut in its body"], "Connection error. peer closed connection"),
    "400": ((400, {"error": {"message": f"no temperature {KEY}"}}), "no temperature.*correct its model, sampling"),
    "long": ((500, "x" * 290 + KEY + "y" * 1000), "x{290}"),
    "garbage": ((200, "{" + KEY), r"\(the reply holds no text\): correct its"),
    "page": ((200, f"<p>{KEY}</p>", {"Content-Type": "text/html"}), r"base_url .most end in /v1"),
    "no choice": ((200, {"choices": [], "key": KEY}), "the reply holds no text"),
    "null choices": ((200, {"choices": None}), "the reply holds no text"),
    "no message": ((200, {"choices": [{"index": 0}]}), "the reply holds no text"),
    "no content": ((200, body_of(None)), "the reply holds no text"),
    "parts": ((200, body_of([{"type": "text", "text": "A"}])), "the reply holds no text"),
    "number": ((200, "7"), "the reply holds no text"),
}  # fmt: skip


@pytest.mark.parametrize("trouble", UNUSABLE)
def test_an_endpoint_that_cannot_be_used_is_one_sentence_without_the_key(
    serve, trouble, tmp_path, monkeypatch, caplog, capsys
):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    reply, reason = UNUSABLE[trouble]
    server = serve(lambda question, number: reply)
    asking = judge("openai", server.url, timeout=0.3 if trouble == "silent" else 30)
    with pytest.raises(PipelineError, match=reason) as error:
        choices(asking, [PAIR, (completion("z"), completion("y"))], tmp_path, "judge")
    assert {request["key"] for request in server.requests} == {f"Bearer {KEY}"}
    written = "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert "wording" in written
    shown = [written, caplog.text, *capsys.readouterr(), *traceback.format_exception(error.value)]
    assert KEY[:4] not in "".join(shown)
    assert len(str(error.value)) < 600
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_reply_that_repeats_the_key_leaves_it_nowhere(serve, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    server = serve(lambda question, number: f"{KEY}\nPreferred: A")
    assert choices(judge("openai", server.url), [PAIR], tmp_path, "judge") == [0.5]
    assert "secret" not in caplog.text + "".join(f.read_text() for f in tmp_path.rglob("*") if f.is_file())


@pytest.mark.parametrize(
    "refusal",
    [
        (400, {"error": "too long"}),
        (413, "too large"),
        (422, {"detail": "too long"}),
        (200, body_of(None)),
        (200, "{"),
    ],
)
def test_a_question_that_is_refused_is_none_and_the_others_stand(serve, tmp_path, refusal):
    server = serve(lambda question, number: refusal if "long" in question else "4")
    texts = ["a", "a long one", "b", "another long one", "c"]
    assert scores(rating(server, retries=2), completions(texts), tmp_path, "judge") == [4, None, 4, None, 4]
    assert len(server.questions) == 5
    # Both are refused again, and a short question tells that it is not the endpoint.
    assert scores(rating(server, retries=2), completions(texts), tmp_path, "judge") == [4, None, 4, None, 4]
    assert [len(question) > 100 for question in server.questions[5:]] == [True, True, False]


def test_a_reply_without_a_verdict_is_counted_and_not_cached(serve, tmp_path, caplog):
    server = serve(lambda question, number: "I cannot say." if "odd" in question else "4")
    assert scores(rating(server), completions(["odd", "even", "odd one"]), tmp_path, "judge") == [None, 4, None]
    assert caplog.messages == ["judge: 2 of 3 replies hold no verdict: the next run asks again"]
    (line,) = cached_lines(tmp_path)
    server.use(lambda question, number: "2")
    assert scores(rating(server), completions(["odd", "even", "odd one"]), tmp_path, "judge") == [2, 4, 2]
    assert len(server.questions) == 2
    (file,) = tmp_path.rglob("*.jsonl")
    file.write_text(line.replace("4.0", "null"))  # as earlier versions cached it
    assert scores(rating(server), completions(["even"]), tmp_path, "judge") == [2]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_reply_that_its_limit_cuts_is_asked_for_once_more_with_a_larger_one(serve, name):
    server = serve(lambda question, number: (200, body_of("Rating:", "length")) if number == 0 else "Rating: 4")
    asking = rating(server, sampling={name: 10})
    assert list(asking.score([completion("x")])) == [(0, 4.0)]
    assert [request[name] for request in server.requests] == [10, 40]
    server.use(lambda question, number: (200, body_of("Rating: 3", "length")))
    assert list(asking.score(completions("xy"))) == [(0, 3.0), (1, 3.0)]
    assert [request[name] for request in server.requests] == [10, 40, 10, 40]
    server.use(lambda question, number: (200, body_of("Rating:", "length")))
    assert list(rating(server, sampling={}).score([completion("x")])) == [(0, None)]
    assert len(server.requests) == 1


def test_max_completion_tokens_takes_the_place_of_max_tokens_where_the_server_refuses_that(serve):
    message = (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    )
    waiting = threading.Barrier(4)

    def reply(question, number):
        if number < 4:
            waiting.wait(20)  # the first four are under way together
        return (400, {"error": {"message": message}}) if "max_tokens" in server.requests[number] else "5"

    server = serve(reply)
    asking = rating(server, concurrency=4, sampling={"max_tokens": 10})
    assert sorted(asking.score(completions("abcdefgh"))) == [(i, 5.0) for i in range(8)]
    limits = Counter((request.get("max_tokens"), request.get("max_completion_tokens")) for request in server.requests)
    assert limits == {(10, None): 4, (None, 10): 8}
    assert json.loads(asking.version)["sampling"] == {"max_tokens": 10}


@pytest.mark.parametrize("concurrency", [1, 4])
def test_so_many_questions_are_under_way_at_a_time(serve, tmp_path, concurrency):
    together = threading.Barrier(concurrency)

    def reply(question, number):
        together.wait(20)  # fails where fewer come
        time.sleep(0.02)
        return "3"

    server = serve(reply)
    assert scores(rating(server, concurrency=concurrency), completions("abcdefgh"), tmp_path, "judge") == [3.0] * 8
    assert server.most_active == concurrency


def test_a_server_that_stops_half_way_loses_nothing(serve, tmp_path):
    alive = 7
    server = serve(lambda question, number: longer(question, number) if number < alive else (500, "out of memory"))
    pairs = [(completion("a" * n), completion("b" * (12 - n))) for n in range(12)]
    with pytest.raises(PipelineError, match="out of memory.*results so far are kept"):
        choices(judge("openai", server.url), pairs, tmp_path, "judge")
    assert len(cached_lines(tmp_path)) == alive == len(server.questions) - 1
    answered = set(server.questions[:alive])
    server.use(longer)
    again = choices(judge("openai", server.url), pairs, tmp_path, "judge")
    assert again == [0.0] * 6 + [0.5] + [1.0] * 5
    assert len(server.questions) == len(set(server.questions)) == 2 * 12 - alive
    assert not answered & set(server.questions)


def test_what_is_under_way_when_another_fails_is_kept_and_nothing_more_is_asked(serve, tmp_path):
    failed = threading.Event()

    def reply(question, number):
        if "fails" in question:
            failed.set()
            return 401, "no"
        failed.wait(20)
        time.sleep(0.3)
        return "4"

    server = serve(reply)
    texts = ["one", "two", "fails", *map(str, range(20))]
    with pytest.raises(PipelineError, match="the key is refused"):
        scores(rating(server, concurrency=3, timeout=30), completions(texts), tmp_path, "judge")
    assert len(cached_lines(tmp_path)) == 2
    assert len(server.questions) == 3


def test_an_interrupt_is_felt_at_once_and_what_was_said_is_kept(serve, tmp_path):
    interrupts = []

    def reply(question, number):
        if number == 4:  # two wait for replies
            while len(cached_lines(tmp_path)) < 3:
                time.sleep(0.01)
            interrupts.append(time.monotonic())
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if number >= 3:
            time.sleep(3)
        return "2"

    server = serve(reply)
    with pytest.raises(KeyboardInterrupt):
        scores(rating(server, concurrency=2, timeout=60), completions(map(str, range(40))), tmp_path, "judge")
    assert time.monotonic() - interrupts[0] < 2
    assert len(server.questions) == 5
    assert len(cached_lines(tmp_path)) == 3
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())


# Both orders


def test_a_judge_that_likes_the_longer_is_right_about_it(serve, tmp_path):
    server = serve(longer)
    short, middle, long = completions(["x", "xxxx", "xxxxxxxx"])
    pairs = [(short, long), (long, short), (middle, short), (middle, middle), (long, completion("y" * 8))]
    assert choices(judge("openai", server.url, concurrency=4), pairs, tmp_path, "judge") == [0, 1, 1, 0.5, 0.5]
    # The second is the first in the other order; the fourth is not asked.
    orders = [(a.text, b.text) for x, y in (pairs[0], pairs[2], pairs[4]) for a, b in ((x, y), (y, x))]
    assert Counter(map(pair_in, server.questions)) == Counter(orders)


VIEWS = {(1, 0): 1, (0, 1): 0, (1, 1): 0.5, (0, 0): 0.5, (0.5, 0.5): 0.5, (1, 0.5): 0.5, (0.5, 1): 0.5, (0, 0.5): 0.5}
VIEWS |= {(None, 1): None, (0, None): None, (None, None): None}


@pytest.mark.parametrize(("views", "verdict"), VIEWS.items())
def test_only_what_both_orders_say_is_a_verdict(tmp_path, views, verdict):
    order = {("x", "y"): views[0], ("y", "x"): views[1]}
    asking = Judge(choose=lambda pairs: ((i, order[a.text, b.text]) for i, (a, b) in enumerate(pairs)))
    flipped = None if verdict is None else 1 - verdict
    assert choices(asking, [PAIR, PAIR[::-1]], tmp_path, "judge") == [verdict, flipped]


# The cache


def counting(value, version=None):
    """A judge that scores by `value`, from the last completion to the first, and remembers what it was asked."""

    def score(items):
        for number, item in reversed(list(enumerate(items))):
            score.items.append(item)
            yield number, value(item)

    score.items = []
    return Judge(score=score, version=version)


def test_each_completion_is_asked_once_in_a_list_and_over_calls(tmp_path):
    scoring = counting(lambda item: ord(item.text) + item.ended / 2, version="one")
    items = [*completions("abab"), completion("a", ended=False)]  # a text that was cut is another
    assert scores(scoring, items, tmp_path, "judge") == [97.5, 98.5, 97.5, 98.5, 97]
    assert scores(scoring, completions("cba"), tmp_path, "judge") == [99.5, 98.5, 97.5]
    assert [item.text for item in scoring.score.items] == ["a", "b", "a", "c"]
    assert scores(scoring, [completion("a", [{"role": "user", "content": "Why?"}])], tmp_path, "judge") == [97.5]
    assert scores(scoring, [], tmp_path, "judge") == []
    assert len(scoring.score.items) == 5
    finished = Judge(choose=lambda pairs: ((i, float(a.ended)) for i, (a, b) in enumerate(pairs)))
    assert choices(finished, [(completion("x"), completion("x", ended=False))], tmp_path, "judge") == [1]


def test_another_version_is_another_judge_and_none_is_not_cached(tmp_path):
    for version, value in (("one", 1.0), ("two", 2.0), ("one", 3.0)):
        scoring = counting(lambda item, value=value: value, version)
        assert scores(scoring, [completion("x")], tmp_path, "judge") == [1.0 if version == "one" else 2.0]
    assert sorted(file.read_text() for file in tmp_path.glob("*/version.txt")) == ["one", "two"]
    scoring = counting(lambda item: 1.0)
    assert [scores(scoring, [completion("x")], tmp_path / "new", "judge") for _ in range(2)] == [[1.0], [1.0]]
    assert len(scoring.score.items) == 2
    assert not (tmp_path / "new").exists()


def test_a_line_torn_anywhere_costs_that_line_alone(tmp_path):
    values = {"a": 1.0, "b": 2.25, "c": 3.5}
    items = completions("cba")  # asked from its end
    scores(counting(lambda item: values[item.text], "v"), items, tmp_path, "judge")
    (file,) = tmp_path.rglob("scores.jsonl")
    whole = file.read_bytes()
    for cut in range(whole.rindex(b"\n"), len(whole) + 1):
        file.write_bytes(whole[:cut])
        again, cached = (counting(lambda item: values[item.text], "v") for _ in range(2))
        assert scores(again, items, tmp_path, "judge") == [3.5, 2.25, 1.0]
        assert [item.text for item in again.score.items] == (["c"] if cut < len(whole) else [])
        assert scores(cached, items, tmp_path, "judge") == [3.5, 2.25, 1.0]
        assert not cached.score.items


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_score_that_is_no_number_is_refused_and_the_others_are_kept(tmp_path, value):
    values = {"fine": 1.0, "bad": value, "never": 2.0}
    items = [completion(text, [{"role": "user", "content": "Why not?"}]) for text in ("never", "bad", "fine")]
    with pytest.raises(PipelineError, match=rf"mine: the judge gives {value} for 'user: Why not\?', 'bad'"):
        scores(counting(lambda item: values[item.text], "v"), items, tmp_path, "mine")
    # Each result is on disk before the next is asked for.
    assert [json.loads(line)["result"] for line in cached_lines(tmp_path)] == [1.0]


# A real server


@pytest.mark.real
def test_a_real_server_gives_what_its_model_says(tmp_path):
    """`transformers serve` with a random model whose letters and digits are likely, so that some verdicts parse."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder, vocabulary = tmp_path / "model", ["<unk>", "<s>", "</s>", "\n", *map(chr, range(32, 127))]
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    torch.manual_seed(0)
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.3}
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(list("AB12345"))] *= 2
    for part in (model, tokenizer):
        part.save_pretrained(folder)

    def reply(question):
        """What the model says, by itself."""
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", port], stdout=log, stderr=log)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        keys = {"base_url": f"http://127.0.0.1:{port}/v1", "model": str(folder), "concurrency": 3, "timeout": 60}
        # One token cuts every reply: it is asked for again with four.
        keys |= {"retries": 0, "sampling": {"temperature": 0, "max_tokens": 1}}
        asking = chat(wording="{prompt} {answer}", verdict=r"\A[^1-5]*([1-5])", **keys)
        items = completions(f"completion {n}" for n in range(20))
        expected = [parse_verdict(re.compile(r"\A[^1-5]*([1-5])"), reply(f"Why? {item.text}"), True) for item in items]
        assert scores(asking, items, tmp_path, "judge") == expected
        assert None in expected
        assert len(set(expected)) > 2
        with pytest.raises(PipelineError, match="the judge gpt-4 at .* fails .*Server is pinned to"):
            list(chat(wording="{a} {b}", verdict="(A|B)", **{**keys, "model": "gpt-4"}).choose([PAIR]))
    finally:
        process.terminate()
        process.wait()
