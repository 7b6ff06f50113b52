"""The table of dictionary architectures: one file each, and one row here.

To add one, write its file (`sae.base.Architecture` says what it must give) and its row; encode, decode, training, sharding, saving and
loading read nothing else.
"""

from __future__ import annotations

from sae.architectures.batchtopk import BATCHTOPK
from sae.architectures.gated import GATED
from sae.architectures.jumprelu import JUMPRELU
from sae.architectures.matryoshka import MATRYOSHKA
from sae.architectures.relu import RELU
from sae.architectures.topk import TOPK
from sae.base import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    "topk": TOPK,
    "relu": RELU,
    "gated": GATED,
    "jumprelu": JUMPRELU,
    "batchtopk": BATCHTOPK,
    "matryoshka": MATRYOSHKA,
}
