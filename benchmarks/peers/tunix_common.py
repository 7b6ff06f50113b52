"""The benchmark's model and tokenizer for tunix."""

import random

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.models.qwen2 import model as qwen2

from peer_common import HEADS, HIDDEN, KV_HEADS, LAYERS, MLP, VOCAB


class WordTokenizer:
    """One token a word: "w12" is 12. Ids 0 to 2 are padding, beginning and end."""

    def encode(self, text, **_):
        """The numbers in the words; the text may come as a numpy scalar."""
        return [int(word[1:]) for word in str(text).split()]

    def decode(self, ids, **_):
        """The words of the numbers."""
        return " ".join(f"w{int(i)}" for i in ids)

    def pad_id(self):
        """Padding."""
        return 0

    def bos_id(self):
        """Beginning of text."""
        return 1

    def eos_id(self):
        """End of text."""
        return 2


def mesh():
    """One device under the axis names that tunix's shardings use."""
    return jax.make_mesh((1, 1), ("fsdp", "tp"), (jax.sharding.AxisType.Auto,) * 2)


def model():
    """Qwen2 with random weights in fp32."""
    config = qwen2.ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCAB,
        embed_dim=HIDDEN,
        hidden_dim=MLP,
        num_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        num_kv_heads=KV_HEADS,
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )
    return qwen2.Qwen2(config, rngs=nnx.Rngs(params=0))


def texts(count, tokens, seed=0):
    """Random prompts of `tokens` tokens, the beginning that the sampler adds included; one more would double its padding."""
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(3, VOCAB)}" for _ in range(tokens - 1)) for _ in range(count)]
