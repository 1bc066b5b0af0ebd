"""A decoder by its numbers. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from loramux_adapters.spec import BaseGeometry
from loramux_adapters.training.memory import DecoderShape


@dataclass(frozen=True)
class ModelShape:
    """`linears` are those that are quantized and that adapters may target; the output head is not among them."""

    name: str
    architecture: str
    parameters: int  # tied ones once
    linears: Mapping[str, tuple[int, int]]  # full module name -> (out_features, in_features)
    decoder: DecoderShape
    context_length: int

    @property
    def linear_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.linears.values())

    @property
    def head_parameters(self) -> int:
        return self.decoder.vocabulary * self.decoder.hidden

    def geometry(self) -> BaseGeometry:
        return BaseGeometry(name=self.name, identity="", linear_shapes=self.linears)
