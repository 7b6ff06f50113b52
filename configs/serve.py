"""Serve a model behind the OpenAI API: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.

    jaxrl-llm serve --config.model=FOLDER
    jaxrl-llm serve --config.model=FOLDER --config.host=0.0.0.0 --config.key_variable=SERVE_KEY
"""

import ml_collections

VARIANTS = ()


def get_config(variant: str | None = None) -> ml_collections.ConfigDict:
    """The config."""
    config = ml_collections.ConfigDict()
    config.model = ""  # Hugging Face folder or hub id
    config.adapter = ""  # PEFT folder of a low-rank adapter of that model, such as the WORKDIR/adapter of a training run; empty = none
    config.dtype = "float32"  # of parameters and activations: float32 or bfloat16
    config.name = "policy"  # of the model, as requests call it
    config.host = "127.0.0.1"  # address to listen at; one that others reach needs a key
    config.port = 8000  # 0 takes a free one, which the first line printed names
    config.key_variable = ""  # environment variable that holds the token which requests must bear; empty = none is needed

    config.places = 16  # completions decoded at once
    config.max_prompt_tokens = 1024  # most tokens of a prompt; with max_tokens at most the model's context
    config.max_tokens = 1024  # most tokens of a completion
    config.chunk = 8  # tokens decoded between two looks at who waits, has a stop string, or is gone
    config.window_ms = 5.0  # milliseconds that an idle server waits for other requests, to decode them together

    config.queue = 256  # completions that may wait; more are answered 429
    config.connections = 256  # open at once; more are answered 503
    config.body_bytes = 1048576  # most bytes of a request
    config.timeout = 600.0  # seconds for a request, its waiting included
    config.drain = 30.0  # seconds after SIGTERM in which those under way may end
    return config
