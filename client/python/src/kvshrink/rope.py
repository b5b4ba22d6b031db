"""The rotary embedding that keys carry."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, cast

from kvshrink.errors import InvalidArgument
from kvshrink.v1 import types_pb2 as types

Pairing = Literal["neox", "gptj"]
Scaling = Literal["none", "linear", "ntk", "yarn", "yarn_untruncated", "llama3"]


@dataclasses.dataclass(frozen=True)
class Rope:
    """With it, K is coded before the embedding, which costs less; what comes back is K as it was put.

    Names and formulas are those of model configurations (`rope_theta`, `rope_scaling`); an attention factor isn't
    needed. Numbers that the scaling doesn't take stay None; so may those with a common default (yarn's betas 32 and 1,
    llama3's frequency factors 1 and 4).
    """

    theta: float
    rotary_dim: int = 0  # leading channels that are turned; 0 = head_dim
    pairing: Pairing = "neox"  # channel j with j + rotary_dim / 2; gptj: 2 j with 2 j + 1
    scaling: Scaling = "none"
    position_offset: int = 0  # the angle of a token is that of its position plus this
    factor: float | None = None
    original_max_position: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def to_proto(self) -> types.Rope:
        return types.Rope(
            theta=self.theta,
            rotary_dim=self.rotary_dim,
            pairing=cast(types.RopePairing, _number(types.RopePairing, "pairing", self.pairing)),
            scaling=cast(types.RopeScaling, _number(types.RopeScaling, "scaling", self.scaling)),
            position_offset=self.position_offset,
            factor=self.factor,
            original_max_position=self.original_max_position,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
        )


# One for all layers, or one for each (None: that layer has none).
Ropes = Rope | Sequence[Rope | None] | None


def of_layer(ropes: Ropes, layer: int) -> Rope | None:
    """`layer` counts those of the call."""
    if ropes is None or isinstance(ropes, Rope):
        return ropes
    if layer >= len(ropes):
        raise InvalidArgument(f"argument 'rope' has {len(ropes)} entries: needs one for layer {layer}")
    return ropes[layer]


def _number(enum: Any, field: str, name: str) -> int:
    prefix = f"ROPE_{field.upper()}_"
    known = {str(key).removeprefix(prefix).lower(): value for key, value in enum.items() if value}
    if name not in known:
        raise InvalidArgument(f"argument 'rope.{field}' is {name!r}: must be one of {', '.join(known)}")
    return cast(int, known[name])
