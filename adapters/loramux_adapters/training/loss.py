"""Cross-entropy of a chunk of logits with its gradient, in two fp32 passes over one buffer.

Promises: what `F.cross_entropy(logits.float(), targets, reduction="sum")` and its backward pass give, up to the rounding
of fp32. Autograd keeps four buffers of the size of the logits for that, and writing memory is most of the time there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ChunkLoss:
    """`loss` is summed over the rows and scaled; `gradient` is of it, in the logits' dtype."""

    loss: torch.Tensor
    correct: torch.Tensor
    gradient: torch.Tensor | None


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, *, scale: float = 1.0, gradient: bool
) -> ChunkLoss:
    """`[N, vocabulary]` and `[N]`; to be called without autograd."""
    wide = logits.to(torch.float32, copy=True)
    highest, best = wide.max(-1, keepdim=True)
    rows = torch.arange(len(targets), device=targets.device)
    wide -= highest
    wanted = wide[rows, targets]
    wide.exp_()
    total = wide.sum(-1, keepdim=True)
    loss = (total.squeeze(1).log() - wanted).sum() * scale
    correct = (best.squeeze(1) == targets).sum()
    if not gradient:
        return ChunkLoss(loss, correct, None)
    wide *= scale / total
    wide[rows, targets] -= scale
    return ChunkLoss(loss, correct, wide.to(logits.dtype))
