"""What a decoder-only language model is: one frozen description, shared by every family."""

from __future__ import annotations

import dataclasses

from models.errors import ModelError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary-embedding scaling, named as in Hugging Face configs (`rope_type` and its parameters).

    kind: "default", "linear", "dynamic", "llama3" or "yarn". Unused fields keep their defaults.
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


# The norms of a block, by its layout.
BLOCK_NORMS: dict[str, tuple[str, ...]] = {
    "pre": ("attn_norm", "mlp_norm"),
    "post": ("attn_post_norm", "mlp_post_norm"),
    "pre_post": ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm"),
    "parallel": ("attn_norm", "mlp_norm"),
    "parallel_shared": ("attn_norm",),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "norm": ("rms", "rms_fp32", "rms_plus_one", "layer"),
    "block": tuple(BLOCK_NORMS),
    "positions": ("rotary", "learned"),
    "rotary_pairs": ("half", "adjacent"),
    "mlp": ("gated", "plain", "experts"),
    "qk_norm_over": ("head", "all"),
    "attention": ("plain", "splash", "cudnn"),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Hashable, so it is a static argument of every jitted function.

    Lengths are in tokens, widths in units. `layer_windows` gives each layer's sliding window
    (None = full attention); an empty tuple means full attention everywhere. `dtype` is the dtype of
    parameters and activations; norms, softmax, logits and log-probabilities are fp32 in any case.

    What families differ in; the first value of each is the plain pre-norm decoder:
    norm: "rms"; "rms_fp32", scaled before the result is rounded (OLMo 2); "rms_plus_one", that with a scale of 1 + w (Gemma);
      "layer", LayerNorm with a bias (Ba et al. 2016).
    block: "pre", norms before attention and MLP; "post", after them (OLMo 2); "pre_post", both (Gemma 2); "parallel", attention and
      MLP of the same input, a norm each (GPT-NeoX); "parallel_shared", with one norm for both (GPT-J).
    positions: "rotary", or "learned": a vector for each of max_position positions, added to the embedding (GPT-2).
    rotary_dim: how many units of a head are rotated, the first ones (None = all). rotary_pairs: "half", unit i with
      i + rotary_dim / 2, or "adjacent", 2 i with 2 i + 1. local_rope_theta: rope base of the layers with a window, which are then not
      scaled (None = as all layers).
    mlp: "gated"; "plain": down(activation(up(x))); or "experts": n_experts gated MLPs a layer, each d_ff wide, of which a router picks
      experts_per_token for each token. renormalise_experts: their weights sum to one (`models.experts`).
    qk_norm_over: the q/k norm is over each "head", or over "all" heads together.
    attention: how a whole text is attended to in training, which is no property of the model: "plain", or by a kernel of an accelerator
      ("splash" on TPU, "cudnn" on GPU; see `models.kernels`). Sampling is plain in any case.
    query_scalar: scores are divided by its square root (None = head_dim). attn_softcap, logit_softcap: scores and logits x become
      cap * tanh(x / cap). embed_scale: factor on the embeddings, rounded to their dtype. head_bias: the unembedding has a bias.
    """

    family: str = "llama"
    vocab_size: int = 32000
    d_model: int = 512
    n_layers: int = 6
    n_heads: int = 8
    n_kv_heads: int = 8
    head_dim: int = 64
    d_ff: int = 1376
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_position: int = 2048
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_windows: tuple[int | None, ...] = ()
    activation: str = "silu"
    dtype: str = "float32"
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    norm: str = "rms"
    block: str = "pre"
    positions: str = "rotary"
    rotary_dim: int | None = None
    rotary_pairs: str = "half"
    local_rope_theta: float | None = None
    mlp: str = "gated"
    qk_norm_over: str = "head"
    query_scalar: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    head_bias: bool = False
    n_experts: int = 0
    experts_per_token: int = 0
    renormalise_experts: bool = False
    attention: str = "plain"

    def __post_init__(self):
        for field, known in CHOICES.items():
            if getattr(self, field) not in known:
                raise ModelError(f"{field}={getattr(self, field)!r} is not known; known: {', '.join(known)}")
        if self.rotary_dim is not None and not (0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0):
            raise ModelError(f"rotary_dim={self.rotary_dim} must be even and within 1..head_dim={self.head_dim}")
        if self.n_heads % self.n_kv_heads:
            raise ModelError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")
        if (self.mlp == "experts") != (self.n_experts > 0) or not 0 <= self.experts_per_token <= self.n_experts:
            told = f"n_experts={self.n_experts} and experts_per_token={self.experts_per_token}"
            raise ModelError(f"mlp={self.mlp!r} with {told}: experts are for mlp='experts', which has at least one, and a token no more than all")
        if self.mlp == "experts" and (self.mlp_bias or not self.experts_per_token):
            raise ModelError(f"mlp='experts' has no biases and at least one expert a token, not mlp_bias={self.mlp_bias} and none")
        if self.attention == "cudnn" and self.attn_softcap is not None:
            raise ModelError(f"attention='cudnn' does not cap scores, which this {self.family} model does: give 'plain' or 'splash'")
        if self.layer_windows and len(self.layer_windows) != self.n_layers:
            raise ModelError(f"layer_windows names {len(self.layer_windows)} layers, the model has {self.n_layers}")

    def window(self, layer: int) -> int | None:
        """The sliding window of `layer` in tokens, or None for full attention."""
        return self.layer_windows[layer] if self.layer_windows else None

    def param_count(self) -> int:
        """Number of parameters, by formula (equals the size of the parameter tree)."""
        d, n, k, h, f = self.d_model, self.n_heads, self.n_kv_heads, self.head_dim, self.d_ff
        attn = d * h * (2 * n + 2 * k) + (h * (n + 2 * k) if self.qkv_bias else 0) + (d if self.o_bias else 0)
        attn += ((n + k if self.qk_norm_over == "all" else 2) * h) if self.qk_norm else 0
        into = 1 if self.mlp == "plain" else 2  # matrices that read the MLP's input
        mlp = (into + 1) * d * f + (into * f + d if self.mlp_bias else 0)
        mlp = self.n_experts * (mlp + d) if self.mlp == "experts" else mlp
        norm = 2 * d if self.norm == "layer" else d
        head = (0 if self.tie_embeddings else d * self.vocab_size) + (self.vocab_size if self.head_bias else 0)
        embedding = (self.vocab_size + (self.max_position if self.positions == "learned" else 0)) * d
        return embedding + self.n_layers * (attn + mlp + len(BLOCK_NORMS[self.block]) * norm) + norm + head

    def flops_per_token(self, context: int = 0) -> int:
        """Forward FLOPs a token (multiply and add are two) at a mean attended context of `context` tokens.

        Backward is twice that. The embedding look-up costs nothing; the unembedding counts whether tied or not; of experts those that a
        token goes to.
        """
        d, n, k, h, f = self.d_model, self.n_heads, self.n_kv_heads, self.head_dim, self.d_ff
        mlp = (4 if self.mlp == "plain" else 6) * d * f
        mlp = self.experts_per_token * mlp + 2 * d * self.n_experts if self.mlp == "experts" else mlp
        layer = 2 * d * h * (2 * n + 2 * k) + mlp
        attention = sum(4 * n * h * min(context, self.window(i) or context) for i in range(self.n_layers))
        return self.n_layers * layer + attention + 2 * d * self.vocab_size

    @classmethod
    def from_hf(cls, config: dict) -> ModelConfig:
        """From the contents of a Hugging Face `config.json`. Raises ModelError for an unknown architecture."""
        from models.hf_config import config_from_hf

        return config_from_hf(config)

    def to_hf(self) -> dict:
        """The contents of a Hugging Face `config.json` that `transformers` reads back as the same model."""
        from models.hf_config import config_to_hf

        return config_to_hf(self)
