"""The client of chat servers against one that fails: none lost, none doubled, order kept, and every fault told by its name."""

import functools
import json
import random
import sqlite3
import threading
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from fault_server import BAD_BODIES, PASSING, STATUSES, FaultServer

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import chat_cache
from jaxrl_llm.rewards.chat import ChatClient, ChatConfig, Fault, Request, Unreadable, retry_after
from jaxrl_llm.rewards.chat_budget import BudgetConfig
from jaxrl_llm.rewards.chat_cache import AnswerCache
from jaxrl_llm.rewards.verdict import RewardStopped

BEARS_ALL = BudgetConfig(in_row=10**6, share=1.0)


@pytest.fixture
def server():
    made = FaultServer()
    yield made
    made.close()


class Sleeps(list):
    """A clock that only sleeping moves."""

    def __init__(self):
        super().__init__()
        self.now, self.lock = 0.0, threading.Lock()

    def __call__(self, seconds):
        with self.lock:
            self.append(seconds)
            self.now += seconds

    def clock(self):
        return self.now


def client_of(server, sleep=None, rng=None, **changes):
    settings = {"url": server.url, "model": "m", "timeout": 5.0, "budget": BEARS_ALL, "workers": 1}
    sleep = Sleeps() if sleep is None else sleep
    return ChatClient(ChatConfig(**settings | changes), sleep.clock, sleep, rng or random.Random(0))


def say(text, **how):
    return Request([{"role": "user", "content": text}], **how)


def asked(body):
    return body["messages"][-1]["content"]


def test_ten_thousand_requests_under_faults(server, tmp_path):
    """A fifth of all tries fail, in every way; what comes back is what an undisturbed server says, in order, and each item was answered once."""
    number = 10_000

    def fault(body, n):
        drawn = random.Random(zlib.crc32(f"{asked(body)} {n}".encode()))
        return drawn.choice(PASSING) if drawn.random() < 0.2 else None

    server.answer, server.fault = lambda body: f"echo of {asked(body)}", fault
    server.retry_after = "7"
    client = client_of(server, workers=16, retries=12, timeout=60.0, cache=str(tmp_path / "answers.sqlite"))
    post = client._wire.post

    def patient(path, body, headers, seconds):
        """Only what never ends is given up early: a busy machine may take long for all else."""
        asks, n = json.loads(body), server.tries[body.decode()]
        met = {fault(asks, n)}
        if met == {"reset"}:  # as a kept connection does that the server closed: it is asked again, on a new one
            met.add(fault(asks, n + 1))
        return post(path, body, headers, 0.15 if Fault.TIMEOUT in map(FAULTS.get, met) else seconds)

    client._wire.post = patient
    requests = [say(f"item {i}") for i in range(number)]
    answers = client.ask_all(requests)
    assert [a.text for a in answers] == [f"echo of item {i}" for i in range(number)]
    assert {a.fault for a in answers} == {None} and not any(a.cached for a in answers)
    sent = sum(server.tries.values())
    share = 1 - number / sent
    assert 0.18 < share < 0.24 and len(server.tries) == number
    # A try may be answered well and yet come too late for its caller: so rare that the count of answers is all but exact.
    assert set(server.answered.values()) <= {1, 2} and sum(server.answered.values()) < number * 1.01
    usage = client.usage
    assert usage.requests == number and usage.failed == {} and client.cache.count() == number
    told = {Fault.CONNECTION, Fault.TIMEOUT, Fault.RATE_LIMITED, Fault.SERVER, Fault.MALFORMED}
    assert set(usage.faults) == {str(fault) for fault in told} and all(n > 30 for n in usage.faults.values())
    assert [a.text for a in client_of(server, cache=str(tmp_path / "answers.sqlite")).ask_all(requests)] == [a.text for a in answers]
    assert sum(server.tries.values()) == sent  # the second time nothing is sent


FAULTS = dict.fromkeys(("reset", "cut_body"), Fault.CONNECTION) | dict.fromkeys(("hang", "drip", "drip_headers"), Fault.TIMEOUT)
FAULTS |= dict.fromkeys(BAD_BODIES, Fault.MALFORMED) | dict.fromkeys(STATUSES, Fault.SERVER) | {"429": Fault.RATE_LIMITED}


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_stays_has_its_name_and_one_that_passes_costs_a_try(server, name):
    server.fault = lambda body, n: name if n < 2 else None
    client = client_of(server, retries=1, timeout=0.3 if FAULTS[name] is Fault.TIMEOUT else 20.0)
    answer = client.ask(say("a"))
    assert (answer.fault, answer.tries, answer.text) == (FAULTS[name], 2, "") and answer.reason
    assert client.usage.faults == {str(FAULTS[name]): 2} and client.usage.failed == {str(FAULTS[name]): 1}
    assert client_of(server, timeout=20.0).ask(say("a")).text == "Verdict: YES"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 302])
