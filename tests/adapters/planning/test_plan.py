"""The arithmetic of a plan, and that what it proposes fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loramux_adapters.errors import ConfigError, TrainingError
from loramux_adapters.planning.fit import CUDA_CONTEXT
from loramux_adapters.planning.model import read_model
from loramux_adapters.planning.plan import Plan, make_plan
from loramux_adapters.planning.serving import ServingOptions
from loramux_adapters.planning.shape import ModelShape
from loramux_adapters.planning.text import plan_lines
from loramux_adapters.planning.training import method_memory
from loramux_adapters.training.memory import training_memory
from loramux_adapters.training.recipe import Recipe

MODELS = Path(__file__).parent / "models"
GB = 10**9


@pytest.fixture(scope="module")
def llama() -> ModelShape:
    return read_model(str(MODELS / "llama-2-7b"), "llama-2-7b")


def plan(
    model: ModelShape, memory: int | None = None, *, serving: ServingOptions | None = None, **fields: object
) -> Plan:
    return make_plan(
        model, Recipe.parse(fields), serving or ServingOptions(), device="cuda", dtype="bfloat16", memory=memory
    )  # fmt: skip


def test_full_fine_tuning_takes_sixteen_bytes_a_parameter(llama: ModelShape) -> None:
    for dtype in ("bfloat16", "float32"):  # fp32 has no second copy of the weights
        made = make_plan(llama, Recipe(), ServingOptions(), device="cuda", dtype=dtype)
        full = made.methods["full"]
        assert full.weights + full.gradients + full.optimizer == 16 * llama.parameters


def test_the_lora_columns_are_the_trainers_own_figures(llama: ModelShape) -> None:
    made = plan(llama, r=8, batch_size=2, max_seq_length=1024, optimizer="adamw_8bit", lora_dropout=0.1)
    own = training_memory(
        llama.decoder, llama.linears.values(), r=8, tokens=2048, dtype_bytes=2, optimizer="adamw_8bit", dropout=True,
        longest=1024, device="cuda",
    )  # fmt: skip
    for method in ("lora", "qlora"):
        memory = made.methods[method]
        assert memory.beside_weights == own.total
        assert memory.total == memory.weights + own.total
    assert made.methods["lora"].weights == 2 * llama.parameters
    assert made.methods["qlora"].total < made.methods["lora"].total < made.methods["full"].total


def test_accumulated_gradients_stay_beside_layer_inputs(llama: ModelShape) -> None:
    once, micro = (plan(llama, gradient_accumulation_steps=steps).methods["qlora"] for steps in (1, 4))
    assert once.layer_inputs > once.gradients
    assert micro.total == once.total + once.gradients


def test_what_auto_becomes_in_a_plan(llama: ModelShape) -> None:
    made = plan(llama)
    assert (made.training.r, made.training.batch_size, made.training.max_seq_length) == (16, 1, 2048)
    assert made.parameters["all-linear"][made.ranks.index(16)] == made.methods["qlora"].trainable
    assert made.serving_options.max_model_len == 4096


def test_trainable_parameters_of_a_list_have_a_row_of_their_own(llama: ModelShape) -> None:
    made = plan(llama, r=5, target_modules=["o_proj", "up_proj"])
    assert made.ranks == (5, 8, 16, 32, 64)
    assert made.parameters["o_proj,up_proj"][0] == made.methods["lora"].trainable
    assert made.methods["lora"].trainable == 32 * 5 * (4096 + 4096 + 4096 + 11008)


@pytest.mark.parametrize("memory", [5 * GB, 6 * GB, 8 * GB, 12 * GB, 24 * GB])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_each_proposed_change_fits_and_is_the_smallest(
    llama: ModelShape, memory: int, batch_size: int
) -> None:
    made = plan(llama, memory, batch_size=batch_size, r=64)
    assert made.fit is not None
    fit = made.fit.methods["qlora"]
    assert fit.left == memory - CUDA_CONTEXT - made.methods["qlora"].total
    assert fit.fits == (fit.left >= 0)
    assert not (fit.fits and fit.changes)
    for change in fit.changes:
        words = change.split()
        flags = {
            flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)
        }
        fields = {name: value if name == "optimizer" else int(value) for name, value in flags.items()}
        changed = replace(made.training, **fields)  # type: ignore[arg-type]
        assert method_memory(llama, changed, "qlora", "cuda", 2).total <= memory - CUDA_CONTEXT
        for name, step in (("batch_size", 1), ("max_seq_length", 128)):
            if name in fields and getattr(changed, name) < getattr(made.training, name) and len(flags) == 1:
                larger = replace(changed, **{name: getattr(changed, name) + step})
                assert method_memory(llama, larger, "qlora", "cuda", 2).total > memory - CUDA_CONTEXT


def test_changes_of_one_flag_are_preferred_to_changes_of_all(llama: ModelShape) -> None:
    def changes(memory: int, **fields: object) -> tuple[str, ...]:
        made = plan(llama, memory, **fields)
        assert made.fit is not None
        return made.fit.methods["qlora"].changes

    alone = changes(8 * GB, batch_size=8)
    assert [change.split()[0] for change in alone] == ["--max-seq-length", "--batch-size"]
    (together,) = changes(int(5.1 * GB), batch_size=64, r=8)
    assert together.startswith("--batch-size 1 --optimizer adamw_8bit --max-seq-length ")
    assert changes(4 * GB) == ()  # the weights alone are too large


def test_serving_in_too_little_memory(llama: ModelShape) -> None:
    made = plan(llama, 7 * GB)
    assert made.fit is not None
    serving = made.fit.serving
    assert not serving.fit.fits
    length = next(int(change.split()[1]) for change in serving.fit.changes if "--max-model-len" in change)
    shorter = make_plan(
        llama, Recipe(), ServingOptions(), device="cuda", dtype="bfloat16", max_model_len=length, memory=7 * GB
    )  # fmt: skip
    assert shorter.fit is not None
    assert shorter.fit.serving.fit.fits
    assert shorter.fit.serving.sequences == 1


def test_fewer_slots_are_proposed_where_they_help(llama: ModelShape) -> None:
    wide = ServingOptions(max_loras=64, gpu_memory_utilization=0.9)
    made = plan(llama, 12 * GB, serving=wide)
    assert made.fit is not None
    fewer = [change for change in made.fit.serving.fit.changes if change.startswith("--max-loras")]
    (count,) = (int(change.split()[1]) for change in fewer)
    for loras, fits in ((count, True), (count + 1, False)):
        again = plan(llama, 12 * GB, serving=replace(wide, max_loras=loras)).fit
        assert again is not None
        assert again.serving.fit.fits is fits


def test_the_length_at_which_nobody_waits(llama: ModelShape) -> None:
    made = plan(llama, 24 * GB, serving=ServingOptions(max_num_seqs=16))
    assert made.fit is not None
    length = made.fit.serving.length_for_all
    assert length is not None
    short = make_plan(
        llama, Recipe(), ServingOptions(max_num_seqs=16), device="cuda", dtype="bfloat16", max_model_len=length,
        memory=24 * GB,
    )  # fmt: skip
    assert short.fit is not None
    assert short.fit.serving.sequences >= 16 > made.fit.serving.sequences


def test_training_beside_serving_leaves_its_bytes_free(llama: ModelShape) -> None:
    made = plan(llama, 16 * GB, batch_size=4)
    assert made.fit is not None
    together = made.serving.weights + made.serving.adapter_slots + made.fit.kv_beside_training
    assert together + made.methods["qlora"].beside_weights + CUDA_CONTEXT == 16 * GB


def test_the_text_and_the_json_say_the_same(llama: ModelShape) -> None:
    made = plan(llama, 24 * GB)
    facts = json.loads(json.dumps(made.to_json(), allow_nan=False))
    text = "\n".join(plan_lines(made))
    for method in ("full", "lora", "qlora"):
        assert f"{facts['training']['methods'][method]['total'] / 1e9:,.2f} GB" in text
    assert f"{facts['serving']['memory']['total'] / 1e9:,.2f} GB" in text
    assert f"{facts['fit']['serving']['kv_tokens']:,} tokens" in text
    assert f"{facts['training']['trainable_parameters']['attention-qv']['8']:,}" in text
    assert facts["fit"]["methods"]["full"]["fits"] is False
    assert "does not fit" in text


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"target_modules": ["w9"]}, "target_modules", "no linear"),
        ({"max_seq_length": 5000}, "max_seq_length", "context of 4096"),
    ],
)
def test_fields_that_the_model_does_not_have(
    llama: ModelShape, fields: dict[str, object], param: str, words: str
) -> None:
    with pytest.raises(TrainingError, match=words) as refused:
        plan(llama, **fields)
    assert refused.value.param == param


def test_a_cpu_has_no_gpu_memory(llama: ModelShape) -> None:
    with pytest.raises(ConfigError, match="gpu_memory"):
        make_plan(llama, Recipe(), ServingOptions(), device="cpu", dtype="bfloat16", memory=GB)
    with pytest.raises(TrainingError, match="needs a CUDA device"):
        make_plan(
            llama, Recipe(optimizer="adamw_8bit"), ServingOptions(), device="cpu", dtype="bfloat16"
        )  # fmt: skip


def test_cpus_hold_dense_copies(llama: ModelShape) -> None:
    on_cpu = make_plan(llama, Recipe(), ServingOptions(), device="cpu", dtype="bfloat16")
    on_gpu = plan(llama)
    copies = 2 * (llama.linear_parameters + 32000 * 4096)
    assert on_cpu.methods["qlora"].weights == on_gpu.methods["qlora"].weights + copies
    assert on_cpu.serving.weights == on_gpu.serving.weights + copies
