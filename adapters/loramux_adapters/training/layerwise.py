"""A decoder one layer at a time: transformers' own code for every part, with the caller between the layers.

`LayerStack` takes the decoder layers out of a model and leaves stand-ins. A stand-in notes how the model's forward
calls its layer (masks, rotary embeddings, windows) and passes the input through; so one cheap pass says how every
layer is to be called, and the last stand-in can hand any hidden states to what follows the layers: the final norm, the
head, score capping or scaling of the logits. Promises: `check` has compared all of it with the model's plain forward,
or refused the architecture. Assumes that how a layer is called does not depend on what earlier layers computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from loramux_adapters.errors import BaseModelError
from loramux_adapters.training import attention
from loramux_adapters.training.memory import DecoderShape, piece_tokens
from loramux_adapters.training.pieces import Piece, Segment

_ONE = Piece(0, 1, ((0, 1),))
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # relative, over logits of a short prompt


@dataclass(frozen=True, slots=True)
class Call:
    """How the model calls one layer, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _StandIn(nn.Module):
    """In a layer's place; answers for the layer's attributes, which some models read in their loop."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # not a submodule: it must not be walked twice
        self.call: Call | None = None
        self.hidden: torch.Tensor | None = None
        self.given: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "layer"), name)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.call, self.hidden = Call(args, kwargs), hidden
        return hidden if self.given is None else self.given


class LayerStack:
    """The layers of `twin`, which is taken over: only this object may run it from here on."""

    def __init__(self, twin: PreTrainedModel, *, alone: bool = False) -> None:
        """`alone` if nothing is served meanwhile: pieces may be long."""
        decoder: Any = twin.get_decoder()
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise BaseModelError(
                f"{type(twin).__name__} keeps its decoder layers where training does not look for them",
                param="model",
            )
        if twin.dtype not in _TOLERANCE:
            raise BaseModelError(
                f"training needs --dtype bfloat16 or float32: gradients underflow in {str(twin.dtype)[6:]}",
                param="dtype",
            )
        self.layers = list(layers)
        shape = DecoderShape.of(twin.config.get_text_config())
        self.vocabulary = shape.vocabulary
        self.piece_tokens = piece_tokens(shape, twin.device.type, alone=alone)
        self.dtype = twin.dtype
        self.device = twin.device
        expected = _plain(twin)
        twin.set_attn_implementation(attention.NAME)
        self._model: Any = twin
        self._decoder = decoder
        self._stand_ins = [_StandIn(layer) for layer in self.layers]
        decoder.layers = nn.ModuleList(self._stand_ins)
        self._check(expected)

    def start(self, ids: torch.Tensor, piece: Piece) -> tuple[torch.Tensor, list[Call]]:
        """A piece `[1, T, hidden]` of token ids `[T]`, embedded, and how each layer is called for it.

        What travels between the layers is fp32, as what adapters add to it is, whatever the layers compute in.
        """
        positions = piece.positions(self.device)
        with torch.no_grad():
            self._decoder(
                input_ids=ids[None],
                position_ids=positions[None],
                use_cache=False,
                piece=piece,
                computed_in=self.dtype,
            )
        hidden = self._stand_ins[0].hidden
        calls = [stand_in.call for stand_in in self._stand_ins if stand_in.call is not None]
        self._forget()
        assert hidden is not None
        if len(calls) != len(self.layers):
            raise BaseModelError(
                f"{type(self._model).__name__} does not run all of its layers", param="model"
            )
        return hidden.float(), calls

    def layer(self, index: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        output = self.layers[index](hidden, *call.args, **call.kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last layer's output `[N, hidden]` -> `[N, vocabulary]`, in the compute dtype; differentiable."""
        last = self._stand_ins[-1]
        last.given = hidden[None]
        try:
            token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
            output = self._model(input_ids=token, use_cache=False, piece=_ONE, computed_in=self.dtype)
        finally:
            last.given = None
            self._forget()
        logits: torch.Tensor = output.logits.squeeze(0)  # not [0], whose backward pass makes a copy
        return logits

    def _forget(self) -> None:
        for stand_in in self._stand_ins:
            stand_in.call = stand_in.hidden = None

    @torch.no_grad()
    def _check(self, plain: list[torch.Tensor]) -> None:
        """Two samples in one row through the stack against each alone through the plain model."""
        ids, segments = _probe(self._model)
        hidden, calls = self.start(ids.to(self.device), Piece(0, len(ids), segments))
        for index, call in enumerate(calls):
            hidden = self.layer(index, hidden, call)
        ours, theirs = self.logits(hidden[0]).float(), torch.cat(plain).float()
        error = float((ours - theirs).norm() / theirs.norm())
        if not error <= _TOLERANCE[self.dtype]:
            raise BaseModelError(
                f"{type(self._model).__name__} cannot be trained layer by layer: its logits differ by {error:.2g} from "
                "those of its own forward",
                param="model",
            )


@torch.no_grad()
def _plain(model: PreTrainedModel) -> list[torch.Tensor]:
    """The logits of each sample of the probe, alone, by transformers' forward."""
    ids, segments = _probe(model)
    return [
        model(input_ids=ids[None, start : start + length].to(model.device), use_cache=False).logits[0]
        for start, length in segments
    ]


def _probe(model: PreTrainedModel) -> tuple[torch.Tensor, tuple[Segment, ...]]:
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(1, 41) * 7919 % vocabulary
    return ids, ((0, 23), (23, 17))
