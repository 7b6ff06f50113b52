"""A model, problems with faults in known places, and settings small enough for a test of curation; also used by subprocesses."""

import json

import jax

import models
from jaxrl_llm.config import load_config
from jaxrl_llm.data.lab_world import build_tokenizer, generate_problems
from jaxrl_llm.rewards import registry
from jaxrl_llm.rewards.verdict import Status, Verdict

N = 90

SMALL = {
    "data.on_bad": "skip",
    "data.topic": "topic",
    "features.min_rows": "2",
    "features.max_share": "1.0",
    "features.batch_tokens": "512",
    "features.shard_rows": "40",
    "train_sae.steps": "4",
    "train_sae.batch_size": "64",
    "train_sae.buffer_rows": "256",
    "train_sae.expansion": "3",
    "train_sae.k": "4",
    "clusters.k": "6",
    "clusters.dims": "8",
    "clusters.restarts": "1",
    "difficulty.labels": "level",
    "difficulty.models": "ridge",
    "difficulty.folds": "2",
    "quality.samples": "40",
    "schedule.batch_size": "8",
    "bootstrap": "20",
}
ROLLOUTS = {
    "difficulty.labels": "rollouts",
    "difficulty.reward": "short_words",
    "difficulty.samples": "4",
    "difficulty.max_new_tokens": "3",
    "difficulty.max_prompt_tokens": "16",
    "difficulty.max_labels": "40",
    "difficulty.batch_prompts": "16",
}


@registry.register("short_words")
def short_words():
    """PASS for a response of few letters: a random model passes it now and then, so pass rates differ."""
    return lambda inputs: [Verdict(Status.PASS if len(item.response) < 12 else Status.FAIL) for item in inputs]


def save_model(folder, seed=0, d_model=16, layers=2, tokenizer=None):
    """A random model that reads the lab's world, as a Hugging Face folder with its tokenizer."""
    tokenizer = build_tokenizer() if tokenizer is None else tokenizer
    hf = dict(model_type="llama", vocab_size=len(tokenizer), hidden_size=d_model, num_hidden_layers=layers, num_attention_heads=2)
    hf |= dict(intermediate_size=24, max_position_embeddings=24, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)
    cfg = models.ModelConfig.from_hf(hf)
    models.save(folder, cfg, models.init(cfg, jax.random.key(seed)))
    tokenizer.save_pretrained(folder)


def save_world(folder):
    """FOLDER/model and FOLDER/rows.jsonl: N problems with faults in known places, a broken line and an empty prompt."""
    save_model(folder / "model")
    rows = [{k: r[k] for k in ("id", "prompt", "answer", "topic", "level")} for r in generate_problems(N, seed=0)]
    rows[5]["prompt"] = rows[4]["prompt"]
    rows[7]["answer"] = ""
    rows[9]["prompt"] = " ".join(["count red in"] + ["red blue"] * 20 + ["="])
    lines = [json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join([*lines, "{broken", json.dumps({"id": "blank", "prompt": " "})]) + "\n")
    return folder


def config_of(world, **changes):
    """configs/curate.py for that world, with changes."""
    overrides = {"model": str(world / "model"), "data.source": str(world / "rows.jsonl"), **SMALL, **changes}
    return load_config("configs/curate.py", overrides)
