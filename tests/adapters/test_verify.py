"""`loramux verify`: what it says of good, empty, broken and misread adapters, and that it leaves the base as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch.nn import functional as F
from typer.testing import CliRunner

from loramux_adapters.cli_verify import VerifyBase, register
from loramux_adapters.errors import AdapterUnavailable, BaseModelError, InvalidAdapter
from loramux_adapters.layers import MultiLoraLinear
from loramux_adapters.nf4 import NF4Linear
from loramux_adapters.spec import ALL_LINEAR, AdapterSpec, BaseGeometry
from loramux_adapters.twin import twin_of
from loramux_adapters.verify import Probe, Progress, VerifyReport, verification_steps, verify_adapter
from loramux_adapters.verify.served import ServedAdapter
from loramux_adapters.weights import LoraWeights
from loramux_server.base.loading import LoadOptions, ResidentBase, load_base
from loramux_server.engine.engine import Engine, EngineOptions
from tests.server.support import Recipe, request, tokens_of, write_adapter

SPECS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 12.0, "target_modules": ("q_proj", "v_proj", "down_proj")},
    "rslora": {"r": 6, "lora_alpha": 5.0, "target_modules": (ALL_LINEAR,), "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 7.0,
        "target_modules": ("q_proj", "k_proj", "up_proj"),
        "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 9},
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 3.0, "up_proj": 2.5},
    },
    "partial": {"r": 3, "lora_alpha": 6.0, "target_modules": ("layers.1.self_attn.o_proj", "gate_proj")},
}
PROBE = Probe.of_ids(320, prompts=2, length=24)


def make_weights(geometry: BaseGeometry, scale: float = 0.5, **fields: Any) -> LoraWeights:
    """Random tensors of the spec's shapes; `scale` is about ||update @ x|| / ||x||, before the scaling."""
    spec = AdapterSpec(**SPECS["plain"] | fields)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name in spec.targets(geometry):
        (out_features, in_features), rank = geometry.linear_shapes[name], spec.rank(name)
        a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        tensors[name] = (a, torch.randn(out_features, rank, generator=generator) * scale / rank**0.5)
    return LoraWeights(spec, tensors)


