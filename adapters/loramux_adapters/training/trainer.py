"""One optimizer step as a generator that stops at every layer, so that serving can go on between two layers.

A micro-batch is a no-grad forward that keeps each layer's input, the loss by chunks of the rows that are trained on,
and then, layer by layer in reverse, the same layer again with gradients and its backward pass; all of it a piece of the
row at a time (`pieces.py`). Memory: a piece's activations in one layer, and one `[T, hidden]` input per layer.
Promises: the gradients are those of a plain backward pass over all samples of the step, each trained token weighing the
same; no autograd mode is left switched over a stop.
Does not decide when to run, evaluate or save (`run.py`).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch

from loramux_adapters.errors import TrainingError
from loramux_adapters.nf4 import holding_dense
from loramux_adapters.training.batches import Batches
from loramux_adapters.training.computing import computing
from loramux_adapters.training.layerwise import Call, LayerStack
from loramux_adapters.training.lora import TrainedAdapter
from loramux_adapters.training.loss import cross_entropy
from loramux_adapters.training.memory import loss_rows
from loramux_adapters.training.optimizers import build_optimizer
from loramux_adapters.training.pieces import Piece
from loramux_adapters.training.recipe import ResolvedRecipe, learning_rate_factor
from loramux_adapters.training.row import Row
from loramux_adapters.training.samples import Sample

Slices = Generator[None, None, None]

_FIRST = "first"  # a row, or the rest of it, is laid out


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step; `step` counts from 1. `seconds` is time spent computing, not time spent waiting."""

    step: int
    total_steps: int
    epoch: float
    train_loss: float
    train_mean_token_accuracy: float
    learning_rate: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Score:
    """Mean loss and accuracy over the trained tokens of some samples."""

    loss: float
    mean_token_accuracy: float
    tokens: int


@dataclass
class _Sums:
    """Of one step, on the device: reading them is the step's only synchronization."""

    loss: torch.Tensor
    correct: torch.Tensor


