"""Named activations: which there are, reading them out of a scan over layers, and replacing them inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from models.config import ModelConfig
from models.errors import ModelError

# An edit maps an activation to what replaces it. One whose attribute `takes_place` is true is called with the `Place` too.
Interventions = Mapping[str, Callable[..., Array]]

# In the order in which a layer computes them. "attn_out" and "mlp_out" are what is added to the residual stream, after any norm that
# stands there; "resid_mid" is the sum after the first, which an MLP in parallel does not read. "mlp_pre" is what goes into the
# activation (of the gate, where there is one), "mlp_act" the input of the down projection; a layer of experts has "router_logits" in
# their place, the scores of its experts. "embed" is what enters the first block:
# embeddings scaled and positions added, where the family does so.
BLOCK_TAPS = ("resid_pre", "attn_probs", "attn_out", "resid_mid", "router_logits", "mlp_pre", "mlp_act", "mlp_out", "resid_post")
OUTER_TAPS = ("embed", "final_norm")


class Place(NamedTuple):
    """Where the tokens of a forward pass stand, for edits that tell tokens apart.

    positions_BT: of each token in its text, -1 = padding. texts_B: the number of the text that a row belongs to: samples of one prompt
    share their prompt's. prompt_lengths_B: tokens of the row's prompt, None where nobody has said.
    """

    positions_BT: Int[Array, "B T"]
    texts_B: Int[Array, " B"]
    prompt_lengths_B: Int[Array, " B"] | None = None

    def generated_BT(self) -> Bool[Array, "B T"]:
        """Whether a token comes after its prompt. Raises ModelError where the prompts' lengths are not known."""
        if self.prompt_lengths_B is None:
            raise ModelError("an intervention tells prompts from what follows them: give forward(..., prompt_lengths=[tokens of each prompt])")
        return self.positions_BT >= self.prompt_lengths_B[:, None]


def as_edits(interventions: Interventions | None) -> dict[str, Callable[..., Array]] | None:
    """The interventions as an argument of a jitted function: what is no pytree becomes one without leaves, told from others by its hash."""
    if not interventions:
        return None
    return {name: jax.tree_util.Partial(fn) if jax.tree_util.all_leaves([fn]) else fn for name, fn in interventions.items()}


def _bound(edit: Callable[..., Array], place: Place | None) -> Callable[[Array], Array]:
    """The edit as a function of the activation alone."""
    inner: Any = edit.func if isinstance(edit, jax.tree_util.Partial) else edit
    return (lambda x: edit(x, place)) if getattr(inner, "takes_place", False) else edit


def taps_of(cfg: ModelConfig) -> tuple[str, ...]:
    """The kinds of BLOCK_TAPS that the model's layers have."""
    absent = ("mlp_pre", "mlp_act") if cfg.mlp == "experts" else ("router_logits",)
    return tuple(kind for kind in BLOCK_TAPS if kind not in absent)


def parse_name(cfg: ModelConfig, name: str, what: str, stop_at: int | None = None) -> tuple[str, int | None]:
    """(kind, layer) of a name like "blocks.3.resid_post"; (name, None) of "embed" and "final_norm".

    Raises ModelError for a name that is not an activation of the first `stop_at` blocks (None: of the whole model).
    """
    match name.split("."):
        case [kind] if kind in OUTER_TAPS:
            layer, reached = None, kind == "embed" or stop_at is None
        case ["blocks", number, kind] if kind in taps_of(cfg) and number in map(str, range(cfg.n_layers)):
            layer = int(number)
            reached = stop_at is None or layer < stop_at
        case _:
            kinds = "{" + ", ".join(taps_of(cfg)) + "}"
            raise ModelError(f"unknown {what} {name!r}; known: embed, blocks.0..{cfg.n_layers - 1}.{kinds}, final_norm")
    if not reached:
        raise ModelError(f"{what} {name!r} is never reached: the run stops after {stop_at} blocks (stop_at)")
    return kind, layer


class Hooks:
    """Reads and replaces named activations. What it reads in a layer goes to buffers that travel through the scan."""

    def __init__(
        self,
        cfg: ModelConfig,
        taps: Iterable[str],
        interventions: Interventions | None,
        stop_at: int | None = None,
        place: Place | None = None,
    ):
        self.cfg = cfg
        self.taps = tuple(dict.fromkeys(taps))
        self.layers: dict[str, list[int]] = {}
        for kind, layer in (parse_name(cfg, name, "tap", stop_at) for name in self.taps):
            if layer is not None:
                self.layers.setdefault(kind, []).append(layer)
        self.edits: dict[str, list[tuple[int | None, Callable[[Array], Array]]]] = {}
        for name, fn in (interventions or {}).items():
            kind, layer = parse_name(cfg, name, "intervention", stop_at)
            self.edits.setdefault(kind, []).append((layer, _bound(fn, place)))

    def wants(self, kind: str) -> bool:
        """Whether `kind` is read or replaced in any layer."""
        return kind in self.layers or kind in self.edits

    def buffers(self, shapes: Mapping[str, tuple[int, ...]], dtype) -> dict[str, Array]:
        """Room for every block activation asked for: {kind: [layers asked for, ...]}."""
        return {
            kind: jnp.zeros((len(layers), *shapes[kind]), jnp.float32 if kind == "attn_probs" else dtype)
            for kind, layers in self.layers.items()
        }

    def at(self, layer: Array | int, buffers: dict[str, Array]) -> Callable[[str, Array], Array]:
        """A hook for `layer` (traced or not) that puts what it reads into the dict `buffers`."""

        def hook(kind: str, x: Array) -> Array:
            for edited, fn in self.edits.get(kind, ()):
                x = lax.cond(layer == edited, lambda y, fn=fn: fn(y).astype(y.dtype), lambda y: y, x)
            if kind in buffers:
                wanted = self.layers[kind]
                # A layer that is not wanted gets a slot past the end, where the write is dropped.
                slots = np.array([wanted.index(i) if i in wanted else len(wanted) for i in range(self.cfg.n_layers)])
                buffers[kind] = buffers[kind].at[jnp.asarray(slots)[layer]].set(x, mode="drop")
            return x

        return hook

    def outer(self, name: str, x: Array, out: dict[str, Array]) -> Array:
        """The hook for "embed" and "final_norm"; what it reads goes to `out`."""
        for _, fn in self.edits.get(name, ()):
            x = fn(x).astype(x.dtype)
        if name in self.taps:
            out[name] = x
        return x

    def collect(self, buffers: dict[str, Array]) -> dict[str, Array]:
        """{full name: activation} of what the hooks put into the buffers."""
        return {
            f"blocks.{layer}.{kind}": buffers[kind][slot]
            for kind, layers in self.layers.items()
            for slot, layer in enumerate(layers)
        }
