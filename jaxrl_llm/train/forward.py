"""Log-probabilities of completions under a policy: the plain reference path, and the shared-prefix path that equals it.

Both take G distinct prompts and N = G x S completions, rows of one prompt adjacent (S may be 1). Only the positions that predict
completion tokens reach the unembedding.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import models
from jaxrl_llm.losses.logprobs import token_logprobs

UNROLLED_LAYERS = 8  # up to so many, a Python loop: the scan over more layers compiles sooner, but copies what it keeps for the gradient


def completion_logprobs(
    cfg: models.ModelConfig,
    params,
    prompts_GP: Int[Array, "prompts prompt_len"],
    prompt_lengths_G: Int[Array, "prompts"],
    completions_NC: Int[Array, "rows completion_len"],
    completion_lengths_N: Int[Array, "rows"],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    remat: bool | str = False,
    shared_prefix: bool = True,
    with_entropy: bool | str = False,
    interventions: Mapping[str, Any] | None = None,
) -> tuple[Float[Array, "rows completion_len"], Float[Array, "rows completion_len"] | None]:
    """(log-probabilities, entropies or None), fp32 [N, C], of each completion token given its prompt and the tokens before it.

    prompts and completions are right-padded; lengths are in tokens, every prompt has at least one. What stands past a completion's
    length gets a finite number of no meaning: mask it. shared_prefix: forward each prompt once and let its S completions attend to its
    keys and values (gradients flow back through them), instead of once for each completion. with_entropy: as of `token_logprobs`.
    interventions: edits of activations, as `models.forward` takes them, told prompts from completions; a text's number is its prompt's, as in
    `models.generate`.
    """
    hidden_NCD = completion_hidden(
        cfg, params, prompts_GP, prompt_lengths_G, completions_NC, completion_lengths_N, remat=remat, shared_prefix=shared_prefix,
        interventions=interventions,
    )  # fmt: skip
    how = {"temperature": temperature, "chunk": chunk, "with_entropy": with_entropy}
    return token_logprobs(hidden_NCD, models.head(cfg, params).spread(), completions_NC, **how)


def policy_logprobs(spec: Any, params, micro: Mapping[str, Any], with_entropy: bool | str = False):
    """`completion_logprobs` of one micro-batch, parameters cast to what the model computes in. spec: of an update (`step.StepSpec`,
    `preference_step.PreferenceSpec`). micro: "prompts", "prompt_lengths", "completions", "lengths"."""
    return completion_logprobs(
        spec.model,
        jax.tree.map(lambda p: p.astype(spec.model.dtype), params),
        micro["prompts"],
        micro["prompt_lengths"],
        micro["completions"],
        micro["lengths"],
        temperature=spec.temperature,
        chunk=spec.logprob_chunk,
        remat=spec.remat,
        shared_prefix=spec.shared_prefix,
        with_entropy=with_entropy,
    )


def completion_hidden(
    cfg: models.ModelConfig,
    params,
    prompts_GP: Int[Array, "prompts prompt_len"],
    prompt_lengths_G: Int[Array, "prompts"],
    completions_NC: Int[Array, "rows completion_len"],
    completion_lengths_N: Int[Array, "rows"],
    *,
    remat: bool | str = False,
    shared_prefix: bool = True,
    interventions: Mapping[str, Any] | None = None,
) -> Float[Array, "rows completion_len d_model"]:
    """The states that predict each completion token; arguments as of `completion_logprobs`."""
    hidden_of = _shared_hidden if shared_prefix else _plain_hidden
    return hidden_of(cfg, params, prompts_GP, prompt_lengths_G, completions_NC, completion_lengths_N, remat, interventions)


def _forward(cfg: models.ModelConfig, params, tokens, *, remat: bool | str, **options) -> models.ForwardOutput:
    return models.forward(cfg, params, tokens, remat=remat, unroll=cfg.n_layers <= UNROLLED_LAYERS and not remat, **options)


def _plain_hidden(cfg, params, prompts_GP, prompt_lengths_G, completions_NC, completion_lengths_N, remat, edits):
    """Hidden states that predict each completion token, by one forward over rows of prompt + completion: the reference."""
    (G, P), (N, C) = prompts_GP.shape, completions_NC.shape
    prompt_lengths_N1 = jnp.repeat(prompt_lengths_G, N // G)[:, None]
    prompts_NP = jnp.repeat(prompts_GP, N // G, axis=0)
    index_T = jnp.arange(P + C)
    from_prompt_NT = jnp.take(prompts_NP, jnp.minimum(index_T, P - 1), axis=1)
    from_completion_NT = jnp.take_along_axis(completions_NC, jnp.clip(index_T - prompt_lengths_N1, 0, C - 1), axis=1)
    tokens_NT = jnp.where(index_T < prompt_lengths_N1, from_prompt_NT, from_completion_NT)
    lengths_N = prompt_lengths_N1[:, 0] + completion_lengths_N
    told = {"interventions": edits, "prompt_lengths": prompt_lengths_N1[:, 0], "texts": jnp.arange(N) // (N // G)}
    hidden_NTD = _forward(cfg, params, tokens_NT, lengths=lengths_N, remat=remat, **told).hidden
    return jnp.take_along_axis(hidden_NTD, (prompt_lengths_N1 - 1 + jnp.arange(C))[..., None], axis=1)


def _shared_hidden(cfg, params, prompts_GP, prompt_lengths_G, completions_NC, completion_lengths_N, remat, edits):
    """The same states with each distinct prompt forwarded once. The last prompt token predicts a completion's first token, so the
    completion's own forward needs its tokens 0 .. C-2 only."""
    N, C = completions_NC.shape
    S = N // prompts_GP.shape[0]
    told = {"interventions": edits, "prompt_lengths": prompt_lengths_G}
    prompt = _forward(cfg, params, prompts_GP, lengths=prompt_lengths_G, remat=remat, return_kv=True, **told)
    last_G1D = jnp.take_along_axis(prompt.hidden, jnp.maximum(prompt_lengths_G - 1, 0)[:, None, None], axis=1)
    first_N1D = jnp.repeat(last_G1D, S, axis=0)
    if C == 1:
        return first_N1D
    index_C = jnp.arange(C - 1)
    positions_NC = jnp.repeat(prompt_lengths_G, S)[:, None] + index_C
    positions_NC = jnp.where(index_C < completion_lengths_N[:, None], positions_NC, -1)
    told |= {"prompt_lengths": jnp.repeat(prompt_lengths_G, S), "texts": jnp.arange(N) // S}
    rest = _forward(cfg, params, completions_NC[:, :-1], positions=positions_NC, prefix=prompt.kv, remat=remat, **told)
    return jnp.concatenate([first_N1D, rest.hidden], axis=1)
