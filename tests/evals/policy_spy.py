"""Who answers in `jaxrl-llm eval`, without a model or a server: what they are told is written down, and they answer by it."""

import hashlib
from types import SimpleNamespace

import models
import models.lora
from jaxrl_llm import runtime
from jaxrl_llm.commands import generate
from jaxrl_llm.rewards import chat

SERVED = {"model": "", "url": "http://127.0.0.1:9/v1", "name": "p"}
POLICY = {  # field of a config's policy -> another value, and what else it needs
    "model": ("other", {}), "adapter": ("folder", {}), "dtype": ("bfloat16", {}), "mesh": ("data=1", {}),
    "url": ("http://127.0.0.1:9/v2", SERVED), "name": ("q", SERVED), "key_variable": ("POLICY_KEY", SERVED), "workers": ("3", SERVED),
    "timeout": ("5.0", SERVED), "template": ("Q: {prompt} A:", {}), "max_prompt_tokens": ("20", {"overflow": "truncate"}),
    "overflow": ("drop", {"max_prompt_tokens": "20", "overflow": "truncate"}),
    "max_new_tokens": ("7", {}), "temperature": ("0.7", {}), "batch_prompts": ("1", {}), "seed": ("5", {"temperature": "0.7"}),
}  # fmt: skip


def tokenizer():
    """One token a character, with a chat template that adds two."""
    class Tokenizer:
        chat_template, bos_token_id, eos_token_id, pad_token_id, name_or_path = "yes", None, None, 0, "spy"

        def __call__(self, texts, **_):
            return {"input_ids": [[ord(letter) % 97 + 1 for letter in text] for text in texts]}

        def apply_chat_template(self, chat, **_):
            return "<" + "|".join(f"{message['role']}:{message['content']}" for message in chat) + ">"

    return Tokenizer()


def install(patch, seen):
    """Patches what answers; `seen` gets what it is told."""
    def load(source, dtype=None, mesh=None):
        seen.append(("load", source, dtype, mesh))
        return SimpleNamespace(max_position=40_000), {}

    def samples(_, cfg, params, __, batch, settings, mesh, edits):
        seen.append(("samples", batch.token_lists(), settings.to_dict(), mesh))
        for name, tokens in zip(batch.ids, batch.token_lists()):
            text = hashlib.sha256(repr((tokens, settings.to_dict())).encode()).hexdigest()
            yield {"id": name, "completion": text, "tokens": len(text), "finish": "length"}

    def ask_all(client, requests, progress=None):
        seen.append(("asked", client.config.url, [client.body(request) for request in requests], repr(client.config)))
        return [chat.Answer(hashlib.sha256(repr(client.body(request)).encode()).hexdigest()) for request in requests]

    patch.setenv("POLICY_KEY", "k")
    patch.setattr(models, "load", load)
    patch.setattr(models, "load_tokenizer", lambda source: tokenizer())
    patch.setattr(runtime, "parse_mesh", lambda text: seen.append(("mesh", text)) or (text or None))
    patch.setattr(models.lora, "load_lora", lambda folder, cfg: seen.append(("adapter", folder)) or ({}, SimpleNamespace(scale=2.0)))
    patch.setattr(models.lora, "merge", lambda params, adapter, scale: seen.append(("merge", scale)) or params)
    patch.setattr(generate, "samples_of", samples)
    patch.setattr(chat.ChatClient, "ask_all", ask_all)