def test_other_refusals_are_not_tried_again(server, status):
    server.fault = lambda body, n: status
    answer = client_of(server, retries=5).ask(say("a"))
    assert (answer.fault, answer.tries, answer.status) == (Fault.REFUSED, 1, status) and f"HTTP {status}" in answer.reason


def test_a_cut_off_answer_is_no_answer(server):
    server.answer = lambda body: {"message": {"content": "Verdict: YES"}, "finish_reason": "length"}
    client = client_of(server)
    answer = client.ask(say("a"))
    assert answer.fault is Fault.TRUNCATED and answer.tries == 1 and "max_tokens" in answer.reason and answer.text == ""
    assert client.ask(say("b", partial=True)).text == "Verdict: YES"
    server.answer = lambda body: {"message": {"content": "Verdict: YES"}, "finish_reason": "content_filter"}
    assert client.ask(say("c")).fault is Fault.UNREADABLE


def test_what_cannot_be_read_is_asked_again_as_often_as_said(server):
    def read(answer):
        if answer.text != "good":
            raise Unreadable(f"it says {answer.text}")
        return 7

    said = ["bad", "bad", "good"]
    server.answer = lambda body: said.pop(0)
    client = client_of(server, rereads=1)
    answer = client.ask(say("a", read=read))
    assert (answer.fault, answer.reason, answer.tries, answer.value) == (Fault.UNREADABLE, "it says bad", 2, None)
    assert client.ask(say("a", read=read)).value == 7


def test_waits_double_are_drawn_and_end(server):
    server.fault = lambda body, n: "500"
    sleep = Sleeps()
    client_of(server, sleep, retries=6, backoff=1.0, most_wait=10.0).ask(say("a"))
    assert len(sleep) == 6 and len(set(sleep)) == 6
    for n, wait in enumerate(sleep):
        grown = min(2.0**n, 10.0)
        assert grown / 2 <= wait <= grown


def test_a_server_that_names_the_wait_is_obeyed_up_to_a_limit(server):
    server.fault = lambda body, n: "429"
    for named, least, most in (("7", 7, 7), ("900", 30, 30), ("soon", 0.5, 1), (None, 0.5, 1)):
        server.retry_after, sleep = named, Sleeps()
        client_of(server, sleep, retries=1, most_wait=30.0).ask(say(str(named)))
        assert len(sleep) == 1 and least <= sleep[0] <= most
    later = datetime.now(UTC) + timedelta(seconds=100)
    assert 90 < retry_after(format_datetime(later, usegmt=True)) <= 100
    assert retry_after("Fri, 31 Dec 1999 23:59:59 GMT") == retry_after("-5") == retry_after("nan") == retry_after("inf") == retry_after("") == 0


def test_the_deadline_of_a_batch_ends_it(server):
    server.fault = lambda body, n: "500" if asked(body) != "0" else None
    sleep = Sleeps()
    answers = client_of(server, sleep, retries=100, deadline=20.0, most_wait=8.0).ask_all([say(str(i)) for i in range(5)])
    assert answers[0].text and {a.fault for a in answers[1:]} <= {Fault.SERVER, Fault.TIMEOUT} and sleep.now <= 20.0
    server.fault = lambda body, n: "hang"
    hung = client_of(server, timeout=60.0, deadline=0.2, retries=0).ask(say("x"))
    assert hung.fault is Fault.TIMEOUT and "0.2 s" in hung.reason


def test_no_more_than_so_many_at_once(server):
    three, never, lock, here, most = threading.Barrier(3), threading.Event(), threading.Lock(), [], []

    def answer(body):
        with lock:
            here.append(body)
            most.append(len(here))
        three.wait(20)  # three come at once, however slow the machine is
        never.wait(0.03)  # and a fourth would be seen
        with lock:
            here.remove(body)
        return "yes"

    server.answer = answer
    answers = client_of(server, workers=3, timeout=20.0).ask_all([say(str(i)) for i in range(12)])
    assert {a.text for a in answers} == {"yes"} and max(most) == 3


def test_equal_requests_are_sent_once_and_all_get_the_answer(server, tmp_path):
    server.answer = lambda body: f"{asked(body)} {body['temperature']}"
    answers = client_of(server, workers=4).ask_all([say("a"), say("b"), say("a", parameters={"temperature": 1.0}), say("a")])
    assert [a.text for a in answers] == ["a 0.0", "b 0.0", "a 1.0", "a 0.0"] and len(server.bodies) == 3


