"""When two models count as equal, and the figures that decide it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loramux_adapters.export import ExportOptions, VerifyOptions, WeightedAdapter, plan_export, run_export
from loramux_adapters.export.agreement import Agreement, AgreementMeter, shortfalls

EXACT = Agreement(1000, 1e-6, 1e-5, 1.0, 0.01, 2.0, 2.0)
NOISY = replace(EXACT, kl=5e-3, top1=0.96)


def test_absolute_thresholds() -> None:
    options = VerifyOptions()
    assert shortfalls(EXACT, options) == ()
    assert shortfalls(replace(EXACT, kl=2e-5), options) == ("KL 2.00e-05 is above 1.0e-05",)
    assert shortfalls(replace(EXACT, top1=0.998), options) == ("top-1 agreement 99.80% is below 99.90%",)
    assert len(shortfalls(replace(EXACT, kl=math.nan, top1=0.5), options)) == 2


def test_a_noisy_server_allows_a_share_of_its_noise() -> None:
    options = VerifyOptions()
    assert shortfalls(replace(EXACT, kl=4e-4, top1=0.99), options, NOISY) == ()
    assert len(shortfalls(replace(EXACT, kl=6e-4, top1=0.98), options, NOISY)) == 2
    quiet = replace(NOISY, kl=1e-7, top1=1.0)
    assert shortfalls(EXACT, options, quiet) == (), "noise never makes the thresholds stricter"


def test_figures_of_known_distributions() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]]).log()
    meter = AgreementMeter()
    meter.add(p + 3.0, q, torch.tensor([0, -1]))
    result = meter.result()
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert (result.positions, result.top1) == (2, 0.5)
    assert result.kl == pytest.approx(first / 2, rel=1e-6)
    assert result.kl_max == pytest.approx(first, rel=1e-6)
    assert result.loss == pytest.approx(math.log(2), rel=1e-6)
    assert result.served_loss == pytest.approx(math.log(4), rel=1e-6)
    assert result.max_logit_difference == pytest.approx(3.0 + math.log(2), rel=1e-6)


def test_noise_is_measured_only_when_needed(
    bases: Callable[[str], Path], adapter: Path, tmp_path: Path
) -> None:
    """An impossible absolute threshold: the server's bf16 arithmetic is far noisier than the export."""
    phases: set[str] = set()
    verify = VerifyOptions(prompts=2, max_kl=1e-12)
    options = ExportOptions(bases("llama"), (WeightedAdapter(adapter),), tmp_path / "merged", verify=verify)
    proof = run_export(plan_export(options), observer=lambda seen: phases.add(seen.phase)).proof
    assert phases == {"merge", "verify", "noise"}
    assert proof is not None
    assert proof.noise is not None
    assert 1e-12 < proof.export.kl < proof.noise.kl / 10
    assert proof.failures == ()


def test_a_base_without_a_tokenizer(base_copy: Path, adapter: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base_copy / name).unlink()
    verify = VerifyOptions(prompts=2, tokens=64)
    options = ExportOptions(base_copy, (WeightedAdapter(adapter),), tmp_path / "merged", verify=verify)
    proof = run_export(plan_export(options)).proof
    assert proof is not None
    assert proof.tokens_from.startswith("pseudo-random tokens")
    assert proof.export.positions == 128
