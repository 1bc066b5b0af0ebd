"""The verification itself: facts of the files, then the adapter beside the base and beside PEFT, then a verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from loramux_adapters.errors import AdapterUnavailable, BaseModelError
from loramux_adapters.probe import DEFAULT_PROMPTS, DEFAULT_TOKENS, Probe
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.twin import twin_of
from loramux_adapters.verify.compare import Comparison
from loramux_adapters.verify.facts import summarize, weigh
from loramux_adapters.verify.reference import PeftAdapter, PeftDiffers
from loramux_adapters.verify.served import ServedAdapter
from loramux_adapters.verify_report import (
    LogitShift,
    ModuleFacts,
    PeftAgreement,
    Verdict,
    VerifyReport,
    WeightFacts,
)
from loramux_adapters.weights import LoraWeights


class Bounds(NamedTuple):
    """What rounding in a compute dtype stays below: of whole logits, and of one module's update."""

    logits: float
    update: float


# Two bf16 forward passes that round in another order differ by 1-3 % of the logits' norm; a factor rounded once to a dtype
# is off by a third of its epsilon on average.
BOUNDS = {
    torch.float32: Bounds(1e-3, 1e-4),
    torch.bfloat16: Bounds(0.05, 0.02),
    torch.float16: Bounds(0.02, 5e-3),
}


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` slices: a module weighed, a twin made or rebuilt, a prompt run once."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class _Finding:
    verdict: Verdict
    reason: str
    shift: LogitShift | None = None
    peft: PeftAgreement | None = None


def verify_adapter(
    model: PreTrainedModel,
    geometry: BaseGeometry,
    weights: LoraWeights,
    *,
    tokenizer: Any = None,
    probe: Probe | None = None,
    prompts: int = DEFAULT_PROMPTS,
    tokens: int = DEFAULT_TOKENS,
    observe: Callable[[Progress], None] | None = None,
) -> VerifyReport:
    """Judge an adapter on a resident base in one go; raises what `verification_steps` raises.

    The prompts are those of `probe` or else `prompts` built-in ones of at most `tokens` tokens, as the tokenizer reads
    them, or fixed pseudo-random ids without one. Which thread: see `verification_steps`.
    """
    if probe is None:
        config = model.config.get_text_config()
        length = min(tokens, int(getattr(config, "max_position_embeddings", tokens)))
        probe = (
            Probe.of_ids(config.vocab_size, prompts=prompts, length=length)
            if tokenizer is None
            else Probe.of_texts(tokenizer, prompts=prompts, length=length)
        )
    steps = verification_steps(model, geometry, weights, probe)
    while True:
        try:
            progress = next(steps)
        except StopIteration as end:
            report: VerifyReport = end.value
            return report
        if observe is not None:
            observe(progress)


def verification_steps(
    model: PreTrainedModel, geometry: BaseGeometry, weights: LoraWeights, probe: Probe
) -> Generator[Progress, None, VerifyReport]:
    """The same in slices: between two of them the caller may run `model` as it likes, and it may stop at any.

    In a server: on the thread that owns the device, between engine steps. `model` may be plain or have `MultiLoraLinear`
    installed; it is never changed, not even for a moment: all work happens on two twins of its module tree that share its
    weights. The longest slice is one forward pass over a prompt, or half a second in which PEFT builds its layers.
    Besides logits it takes device memory for the adapter twice, once in fp32.

    `weights` must be shaped as the gate demands. Raises BaseModelError if the base itself is not finite or cannot read
    `probe`, AdapterUnavailable if memory does not suffice.
    """
    started = time.monotonic()
    probe.check(model.config.get_text_config().vocab_size)
    total = len(weights.tensors) + 4 + 3 * len(probe.tokens)
    try:
        modules: list[ModuleFacts | None] = []
        for facts_of_module in weigh(model, weights):
            modules.append(facts_of_module)
            yield Progress(len(modules), total)
        facts = summarize(weights, modules)
        finding = _judge_files(facts)
        if finding is None:
            finding = yield from _run_and_judge(model, weights, probe, len(modules), total)
    except torch.OutOfMemoryError as error:
        raise AdapterUnavailable("not enough device memory is free to verify the adapter") from error
    return VerifyReport(
        verdict=finding.verdict,
        reason=finding.reason,
        generation=weights.generation,
        base=geometry.name,
        base_identity=geometry.identity,
        dtype=_dtype_name(model.dtype),
        device=str(model.device),
        tokens_from=probe.origin,
        weights=facts,
        shift=finding.shift,
        peft=finding.peft,
        warnings=weights.spec.warnings(geometry),
        seconds=round(time.monotonic() - started, 3),
    )


def _judge_files(facts: WeightFacts) -> _Finding | None:
    """A verdict that needs no model, or None."""
    if facts.nonfinite_modules:
        bad, whole = facts.nonfinite_modules, len(facts.modules) + len(facts.nonfinite_modules)
        return _Finding("not_finite", f"inf or nan in {len(bad)} of {whole} modules, the first is {bad[0]}")
    if len(facts.zero_modules) == len(facts.modules):
        return _Finding("noop", "the adapter changes nothing: every lora_B is zero")
    if not any(module.delta_norm for module in facts.modules):
        return _Finding("noop", "the adapter changes nothing: lora_B @ lora_A is zero in every module")
    return None


def _run_and_judge(
    model: PreTrainedModel, weights: LoraWeights, probe: Probe, done: int, total: int
) -> Generator[Progress, None, _Finding]:
    try:
        twin = twin_of(model)
        yield Progress(done + 1, total)
        served = ServedAdapter(twin, weights)
        yield Progress(done + 2, total)
        twin = twin_of(model)
        yield Progress(done + 3, total)
        peft = PeftAdapter(twin, weights)
        yield Progress(done + 4, total)
    except AdapterUnavailable as error:
        return _Finding("not_finite", error.message)
    except PeftDiffers as error:
        return _Finding("disagrees", str(error))
    done += 4
    shift, agreement = Comparison(), Comparison()
    for tokens in probe.tokens:
        base = served.logits(tokens, adapted=False)
        yield Progress(done + 1, total)
        ours = served.logits(tokens, adapted=True)
        yield Progress(done + 2, total)
        theirs = peft.logits(tokens)
        done += 3
        yield Progress(done, total)
        if not bool(base.isfinite().all()):
            raise BaseModelError("the base's own logits are not finite", param="model")
        if not bool(ours.isfinite().all()):
            return _Finding("not_finite", f"the adapter makes the logits inf or nan on {probe.origin}")
        if not bool(theirs.isfinite().all()):
            return _Finding("disagrees", "PEFT's logits are inf or nan, loramux's are not")
        shift.add(ours, base, tokens)
        agreement.add(ours, theirs, tokens)
    update = peft.update_error(served.host)
    return _judge_run(shift, _agreement(agreement, update, model.dtype), model.dtype)


def _agreement(logits: Comparison, update: tuple[float, str], dtype: torch.dtype) -> PeftAgreement:
    result, bounds = logits.result(), BOUNDS[dtype]
    return PeftAgreement(
        relative_error=logits.relative,
        relative_bound=bounds.logits,
        update_error=update[0],
        update_bound=bounds.update,
        worst_module=update[1],
        max_logit=result.max_logit_difference,
        kl=result.kl,
        top1_agreement=result.top1,
    )


def _judge_run(comparison: Comparison, peft: PeftAgreement, dtype: torch.dtype) -> _Finding:
    result = comparison.result()
    shift = LogitShift(
        positions=result.positions,
        max_logit=result.max_logit_difference,
        relative=comparison.relative,
        kl=result.kl,
        kl_max=result.kl_max,
        top1_changed=1.0 - result.top1,
    )
    verdict: Verdict = "ok"
    reason = "the adapter changes the model, and as PEFT would"
    if not peft.update_error <= peft.update_bound:
        verdict = "disagrees"
        reason = (
            f"the update of {peft.worst_module} differs from PEFT's by {peft.update_error:.2g} of its norm; "
            f"at most {peft.update_bound:g} is rounding"
        )
    elif not peft.relative_error <= peft.relative_bound:
        verdict = "disagrees"
        reason = (
            f"the logits differ from PEFT's by {peft.relative_error:.2g} of their norm; "
            f"at most {peft.relative_bound:g} is rounding"
        )
    elif comparison.equal:
        verdict = "noop"
        reason = f"the adapter changes nothing: in {_dtype_name(dtype)} its logits equal the base's"
    return _Finding(verdict, reason, shift, peft)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
