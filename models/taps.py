"""Named activations: which there are, reading them out of a scan over layers, and replacing them inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from models.config import BLOCK_NORMS, ModelConfig
from models.errors import ModelError

# An edit maps an activation to what replaces it. One whose attribute `takes_place` is true is called with the `Place` too, one whose
# attribute `reads` names another, earlier activation with that one last.
Interventions = Mapping[str, Callable[..., Array]]

# In the order in which a layer computes them. "attn_z" are the heads' values side by side, the input of the output projection.
# "attn_out" and "mlp_out" are what is added to the residual stream, after any norm that stands there; "resid_mid" is the sum after the
# first, which an MLP in parallel does not read. "mlp_in" is what enters the MLP: of its norm where it has one; "mlp_normalized" the same
# before the norm's scale and bias, where that norm is the MLP's own. "mlp_pre" is what goes into the activation (of the gate, where there
# is one), "mlp_act" the input of the down projection; a layer of experts has "router_logits" in their place, the scores of its experts.
# "embed" is what enters the first block: embeddings scaled and positions added, where the family does so.
BLOCK_TAPS = (
    "resid_pre", "attn_probs", "attn_z", "attn_out", "resid_mid", "mlp_normalized", "mlp_in", "router_logits", "mlp_pre", "mlp_act", "mlp_out",
    "resid_post",
)  # fmt: skip
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


def _plain(edit: Callable[..., Array]) -> Any:
    """The edit itself, out of the wrapping that `as_edits` gives it."""
    return edit.func if isinstance(edit, jax.tree_util.Partial) else edit


def _bound(edit: Callable[..., Array], place: Place | None) -> Callable[..., Array]:
    """The edit as a function of the activation alone, and of the one that it reads if it reads one."""
    return (lambda x, *read: edit(x, place, *read)) if getattr(_plain(edit), "takes_place", False) else edit


def taps_of(cfg: ModelConfig) -> tuple[str, ...]:
    """The kinds of BLOCK_TAPS that the model's layers have."""
    absent = ("mlp_pre", "mlp_act") if cfg.mlp == "experts" else ("router_logits",)
    absent += () if "mlp_norm" in BLOCK_NORMS[cfg.block] else ("mlp_normalized",)
    return tuple(kind for kind in BLOCK_TAPS if kind not in absent)


def width_of(cfg: ModelConfig, kind: str) -> int:
    """The width of an activation of `kind`, a vector a token. Raises ModelError for "attn_probs", which is none."""
    if kind == "attn_probs":
        raise ModelError("attn_probs is no vector a token; choose another tap")
    widths = {"attn_z": cfg.n_heads * cfg.head_dim, "mlp_pre": cfg.d_ff, "mlp_act": cfg.d_ff, "router_logits": cfg.n_experts}
    return widths.get(kind, cfg.d_model)


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


def _order(cfg: ModelConfig, name: str) -> tuple[int, int]:
    """When an activation is computed, among all of a forward pass."""
    if name in OUTER_TAPS:
        return (-1, 0) if name == "embed" else (cfg.n_layers, 0)
    _, layer, kind = name.split(".")
    return int(layer), BLOCK_TAPS.index(kind)


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
        self.edits: dict[str, list[tuple[int | None, Callable[..., Array], str | None]]] = {}
        read = []
        for name, fn in (interventions or {}).items():
            kind, layer = parse_name(cfg, name, "intervention", stop_at)
            reads = getattr(_plain(fn), "reads", None)
            if reads is not None:
                parse_name(cfg, reads, "activation read by an intervention", stop_at)
                if _order(cfg, reads) >= _order(cfg, name):
                    raise ModelError(f"the intervention at {name} reads {reads}, which is not computed before it")
                read.append(reads)
            self.edits.setdefault(kind, []).append((layer, _bound(fn, place), reads))
        self.layers: dict[str, list[int]] = {}
        self.found: dict[str, Array] = {}  # what was read outside of the layers, and what `collect` was given
        self.kept = dict.fromkeys((*self.taps, *read))
        for kind, layer in (parse_name(cfg, name, "tap", stop_at) for name in self.kept):
            if layer is not None:
                self.layers.setdefault(kind, []).append(layer)

    def wants(self, kind: str) -> bool:
        """Whether `kind` is read or replaced in any layer."""
        return kind in self.layers or kind in self.edits

    def buffers(self, rows: tuple[int, int], slots: int, dtype: Any) -> dict[str, Array]:
        """Room for every block activation asked for, {kind: [layers asked for, B, T, ...]}. rows: (B, T); slots: what a query attends to."""
        B, T = rows

        def room(kind: str, layers: list[int]) -> Array:
            if kind == "attn_probs":
                return jnp.zeros((len(layers), B, self.cfg.n_heads, T, slots), jnp.float32)
            return jnp.zeros((len(layers), B, T, width_of(self.cfg, kind)), dtype)

        return {kind: room(kind, layers) for kind, layers in self.layers.items()}

    def at(self, layer: Array | int, buffers: dict[str, Array]) -> Callable[[str, Array], Array]:
        """A hook for `layer` (traced or not) that puts what it reads into the dict `buffers`."""

        def read(name: str | None) -> tuple[Array, ...]:
            if name is None or name in self.found:
                return () if name is None else (self.found[name],)
            _, number, kind = name.split(".")
            return (buffers[kind][self.layers[kind].index(int(number))],)

        def hook(kind: str, x: Array) -> Array:
            for edited, fn, reads in self.edits.get(kind, ()):
                x = lax.cond(layer == edited, lambda y, fn=fn, reads=reads: fn(y, *read(reads)).astype(y.dtype), lambda y: y, x)
            if kind in buffers:
                wanted = self.layers[kind]
                # A layer that is not wanted gets a slot past the end, where the write is dropped.
                slots = np.array([wanted.index(i) if i in wanted else len(wanted) for i in range(self.cfg.n_layers)])
                buffers[kind] = buffers[kind].at[jnp.asarray(slots)[layer]].set(x, mode="drop")
            return x

        return hook

    def outer(self, name: str, x: Array) -> Array:
        """The hook for "embed" and "final_norm"."""
        for _, fn, reads in self.edits.get(name, ()):
            x = fn(x, *(() if reads is None else (self.found[reads],))).astype(x.dtype)
        if name in self.kept:
            self.found[name] = x
        return x

    def collect(self, buffers: dict[str, Array]) -> None:
        """Takes what the hooks put into the buffers."""
        for kind, layers in self.layers.items():
            self.found |= {f"blocks.{layer}.{kind}": buffers[kind][slot] for slot, layer in enumerate(layers)}

    def results(self) -> dict[str, Array]:
        """{full name: activation} of the taps."""
        return {name: self.found[name] for name in self.taps}