def edited(
    weights: LoraWeights, edit: Callable[[str, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> LoraWeights:
    return LoraWeights(weights.spec, {name: edit(name, *pair) for name, pair in weights.tensors.items()})


def load(directory: Path, dtype: str, quantization: Any = "nf4") -> ResidentBase:
    options = LoadOptions(
        model=str(directory), name="org/tiny", device="cpu", dtype=dtype, quantization=quantization
    )
    return load_base(options)


@pytest.fixture(scope="module")
def bases(tiny_model: Callable[[str], Path]) -> Mapping[str, ResidentBase]:
    return {dtype: load(tiny_model("llama"), dtype) for dtype in ("float32", "bfloat16")}


@pytest.fixture
def base(bases: Mapping[str, ResidentBase]) -> ResidentBase:
    return bases["float32"]


def verify(base: ResidentBase, weights: LoraWeights) -> VerifyReport:
    return verify_adapter(base.model, base.geometry, weights, probe=PROBE)


def state_of(base: ResidentBase) -> dict[str, Any]:
    """Everything of a base that serving depends on, by value."""
    model = base.model
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(5, 25)[None], use_cache=False).logits
    return {
        "logits": logits.view(torch.uint8).numpy().tobytes(),
        "nf4": [m.quantized.digest() for m in model.modules() if isinstance(m, NF4Linear)],
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "tensors": [
            (name, id(p), p.data_ptr(), p.requires_grad, p.grad) for name, p in model.named_parameters()
        ],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "config": model.config.to_json_string(),
        "attention": model.config._attn_implementation,
    }


# --- good adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_good_adapter_is_ok_and_agrees_with_peft(
    spec: dict[str, Any], dtype: str, bases: Mapping[str, ResidentBase]
) -> None:
    base = bases[dtype]
    weights = make_weights(base.geometry, **spec)
    report = verify(base, weights)
    assert (report.verdict, report.reason) == ("ok", "the adapter changes the model, and as PEFT would")
    report.require()
    assert report.shift is not None
    assert report.peft is not None
    assert report.shift.positions == 48
    assert report.shift.relative > 0.05
    assert report.shift.top1_changed > 0
    assert report.peft.relative_error <= (1e-5 if dtype == "float32" else 0.05)
    assert report.peft.update_error <= (1e-5 if dtype == "float32" else 0.01)
    assert report.peft.top1_agreement >= (1.0 if dtype == "float32" else 0.8)
    assert [facts.name for facts in report.weights.modules] == list(weights.spec.targets(base.geometry))
    assert report.weights.nonzero_tensors == report.weights.nonzero_elements == 1.0
    assert report.generation == weights.generation
    assert (report.base, report.base_identity, report.dtype) == ("org/tiny", base.geometry.identity, dtype)


@pytest.mark.parametrize("architecture", ["gemma3", "phi3", "qwen2"])
def test_other_architectures_agree_too(architecture: str, tiny_model: Callable[[str], Path]) -> None:
    base = load(tiny_model(architecture), "float32")
    weights = make_weights(base.geometry, scale=0.2, target_modules=(ALL_LINEAR,))
    assert verify(base, weights).verdict == "ok"


def test_an_unquantized_base_is_verified_too(tiny_model: Callable[[str], Path]) -> None:
    base = load(tiny_model("llama"), "bfloat16", "none")
    assert verify(base, make_weights(base.geometry)).verdict == "ok"


def test_norms_are_those_of_the_dense_matrices(base: ResidentBase) -> None:
    weights = make_weights(base.geometry, **SPECS["patterns"])
    for facts in verify(base, weights).weights.modules:
        a, b = weights.tensors[facts.name]
        scaling = weights.spec.alpha(facts.name) / weights.spec.rank(facts.name)
        dense = base.model.get_submodule(facts.name).dequantize(torch.float32)
        assert facts.delta_norm == pytest.approx(float((scaling * b @ a).norm()), rel=1e-5)
        assert facts.weight_norm == pytest.approx(float(dense.norm()), rel=1e-5)
        assert facts.relative == pytest.approx(facts.delta_norm / facts.weight_norm)
        assert (facts.rank, facts.scaling) == (a.shape[0], scaling)


def test_the_shift_is_that_of_merged_weights(base: ResidentBase, tiny_model: Callable[[str], Path]) -> None:
    """Against a third computation that is neither PEFT's nor ours: the update added to the dense weight."""
    weights = make_weights(base.geometry)
    merged = load(tiny_model("llama"), "float32").model
    for name, (a, b) in weights.tensors.items():
        module = merged.get_submodule(name)
        dense = module.dequantize(torch.float32) + weights.spec.scaling(name) * b @ a
        module.forward = lambda x, dense=dense: F.linear(x, dense)
    ours, plain = [], []
    with torch.inference_mode():
        for row in PROBE.tokens:
            ours.append(merged(input_ids=torch.tensor([row]), use_cache=False).logits[0])
            plain.append(base.model(input_ids=torch.tensor([row]), use_cache=False).logits[0])
    adapted, before = torch.cat(ours), torch.cat(plain)
    shift = verify(base, weights).shift
    assert shift is not None
    assert shift.relative == pytest.approx(float((adapted - before).norm() / before.norm()), rel=1e-3)
    assert shift.max_logit == pytest.approx(float((adapted - before).abs().max()), rel=1e-3)
    kl = F.kl_div(before.log_softmax(-1), adapted.log_softmax(-1), log_target=True, reduction="batchmean")
    assert shift.kl == pytest.approx(float(kl), rel=1e-3)
    changed = (adapted.argmax(-1) != before.argmax(-1)).float().mean()
    assert shift.top1_changed == pytest.approx(float(changed))


def test_another_base_by_name_is_a_warning(base: ResidentBase) -> None:
    report = verify(base, make_weights(base.geometry, base_model_name_or_path="org/other"))
    assert report.verdict == "ok"
    assert "org/other" in report.warnings[0]


def test_a_report_survives_json(base: ResidentBase) -> None:
    for weights in (make_weights(base.geometry), make_weights(base.geometry, scale=0.0)):
        report = verify(base, weights)
        text = json.dumps(report.to_json(), allow_nan=False)
        assert VerifyReport.from_json(json.loads(text)) == report


# --- adapters that change nothing --------------------------------------------------------------------------------


def test_zero_b_is_refused_with_the_reason_unless_allowed(base: ResidentBase) -> None:
    report = verify(base, make_weights(base.geometry, scale=0.0))
    assert (report.verdict, report.reason) == ("noop", "the adapter changes nothing: every lora_B is zero")
    assert report.weights.nonzero_tensors == 0.5
    assert len(report.weights.zero_modules) == len(report.weights.modules) == 9
    report.require(allow_noop=True)
    with pytest.raises(
        InvalidAdapter, match="'mine' is refused.*changes nothing: every lora_B is zero; allow_noop"
    ):
        report.require(name="mine")


def test_some_zero_modules_are_named_and_no_reason_to_refuse(base: ResidentBase) -> None:
    weights = edited(
        make_weights(base.geometry), lambda name, a, b: (a, torch.zeros_like(b) if "q_proj" in name else b)
    )
    report = verify(base, weights)
    assert report.verdict == "ok"
    assert report.weights.zero_modules == tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(3))