def test_the_cache_knows_every_part_of_a_request(server, tmp_path):
    path = str(tmp_path / "sub" / "answers.sqlite")
    first = [say("a"), say("a", parameters={"seed": 1}), Request([{"role": "system", "content": "a"}])]
    client_of(server, cache=path).ask_all(first)
    assert len(server.bodies) == 3
    client = client_of(server, cache=path)
    assert all(a.cached for a in client.ask_all(first)) and len(server.bodies) == 3
    assert client.usage.cached == 3 and client.usage.tries == 0 and client.usage.cost == 0
    for change in ({"model": "n"}, {"temperature": 0.5}, {"max_tokens": 9}):
        assert not client_of(server, cache=path, **change).ask(first[0]).cached


def test_faults_are_not_cached(server, tmp_path):
    path = str(tmp_path / "answers.sqlite")
    server.fault = lambda body, n: 400 if n == 0 else None
    client = client_of(server, cache=path)
    assert client.ask(say("a")).fault and client.ask(say("a")).text == "Verdict: YES"


def test_a_cache_of_several_threads_and_processes(tmp_path, run_python):
    path = str(tmp_path / "answers.sqlite")
    code = """
import sys, threading
from jaxrl_llm.rewards.chat_cache import AnswerCache
cache = AnswerCache(sys.argv[1])
def work(t):
    for i in range(200):
        kept = cache.put(f"key {i}", {"by": sys.argv[2], "i": i})
        assert kept == cache.get(f"key {i}") and kept["i"] == i
threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print(cache.count())
"""
    results = []
    workers = [threading.Thread(target=lambda name=name: results.append(run_python(code, (path, name)))) for name in "ab"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [r.strip() for r in results] == ["200", "200"]


def test_a_cache_that_another_is_making_is_tried_again(tmp_path, monkeypatch):
    """SQLite refuses one of two processes that make a file at the same time; one that is refused for good says so."""

    class Refused(sqlite3.Connection):
        left = 3

        def execute(self, statement, *values):
            if "journal_mode" in statement and Refused.left:
                Refused.left -= 1
                error = sqlite3.OperationalError("database is locked")
                error.sqlite_errorcode = sqlite3.SQLITE_BUSY
                raise error
            return super().execute(statement, *values)

    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Refused))
    assert AnswerCache(tmp_path / "answers.sqlite").put("key", {"a": 1}) == {"a": 1} and not Refused.left
    monkeypatch.setattr(chat_cache, "BUSY", 0.05)
    Refused.left = 10**9
    with pytest.raises(UserError, match=r"answers.sqlite cannot be used \(database is locked\)"):
        AnswerCache(tmp_path / "answers.sqlite")


def test_a_damaged_cache_is_told(server, tmp_path):
    path = tmp_path / "answers.sqlite"
    path.write_bytes(b"no database at all, but long enough to be looked at" * 100)
    with pytest.raises(UserError, match="answers.sqlite cannot be used"):
        client_of(server, cache=str(path))


def test_tokens_and_cost(server):
    client = client_of(server, price_in=3.0, price_out=15.0)
    client.ask_all([say("a"), say("b")])
    assert (client.usage.prompt_tokens, client.usage.completion_tokens) == (20, 4)
    assert client.usage.cost == pytest.approx((20 * 3 + 4 * 15) / 1e6)
    server.usage = {"prompt_tokens": "many", "completion_tokens": -1}
    client.ask(say("c"))
    server.usage = None
    client.ask(say("d"))
    assert client.usage.prompt_tokens == 20


def test_log_probabilities(server):
    top = [{"token": "YES", "logprob": -0.1}, {"token": "NO", "logprob": -2.4}]
    told = {"content": [{"token": "YES", "logprob": -0.1, "top_logprobs": top}]}
    choice = {"message": {"content": "YES"}, "finish_reason": "stop", "logprobs": told}
    server.answer = lambda body: choice
    assert client_of(server).ask(say("a")).top_logprobs == ({"YES": -0.1, "NO": -2.4},)
    choice["logprobs"] = {"content": [{"top_logprobs": [{"token": "YES"}]}]}
    assert client_of(server, retries=0).ask(say("a")).fault is Fault.MALFORMED


# ---- the budget of errors ----


