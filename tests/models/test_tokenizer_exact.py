"""tokenizer.json is read as it is, whatever class transformers keeps for the model's family."""

import dataclasses

import jax
import numpy as np

import models
from jaxrl_llm.data import lab_world


def test_word_level_tokenizer_in_a_qwen2_folder_keeps_every_word(tmp_path):
    tokenizer = lab_world.build_tokenizer()
    cfg = models.ModelConfig(
        family="qwen2", vocab_size=len(tokenizer), d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=16,
        tie_embeddings=True, qkv_bias=True, bos_token_id=1, eos_token_ids=(2,), pad_token_id=0,
    )  # fmt: skip
    models.save(tmp_path / "policy", dataclasses.replace(cfg), jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), models.abstract_params(cfg)))
    tokenizer.save_pretrained(tmp_path / "policy")
    read = models.load_tokenizer(tmp_path / "policy")
    for row in lab_world.generate_problems(200, 0):
        assert read(row["prompt"]).input_ids == tokenizer(row["prompt"]).input_ids
        assert read.decode(read(row["prompt"]).input_ids, skip_special_tokens=True) == row["prompt"]