def test_a_product_of_zero_is_a_noop(base: ResidentBase) -> None:
    report = verify(base, edited(make_weights(base.geometry), lambda _, a, b: (torch.zeros_like(a), b)))
    assert report.verdict == "noop"
    assert "lora_B @ lora_A is zero" in report.reason


def test_what_rounding_swallows_is_a_noop(bases: Mapping[str, ResidentBase]) -> None:
    base = bases["bfloat16"]
    report = verify(base, make_weights(base.geometry, scale=1e-9))
    assert report.verdict == "noop"
    assert report.reason == "the adapter changes nothing: in bfloat16 its logits equal the base's"
    assert report.shift is not None
    assert report.shift.max_logit == 0.0


# --- adapters that are misread -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 0.5), ("bfloat16", 0.5), ("bfloat16", 1e-4)])
def test_a_wrong_scaling_disagrees_however_small_the_adapter(
    dtype: str, scale: float, bases: Mapping[str, ResidentBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = bases[dtype]
    weights = make_weights(base.geometry, scale, use_rslora=True)
    monkeypatch.setattr(AdapterSpec, "scaling", lambda spec, name: spec.alpha(name) / spec.rank(name))
    report = verify(base, weights)
    assert report.verdict == "disagrees"
    assert "differs from PEFT's by" in report.reason
    assert report.peft is not None
    assert report.peft.worst_module in weights.tensors
    assert report.peft.update_error > 0.5
    with pytest.raises(InvalidAdapter, match="differs from PEFT's"):
        report.require(allow_noop=True)


def test_an_update_that_is_not_applied_disagrees(base: ResidentBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors are right but one linear never uses them: only the logits show it."""
    forward = MultiLoraLinear.forward
    monkeypatch.setattr(
        MultiLoraLinear,
        "forward",
        lambda self, x: self.base_layer(x) if self.name.endswith("2.self_attn.v_proj") else forward(self, x),
    )
    report = verify(base, make_weights(base.geometry))
    assert report.verdict == "disagrees"
    assert report.reason.startswith("the logits differ from PEFT's by")


def test_other_targets_or_shapes_than_pefts_disagree(base: ResidentBase) -> None:
    whole = make_weights(base.geometry)
    first, *rest = whole.tensors
    fewer = LoraWeights(whole.spec, {name: whole.tensors[name] for name in rest})
    assert verify(base, fewer).reason == f"PEFT targets {first} and loramux does not"
    narrow = edited(whole, lambda _, a, b: (a[:5], b[:, :5]))
    report = verify(base, narrow)
    assert report.verdict == "disagrees"
    assert f"PEFT gives {first} the shape (8, 64), loramux (5, 64)" in report.reason


def test_a_config_peft_does_not_take_disagrees(base: ResidentBase) -> None:
    whole = make_weights(base.geometry)
    spec = AdapterSpec(**SPECS["plain"] | {"target_modules": ("no_such_module",)})
    report = verify(base, LoraWeights(spec, whole.tensors))
    assert report.verdict == "disagrees"
    assert report.reason.startswith("PEFT does not take this config: ")


# --- adapters that are not finite --------------------------------------------------------------------------------


def test_weights_that_are_not_finite_are_named(base: ResidentBase) -> None:
    weights = edited(
        make_weights(base.geometry), lambda name, a, b: (a, b * float("nan") if "1.mlp" in name else b)
    )
    report = verify(base, weights)
    assert report.verdict == "not_finite"
    assert report.weights.nonfinite_modules == ("model.layers.1.mlp.down_proj",)
    assert report.reason == "inf or nan in 1 of 9 modules, the first is model.layers.1.mlp.down_proj"
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("size", "reason"), [(3e38, "overflow torch.bfloat16"), (1e37, "makes the logits inf or nan")]
)
def test_overflow_is_not_finite(size: float, reason: str, bases: Mapping[str, ResidentBase]) -> None:
    base = bases["bfloat16"]
    report = verify(base, edited(make_weights(base.geometry), lambda _, a, b: (a, torch.full_like(b, size))))
    assert report.verdict == "not_finite"
    assert reason in report.reason
    json.dumps(report.to_json(), allow_nan=False)


def test_a_broken_base_is_not_the_adapters_fault(base: ResidentBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ServedAdapter, "logits", lambda self, tokens, adapted: torch.full((len(tokens), 320), float("nan"))
    )
    with pytest.raises(BaseModelError, match="base's own logits are not finite"):
        verify(base, make_weights(base.geometry))


# --- the base stays as it was ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_exactly_as_before(dtype: str, bases: Mapping[str, ResidentBase]) -> None:
    base = bases[dtype]
    norm = base.model.get_submodule("model.norm").weight
    norm.requires_grad_(True)  # PEFT freezes whatever it wraps
    random_numbers = torch.get_rng_state()
    before = state_of(base)
    try:
        verify(base, make_weights(base.geometry, target_modules=(ALL_LINEAR,)))
        assert torch.equal(torch.get_rng_state(), random_numbers)
        assert state_of(base) == before
    finally:
        norm.requires_grad_(False)


def test_a_twin_copies_no_weight(base: ResidentBase) -> None:
    def memory(model: torch.nn.Module) -> set[int]:
        linears = [m for m in model.modules() if isinstance(m, NF4Linear)]
        held = [part for m in linears for part in m.quantized.canonical_parts()[:3]]
        return {t.data_ptr() for t in (*held, *model.parameters(), *model.buffers())} | {
            id(m.kernel) for m in linears
        }

    assert memory(twin_of(base.model)) == memory(base.model)


def test_an_engine_goes_on_between_slices(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """On the wrapped model, while streams of the base and of another adapter decode: same tokens, same verdict."""
    engine = Engine(load(tiny_model("llama"), "float32"), EngineOptions(num_blocks=64, max_model_len=256))
    try:
        ref = write_adapter(tmp_path, engine.base.geometry, Recipe(r=4, seed=1))
        requests = [
            request(f"r{i}", list(range(9 + i, 30)), ref if i % 2 else None, max_tokens=60) for i in range(3)
        ]

        def decode(between: Iterator[object]) -> dict[str, list[int]]:
            for item in requests:
                engine.add(item)
            outputs: dict[str, list[Any]] = {item.id: [] for item in requests}
            while engine.has_work:
                next(between, None)
                for output in engine.step().outputs:
                    outputs[output.id].append(output)
            return {name: tokens_of(found) for name, found in outputs.items()}

        expected = decode(iter(()))
        weights = make_weights(engine.base.geometry)
        reports: list[VerifyReport] = []
        slices: list[Progress] = []

        def verifying() -> Iterator[object]:
            steps = verification_steps(engine.base.model, engine.base.geometry, weights, PROBE)
            while True:
                try:
                    slices.append(next(steps))
                except StopIteration as end:
                    reports.append(end.value)
                    return
                yield None

        assert decode(verifying()) == expected
        assert [report.verdict for report in reports] == ["ok"]
        assert [step.done for step in slices] == list(range(1, slices[-1].total + 1))
        engine.check_integrity()
    finally:
        engine.close()


def test_lack_of_memory_is_the_adapters_trouble_only(
    base: ResidentBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ServedAdapter, "logits", exhausted)
    with pytest.raises(AdapterUnavailable, match="not enough device memory"):
        verify(base, make_weights(base.geometry))


# --- prompts -----------------------------------------------------------------------------------------------------


class Characters:
    """A tokenizer whose first id is `offset`."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def encode(self, text: str) -> list[int]:
        return [ord(character) % 256 + self.offset for character in text]


def test_texts_are_read_by_the_tokenizer(base: ResidentBase) -> None:
    weights = make_weights(base.geometry)
    report = verify_adapter(
        base.model, base.geometry, weights, tokenizer=Characters(60), prompts=3, tokens=10
    )
    assert report.tokens_from == "3 built-in texts"
    assert report.shift is not None
    assert report.shift.positions == 30
    with pytest.raises(BaseModelError, match="does not fit its vocabulary of 320 tokens"):
        verify_adapter(base.model, base.geometry, weights, tokenizer=Characters(300))


# --- command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(base: ResidentBase) -> Callable[..., Any]:
    """`command(arguments...)` runs `verify` in this process, on a base that is loaded already."""
    app = typer.Typer()

    def loaded(model: str, device: str, dtype: str, quantization: str = "") -> VerifyBase:
        assert (device, dtype, quantization) == ("auto", "auto", "nf4")
        return VerifyBase(base.model, base.geometry, None)

    register(app, loaded)
    return lambda *arguments: CliRunner().invoke(app, [*map(str, arguments), "--model", "org/tiny"])


def test_command_shows_kinds_and_a_verdict(
    command: Callable[..., Any], base: ResidentBase, tmp_path: Path
) -> None:
    make_weights(base.geometry).write(tmp_path)
    result = command(tmp_path, "--prompts", 1)
    assert result.exit_code == 0, result.output
    for word in ("q_proj", "v_proj", "down_proj", "100.0% of the tensors", "of 64 positions"):
        assert word in result.stdout
    assert result.stdout.splitlines()[-1] == "ok: the adapter changes the model, and as PEFT would"


def test_command_refuses_a_noop_with_exit_code_1(
    command: Callable[..., Any], base: ResidentBase, tmp_path: Path
) -> None:
    make_weights(base.geometry, scale=0.0).write(tmp_path)
    refused = command(tmp_path)
    assert refused.exit_code == 1
    assert refused.stdout.splitlines()[-1] == "noop: the adapter changes nothing: every lora_B is zero"
    assert command(tmp_path, "--allow-noop").exit_code == 0


def test_command_takes_an_archive(command: Callable[..., Any], base: ResidentBase, tmp_path: Path) -> None:
    make_weights(base.geometry).write(tmp_path / "adapter")
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "adapter")
    result = command(archive, "--json", "--prompts", 1)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["verdict"] == "ok"


def test_command_errors_are_sentences(command: Callable[..., Any], tmp_path: Path) -> None:
    missing = command(tmp_path / "nowhere")
    assert missing.exit_code == 1
    assert "nowhere: no such directory or archive" in missing.stderr
    (tmp_path / "adapter_config.json").write_text("{}")
    in_json = command(tmp_path, "--json")
    assert in_json.exit_code == 1
    assert json.loads(in_json.stdout)["error"]["code"] == "invalid_adapter"


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_command_as_users_start_it(
    quantization: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base = load(tiny_model("llama"), "float32", quantization)
    make_weights(base.geometry).write(tmp_path)
    line = ["verify", str(tmp_path), "--model", str(tiny_model("llama")), "--device", "cpu", "--json"]
    line += ["--quantization", quantization, "--dtype", "float32"]
    done = subprocess.run(
        [sys.executable, "-m", "loramux_server", *line],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = VerifyReport.from_json(json.loads(done.stdout))
    assert report.verdict == "ok"
    assert report.tokens_from == "4 sequences of pseudo-random tokens"
    assert report.base_identity == base.geometry.identity
