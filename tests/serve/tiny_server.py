"""A random model over bytes with a chat template, served on the loopback, and HTTP by hand."""

import contextlib
import http.client
import json
import threading
from types import SimpleNamespace

import jax
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from transformers import PreTrainedTokenizerFast

import models
from jaxrl_llm.commands import serve
from jaxrl_llm.config import load_config

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {"</s>": 0} | {letter: i + 1 for i, letter in enumerate(LETTERS)}


def tokenizer_of(template):
    core = Tokenizer(token_models.BPE(VOCABULARY, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", chat_template=template)


def write_model(folder, template=TEMPLATE):
    """A Hugging Face folder."""
    sizes = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 2048, "eos_token_id": 0, "architectures": ["LlamaForCausalLM"]}
    cfg = models.ModelConfig.from_hf({"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, **sizes})
    params = jax.tree.map(lambda a: a * 4 if a.ndim > 1 else a, models.init(cfg, jax.random.key(1)))
    models.save(folder, cfg, params, tokenizer_from=tokenizer_of(template))
    return folder


SMALL = {"port": "0", "places": "8", "max_prompt_tokens": "64", "max_tokens": "64", "window_ms": "20", "drain": "5"}


@contextlib.contextmanager
def served(folder, **changes):
    """A server of the model; its `port`, `ask(path, body)` and the server itself."""
    config = load_config("configs/serve.py", SMALL | {"model": str(folder)} | {name: str(value) for name, value in changes.items()})
    server = serve.make_server(config)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    port = server.server_address[1]
    try:
        yield SimpleNamespace(port=port, server=server, ask=lambda path, body, **how: ask(port, path, body, **how), config=config)
    finally:
        serve.end(server, 1.0)


def ask(port, path, body=None, headers=None, method=None, timeout=60):
    """(status, headers, what was said: JSON where it is some). A body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method or ("GET" if raw is None else "POST"), path, raw, {"Content-Type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        said = response.read().decode()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, dict(response.headers), json.loads(said) if is_json else said
    finally:
        connection.close()


def events(said):
    """The data of server-sent events."""
    lines = [line.removeprefix("data: ") for line in said.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
