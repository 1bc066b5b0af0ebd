"""The rebuilt config: what is accepted, what each refusal says, and that the meaning is PEFT's."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_adapters.errors import InvalidAdapter
from loramux_adapters.spec import ALL_LINEAR, AdapterSpec, BaseGeometry

PLAIN = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj"],
}


def refusal(config: dict[str, object]) -> str:
    with pytest.raises(InvalidAdapter) as caught:
        AdapterSpec.from_config(config)
    return str(caught.value)


def test_plain_config() -> None:
    spec = AdapterSpec.from_config(PLAIN)
    assert (spec.r, spec.lora_alpha, spec.target_modules) == (8, 16.0, ("q_proj",))
    assert spec.scaling("model.layers.0.self_attn.q_proj") == 2.0


def test_every_default_of_the_installed_peft_is_accepted() -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM"
    ).to_dict()
    spec = AdapterSpec.from_config(json.loads(json.dumps(config, default=list)))
    assert spec.target_modules == ("q_proj", "v_proj")
    assert AdapterSpec.from_config(config) == spec  # enums and sets, as the trainer holds them


@pytest.mark.parametrize(
    "neutral",
    [
        {"lora_dropout": 0.1},
        {"inference_mode": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"task_type": None},
        {"revision": "main"},
        {"runtime_config": {"ephemeral_gpu_offload": False}},
        {"qalora_group_size": 16, "use_qalora": False},
        {"enable_lora": None, "merge_weights": False, "invented_tomorrow": []},
        {
            "task_type": None,
            "auto_mapping": {
                "base_model_class": "LlamaForCausalLM",
                "parent_library": "transformers.models.llama.modeling_llama",
                "unsloth_fixed": True,
            },
        },
    ],
    ids=lambda fields: ",".join(fields),
)
def test_harmless_fields_are_accepted(neutral: dict[str, object]) -> None:
    assert AdapterSpec.from_config(PLAIN | neutral) == AdapterSpec.from_config(PLAIN)


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(InvalidAdapter) as caught:
        AdapterSpec.from_config(
            PLAIN | {"r": 0, "lora_alpha": "x", "use_dora": True, "bias": "all", "what": 1}
        )
    assert [fault.where for fault in caught.value.faults] == ["r", "lora_alpha", "use_dora", "bias", '"what"']
    assert caught.value.param is None


def test_one_fault_names_its_field() -> None:
    with pytest.raises(InvalidAdapter) as caught:
        AdapterSpec.from_config(PLAIN | {"use_dora": True})
    assert caught.value.param == "use_dora"


def test_message_stays_short_and_printable() -> None:
    message = refusal(PLAIN | {"x\n\x1b[31m\ud800" * 1000: ["y\u202e" * 10000]})
    assert message.isascii()
    assert message.isprintable()
    assert len(message) < 600


def test_a_value_too_deep_to_show() -> None:
    nested: list[object] = []
    for _ in range(5000):
        nested = [nested]
    assert "use_dora: a deeply nested value is not supported" in refusal(PLAIN | {"use_dora": nested})


def test_max_rank_is_the_callers() -> None:
    with pytest.raises(InvalidAdapter, match="r: must be an integer from 1 to 4, not 8"):
        AdapterSpec.from_config(PLAIN, max_rank=4)


def test_patterns_override_by_dotted_suffix() -> None:
    spec = AdapterSpec.from_config(
        PLAIN
        | {
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 6},
            "use_rslora": True,
        }
    )
    assert spec.rank("model.layers.1.self_attn.q_proj") == 2
    assert spec.rank("model.layers.11.self_attn.q_proj") == 8
    assert spec.rank("model.xlayers.1.self_attn.q_proj") == 8
    assert spec.scaling("model.layers.1.self_attn.q_proj") == 16 / math.sqrt(2)
    assert spec.scaling("model.layers.0.self_attn.v_proj") == 6 / math.sqrt(8)
    assert spec.alpha("model.layers.0.self_attn.my_v_proj") == 16


def test_overlapping_patterns_must_agree() -> None:
    overlap = {"q_proj": 4, "layers.0.self_attn.q_proj": 4}
    assert AdapterSpec.from_config(PLAIN | {"rank_pattern": overlap}).rank("layers.0.self_attn.q_proj") == 4
    message = refusal(PLAIN | {"alpha_pattern": overlap | {"q_proj": 5}})
    assert "alpha_pattern: 'q_proj' and 'layers.0.self_attn.q_proj' disagree" in message


FULL = "model.layers.1.mlp.down_proj"


def test_targets_in_the_geometrys_order(tiny_geometry: BaseGeometry) -> None:
    spec = AdapterSpec(
        r=4, lora_alpha=8, target_modules=("v_proj", "layers.0.self_attn.q_proj", FULL, "proj")
    )
    assert spec.targets(tiny_geometry) == (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        FULL,
    )


def test_all_linear_means_every_linear_of_the_base(tiny_geometry: BaseGeometry) -> None:
    spec = AdapterSpec.from_config(PLAIN | {"target_modules": ALL_LINEAR})
    assert spec.targets(tiny_geometry) == tuple(tiny_geometry.linear_shapes)
    assert spec.to_config()["target_modules"] == ALL_LINEAR


def test_all_linear_inside_a_list_is_no_name() -> None:
    assert '"all-linear" is not a literal module name' in refusal(PLAIN | {"target_modules": [ALL_LINEAR]})


def test_canonical_does_not_depend_on_order() -> None:
    one = PLAIN | {"target_modules": ["a", "b"], "rank_pattern": {"a": 1, "b": 2}}
    other = PLAIN | {"rank_pattern": {"b": 2, "a": 1}, "target_modules": ["b", "a", "b"], "lora_alpha": 16.0}
    assert AdapterSpec.from_config(one).canonical() == AdapterSpec.from_config(other).canonical()


@pytest.mark.parametrize(
    "change",
    [
        {"r": 9},
        {"lora_alpha": 16.5},
        {"target_modules": ["k_proj"]},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 3}},
        {"alpha_pattern": {"q_proj": 3}},
        {"base_model_name_or_path": "other"},
        {"loramux_base_identity": "nf4:1"},
    ],
    ids=lambda fields: ",".join(fields),
)
def test_canonical_depends_on_every_field(change: dict[str, object]) -> None:
    assert AdapterSpec.from_config(PLAIN | change).canonical() != AdapterSpec.from_config(PLAIN).canonical()


@pytest.mark.parametrize(
    ("trained_on", "warned"),
    [("org/tiny", False), ("/models/tiny/", False), ("Org/TINY", False), (None, False), ("org/huge", True)],
)
def test_warning_about_another_base(
    tiny_geometry: BaseGeometry, trained_on: str | None, warned: bool
) -> None:
    spec = AdapterSpec(r=1, lora_alpha=1, target_modules=("q_proj",), base_model_name_or_path=trained_on)
    warnings = spec.warnings(tiny_geometry)
    assert bool(warnings) == warned
    assert all('"org/huge"' in text and '"org/tiny"' in text for text in warnings)


names = st.from_regex(r"\A[a-z_]{1,6}(\.[a-z0-9_]{1,6}){0,2}\Z")
positive = st.floats(min_value=0.01, max_value=1000)


@given(
    st.fixed_dictionaries(
        {
            "r": st.integers(1, 512),
            "lora_alpha": positive | st.integers(1, 1000),
            "target_modules": st.lists(names, min_size=1, max_size=4),
            "use_rslora": st.booleans(),
            "base_model_name_or_path": st.none() | st.just("org/m"),
        },
        optional={
            "rank_pattern": st.dictionaries(names, st.just(3), max_size=3),
            "alpha_pattern": st.dictionaries(names, st.just(2.5), max_size=3),
        },
    )
)
def test_config_round_trip(fields: dict[str, object]) -> None:
    spec = AdapterSpec.from_config({"peft_type": "LORA"} | fields)
    again = AdapterSpec.from_config(json.loads(json.dumps(spec.to_config())))
    assert again == spec
    assert again.canonical() == spec.canonical()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
field_names = st.sampled_from(
    [*PLAIN, "rank_pattern", "alpha_pattern", "use_rslora", "bias", "auto_mapping", "init_lora_weights"]
)


@given(st.dictionaries(field_names | st.text(), json_values, max_size=5))
def test_any_json_is_read_or_refused(changes: dict[str, object]) -> None:
    try:
        spec = AdapterSpec.from_config(PLAIN | changes)
    except InvalidAdapter as error:
        assert error.faults
        assert str(error).isprintable()
    else:
        assert AdapterSpec.from_config(spec.to_config()) == spec