class Trainer:
    """The optimizer, its adapter and the stack that computes both ways."""

    def __init__(
        self,
        stack: LayerStack,
        adapter: TrainedAdapter,
        recipe: ResolvedRecipe,
        samples: Sequence[Sample],
        batches: Batches,
    ) -> None:
        self.adapter = adapter
        self.parameters = adapter.named_parameters()
        self.optimizer = build_optimizer(recipe, self.parameters)
        self.step = 0  # optimizer steps done
        self._stack = stack
        self._recipe = recipe
        self._samples = samples
        self._batches = batches
        # Below the first layer that is trained nothing needs a gradient.
        trained = [any(hasattr(m, "lora_a") for m in layer.modules()) for layer in stack.layers]
        self._first_trained = trained.index(True)
        self._micro: int | None = None  # which is computed; None while validating
        self.upcoming = _FIRST  # what the next slice is, for whoever knows what its kind takes
        self._busy = 0.0

    def slices(self) -> Generator[None, None, StepReport]:
        """Run the next step, stopping often; the step counts once this returns. Raises TrainingError if it diverges."""
        self._busy = 0.0
        with computing(grad=False):
            units = self._batches.of_step(self.step)
            micros = [self._row([self._samples[index] for index in unit]) for unit in units]
            sums = self._sums()
        trained = sum(len(row.targets) for row in micros)
        self.optimizer.zero_grad(set_to_none=True)
        for place, row in enumerate(micros):
            then = "update" if place == len(micros) - 1 else _FIRST
            yield from self._timed(self._gradients(row, place, trained, sums, then))
        self.upcoming = _FIRST
        started = time.perf_counter()
        rate, norm = self._update()
        loss, correct = float(sums.loss), int(sums.correct)
        if not norm < float("inf") or not loss < float("inf"):
            raise TrainingError(
                f"training diverged in step {self.step + 1}: loss {loss:g}, gradient norm {norm:g}; try a lower "
                f"learning_rate than {self._recipe.learning_rate:g}",
                param="learning_rate",
                code="diverged",
            )
        self._busy += time.perf_counter() - started
        return StepReport(
            step=self.step,
            total_steps=self._recipe.total_steps,
            epoch=self.step / self._recipe.steps_per_epoch,
            train_loss=loss,
            train_mean_token_accuracy=correct / trained,
            learning_rate=rate,
            grad_norm=norm,
            tokens=sum(len(row.ids) for row in micros),
            trained_tokens=trained,
            seconds=self._busy,
        )

    def evaluate(self, samples: Sequence[Sample]) -> Generator[None, None, Score]:
        """The loss on samples that are not trained on, without dropout; stops as often as training does."""
        self._micro = None
        self.adapter.dropout.leave()
        with computing(grad=False):
            sums = self._sums()
        tokens = 0
        size = self._recipe.batch_size
        for start in range(0, len(samples), size):
            with computing(grad=False):
                row = self._row(samples[start : start + size])
            tokens += len(row.targets)
            hidden, _, _ = yield from self._forward(row, keep=False, then="score")
            for chunk in self._chunks(row):
                with computing(grad=False):
                    logits = self._stack.logits(hidden[0, row.predicting[chunk]])
                    found = cross_entropy(logits, row.targets[chunk], gradient=False)
                    sums.loss += found.loss
                    sums.correct += found.correct
                self.upcoming = "score" if chunk.stop < len(row.targets) else _FIRST
                yield
        return Score(float(sums.loss) / tokens, int(sums.correct) / tokens, tokens)

    def _gradients(self, row: Row, micro: int, trained: int, sums: _Sums, then: str) -> Slices:
        """Add one micro-batch's share of the step's gradient; `then` is what follows it."""
        self._micro = micro
        hidden, inputs, calls = yield from self._forward(row, keep=True, then="loss")
        gradient = yield from self._loss_gradient(row, hidden, 1.0 / trained, sums)
        del hidden
        backward = [gradient[:, piece.start : piece.end] for piece in row.pieces]
        # Dequantized once a layer instead of once a piece; on a GPU that costs less than the memory.
        several = len(row.pieces) > 1 and self._stack.device.type == "cpu"
        for index in range(len(self._stack.layers) - 1, self._first_trained - 1, -1):
            given = inputs.pop()
            with holding_dense(self._stack.layers[index] if several else None):
                for place in range(len(row.pieces) - 1, -1, -1):
                    after = "again" if place or index > self._first_trained else then
                    backward[place] = yield from self._back(
                        index, row.pieces[place], given.pop(), calls[place][index], backward[place], after
                    )
            for piece in row.pieces:
                piece.drop(index)

    def _back(
        self, index: int, piece: Piece, given: torch.Tensor, call: Call, gradient: torch.Tensor, then: str
    ) -> Generator[None, None, torch.Tensor]:
        """One piece through one layer again, and back; returns the gradient of its input."""
        self._enter(piece, index, repeating=True)
        with computing(grad=True):
            given = given.detach().requires_grad_(index > self._first_trained)
            output = self._stack.layer(index, given, call)
        self.upcoming = "back"
        yield
        with computing(grad=True):
            tensors, gradients = zip((output, gradient), *piece.owed(), strict=True)
            torch.autograd.backward(tensors, gradients)
        self.upcoming = then
        yield
        return gradient if given.grad is None else given.grad

    def _loss_gradient(
        self, row: Row, hidden: torch.Tensor, scale: float, sums: _Sums
    ) -> Generator[None, None, torch.Tensor]:
        """Of the last layer's output, chunk by chunk; adds to `sums`."""
        with computing(grad=False):
            gradient = torch.zeros_like(hidden)
        for chunk in self._chunks(row):
            rows = row.predicting[chunk]
            with computing(grad=True):
                last = hidden[0, rows].detach().requires_grad_()
                logits = self._stack.logits(last)
                with torch.no_grad():
                    found = cross_entropy(logits, row.targets[chunk], scale=scale, gradient=True)
                    sums.loss += found.loss
                    sums.correct += found.correct
                (gradient[0, rows],) = torch.autograd.grad(logits, last, found.gradient)
            del logits, found  # or they would be alive beside the next chunk's
            self.upcoming = "loss" if chunk.stop < len(row.targets) else "again"
            yield
        return gradient

    def _forward(
        self, row: Row, *, keep: bool, then: str
    ) -> Generator[None, None, tuple[torch.Tensor, list[list[torch.Tensor]], list[list[Call]]]]:
        """The last layer's output; of trained layers the inputs, by layer and piece; how each piece calls each layer."""
        hidden: list[torch.Tensor] = []
        calls: list[list[Call]] = []
        for place, piece in enumerate(row.pieces):
            with computing(grad=False):
                embedded, called = self._stack.start(row.ids[piece.start : piece.end], piece)
            hidden.append(embedded)
            calls.append(called)
            if place < len(row.pieces) - 1:
                self.upcoming = "start" if place < len(row.pieces) - 2 else _FIRST
                yield
        inputs: list[list[torch.Tensor]] = []
        for index in range(len(self._stack.layers)):
            kept = keep and index >= self._first_trained
            if kept:
                inputs.append(list(hidden))
            for place, piece in enumerate(row.pieces):
                self._enter(piece, index)
                with computing(grad=False):
                    hidden[place] = self._stack.layer(index, hidden[place], calls[place][index])
                last = place == len(row.pieces) - 1
                if last and not kept:
                    for one in row.pieces:
                        one.drop(index)
                self.upcoming = then if last and index == len(self._stack.layers) - 1 else "forward"
                yield
        with computing(grad=False):
            return torch.cat(hidden, dim=1), inputs, calls

    def _enter(self, piece: Piece, layer: int, *, repeating: bool = False) -> None:
        """Before a layer is run on a piece, for the parts of it that depend on which one it is."""
        if self._micro is not None:
            self.adapter.dropout.enter(self.step, self._micro, piece.start)
        piece.enter(layer, repeating=repeating)

    def _chunks(self, row: Row) -> Iterator[slice]:
        size = loss_rows(self._stack.vocabulary, self._stack.device.type)
        for start in range(0, len(row.targets), size):
            yield slice(start, start + size)

    def _update(self) -> tuple[float, float]:
        """Clip and step; returns the learning rate and the gradient's norm before clipping."""
        recipe = self._recipe
        factor = learning_rate_factor(self.step, recipe.total_steps, recipe.lr_scheduler, recipe.warmup_ratio)
        rate = recipe.learning_rate * factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with computing(grad=False):
            limit = recipe.max_grad_norm or float("inf")
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
            if norm < float("inf"):
                self.optimizer.step()
                self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        return rate, norm

    def _row(self, samples: Sequence[Sample]) -> Row:
        return Row.of(samples, self._stack.piece_tokens, self._stack.device)

    def _sums(self) -> _Sums:
        device = self._stack.device
        return _Sums(torch.zeros((), device=device), torch.zeros((), dtype=torch.long, device=device))

    def _timed(self, slices: Slices) -> Slices:
        while True:
            started = time.perf_counter()
            try:
                next(slices)
            except StopIteration:
                return
            finally:
                self._busy += time.perf_counter() - started
            yield
