"""One optimizer step as a generator that stops at every layer, so that serving can go on between two layers.

A micro-batch is a no-grad forward that keeps each layer's input, the loss by chunks of the rows that are trained on,
and then, layer by layer in reverse, the same layer again with gradients and its backward pass. Memory: one layer's
activations, and one `[T, hidden]` input per layer. Promises: the gradients are those of a plain backward pass over all
samples of the step, each trained token weighing the same; no autograd mode is left switched over a stop.
Does not decide when to run, evaluate or save (`run.py`).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from loramux_adapters.errors import TrainingError
from loramux_adapters.training.attention import Segment
from loramux_adapters.training.batches import Batches
from loramux_adapters.training.layerwise import Call, LayerStack
from loramux_adapters.training.lora import TrainedAdapter
from loramux_adapters.training.memory import LOGITS_PER_CHUNK
from loramux_adapters.training.optimizers import build_optimizer
from loramux_adapters.training.recipe import ResolvedRecipe, learning_rate_factor
from loramux_adapters.training.samples import Sample

Slices = Generator[None, None, None]


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


@dataclass(frozen=True, slots=True)
class _Row:
    """Samples end to end: ids `[T]`, where each lies, and which positions predict a trained token."""

    ids: torch.Tensor
    segments: tuple[Segment, ...]
    predicting: torch.Tensor  # [N] positions
    targets: torch.Tensor  # [N] token ids


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
        self._busy = 0.0

    def slices(self) -> Generator[None, None, StepReport]:
        """Run the next step, stopping often; the step counts once this returns. Raises TrainingError if it diverges."""
        self._busy = 0.0
        with _computing(grad=False):
            units = self._batches.of_step(self.step)
            micros = [self._row([self._samples[index] for index in unit]) for unit in units]
            sums = self._sums()
        trained = sum(len(row.targets) for row in micros)
        self.optimizer.zero_grad(set_to_none=True)
        for place, row in enumerate(micros):
            yield from self._timed(self._gradients(row, place, trained, sums))
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
        self.adapter.dropout.leave()
        with _computing(grad=False):
            sums = self._sums()
        tokens = 0
        size = self._recipe.batch_size
        for start in range(0, len(samples), size):
            with _computing(grad=False):
                row = self._row(samples[start : start + size])
            tokens += len(row.targets)
            hidden, _, _ = yield from self._forward(row, keep=False)
            for chunk in self._chunks(row):
                with _computing(grad=False):
                    self._loss(hidden[0, row.predicting[chunk]], row.targets[chunk], sums)
                yield
        return Score(float(sums.loss) / tokens, int(sums.correct) / tokens, tokens)

    def _gradients(self, row: _Row, micro: int, trained: int, sums: _Sums) -> Slices:
        """Add one micro-batch's share of the step's gradient."""
        self.adapter.dropout.enter(self.step, micro)
        hidden, inputs, calls = yield from self._forward(row, keep=True)
        with _computing(grad=False):
            gradient = torch.zeros_like(hidden)
        for chunk in self._chunks(row):
            rows = row.predicting[chunk]
            with _computing(grad=True):
                last = hidden[0, rows].detach().requires_grad_()
                loss = self._loss(last, row.targets[chunk], sums, scale=1.0 / trained)
                (gradient[0, rows],) = torch.autograd.grad(loss, last)
            yield
        del hidden
        for index in range(len(calls) - 1, self._first_trained - 1, -1):
            with _computing(grad=True):
                given = inputs.pop().detach().requires_grad_(index > self._first_trained)
                output = self._stack.layer(index, given, calls[index])
                torch.autograd.backward(output, gradient)
                if given.grad is not None:
                    gradient = given.grad
            yield

    def _forward(
        self, row: _Row, *, keep: bool
    ) -> Generator[None, None, tuple[torch.Tensor, list[torch.Tensor], list[Call]]]:
        """The last layer's output, and of trained layers the inputs."""
        with _computing(grad=False):
            hidden, calls = self._stack.start(row.ids, row.segments)
        inputs = []
        for index, call in enumerate(calls):
            if keep and index >= self._first_trained:
                inputs.append(hidden)
            with _computing(grad=False):
                hidden = self._stack.layer(index, hidden, call)
            yield
        return hidden, inputs, calls

    def _loss(
        self, hidden: torch.Tensor, targets: torch.Tensor, sums: _Sums, scale: float = 1.0
    ) -> torch.Tensor:
        """`scale` times the summed cross-entropy in fp32; adds to `sums`."""
        logits = self._stack.logits(hidden).float()
        loss = F.cross_entropy(logits, targets, reduction="sum") * scale
        sums.loss += loss.detach()
        sums.correct += (logits.detach().argmax(-1) == targets).sum()
        return loss

    def _chunks(self, row: _Row) -> Iterator[slice]:
        size = max(16, LOGITS_PER_CHUNK // self._stack.vocabulary)
        for start in range(0, len(row.targets), size):
            yield slice(start, start + size)

    def _update(self) -> tuple[float, float]:
        """Clip and step; returns the learning rate and the gradient's norm before clipping."""
        recipe = self._recipe
        factor = learning_rate_factor(self.step, recipe.total_steps, recipe.lr_scheduler, recipe.warmup_ratio)
        rate = recipe.learning_rate * factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with _computing(grad=False):
            limit = recipe.max_grad_norm or float("inf")
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
            if norm < float("inf"):
                self.optimizer.step()
                self.step += 1
        self.optimizer.zero_grad(set_to_none=True)
        return rate, norm

    def _row(self, samples: Sequence[Sample]) -> _Row:
        ids = torch.cat([torch.frombuffer(sample.ids, dtype=torch.int32) for sample in samples]).long()
        mask = torch.frombuffer(bytearray(b"".join(sample.mask for sample in samples)), dtype=torch.uint8)
        segments, start = [], 0
        for sample in samples:
            segments.append((start, len(sample)))
            start += len(sample)
        trained = mask.nonzero().squeeze(1)  # never a sample's first token
        device = self._stack.device
        return _Row(ids.to(device), tuple(segments), (trained - 1).to(device), ids[trained].to(device))

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


@contextmanager
def _computing(*, grad: bool) -> Iterator[None]:
    """The autograd mode of one slice, whatever the caller is in; an engine may run in inference mode.

    Raises TrainingError when device memory runs out: the run has failed, the base and whoever else uses it have not.
    """
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        try:
            yield
        except torch.OutOfMemoryError as error:
            reason = (str(error) or "no memory is left").splitlines()[0]
            raise TrainingError(
                f"not enough device memory to train ({reason}); try a smaller batch_size with more "
                "gradient_accumulation_steps, or a smaller max_seq_length",
                code="out_of_memory",
            ) from None  # the traceback would keep the layer's activations alive
