"""Mutations of what an adapter says: its tensors and its config."""

from __future__ import annotations

from random import Random

import torch

from loramux_adapters.config_fields import IGNORED, READ
from tests.fuzz.uploads import PREFIX, Draft

SIZES = (
    0,
    1,
    -1,
    2,
    7,
    255,
    4096,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**48,
    2**53,
    2**62,
    2**63,
    2**64,
    10**40,
)
TEXTS = (
    "",
    "q_proj",
    "all-linear",
    "none",
    "LORA",
    "CAUSAL_LM",
    "../x",
    "/etc/passwd",
    "[a-z._]+",
    "(a+)+$",
    "\ud800",
    "\0",
    "a\nb",
    "\u202e",
    "é",
    "x" * 5000,
    "__class__",
    "nf4:1234",
    "nf4:other",
    "model.layers.0.self_attn.q_proj",
    "pissa",
    "gaussian",
    "megatron.evil",
    "os",
    "hf://a/b",
)
FIELDS = (
    *sorted(READ),
    *sorted(IGNORED),
    "use_dora",
    "bias",
    "modules_to_save",
    "init_lora_weights",
    "fan_in_fan_out",
    "layers_to_transform",
    "exclude_modules",
    "auto_mapping",
    "loftq_config",
    "revision",
    "runtime_config",
    "eva_config",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "megatron_core",
    "lora_bias",
    "made_up",
)


# --- values ----------------------------------------------------------------------------------------------------------


def _nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def any_value(random: Random) -> object:
    kind = random.randrange(9)
    if kind == 0:
        return random.choice(SIZES)
    if kind == 1:
        return random.choice(TEXTS)
    if kind == 2:
        return random.choice((None, True, False))
    if kind == 3:
        return random.choice(
            (0.0, -0.0, 0.5, 1e-308, 1e30, 1e308, float("nan"), float("inf"), 65536.0, 65536.1)
        )
    if kind == 4:
        return [any_value(random) for _ in range(random.randrange(4))]
    if kind == 5:
        return {random.choice(TEXTS): any_value(random) for _ in range(random.randrange(3))}
    if kind == 6:
        return random.choice(
            (["q_proj", "v_proj"], ["v_proj", "q_proj", "q_proj"], ["self_attn.q_proj"], ["proj"])
        )
    if kind == 7:
        return random.randrange(1, 64)
    return _nested(random.choice((3, 40, 300)))  # deeper than json could write is made of text, below


# --- tensors and config ----------------------------------------------------------------------------------------------


def _pick(draft: Draft) -> str:
    return draft.random.choice(sorted(draft.tensors)) if draft.tensors else ""


def drop_tensor(draft: Draft) -> None:
    draft.tensors.pop(_pick(draft), None)


def swap_tensors(draft: Draft) -> None:
    a, b = _pick(draft), _pick(draft)
    if a != b:
        draft.tensors[a], draft.tensors[b] = draft.tensors[b], draft.tensors[a]


def add_tensor(draft: Draft) -> None:
    known = _pick(draft)
    name = draft.random.choice(
        (
            known.replace(".weight", ".default.weight"),
            known.replace("lora_A", "lora_C"),
            known.replace("layers.0", "layers.9"),
            known.replace("lora_A.", "lora_A.good."),
            known.replace(".lora_A.weight", ".base_layer.weight"),
            f"{known} ",
            f"{PREFIX}lm_head.weight",
            f"{PREFIX}model.norm.weight",
            known.removeprefix(PREFIX),
            "x" * 2000,
            draft.random.choice(TEXTS).replace("\ud800", "?"),
        )
    )
    draft.tensors[name] = torch.ones(draft.random.choice(((4, 16), (0,), (), (1, 1, 1), (16, 4))))


def reshape_tensor(draft: Draft) -> None:
    name = _pick(draft)
    tensor = draft.tensors.get(name, torch.ones(1))
    if tensor.dim() == 2:
        shapes = (tensor.T, tensor.reshape(-1), tensor[:-1], tensor[:, :0], tensor[None], tensor.repeat(1, 2))
        draft.tensors[name] = draft.random.choice(shapes).contiguous()


def cast_tensor(draft: Draft) -> None:
    name = _pick(draft)
    if name:
        kinds = (
            torch.float32,
            torch.bfloat16,
            torch.float16,
            torch.float64,
            torch.int8,
            torch.bool,
            torch.uint8,
        )
        draft.tensors[name] = draft.tensors[name].to(draft.random.choice(kinds))


def poison_tensor(draft: Draft) -> None:
    name = _pick(draft)
    if name and draft.tensors[name].is_floating_point() and draft.tensors[name].numel():
        values = (float("nan"), float("inf"), float("-inf"), 3e38, -1e30, 1e-45, 0.0)
        flat = draft.tensors[name].view(-1)
        flat[draft.random.randrange(flat.numel())] = draft.random.choice(values)


def set_field(draft: Draft) -> None:
    draft.config[draft.random.choice(FIELDS)] = any_value(draft.random)


def drop_field(draft: Draft) -> None:
    draft.config.pop(draft.random.choice(sorted(draft.config)), None)


def tune_field(draft: Draft) -> None:
    """A change that is often still valid: the accepted side has corners too."""
    random = draft.random
    name, value = random.choice(
        (
            ("lora_alpha", random.choice((random.uniform(1e-6, 65536), random.randrange(1, 100)))),
            ("use_rslora", random.choice((True, False, None))),
            ("base_model_name_or_path", random.choice(("org/else", None, "org/tiny/"))),
            ("lora_dropout", random.choice((0.1, "x", any_value(random)))),
            ("alpha_pattern", {"model.layers.1.self_attn.v_proj": random.uniform(0.1, 100)}),
            (
                "rank_pattern",
                {random.choice(("no.such", "layers.0.self_attn.q_proj")): random.randrange(1, 5)},
            ),
            ("init_lora_weights", random.choice((True, False, "gaussian", "orthogonal"))),
            ("inference_mode", False),
            ("task_type", None),
        )
    )
    draft.config[name] = value


def shuffle_config(draft: Draft) -> None:
    items = list(draft.config.items())
    draft.random.shuffle(items)
    draft.config = dict(items)