def test_an_outage_pauses_and_then_stops_and_loses_nothing(server, tmp_path):
    path = str(tmp_path / "answers.sqlite")
    up = threading.Event()
    server.fault = lambda body, n: None if up.is_set() or int(asked(body)) < 10 else "503"
    sleep, budget = Sleeps(), BudgetConfig(in_row=4, pauses=2, pause=30.0)
    client = client_of(server, sleep, retries=0, cache=path, budget=budget)
    requests = [say(str(i)) for i in range(100)]
    with pytest.raises(RewardStopped, match=r"4 requests in a row failed, after 2 pauses; the last: server: HTTP 503.*the same command goes on"):
        client.ask_all(requests)
    assert sleep.now == 30 + 60 and len(server.bodies) == 10 + 3 * 4
    up.set()
    answers = client_of(server, cache=path).ask_all(requests)
    assert [a.cached for a in answers] == [True] * 10 + [False] * 90


def test_a_server_that_comes_back_during_a_pause_is_asked_on(server):
    sleep = Sleeps()
    server.fault = lambda body, n: "503" if sleep.now < 25 else None
    budget = BudgetConfig(in_row=3, pauses=3, pause=10.0)
    answers = client_of(server, sleep, retries=0, budget=budget).ask_all([say(str(i)) for i in range(40)])
    assert [a.fault for a in answers] == [Fault.SERVER] * 6 + [None] * 34 and sleep.now == 30


def test_a_share_of_errors_stops_too(server):
    server.fault = lambda body, n: "500" if int(asked(body)) % 3 else None
    budget = BudgetConfig(in_row=100, share=0.5, window=30, pauses=1, pause=5.0)
    with pytest.raises(RewardStopped, match="20 of the last 30 requests failed, after 1 pauses"):
        client_of(server, retries=0, budget=budget).ask_all([say(str(i)) for i in range(100)])
    server.fault = lambda body, n: "500" if int(asked(body)) % 3 == 0 else None  # a third may
    client_of(server, retries=0, budget=budget).ask_all([say(str(i)) for i in range(100)])


def test_waiting_does_not_help_a_model_that_never_answers_in_form(server):
    def read(answer):
        raise Unreadable("gibberish")

    sleep = Sleeps()
    with pytest.raises(RewardStopped, match="5 requests in a row failed, after 0 pauses; the last: unreadable: gibberish; name a cache"):
        client_of(server, sleep, rereads=0, budget=BudgetConfig(in_row=5)).ask_all([say(str(i), read=read) for i in range(50)])
    assert not sleep


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_address_stops_at_once(server, status):
    server.fault = lambda body, n: status
    with pytest.raises(RewardStopped, match=f"refuses: HTTP {status}.*check the url, the model's name and the key"):
        client_of(server).ask_all([say(str(i)) for i in range(50)])
    assert len(server.bodies) == 1


# ---- secrets and settings ----


def test_the_key_is_sent_and_stands_nowhere_else(server, tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "s3cr3t-k3y")
    path = tmp_path / "answers.sqlite"
    server.answer = lambda body: "your key is s3cr3t-k3y"
    client = client_of(server, key_variable="A_KEY", cache=str(path))
    answer = client.ask(say("a"))
    assert server.headers == [("/v1/chat/completions", "Bearer s3cr3t-k3y")] and answer.text == "your key is ***"
    server.fault = lambda body, n: 401  # this server repeats the header
    refused = client.ask(say("b"))
    assert "no: Bearer ***" in refused.reason
    with pytest.raises(RewardStopped) as caught:
        client.ask_all([say("c")])
    client.close()
    told = "".join(map(str, (client.config, client.usage, answer, refused, caught.value, vars(client))))
    assert "s3cr3t" not in told and not any(b"s3cr3t" in file.read_bytes() for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"url": "localhost:8000"}, "the server's url is 'localhost:8000'"),
        ({"url": "http://a:99999/v1"}, "the server's url is"),
        ({"url": "http://me:pw123@h/v1"}, "holds a user name or password"),
        ({"model": ""}, "no model"),
        ({"key_variable": "NO_SUCH_KEY"}, "NO_SUCH_KEY.*is not set"),
        ({"workers": 0}, "workers is 0: give 1 or more"),
        ({"timeout": 0.0}, "timeout is 0.0"),
    ],
)
def test_wrong_settings_are_told(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        ChatClient(ChatConfig(**{"url": "http://h/v1", "model": "m"} | changes))
    assert "pw123" not in str(caught.value)


def test_nobody_there():
    answer = ChatClient(ChatConfig("http://127.0.0.1:9/v1", "m", retries=0)).ask(say("a"))
    assert answer.fault is Fault.CONNECTION and "refused" in answer.reason


def test_what_is_sent(server):
    client_of(server, max_tokens=5, temperature=0.3).ask(say("ä \ud800", parameters={"stop": ["x"]}))
    body = server.bodies[0]
    expected = {"model": "m", "messages": [{"role": "user", "content": "ä \ud800"}], "temperature": 0.3, "max_tokens": 5, "stop": ["x"]}
    assert json.loads(json.dumps(body)) == expected
