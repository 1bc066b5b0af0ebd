"""The hostile corpus: what strangers upload, and the sentence each of them gets.

A case alters a valid adapter; the gate must refuse it with that sentence, must not say anything about this
machine, and must find nothing else wrong (unless the case says that it breaks more than one thing).
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from loramux_adapters.adapter_files import CONFIG_FILE, WEIGHTS_FILE, GateLimits
from loramux_adapters.errors import InvalidAdapter
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.weights import LoraWeights

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
V1 = "base_model.model.model.layers.1.self_attn.v_proj"
A0 = f"{Q0}.lora_A.weight"
LIMITS = GateLimits(
    max_file_bytes=64 * 1024, max_header_bytes=16 * 1024, max_tensors=64, max_config_bytes=8192
)


@dataclass(frozen=True)
class Case:
    name: str
    alter: Callable[[Any], object]
    sentence: str
    faults: int = 1


def config(**fields: object) -> Callable[[Any], object]:
    return lambda files: files.config.update(fields)


def config_text(change: Callable[[str], str]) -> Callable[[Any], object]:
    return lambda files: files.raw.update({CONFIG_FILE: change(json.dumps(files.config)).encode("utf-8")})


def config_raw(data: bytes | None) -> Callable[[Any], object]:
    return lambda files: files.raw.update({CONFIG_FILE: data})


def field(name: str, value: object, sentence: str, case: str | None = None) -> Case:
    return Case(case or f"{name}={str(value)[:40]}", config(**{name: value}), sentence)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Any], object]:
    return lambda files: change(files.tensors)


def extra(name: str, sentence: str, tensor: torch.Tensor | None = None) -> Case:
    added = torch.ones(4, 16) if tensor is None else tensor
    return Case(f"extra tensor {name[-50:]!r}", tensors(lambda found: found.update({name: added})), sentence)


def poison(name: str, value: float) -> Callable[[Any], object]:
    return tensors(lambda found: found[name].view(-1)[-1:].fill_(value))


def file_bytes(change: Callable[[bytes], bytes]) -> Callable[[Any], object]:
    return lambda files: files.raw.update({WEIGHTS_FILE: change(save(files.tensors))})


def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Any], object]:
    """Alter the parsed header of the valid file; the data stays."""

    def altered(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        parsed = json.loads(data[8 : 8 + length])
        change(parsed)
        return with_header(json.dumps(parsed), data[8 + length :])

    return file_bytes(altered)


def header_text(change: Callable[[str], str]) -> Callable[[Any], object]:
    def altered(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        return with_header(change(data[8 : 8 + length].decode()), data[8 + length :])

    return file_bytes(altered)


def with_header(text: str, data: bytes = b"") -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


def entry(**fields: object) -> Callable[[Any], object]:
    return header(lambda parsed: parsed[A0].update(fields))


CONFIG_CASES = [
    Case("no config", config_raw(None), "adapter_config.json: is missing"),
    Case("empty config", config_raw(b""), "adapter_config.json: is not valid JSON"),
    Case(
        "config is a list", config_raw(b"[]"), "adapter_config.json: is not valid JSON: it is not an object"
    ),
    Case("config is cut", config_text(lambda text: text[:-5]), "adapter_config.json: is not valid JSON"),
    Case("config is not UTF-8", config_raw(b'{"r": "\xff"}'), "adapter_config.json: is not valid JSON"),
    Case(
        "config has a BOM",
        config_text(lambda text: "\ufeff" + text),
        "adapter_config.json: is not valid JSON",
    ),
    Case("key twice", config_text(lambda text: '{"r": 4, ' + text[1:]), 'not valid JSON: duplicate name "r"'),
    Case("NaN", config_text(lambda text: text.replace(" 8,", " NaN,", 1)), "not valid JSON: NaN is not JSON"),
    Case("nested deep", config_raw(b"[" * 5000), "not valid JSON: it is nested too deeply"),
    Case(
        "endless number", config_raw(b'{"r": ' + b"9" * 5000 + b"}"), "adapter_config.json: is not valid JSON"
    ),
    Case(
        "huge config", config_raw(b" " * 8193), "adapter_config.json: is larger than the 8192 bytes allowed"
    ),
    field("r", True, "r: must be an integer from 1 to 512, not true"),
    field("r", 0, "r: must be an integer from 1 to 512, not 0"),
    field("r", -1, "r: must be an integer from 1 to 512, not -1"),
    field("r", 2_000_000, "r: must be an integer from 1 to 512, not 2000000"),
    field("r", "4", 'r: must be an integer from 1 to 512, not "4"'),
    field("r", 4.0, "r: must be an integer from 1 to 512, not 4.0", "r is a float"),
    field("r", None, "r: must be an integer from 1 to 512, not null"),
    field("lora_alpha", 0, "lora_alpha: must be a number above 0"),
    field("lora_alpha", -8, "lora_alpha: must be a number above 0"),
    field("lora_alpha", "8", 'lora_alpha: must be a number above 0 and at most 65536, not "8"'),
    field("lora_alpha", True, "lora_alpha: must be a number above 0"),
    field("lora_alpha", 1e30, "lora_alpha: must be a number above 0 and at most 65536"),
    Case(
        "alpha overflows",
        config_text(lambda t: t.replace(" 8,", " 1e999,", 1)),
        "lora_alpha: must be a number",
    ),
    field("use_rslora", "yes", 'use_rslora: must be true or false, not "yes"'),
    field("target_modules", "([a-z._0-9]+)+!", "is a pattern, write the literal module names as a list"),
    field(
        "target_modules", ["q_proj", ".*v_proj"], 'target_modules: ".*v_proj" is not a literal module name'
    ),
    field("target_modules", ["../q_proj"], 'target_modules: "../q_proj" is not a literal module name'),
    field("target_modules", [["q_proj"]], 'target_modules: ["q_proj"] is not a literal module name'),
    field("target_modules", {"q_proj": 1}, "target_modules: must be a list of 1 to"),
    field("target_modules", [], "target_modules: must be a list of 1 to"),
    field("target_modules", None, "target_modules: must be a list of 1 to"),
    field(
        "rank_pattern", {"^model.*q_proj": 8}, 'rank_pattern: "^model.*q_proj" is not a literal module name'
    ),
    field("rank_pattern", {"q_proj": 1e9}, "rank_pattern.q_proj: must be an integer from 1 to 512"),
    field("rank_pattern", [1], "rank_pattern: must map at most"),
    field("alpha_pattern", {"q_proj": "inf"}, "alpha_pattern.q_proj: must be a number above 0"),
    field("alpha_pattern", {"(.*)+$": 8}, 'alpha_pattern: "(.*)+$" is not a literal module name'),
    field(
        "alpha_pattern",
        {"q_proj": 1, "self_attn.q_proj": 2},
        "alpha_pattern: 'q_proj' and 'self_attn.q_proj'",
    ),
    field("peft_type", "XLORA", 'peft_type: "XLORA" is not served, it must be "LORA"'),
    field("peft_type", None, 'peft_type: null is not served, it must be "LORA"'),
    field("peft_type", ["LORA"], 'peft_type: ["LORA"] is not served'),
    field("task_type", "SEQ_CLS", 'task_type: "SEQ_CLS" is not served, it must be "CAUSAL_LM"'),
    field("use_dora", True, "use_dora: true is not supported: DoRA is not served"),
    field("modules_to_save", ["lm_head"], 'modules_to_save: ["lm_head"] is not supported'),
    field("bias", "all", 'bias: "all" is not supported: trained biases belong to the base'),
    field("lora_bias", True, "lora_bias: true is not supported"),
    field(
        "layers_to_transform", [0], "layers_to_transform: [0] is not supported: write the full module names"
    ),
    field("layers_pattern", ["layers"], 'layers_pattern: ["layers"] is not supported'),
    field("exclude_modules", ["q_proj"], 'exclude_modules: ["q_proj"] is not supported'),
    field("fan_in_fan_out", True, "fan_in_fan_out: true is not supported"),
    field("trainable_token_indices", [1], "trainable_token_indices: [1] is not supported"),
    field("target_parameters", ["w"], 'target_parameters: ["w"] is not supported'),
    field("layer_replication", [[0, 2]], "layer_replication: [[0, 2]] is not supported"),
    field("megatron_config", {"a": 1}, 'megatron_config: {"a": 1} is not supported'),
    field("megatron_core", "evil.module", "no module is imported on an adapter's word"),
    field(
        "auto_mapping",
        {"base_model_class": "x", "parent_library": "evil"},
        "no class is imported on an adapter's word",
    ),
    field("auto_mapping", {"parent_library": "transformers"}, "no class is imported on an adapter's word"),
    field("revision", "refs/pr/1", 'revision: "refs/pr/1" is not supported'),
    field("runtime_config", {"ephemeral_gpu_offload": True}, "runtime_config: {"),
    field("loftq_config", {"loftq_bits": 4}, 'loftq_config: {"loftq_bits": 4} is not supported'),
    field("eva_config", {"rho": 2.0}, 'eva_config: {"rho": 2.0} is not supported'),
    field("corda_config", {"cache_file": "/etc/passwd"}, "it names files to read when training starts"),
    field("lora_ga_config", {"cache_file": "x.pt"}, "it names files to read when training starts"),
    field("alora_invocation_tokens", [1, 2], "aLoRA is not served"),
    field("use_qalora", True, "QA-LoRA is not served"),
    field("use_bdlora", {"nblocks": 2}, "block-diagonal LoRA is not served"),
    field("arrow_config", {"top_k": 1}, "adapter routing is not served"),
    field("kasa_config", {"beta": 1}, "KaSA is not served"),
    field("velora_config", {"rank": 1}, "VeLoRA is not served"),
    field("monteclora_config", {"n": 1}, "MonteCLoRA is not served"),
    field(
        "init_lora_weights",
        "pissa",
        'init_lora_weights: "pissa" is not accepted: this initialisation changes',
    ),
    field("init_lora_weights", "pissa_niter_4", "convert the adapter with save_pretrained"),
    field("init_lora_weights", "olora", "convert the adapter with save_pretrained"),
    field("init_lora_weights", "corda", "convert the adapter with save_pretrained"),
    field("init_lora_weights", "loftq", "LoftQ replaces the base weights"),
    field("init_lora_weights", "eva", "set init_lora_weights to true and eva_config to null"),
    field("init_lora_weights", 1, "init_lora_weights: 1 is not accepted: set it to true"),
    field("adapters", {"a": "../b"}, '"adapters": unknown field with value {"a": "../b"}'),
    field("chat_template", "{{ x }}", '"chat_template": unknown field'),
    field("trust_remote_code", True, '"trust_remote_code": unknown field with value true'),
    field("base_model_name_or_path", "a\nb", "base_model_name_or_path: must be printable text"),
    field("base_model_name_or_path", "\ud800", "base_model_name_or_path: must be printable text"),
    field("base_model_name_or_path", ["x"], "base_model_name_or_path: must be printable text"),
    field(
        "loramux_base_identity",
        "nf4:other",
        '"nf4:other", this one is "nf4:1234"',
        "identity of another base",
    ),
    field("loramux_base_identity", {"x": 1}, "loramux_base_identity: must be the identity loramux wrote"),
]
BOTH_FILES_CASES = [
    Case(
        "config and an empty tensor",
        lambda files: (config(use_dora=True)(files), files.tensors.update({A0: torch.ones(0, 16)})),
        f'"{A0}": has no values, its shape is [0, 16]',
        faults=2,
    ),
    Case(
        "config and truncated data",
        lambda f: (config(r=0)(f), file_bytes(lambda d: d[:-1])(f)),
        "end at byte",
        2,
    ),
]
# A changed r or target list makes the tensors wrong too: these break more than one thing.
CONFIG_AND_TENSOR_CASES = [
    Case("rank lies", config(r=8), f'"{A0}": expected shape [8, 16], found [4, 16]', faults=8),
    Case(
        "rank pattern lies",
        config(rank_pattern={"layers.0.self_attn.q_proj": 2}),
        "expected shape [2, 16]",
        2,
    ),
    Case(
        "targets no module of the base", config(target_modules=["c_attn"]), "match no linear of the base", 9
    ),
    Case(
        "targets more",
        config(target_modules=["q_proj", "v_proj", "down_proj"]),
        "is missing, expected shape",
        4,
    ),
    Case(
        "targets less",
        config(target_modules=["q_proj"]),
        "is not called for: target_modules does not name it",
        4,
    ),
]
TENSOR_CASES = [
    extra(
        "base_model.model.model.norm.weight", "is not a LoRA weight, and an adapter may carry nothing else"
    ),
    extra(f"{Q0}.base_layer.weight", "is not a LoRA weight"),
    extra("base_model.model.lm_head.weight", "is not a LoRA weight"),
    extra("base_model.model.model.layers.0.mlp.gate_proj.weight", "is not a LoRA weight"),
    extra("base_model.model.model.embed_tokens.weight", "is not a LoRA weight"),
    extra("", '"": is not a LoRA weight'),
    extra("../../etc/passwd", '"../../etc/passwd": is not a LoRA weight'),
    extra(f"{A0}\n2026-01-01 INFO all is well", "\\n2026-01-01 INFO"),
    extra(f"{Q0}.lora_A.good.weight", "is stored under the name of another adapter"),
    extra(f"{Q0}.lora_A.default.weight", "gives the same weight a second time"),
    extra(f"{Q0}.lora_magnitude_vector", "belongs to DoRA, which is not served"),
    extra("base_model.model.model.embed_tokens.lora_embedding_A", "adapts an embedding, which is not served"),
    extra(
        "base_model.model.lm_head.modules_to_save.weight", "replaces a module of the base, which is shared"
    ),
    extra("base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight", "it is no linear of this base"),
    extra("base_model.model.model.layers.0.mlp.down_proj.lora_B.weight", "is not called for: target_modules"),
    extra("model.layers.0.self_attn.q_proj.lora_A.weight", "is not called for"),
    Case("no A", tensors(lambda found: found.pop(A0)), f'"{A0}": is missing, expected shape [4, 16]'),
    Case(
        "no B", tensors(lambda found: found.pop(f"{V1}.lora_B.weight")), "is missing, expected shape [8, 4]"
    ),
    Case("no tensors", tensors(lambda found: found.clear()), "is missing, expected shape", faults=8),
    Case(
        "a layer missing",
        tensors(lambda found: [found.pop(name) for name in list(found) if ".layers.1." in name]),
        "is missing, expected shape",
        faults=4,
    ),
    Case(
        "transposed",
        tensors(lambda f: f.update({A0: f[A0].T.contiguous()})),
        "expected shape [4, 16], found [16, 4]",
    ),
    Case("flat", tensors(lambda f: f.update({A0: f[A0].view(-1)})), "expected shape [4, 16], found [64]"),
    Case("one more row", tensors(lambda f: f.update({A0: torch.ones(5, 16)})), "found [5, 16]"),
    Case("no rows", tensors(lambda f: f.update({A0: torch.ones(0, 16)})), "found [0, 16]"),
    Case("no dimensions", tensors(lambda f: f.update({A0: torch.tensor(1.0)})), "found []"),
    Case("int8", tensors(lambda f: f.update({A0: f[A0].to(torch.int8)})), "dtype I8 is not served"),
    Case("packed", tensors(lambda f: f.update({A0: f[A0].to(torch.uint8)})), "must be one of F32, F16, BF16"),
    Case("double", tensors(lambda f: f.update({A0: f[A0].double()})), "dtype F64 is not served"),
    Case(
        "fp8", tensors(lambda f: f.update({A0: f[A0].to(torch.float8_e4m3fn)})), "dtype F8_E4M3 is not served"
    ),
    Case("NaN weight", poison(A0, float("nan")), f'"{A0}": has values that are NaN or infinite'),
    Case("inf weight", poison(f"{V1}.lora_B.weight", float("inf")), "has values that are NaN or infinite"),
    Case("-inf weight", poison(A0, float("-inf")), "has values that are NaN or infinite"),
    Case(
        "bf16 inf",
        tensors(lambda f: f.update({A0: torch.full((4, 16), float("inf"), dtype=torch.bfloat16)})),
        "has values that are NaN or infinite",
    ),
]
FILE_CASES = [
    Case("no weights", file_bytes(lambda data: b""), "adapter_model.safetensors: 0 bytes are too short"),
    Case("seven bytes", file_bytes(lambda data: data[:7]), "7 bytes are too short for a safetensors file"),
    Case("header only", file_bytes(lambda data: data[:8]), "but the file has 8 in all"),
    Case(
        "weights missing",
        lambda f: f.raw.update({WEIGHTS_FILE: None}),
        "adapter_model.safetensors: is missing",
    ),
    Case(
        "header length lies",
        file_bytes(lambda d: (15000).to_bytes(8, "little") + d[8:]),
        "claims 15000 bytes, but",
    ),
    Case(
        "header length 2**63",
        file_bytes(lambda d: (2**63).to_bytes(8, "little") + d[8:]),
        "at most 16384 are read",
    ),
    Case(
        "header bomb",
        file_bytes(lambda d: with_header("{" + " " * 20000 + "}")),
        "claims 20002 bytes, at most",
    ),
    Case("file bomb", file_bytes(lambda data: data + bytes(70000)), "at most 65536 are allowed"),
    Case(
        "header not JSON", file_bytes(lambda data: with_header("{nonsense}")), "the header is not valid JSON"
    ),
    Case("header is a list", file_bytes(lambda data: with_header("[]")), "the header is not a JSON object"),
    Case("header is empty", file_bytes(lambda data: bytes(8)), "the header is not a JSON object"),
    Case("space before header", header_text(lambda text: " " + text), "the header is not a JSON object"),
    Case(
        "header not UTF-8", file_bytes(lambda d: with_header('{"\udc80": 1}')), "the header is not valid JSON"
    ),
    Case(
        "tensor twice", header_text(lambda t: '{"x": 1, "x": 2, ' + t[1:]), 'valid JSON: duplicate name "x"'
    ),
    Case(
        "field twice",
        header_text(lambda t: t.replace('"dtype"', '"dtype":"I32","dtype"', 1)),
        "duplicate name",
    ),
    Case(
        "minus zero",
        header_text(lambda text: text.replace('"data_offsets":[0,', '"data_offsets":[-0,', 1)),
        "the header is not valid JSON: -0 is not a whole number",
    ),
    Case("two objects", header_text(lambda text: text.rstrip() + "{}"), "the header is not valid JSON"),
    Case("truncated data", file_bytes(lambda data: data[:-1]), "the tensors end at byte"),
    Case("trailing data", file_bytes(lambda data: data + b"PK"), "the tensors end at byte"),
    Case(
        "hole",
        header(lambda h: h[A0].update(data_offsets=[o + 4096 for o in h[A0]["data_offsets"]])),
        "a hole",
        3,
    ),
    Case(
        "overlap",
        header(lambda h: h[A0].update(data_offsets=h[f"{Q0}.lora_B.weight"]["data_offsets"])),
        "overlaps",
        2,
    ),
    Case("offset far outside", entry(data_offsets=[2**40, 2**40 + 256]), "a hole", 3),
    Case("offsets swapped", entry(data_offsets=[256, 0]), "takes 256 bytes, data_offsets [256, 0] give -256"),
    Case("offsets negative", entry(data_offsets=[-256, 0]), "data_offsets must be two sizes, not [-256, 0]"),
    Case("offsets of 2**64", entry(data_offsets=[2**64, 2**64 + 256]), "data_offsets must be two sizes"),
    Case("three offsets", entry(data_offsets=[0, 1, 2]), "data_offsets must be two sizes, not [0, 1, 2]"),
    Case("size and shape differ", entry(shape=[4, 17]), "F32 [4, 17] takes 272 bytes, data_offsets"),
    Case("shape overflows", entry(shape=[2**32, 2**32]), "takes 73786976294838206464 bytes"),
    Case("shape of 2**62 and 0", entry(shape=[2**62, 0]), "shape must be at most 8 sizes"),
    Case("shape negative", entry(shape=[-4, -16]), "shape must be at most 8 sizes, not [-4, -16]"),
    Case("shape not whole", entry(shape=[4.0, 16]), "shape must be at most 8 sizes, not [4.0, 16]"),
    Case("shape of booleans", entry(shape=[True, 64]), "shape must be at most 8 sizes, not [true, 64]"),
    Case("shape a number", entry(shape=64), "shape must be at most 8 sizes, not 64"),
    Case("a thousand dimensions", entry(shape=[4, 16] + [1] * 998), "shape must be at most 8 sizes"),
    Case("dtype unknown", entry(dtype="PICKLE"), f'"{A0}": unknown dtype "PICKLE"'),
    Case("dtype a list", entry(dtype=["F32"]), 'unknown dtype ["F32"]'),
    Case("field unknown", entry(url="file:///"), "must have exactly dtype, shape and data_offsets"),
    Case("field missing", header(lambda parsed: parsed[A0].pop("dtype")), "must have exactly dtype, shape"),
    Case("entry is null", header(lambda parsed: parsed.update({A0: None})), "must have exactly dtype, shape"),
    Case(
        "metadata not text",
        header(lambda h: h.update(__metadata__={"a": 1})),
        "__metadata__ must map text to text",
    ),
    Case(
        "metadata a list", header(lambda h: h.update(__metadata__=[])), "__metadata__ must map text to text"
    ),
    Case(
        "many tensors",
        header(
            lambda h: h.update(
                {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(64)}
            )
        ),
        "72 tensors are more than the 64 allowed",
    ),
    Case("a pickle", file_bytes(lambda data: pickle.dumps({"a": 1})), "adapter_model.safetensors: "),
    Case(
        "a zip, as torch.save writes", file_bytes(lambda data: b"PK\x03\x04" + data), "at most 16384 are read"
    ),
    Case("GGUF", file_bytes(lambda data: b"GGUF" + data), "at most 16384 are read"),
]
CASES = CONFIG_CASES + BOTH_FILES_CASES + CONFIG_AND_TENSOR_CASES + TENSOR_CASES + FILE_CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_hostile_corpus(case: Case, adapter_files: Any, tiny_geometry: BaseGeometry, tmp_path: Path) -> None:
    case.alter(adapter_files)
    adapter_files.write(tmp_path)
    with pytest.raises(InvalidAdapter) as caught:
        LoraWeights.read(tmp_path, tiny_geometry, limits=LIMITS)
    message = str(caught.value)
    assert case.sentence in message
    assert len(caught.value.faults) == case.faults, message
    assert message.isprintable()
    assert str(tmp_path) not in message


def test_the_corpus_is_an_adapter_when_nothing_is_altered(
    adapter_files: Any, tiny_geometry: BaseGeometry, tmp_path: Path
) -> None:
    LoraWeights.read(adapter_files.write(tmp_path), tiny_geometry, limits=LIMITS)


def test_config_and_tensor_faults_come_together(
    adapter_files: Any, tiny_geometry: BaseGeometry, tmp_path: Path
) -> None:
    adapter_files.config["use_dora"] = True
    adapter_files.tensors["base_model.model.lm_head.weight"] = torch.full((2, 2), float("nan"))
    adapter_files.tensors[A0] = torch.ones(3, 16)
    adapter_files.config["base_model_name_or_path"] = "org/another"
    with pytest.raises(InvalidAdapter) as refused_config:
        LoraWeights.read(adapter_files.write(tmp_path), tiny_geometry)
    assert [fault.where for fault in refused_config.value.faults] == [
        "use_dora",
        '"base_model.model.lm_head.weight"',
    ]
    adapter_files.config["use_dora"] = False
    with pytest.raises(InvalidAdapter) as refused_tensors:
        LoraWeights.read(adapter_files.write(tmp_path), tiny_geometry)
    assert [str(fault) for fault in refused_tensors.value.faults] == [
        '"base_model.model.lm_head.weight": is not a LoRA weight, and an adapter may carry nothing else',
        '"base_model.model.lm_head.weight": has values that are NaN or infinite',
        f'"{A0}": expected shape [4, 16], found [3, 16]',
        'hint: base_model_name_or_path is "org/another", but this server holds "org/tiny"',
    ]


def test_a_foreign_adapter_gets_a_bounded_answer(
    adapter_files: Any, tiny_geometry: BaseGeometry, tmp_path: Path
) -> None:
    adapter_files.tensors = {f"x{i}": torch.ones(1) for i in range(400)}
    with pytest.raises(InvalidAdapter) as caught:
        LoraWeights.read(adapter_files.write(tmp_path), tiny_geometry)
    assert len(caught.value.faults) == 51
    assert str(caught.value.faults[-1]) == "and: 358 more faults like these"


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "dangling link"])
def test_what_is_no_file_is_refused_at_once(
    name: str, kind: str, adapter_files: Any, tiny_geometry: BaseGeometry, tmp_path: Path
) -> None:
    adapter_files.write(tmp_path)
    path = tmp_path / name
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/nonexistent/file")
    with pytest.raises(InvalidAdapter, match=rf"{name}: (not a regular file|is missing)"):
        LoraWeights.read(tmp_path, tiny_geometry)


def test_a_pickled_adapter_gets_advice(
    adapter_files: Any, tiny_geometry: BaseGeometry, tmp_path: Path
) -> None:
    adapter_files.raw = {WEIGHTS_FILE: None, "adapter_model.bin": pickle.dumps(1)}
    with pytest.raises(
        InvalidAdapter, match="is missing, and adapter_model.bin does not count, it is a pickle"
    ):
        LoraWeights.read(adapter_files.write(tmp_path), tiny_geometry)


def test_a_file_that_changes_while_it_is_read(
    adapter_files: Any, tiny_geometry: BaseGeometry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loramux_adapters import gate

    adapter_files.write(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    checked = gate._is_finite

    def truncate(tensor: torch.Tensor) -> bool:
        os.truncate(path, 100)
        return checked(tensor)

    def touch(tensor: torch.Tensor) -> bool:
        os.utime(path)
        return checked(tensor)

    monkeypatch.setattr(gate, "_is_finite", touch)
    with pytest.raises(InvalidAdapter, match="changed while it was read, try again"):
        LoraWeights.read(tmp_path, tiny_geometry)
    monkeypatch.setattr(gate, "_is_finite", truncate)
    with pytest.raises(InvalidAdapter, match="became shorter while it was read"):
        LoraWeights.read(tmp_path, tiny_geometry)
