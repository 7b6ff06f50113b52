"""`jaxrl-llm serve` by raw HTTP: answers equal generate's, many at once, streams, limits, and that a bad request hurts no one else."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_server import SMALL, ask, events, served, tokenizer_of, write_model

import models
from jaxrl_llm.commands import serve
from jaxrl_llm.config import field_names, load_config
from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.chat import ChatClient, ChatConfig
from jaxrl_llm.rewards.judge import Judge, JudgeConfig, Question
from jaxrl_llm.rewards.verdict import SCORED, Status

pytestmark = pytest.mark.usefixtures("quick_compilation")

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    cfg, params = models.load(folder)
    return cfg, params, models.load_tokenizer(folder)


@pytest.fixture(scope="module")
def here(folder):
    with served(folder) as found:
        yield found


def generated(model, prompts, **how):
    """What models.generate writes for texts, as texts and tokens."""
    cfg, params, tokenizer = model
    rollout = models.generate(cfg, params, [tokenizer(p)["input_ids"] for p in prompts], tokenizer=tokenizer, **how)
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in rollout.completions()], rollout


# ---- what is answered ----


def test_greedy_completions_are_those_of_generate(here, model):
    prompts = ["a", "once upon a time", "äöü", "x" * 64]
    wanted, rollout = generated(model, prompts, max_new_tokens=40, temperature=0.0)
    status, _, said = here.ask(TEXT, {"model": "policy", "prompt": prompts, "max_tokens": 40, "temperature": 0})
    assert status == 200 and [choice["text"] for choice in said["choices"]] == wanted
    assert [choice["index"] for choice in said["choices"]] == [0, 1, 2, 3] and said["object"] == "text_completion"
    read, written = int(rollout.prompt_lengths_N.sum()), int(rollout.completion_lengths_N.sum())
    assert said["usage"] == {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    ids = [model[2](p)["input_ids"] for p in prompts]
    assert here.ask(TEXT, {"prompt": ids, "max_tokens": 40, "temperature": 0})[2]["choices"] == said["choices"]


@pytest.mark.parametrize("how", [{"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.5}, {"top_k": 9, "top_p": 0.5}])
def test_samples_are_those_of_generate_with_the_same_seed(here, model, how):
    wanted, _ = generated(model, ["once"], max_new_tokens=24, num_samples=3, seed=7, **how)
    said = here.ask(TEXT, {"prompt": "once", "max_tokens": 24, "n": 3, "seed": 7, **how})[2]
    assert [choice["text"] for choice in said["choices"]] == wanted and len(set(wanted)) == 3
    assert here.ask(TEXT, {"prompt": "once", "max_tokens": 24, "n": 3, "seed": 8, **how})[2]["choices"] != said["choices"]


def test_log_probabilities_are_the_models(here, model):
    cfg, params, tokenizer = model
    said = here.ask(TEXT, {"prompt": "abc", "max_tokens": 12, "temperature": 1.3, "seed": 1, "logprobs": 4})[2]["choices"][0]
    prompt = tokenizer("abc")["input_ids"]
    rollout = generated(model, ["abc"], max_new_tokens=12, temperature=1.3, seed=1)[1]
    tokens = rollout.completions()[0]
    logits, _ = models.apply(cfg, params, np.array([prompt + tokens]))
    logps = np.asarray(logits[0, len(prompt) - 1 : -1], np.float64)
    logps -= np.log(np.exp(logps - logps.max(-1, keepdims=True)).sum(-1, keepdims=True)) + logps.max(-1, keepdims=True)
    found = said["logprobs"]
    np.testing.assert_allclose(found["token_logprobs"], logps[np.arange(len(tokens)), tokens], atol=1e-4)
    for row, tops in zip(logps, found["top_logprobs"], strict=True):
        best = np.sort(row)[-4:]  # tokens that are spelt alike (bytes of letters) are one
        assert np.isclose(max(tops.values()), best[-1], atol=1e-4) and all(np.isclose(p, best, atol=1e-4).any() for p in tops.values())
    assert found["text_offset"][0] == 0 and found["text_offset"][-1] == sum(map(len, found["tokens"][:-1]))
    chat = here.ask(CHAT, HELLO | {"logprobs": True, "top_logprobs": 2})[2]["choices"][0]["logprobs"]["content"]
    assert all(entry["logprob"] == entry["top_logprobs"][0]["logprob"] and len(entry["top_logprobs"]) == 2 for entry in chat)
    bare = here.ask(CHAT, HELLO | {"logprobs": True})[2]["choices"][0]["logprobs"]["content"]
    assert bare[0]["top_logprobs"] == [] and bare[0]["bytes"] == list(bare[0]["token"].encode())


def test_a_chat_is_its_template(here, model):
    text = "[system]be kind\n[user]hello\n[assistant]"
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    said = here.ask(CHAT, HELLO | {"messages": chat})[2]
    plain = here.ask(TEXT, {"prompt": text, "max_tokens": 8, "temperature": 0})[2]
    assert said["choices"][0]["message"] == {"role": "assistant", "content": plain["choices"][0]["text"]}
    assert said["object"] == "chat.completion" and said["usage"] == plain["usage"]
    assert here.ask(CHAT, HELLO | {"max_completion_tokens": 3, "max_tokens": None})[2]["usage"]["completion_tokens"] <= 3


def test_stop_strings_cut_before_them(here, model):
    whole = here.ask(TEXT, {"prompt": "hi", "max_tokens": 40, "temperature": 0})[2]
    text = whole["choices"][0]["text"]
    stop = text[9:12]
    at = min(text.find(stop), 9)
    for body in ({"stop": stop}, {"stop": ["never there", stop]}, {"stop": stop, "stream": True}):
        status, _, said = here.ask(TEXT, {"prompt": "hi", "max_tokens": 40, "temperature": 0, **body})
        parts = [e["choices"][0] for e in events(said)[:-1]] if body.get("stream") else said["choices"]
        assert status == 200 and "".join(part["text"] for part in parts) == text[:at] and parts[-1]["finish_reason"] == "stop"
    short = here.ask(TEXT, {"prompt": "hi", "max_tokens": 40, "temperature": 0, "stop": stop})[2]["usage"]
    assert short["completion_tokens"] < whole["usage"]["completion_tokens"]


def test_finish_reasons(here, model):
    said = here.ask(TEXT, {"prompt": "hi", "max_tokens": 3, "temperature": 0})[2]["choices"][0]
    assert said["finish_reason"] == "length"
    _, rollout = generated(model, ["q"], max_new_tokens=64, num_samples=32, seed=0, temperature=3.0)
    said = here.ask(TEXT, {"prompt": "q", "max_tokens": 64, "n": 32, "seed": 0, "temperature": 3.0})[2]["choices"]
    assert [choice["finish_reason"] == "stop" for choice in said] == (rollout.finish_reason_N == 1).tolist()
    assert 0 < sum(rollout.finish_reason_N == 1) < 32


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_stream_adds_up_to_the_answer(here, path):
    body = {"max_tokens": 40, "temperature": 1.0, "seed": 3, "n": 2} | ({"prompt": "hi"} if path == TEXT else {"messages": HELLO["messages"]})
    body |= {"logprobs": 1} if path == TEXT else {"logprobs": True, "top_logprobs": 1}
    whole = here.ask(path, body)[2]
    status, headers, said = here.ask(path, body | {"stream": True, "stream_options": {"include_usage": True}})
    chunks = events(said)
    assert status == 200 and headers["Content-Type"] == "text/event-stream" and chunks[-1] == "[DONE]"
    assert chunks[-2]["usage"] == whole["usage"] and chunks[-2]["choices"] == [] and len({chunk["id"] for chunk in chunks[:-1]}) == 1
    for choice in whole["choices"]:
        own = [c for chunk in chunks[:-2] for c in chunk["choices"] if c["index"] == choice["index"]]
        text = "".join(c["text"] if path == TEXT else c["delta"].get("content", "") for c in own)
        assert text == (choice["text"] if path == TEXT else choice["message"]["content"])
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]] and len(own) > 3
        name = "token_logprobs" if path == TEXT else "content"
        told = [entry for c in own if c["logprobs"] for entry in c["logprobs"][name]]
        numbers = [[entry if path == TEXT else entry["logprob"] for entry in entries] for entries in (told, choice["logprobs"][name])]
        np.testing.assert_allclose(*numbers, atol=1e-5)


def test_echo(here):
    said = here.ask(TEXT, {"prompt": "hi", "max_tokens": 5, "temperature": 0, "echo": True})[2]["choices"][0]["text"]
    streamed = events(here.ask(TEXT, {"prompt": "hi", "max_tokens": 5, "temperature": 0, "echo": True, "stream": True})[2])
    assert said.startswith("hi") and "".join(e["choices"][0]["text"] for e in streamed[:-1]) == said


def test_models_health_and_metrics(here):
    assert here.ask("/v1/models", None)[2]["data"][0]["id"] == "policy" == here.ask("/v1/models/policy", None)[2]["id"]
    assert here.ask("/health", None)[::2] == (200, {"status": "ok"})
    here.ask(TEXT, {"prompt": "hi", "max_tokens": 5})
    text = here.ask("/metrics", None)[2]
    numbers = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if not line.startswith("#")}
    assert numbers['jaxrl_llm_requests_total{path="/v1/completions",status="200"}'] >= 1 and numbers["jaxrl_llm_completion_tokens_total"] >= 1
    assert numbers["jaxrl_llm_waiting"] == 0 and numbers['jaxrl_llm_request_seconds_bucket{le="+Inf"}'] == numbers["jaxrl_llm_request_seconds_count"]


# ---- many at once ----


def test_sixty_four_clients_and_none_is_dropped(here, model):
    """Different lengths, temperatures and stops side by side: each gets what it would get alone."""
    bodies = [{"prompt": f"client {i}", "max_tokens": 5 + i % 30, "temperature": (0, 0.9)[i % 2], "seed": i} for i in range(64)]
    engine, turn, before, until = here.server.engine, here.server.engine._turn, here.server.engine.chunks, time.monotonic() + 60

    def when_all_are_there(places):
        while sum(engine.load()) < 64 and time.monotonic() < until:
            time.sleep(0.01)
        engine._turn = turn
        return turn(places)

    engine._turn = when_all_are_there
    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda body: here.ask(TEXT, body), bodies))
    assert [status for status, _, _ in found] == [200] * 64
    for i in (10, 21, 32, 43, 54, 63):
        _, rollout = generated(model, [f"client {i}"], max_new_tokens=34, temperature=(0.0, 0.9)[i % 2], seed=i)
        assert found[i][2]["choices"][0]["text"] == model[2].decode(rollout.completions()[0][: 5 + i % 30], skip_special_tokens=True)
    tokens = sum(said["usage"]["completion_tokens"] for _, _, said in found)
    assert engine.most_at_once == 8 and (engine.chunks - before) * 8 < tokens / 2  # together, not one by one


def test_an_idle_server_waits_a_moment_for_others(folder, monkeypatch):
    moments = []

    def slept(seconds):
        """The window ends when all three are there, and not before: a busy machine has them sent late."""
        moments.append(seconds)
        until = time.monotonic() + 60
        while found.server.engine.load()[0] < 3 and time.monotonic() < until:
            pause(0.01)

    for window, most in (("300", 3), ("0", 1)):
        with monkeypatch.context() as patch, served(folder, window_ms=window, chunk=64) as found:
            pause = time.sleep
            patch.setattr("jaxrl_llm.serve.engine.time", SimpleNamespace(sleep=slept, monotonic=time.monotonic))
            first = threading.Thread(target=found.ask, args=(TEXT, {"prompt": "a", "max_tokens": 1}))
            first.start()
            if window == "0":
                first.join()
            rest = [threading.Thread(target=found.ask, args=(TEXT, {"prompt": "a", "max_tokens": 1})) for _ in range(2 if window != "0" else 0)]
            for thread in rest:
                thread.start()
            for thread in [first, *rest]:
                thread.join()
            assert found.server.engine.most_at_once == most and moments == [0.3]
            patch.undo()


# ---- what is refused ----

BAD = [
    (TEXT, b"{", 400, "no JSON"),
    (TEXT, b"[" * 100_000, 400, "no JSON"),
    (TEXT, b"\xff\xfe", 400, "no JSON"),
    (TEXT, [1], 400, "no JSON object"),
    (TEXT, {}, 400, "prompt is None"),
    (TEXT, {"prompt": []}, 400, "prompt is"),
    (TEXT, {"prompt": ""}, 400, "0 tokens"),
    (TEXT, {"prompt": [1, 10**6]}, 400, "prompt is"),
    (TEXT, {"prompt": [True]}, 400, "prompt is"),
    (TEXT, {"prompt": "x" * 65}, 400, "65 tokens; it may have 1 to 64"),
    (TEXT, {"prompt": "\ud800"}, 400, "cannot be tokenised"),
    (TEXT, {"prompt": "x", "max_tokens": 65}, 400, "max_tokens is 65"),
    (TEXT, {"prompt": "x", "max_tokens": 0}, 400, "max_tokens is 0"),
    (TEXT, {"prompt": "x", "max_tokens": "9"}, 400, "max_tokens is '9'"),
    (TEXT, {"prompt": "x", "max_tokens": True}, 400, "max_tokens is True"),
    (TEXT, b'{"prompt": "x", "temperature": NaN}', 400, "temperature is nan"),
    (TEXT, {"prompt": "x", "temperature": -1}, 400, "temperature is -1"),
    (TEXT, {"prompt": "x", "top_p": 0}, 400, "top_p is 0"),
    (TEXT, {"prompt": "x", "n": 1000}, 400, "n is 1000"),
    (TEXT, {"prompt": "x", "logprobs": 21}, 400, "logprobs is 21"),
    (TEXT, {"prompt": "x", "stop": [""]}, 400, "stop is"),
    (TEXT, {"prompt": "x", "stop": ["a"] * 17}, 400, "stop is"),
    (TEXT, {"prompt": "x", "stream": "yes"}, 400, "stream is 'yes'"),
    (TEXT, {"prompt": "x", "temprature": 1}, 400, "did you mean temperature"),
    (TEXT, {"prompt": "x", "presence_penalty": 0.5}, 400, "presence_penalty is not served"),
    (TEXT, {"prompt": "x", "best_of": 2}, 400, "best_of is not served"),
    (TEXT, {"prompt": "x", "echo": True, "logprobs": 1}, 400, "echo together with logprobs"),
    (TEXT, {"prompt": "x", "model": "other"}, 404, "'other' is not here"),
    (CHAT, {"messages": []}, 400, "messages is no list"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "content is None"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "a text, or a list of parts"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "refuses these messages: no role wizard"),
    (CHAT, HELLO | {"top_logprobs": 2}, 400, "top_logprobs needs logprobs"),
    (CHAT, HELLO | {"tools": [{"type": "function"}]}, 400, "tools is not served"),
    (CHAT, HELLO | {"response_format": {"type": "json_object"}}, 400, "response_format is not served"),
    ("/v1/embeddings", {"input": "x"}, 404, "nothing at /v1/embeddings"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), BAD)
def test_bad_requests_are_told(here, path, body, status, message):
    found = here.ask(path, body)
    assert found[0] == status and message in found[2]["error"]["message"] and found[2]["error"]["type"] == "invalid_request_error"


def test_harmless_fields_are_taken(here):
    neutral = {"user": "me", "metadata": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": None, "n": 1, "stop": None}
    assert here.ask(TEXT, {"prompt": "x", "max_tokens": 2, **neutral})[0] == 200


def test_bad_http_is_refused(here):
    def raw(data):
        with socket.create_connection(("127.0.0.1", here.port), timeout=20) as s:
            s.sendall(data)
            return s.recv(65536).decode(errors="replace")

    post = "POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n"
    big = here.config.body_bytes + 1
    assert " 413 " in raw(f"{post}Content-Length: {big}\r\n\r\n".encode())
    assert " 413 " in raw(f"{post}Content-Length: {'9' * 4000}\r\n\r\n".encode())
    assert " 411 " in raw(f"{post}\r\n".encode()) and " 411 " in raw(f"{post}Content-Length: -5\r\n\r\n".encode())
    assert " 411 " in raw(f"{post}Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".encode())
    assert " 415 " in raw(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}")
    assert " 400 " in raw(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n") and " 501 " in raw(b"BREW / HTTP/1.1\r\nHost: h\r\n\r\n")
    assert " 431 " in raw(b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n")
    assert here.ask(TEXT, None, method="GET")[0] == 405


def test_the_bad_hurt_no_one_else(here, model):
    """Half the clients send what is refused, hang up or never end, while the others are answered."""
    wanted = generated(model, ["steady"], max_new_tokens=40, temperature=0.0)[0][0]
    good = {"prompt": "steady", "max_tokens": 40, "temperature": 0}

    def client(i):
        kind = i % 4
        if kind == 0:
            return ask(here.port, TEXT, BAD[i % len(BAD)][1])[0]
        if kind == 1:  # leaves in the middle of a stream
            with socket.create_connection(("127.0.0.1", here.port)) as s:
                body = json.dumps(good | {"stream": True, "max_tokens": 64}).encode()
                head = f"POST {TEXT} HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                s.sendall(head.encode() + body)
                s.recv(10)
            return None
        said = ask(here.port, TEXT, good)
        return said[0] == 200 and said[2]["choices"][0]["text"] == wanted

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(client, range(48)))
    assert all(f is True for i, f in enumerate(found) if i % 4 >= 2) and all(f and f >= 400 for f in found[::4])
    until = time.monotonic() + 60
    while here.server.engine.load() != (0, 0) and time.monotonic() < until:  # places of those who left are free again
        time.sleep(0.05)
    assert here.server.engine.load() == (0, 0)


def test_a_full_queue_is_told_and_the_rest_is_answered(folder):
    with served(folder, places=1, queue=2, chunk=1) as found:
        engine, turn, refused = found.server.engine, found.server.engine._turn, threading.Event()
        engine._turn = lambda places: refused.wait(60) and turn(places)  # none is answered before all places are taken
        with ThreadPoolExecutor(12) as pool:
            sent = [pool.submit(found.ask, TEXT, {"prompt": "x", "max_tokens": 60, "seed": i}) for i in range(12)]
            wait(sent, return_when=FIRST_COMPLETED)
            refused.set()
            said = [future.result() for future in sent]
        statuses = [s[0] for s in said]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 2
        assert next(s for s in said if s[0] == 429)[1]["Retry-After"] == "1"
        assert found.ask(TEXT, {"prompt": "x", "n": 3})[0] == 429 and found.ask(TEXT, {"prompt": "x", "n": 2})[0] == 200


def test_time_and_connections_have_limits(folder):
    with served(folder, timeout=0.5, connections=2) as found:
        engine, turn = found.server.engine, found.server.engine._turn
        engine._turn = lambda places: time.sleep(1.0) or turn(places)
        status, _, said = found.ask(TEXT, {"prompt": "x", "max_tokens": 60})
        assert status == 504 and "no answer within 0.5 s" in said["error"]["message"]
        engine._turn = turn
        until, status = time.monotonic() + 10, 0
        while status != 503 and time.monotonic() < until:  # the server takes its time to accept both, and ends each that says nothing for 0.5 s
            held = [socket.create_connection(("127.0.0.1", found.port)) for _ in range(2)]
            time.sleep(0.05)
            status = found.ask("/health", None)[0]
            for s in held:
                s.close()
        assert status == 503
        until = time.monotonic() + 10
        while found.ask("/health", None)[0] != 200 and time.monotonic() < until:
            time.sleep(0.05)
        with socket.create_connection(("127.0.0.1", found.port)) as slow:  # sends half a body and waits
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in slow.recv(1000)


def test_decoding_that_fails_is_told_and_the_server_goes_on(folder, capfd):
    with served(folder) as found:
        engine, turn = found.server.engine, found.server.engine._turn

        def fail(places):
            turn(places)
            engine._turn = turn
            raise MemoryError("no room")

        engine._turn = fail
        status, _, said = found.ask(TEXT, {"prompt": "x", "max_tokens": 60})
        assert status == 500 and said["error"]["type"] == "server_error"
        assert found.ask(TEXT, {"prompt": "x", "max_tokens": 6})[0] == 200 and "no room" in capfd.readouterr().out


def test_a_token_is_asked_for(folder, monkeypatch):
    monkeypatch.setenv("SERVE_KEY", "s3cr3t")
    with served(folder, key_variable="SERVE_KEY") as found:
        for path, body in ((TEXT, {"prompt": "x"}), ("/v1/models", None), ("/metrics", None)):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}):
                status, _, said = found.ask(path, body, headers=headers)
                assert status == 401 and "s3cr3t" not in str(said)
            assert found.ask(path, body, headers={"Authorization": "Bearer s3cr3t"})[0] == 200
        assert found.ask("/health", None)[0] == 200
        client = ChatClient(ChatConfig(f"http://127.0.0.1:{found.port}/v1", "policy", key_variable="SERVE_KEY", max_tokens=4))
        assert client._wire.post("/completions", b'{"prompt": "x"}', {"Content-Type": "application/json"}, 20)[0] == 401


def test_without_a_chat_template_chats_are_refused_and_completions_are_not(tmp_path):
    with served(write_model(tmp_path / "m", template=None)) as found:
        status, _, said = found.ask(CHAT, HELLO)
        assert status == 400 and said["error"]["code"] == "no_chat_template" and "/v1/completions" in said["error"]["message"]
        assert found.ask(TEXT, {"prompt": "x"})[0] == 200


# ---- the judge on it ----


def test_a_judge_that_is_a_local_model(here, folder):
    """A random model says nothing in form, which is INFRASTRUCTURE; its log-probabilities can be read, and are the same each time."""
    questions = [Question("Which letter?", {"R": text}, tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")) for text in ("x", "y", "z")]
    client = lambda found: ChatClient(ChatConfig(f"http://127.0.0.1:{found.port}/v1", "policy", max_tokens=8, retries=0, rereads=0))  # noqa: E731
    verdict = Judge(client(here)).decide(questions)[0]  # the prompt is longer than this server takes
    assert verdict.status is Status.INFRASTRUCTURE and "HTTP 400" in verdict.reason
    with served(folder, max_prompt_tokens=1900) as found:
        assert {v.status for v in Judge(client(found)).decide(questions)} == {Status.INFRASTRUCTURE}
        judge = Judge(client(found), JudgeConfig(mode="logprobs", graded=True))
        verdicts = judge.decide(questions)
        assert {v.status for v in verdicts} <= SCORED and all(0 <= v.value <= 1 for v in verdicts)
        shares = [opinion[0].shares for opinion in judge.opinions(questions)]
        assert all(abs(sum(share.values()) - 1) < 1e-6 for share in shares) and judge.client.usage.prompt_tokens > 3000


# ---- the verb ----


def test_sigterm_ends_it_when_all_are_answered(folder, repo, tmp_path):
    arguments = [f"--config.{name}={value}" for name, value in (SMALL | {"model": str(folder), "drain": "300"}).items()]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(repo), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    process = subprocess.Popen([sys.executable, "-m", "jaxrl_llm", "serve", *arguments], stdout=subprocess.PIPE, text=True, cwd=repo, env=environment)
    try:
        first = process.stdout.readline()
        assert first.startswith("serving policy at http://127.0.0.1:")
        port = int(first.rpartition(":")[2].removesuffix("/v1\n"))
        with ThreadPoolExecutor(8) as pool:
            found = [pool.submit(ask, port, TEXT, {"prompt": "x", "max_tokens": 64, "n": 8, "seed": i}) for i in range(8)]
            until = time.monotonic() + 60
            while "jaxrl_llm_decoding 0" in ask(port, "/metrics")[2] and time.monotonic() < until:
                pass
            process.send_signal(signal.SIGTERM)
            answers = [future.result() for future in found]
        # Those that had been taken are answered whole; one that came later is told so.
        assert {status for status, _, _ in answers} <= {200, 503} and [a[0] for a in answers].count(200) >= 1
        assert all(len(said["choices"]) == 8 for status, _, said in answers if status == 200)
        assert process.wait(300) == 0 and "stopped; all requests were answered" in process.stdout.read()
    finally:
        process.kill()
        process.stdout.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "no model"),
        ({"host": "0.0.0.0"}, "which others reach"),
        ({"host": "example.org"}, "which others reach"),
        ({"key_variable": "NO_SUCH_KEY"}, "NO_SUCH_KEY.*is not set"),
        ({"max_tokens": "3000"}, "context of 2048"),
        ({"places": "0"}, "'places' is 0"),
        ({"dtype": "int8"}, "'dtype' is"),
    ],
)
def test_wrong_configs_are_told(folder, changes, message):
    with pytest.raises(UserError, match=message):
        serve.make_server(load_config("configs/serve.py", SMALL | {"model": str(folder)} | changes))


def test_an_address_in_use_is_told(folder, here):
    with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{here.port}"):
        serve.make_server(load_config("configs/serve.py", SMALL | {"model": str(folder), "port": str(here.port)}))


def test_every_field_reaches_what_it_is_for(folder, monkeypatch):
    seen = {}
    import jaxrl_llm.serve.engine as engine_module
    import jaxrl_llm.serve.server as server_module

    load = models.load

    def fake_load(source, dtype, mesh):
        seen.update(model=source, dtype=dtype)
        return load(source, dtype=dtype)

    class Engine:
        def __init__(self, cfg, params, **how):
            seen.update(how)

    monkeypatch.setattr(models, "load", fake_load)
    monkeypatch.setattr(engine_module, "Engine", Engine)
    monkeypatch.setattr(server_module, "Server", lambda host, port, e, t, name, limits: seen.update(host=host, port=port, name=name, limits=limits))
    monkeypatch.setattr(serve, "warm_up", lambda engine: None)
    monkeypatch.setenv("K", "k")
    values = {"dtype": "bfloat16", "name": "n", "host": "::1", "port": 1, "key_variable": "K", "places": 3, "max_prompt_tokens": 4, "max_tokens": 5}
    values |= {"chunk": 6, "window_ms": 7.0, "queue": 8, "connections": 9, "body_bytes": 10, "timeout": 11.0, "model": str(folder)}
    config = load_config("configs/serve.py", {name: str(value) for name, value in values.items()})
    serve.make_server(config)
    # drain: of the verb's end, above; adapter: tests/train/test_lora_training.py
    assert set(values) | {"drain", "adapter"} == set(field_names(config))
    assert (seen["places"], seen["prompt_tokens"], seen["new_tokens"], seen["chunk"], seen["window"], seen["waiting"]) == (3, 4, 5, 6, 0.007, 8)
    assert seen["limits"] == server_module.Limits(10, 11.0, 9, "k") and (seen["host"], seen["port"], seen["name"]) == ("::1", 1, "n")
    assert (seen["model"], seen["dtype"]) == (str(folder), "bfloat16")


# ---- a real checkpoint ----


def test_the_real_stories_model(assets):
    source = assets / "checkpoints" / "stories260k"
    opening = "Once upon a time, there was a little girl named Lily."
    with served(source, max_prompt_tokens=384, max_tokens=96) as found:
        said = found.ask(TEXT, {"prompt": opening, "max_tokens": 40, "temperature": 0})[2]["choices"][0]["text"]
        assert said.startswith(" She loved to play outside in the park. One day, she saw a big, red ball.")
        cfg, params = models.load(source)
        alone = generated((cfg, params, models.load_tokenizer(source)), [opening], max_new_tokens=40, temperature=0.0)[0][0]
        assert said == " " + alone  # this tokenizer drops the space that a text begins with
        assert found.ask(CHAT, HELLO)[0] == 400


def test_the_tokenizer_of_the_tests_spells_bytes():
    tokenizer = tokenizer_of(None)
    assert tokenizer.decode(tokenizer("äb </s>")["input_ids"]) == "äb </s>"
