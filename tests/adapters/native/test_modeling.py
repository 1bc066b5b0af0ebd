"""Behind transformers' modeling code: the same logits of every architecture, and only where a probe says so."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from loramux_adapters.native.library import Native
from loramux_adapters.native.modeling import put_behind
from tests.conftest import TINY_CONFIGS

TOKENS = torch.arange(5, 45)[None]


def make(architecture: str) -> PreTrainedModel:
    """Large enough for the kernels: heads of 32."""
    config = TINY_CONFIGS[architecture]()
    config.hidden_size, config.head_dim = 128, 32
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.7 if "norm" in name else 0.0, 0.2)
    return model.bfloat16().eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def rotary_as_it_was() -> Iterator[None]:
    """The rotary function is its module's: what one test puts there is not the next one's."""
    yield
    for module in list(sys.modules.values()):
        found = vars(module).get("apply_rotary_pos_emb") if "transformers.models" in module.__name__ else None
        if hasattr(found, "loramux_original"):
            module.apply_rotary_pos_emb = found.loramux_original  # type: ignore[attr-defined]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS, use_cache=False).logits.float()


class Counted:
    """Passes every call on, and counts them."""

    def __init__(self, native: Native) -> None:
        self._native = native
        self.calls = {"rms_norm": 0, "rotate": 0, "gate": 0}

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self._native, name)


# norms of 3 layers and the last; rotary of q and k; Gemma's activation is another, Phi 3 has gate and up in one
CALLS = {
    "llama": {"rms_norm": 7, "rotate": 6, "gate": 3},
    "mistral": {"rms_norm": 7, "rotate": 6, "gate": 3},
    "qwen2": {"rms_norm": 7, "rotate": 6, "gate": 3},
    "qwen3": {"rms_norm": 13, "rotate": 6, "gate": 3},
    "gemma2": {"rms_norm": 13, "rotate": 6, "gate": 0},
    "gemma3": {"rms_norm": 19, "rotate": 6, "gate": 0},
    "phi3": {"rms_norm": 7, "rotate": 6, "gate": 0},
}


@pytest.mark.parametrize("architecture", TINY_CONFIGS)
def test_the_same_logits(architecture: str, native: Native) -> None:
    model = make(architecture)
    expected = logits(model)
    counted: Any = Counted(native)
    put_behind(model, counted)
    counted.calls.update(dict.fromkeys(counted.calls, 0))
    ours = logits(model)
    assert counted.calls == CALLS[architecture]
    assert float((ours - expected).norm() / expected.norm()) < 1e-2


def test_whoever_differentiates_gets_what_was_there(native: Native) -> None:
    model = make("llama")
    embedded = model.get_input_embeddings()(TOKENS)

    def gradient() -> torch.Tensor:
        x = embedded.clone().requires_grad_()
        model(inputs_embeds=x, use_cache=False).logits.float().sum().backward()
        assert x.grad is not None
        return x.grad

    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
    expected = gradient()
    counted: Any = Counted(native)
    put_behind(model, counted)
    counted.calls.update(dict.fromkeys(counted.calls, 0))
    assert torch.equal(gradient(), expected)
    with torch.no_grad():  # a recomputation begins like this
        assert torch.equal(model(input_ids=TOKENS).logits, before)
    assert sum(counted.calls.values()) == 0


def test_other_types_get_what_was_there(native: Native) -> None:
    model, other = make("llama"), make("llama")
    put_behind(model, native)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(model.float()), logits(other.float()))
    two = TOKENS.repeat(2, 1)
    with torch.inference_mode():
        rows = model.bfloat16()(input_ids=two, use_cache=False).logits
    assert torch.equal(rows[0], rows[1])


def test_again_for_another_model(native: Native) -> None:
    first, second = make("llama"), make("llama")
    put_behind(first, native)
    expected = logits(first)
    put_behind(second, native)
    assert torch.equal(logits(second), expected)
    assert torch.equal(logits(first), expected)
    rotary: Any = sys.modules[type(second).__module__]
    assert not hasattr(rotary.apply_rotary_pos_emb.loramux_original, "loramux_original")
    assert type(second).__name__ == "LlamaForCausalLM"
    assert type(second.model.norm).__name__ == "LlamaRMSNorm"


@pytest.mark.parametrize("wrong", ["rms_norm", "rotate", "gate"])
def test_a_wrong_kernel_is_not_used(
    wrong: str, native: Native, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama")
    expected = logits(model)
    right = getattr(native, wrong)

    def nearly(*arguments: Any, **options: Any) -> torch.Tensor:
        result: torch.Tensor = right(*arguments, **options).clone()
        result[..., 0] *= 1.5
        return result

    monkeypatch.setattr(native, wrong, nearly)
    with caplog.at_level(logging.INFO):
        put_behind(model, native)
    said = {
        "rms_norm": "0 norms, 3 MLPs, rotary embedding too",
        "rotate": "7 norms, 3 MLPs, rotary embedding by torch",
        "gate": "7 norms, 0 MLPs, rotary embedding too",
    }
    assert said[wrong] in caplog.text
    assert float((logits(model) - expected).norm() / expected.norm()) < 1e-2


def test_an_mlp_that_clamps_is_left_alone(native: Native, caplog: pytest.LogCaptureFixture) -> None:
    """What it clamps is larger than what random inputs make."""
    model = make("llama")
    mlp: Any = model.model.layers[0].mlp

    class Clamped(type(mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate = self.act_fn(self.gate_proj(x)).clamp(max=50.0)
            result: torch.Tensor = self.down_proj(gate * self.up_proj(x))
            return result

    mlp.__class__ = Clamped
    with caplog.at_level(logging.INFO):
        put_behind(model, native)
    assert "2 MLPs" in caplog.text


@pytest.mark.parametrize("result", ["a tuple", "an error"])
def test_modules_that_are_called_otherwise_are_left_alone(
    result: str, native: Native, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("llama")
    layer: Any = model.model.layers[0]

    class Norm(type(layer.input_layernorm)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
            return x + residual

    class LlamaRMSNorm(Norm):
        pass

    class Gated(type(layer.mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> Any:
            if result == "an error":
                raise ValueError("not like this")
            return x, x

    def rotary(q: torch.Tensor, unsqueeze_dim: int = 2) -> torch.Tensor:
        return q

    layer.input_layernorm.__class__ = LlamaRMSNorm
    layer.mlp.__class__ = Gated
    monkeypatch.setattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", rotary)
    with caplog.at_level(logging.INFO):
        put_behind(model, native)
    assert "6 norms, 2 MLPs, rotary embedding by torch" in caplog.text


def test_rotary_called_otherwise_is_the_original(native: Native) -> None:
    model = make("llama")
    modeling: Any = sys.modules[type(model).__module__]
    original = modeling.apply_rotary_pos_emb
    counted: Any = Counted(native)
    put_behind(model, counted)
    counted.calls.update(dict.fromkeys(counted.calls, 0))
    q, k, angle = torch.ones(1, 4, 6, 32), torch.ones(1, 2, 6, 32), torch.rand(1, 6, 32)
    q, k, angle = q.bfloat16(), k.bfloat16(), angle.bfloat16()
    with torch.inference_mode():
        for given, options in (
            ((q, k, angle, angle, 1), {}),
            ((q, k), {"cos": angle, "sin": angle}),
            ((q, k, angle.repeat(2, 1, 1)[:1, :, ::2].repeat(1, 1, 2), angle.float()), {}),
            ((q.transpose(1, 2), k.transpose(1, 2), angle, angle), {"unsqueeze_dim": 2}),
        ):
            ours = modeling.apply_rotary_pos_emb(*given, **options)
            assert all(map(torch.equal, ours, original(*given, **options)))
    assert counted.calls["rotate"] == 0


def test_an_mlp_that_does_more_is_left_alone(native: Native, caplog: pytest.LogCaptureFixture) -> None:
    model = make("llama")
    mlp: Any = model.model.layers[0].mlp
    cls = type(mlp)

    class Doubled(cls):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = 2 * super().forward(x)
            return result

    mlp.__class__ = Doubled
    expected = logits(model)
    with caplog.at_level(logging.INFO):
        put_behind(model, native)
    assert "2 MLPs" in caplog.text
    assert type(mlp) is Doubled
    assert float((logits(model) - expected).norm() / expected.norm()) < 1e-2
