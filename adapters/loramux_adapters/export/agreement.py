"""How close two next-token distributions are, and when that is close enough."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from loramux_adapters.export.options import VerifyOptions

NOISE_KL_SHARE = 0.1
NOISE_TOP1_SHARE = 1 / 3  # KL grows with the square of a small difference, disagreement with the difference


@dataclass(frozen=True, slots=True)
class Agreement:
    """How close a model's next-token distributions are to the served ones, over `positions` positions.

    `kl` is the mean of KL(model || served) in nats, `top1` the share of equal most likely tokens, `loss` the
    mean negative log-likelihood of the texts' next tokens.
    """

    positions: int
    kl: float
    kl_max: float
    top1: float
    max_logit_difference: float
    loss: float
    served_loss: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


class AgreementMeter:
    """Sums over positions, in fp64."""

    def __init__(self) -> None:
        self._positions = self._agreeing = self._scored = 0
        self._kl = self._kl_max = self._difference = self._loss = self._served_loss = 0.0

    def add(self, logits: torch.Tensor, served: torch.Tensor, targets: torch.Tensor) -> None:
        """Logits `[positions, vocabulary]` in fp32; `targets` -1 where there is no next token."""
        log_p, log_q = (x.double().log_softmax(dim=-1) for x in (logits, served))
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        self._positions += len(logits)
        self._kl += float(kl.sum())
        self._kl_max = max(self._kl_max, float(kl.max()))
        self._agreeing += int((logits.argmax(-1) == served.argmax(-1)).sum())
        self._difference = max(self._difference, float((logits - served).abs().max()))
        known = targets >= 0
        chosen = targets[known].unsqueeze(-1)
        self._scored += int(known.sum())
        self._loss -= float(log_p[known].gather(-1, chosen).sum())
        self._served_loss -= float(log_q[known].gather(-1, chosen).sum())

    def result(self) -> Agreement:
        return Agreement(
            positions=self._positions,
            kl=self._kl / self._positions,
            kl_max=self._kl_max,
            top1=self._agreeing / self._positions,
            max_logit_difference=self._difference,
            loss=self._loss / self._scored,
            served_loss=self._served_loss / self._scored,
        )


def shortfalls(
    agreement: Agreement, options: VerifyOptions, noise: Agreement | None = None
) -> tuple[str, ...]:
    """What speaks against equality, one phrase each; empty when the model counts as equal.

    `noise` is what the server's own rounding in its compute dtype does to the same function: an export that
    adds a fraction of that is equal for every user of the server, whatever the absolute figures.
    """
    max_kl, min_top1 = options.max_kl, options.min_top1
    if noise is not None:
        max_kl = max(max_kl, NOISE_KL_SHARE * noise.kl)
        min_top1 = min(min_top1, 1 - NOISE_TOP1_SHARE * (1 - noise.top1))
    failures = []
    if not agreement.kl <= max_kl:  # a NaN fails
        failures.append(f"KL {agreement.kl:.2e} is above {max_kl:.1e}")
    if not agreement.top1 >= min_top1:
        failures.append(f"top-1 agreement {agreement.top1:.2%} is below {min_top1:.2%}")
    return tuple(failures)
