"""The clients that people have: OpenAI's own for Python, and curl."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_server import events, served, write_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

HELLO = [{"role": "user", "content": "hello"}]
PROGRAM = """
import json, sys
import openai
client = openai.OpenAI(base_url=sys.argv[1], api_key=sys.argv[2], max_retries=0)
hello, how = [{"role": "user", "content": "hello"}], {"model": "policy", "max_tokens": 8, "temperature": 0}
chat = client.chat.completions.create(messages=hello, logprobs=True, top_logprobs=2, **how)
one = chat.choices[0]
parts = list(client.chat.completions.create(messages=hello, stream=True, stream_options={"include_usage": True}, **how))
text = client.completions.create(prompt=["a", "once"], stop=["qq"], seed=3, logprobs=1, **how)
pieces = list(client.completions.create(prompt="a", stream=True, **how))
def refused(call):
    try:
        call()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.code, error.param]
print(json.dumps({
    "models": [model.id for model in client.models.list()],
    "chat": [one.message.role, one.message.content, one.finish_reason, chat.usage.completion_tokens],
    "logprobs": [[token.token, len(token.top_logprobs)] for token in one.logprobs.content],
    "streamed": ["".join(p.choices[0].delta.content or "" for p in parts if p.choices), parts[-1].usage.completion_tokens],
    "text": [choice.text for choice in text.choices],
    "pieces": "".join(p.choices[0].text for p in pieces),
    "refused": [
        refused(lambda: client.chat.completions.create(messages=hello, model="other")),
        refused(lambda: client.chat.completions.create(messages=[], model="policy")),
        refused(lambda: client.completions.create(prompt="x" * 900, model="policy")),
        refused(lambda: client.with_options(api_key="wrong").models.list()),
    ],
}))
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    os.environ["JAXRL_LLM_TEST_KEY"] = "a-secret-of-this-test"
    with served(write_model(tmp_path_factory.mktemp("model")), key_variable="JAXRL_LLM_TEST_KEY") as found:
        yield found
    del os.environ["JAXRL_LLM_TEST_KEY"]


def asked(here, path, body):
    status, _, said = here.ask(path, body, headers={"Authorization": "Bearer a-secret-of-this-test"})
    assert status == 200, said
    return said


def python_with_openai(repo):
    """A Python that has the client: JAXRL_LLM_SERVE_PYTHON, this one, or the peers'."""
    for python in filter(None, (os.environ.get("JAXRL_LLM_SERVE_PYTHON"), sys.executable, str(repo / ".venvs/hf/bin/python"))):
        if Path(python).exists() and subprocess.run([python, "-c", "import openai"], capture_output=True).returncode == 0:
            return python
    return pytest.skip("no Python with OpenAI's client: pip install openai, or set JAXRL_LLM_SERVE_PYTHON to one that has it")


def test_openais_own_client(here, repo):
    command = [python_with_openai(repo), "-c", PROGRAM, f"http://127.0.0.1:{here.port}/v1", "a-secret-of-this-test"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"PATH": os.environ["PATH"], "NO_PROXY": "*"})
    assert done.returncode == 0, done.stderr[-2000:]
    found, how = json.loads(done.stdout), {"max_tokens": 8, "temperature": 0}
    one = asked(here, "/v1/chat/completions", {"messages": HELLO, "logprobs": True, **how})["choices"][0]
    text = one["message"]["content"]
    assert found["models"] == ["policy"] and found["chat"] == ["assistant", text, one["finish_reason"], 8] and found["streamed"] == [text, 8]
    assert found["logprobs"] == [[token["token"], 2] for token in one["logprobs"]["content"]]
    texts = [choice["text"] for choice in asked(here, "/v1/completions", {"prompt": ["a", "once"], **how})["choices"]]
    assert found["text"] == texts and found["pieces"] == texts[0]
    assert [refusal[:2] for refusal in found["refused"]] == [
        ["NotFoundError", 404], ["BadRequestError", 400], ["BadRequestError", 400], ["AuthenticationError", 401],
    ]  # fmt: skip
    assert found["refused"][0][2:] == ["model_not_found", "model"]


def test_curl(here):
    if not shutil.which("curl"):
        pytest.skip("there is no curl here")

    def curl(path, body=None, *flags):
        sent = [] if body is None else ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        head = ["curl", "-sS", "--noproxy", "*", "-H", "Authorization: Bearer a-secret-of-this-test", *flags]
        return subprocess.run([*head, *sent, f"http://127.0.0.1:{here.port}{path}"], capture_output=True, text=True, check=True, timeout=60).stdout

    body = {"model": "policy", "messages": HELLO, "max_tokens": 8, "temperature": 0}
    text = asked(here, "/v1/chat/completions", body)["choices"][0]["message"]["content"]
    assert json.loads(curl("/v1/chat/completions", body))["choices"][0]["message"]["content"] == text
    *parts, end = events(curl("/v1/chat/completions", body | {"stream": True}, "-N"))
    assert end == "[DONE]" and "".join(part["choices"][0]["delta"].get("content") or "" for part in parts) == text
    assert json.loads(curl("/health"))["status"] == "ok" and "jaxrl_llm_requests_total" in curl("/metrics")
    assert curl("/v1/completions", {"promt": "a"}, "-o", os.devnull, "-w", "%{http_code}") == "400"
