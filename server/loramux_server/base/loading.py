"""Any Hugging Face decoder -> one resident base: NF4 linears, transformers' own modeling code, our attention.

Promises: the weights are quantized while they are read (never two full copies), the same layers are quantized that
transformers' bitsandbytes integration quantizes (every linear but the output head), and what is returned has been
run once against transformers' own attention, so that an architecture this engine would compute wrongly is
refused at start instead of answering wrongly later. Remote code is never executed.
Does not download the demo model (base/demo.py), tokenize, or allocate the KV cache.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loramux_adapters.errors import BaseModelError
from loramux_adapters.grouping import derive_kernels, shared_inputs
from loramux_adapters.kernels import ResidentLinear
from loramux_adapters.model_config import CONFIG_FAULTS, faults_said, reason
from loramux_adapters.native.library import Native, load_native
from loramux_adapters.native.modeling import put_behind
from loramux_adapters.native.products import CodesKernel, multiplies
from loramux_adapters.nf4 import NF4Linear, NF4Weight, base_identity
from loramux_adapters.nf4_rows import choose_few_rows
from loramux_adapters.spec import BaseGeometry
from loramux_adapters.training.context import context_length
from loramux_server.base.device import pick_device, pick_dtype
from loramux_server.base.location import check_location
from loramux_server.base.nf4_cache import QuantizedCopy
from loramux_server.base.quantized_checkpoint import is_nf4_checkpoint

logger = logging.getLogger(__name__)

Quantization = Literal["nf4", "none"]
_WEIGHT_FAULTS: tuple[type[BaseException], ...] = (*CONFIG_FAULTS, MemoryError, SafetensorError)


@dataclass(frozen=True)
class LoadOptions:
    """How to load a base. `dtype` "auto": bf16 where the device computes in it, else fp32.

    `nf4_cache` is the directory of quantized copies (`nf4_cache.py`); without one nothing is kept. `cpu_kernels` is where
    the kernels for CPUs are built and kept; without one torch's operators do their work.
    """

    model: str
    name: str
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantization: Quantization = "nf4"
    local_files_only: bool = False
    nf4_cache: Path | None = None
    cpu_kernels: Path | None = None


@dataclass(frozen=True)
class ResidentBase:
    """The base as the engine uses it. `model` is in eval mode, without gradients, on one device."""

    model: PreTrainedModel
    geometry: BaseGeometry
    device: torch.device
    dtype: torch.dtype
    quantization: Quantization
    max_position: int
    eos_token_ids: tuple[int, ...]
    weight_bytes: int
    input_groups: list[tuple[str, ...]]  # adaptable linears by the input they share
    native: Native | None = None  # kernels compiled for this CPU

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()


def load_base(options: LoadOptions) -> ResidentBase:
    """Read, quantize and check a base. Raises BaseModelError with one sentence for whatever is wrong with it."""
    device = pick_device(options.device)
    native = _kernels(options, device)
    dtype = pick_dtype(options.dtype, device, native.products if native else None)
    config = _read_config(options)
    prequantized = is_nf4_checkpoint(config, options.model, options.quantization)
    quantize = options.quantization == "nf4" and not prequantized
    copy = None
    if quantize and options.nf4_cache is not None:
        copy = QuantizedCopy.of(options.nf4_cache, options.model, config, device)
        if copy is not None and (base := _from_copy(copy, options)) is not None:
            return base
    model = _read_weights(options, config, device, quantize=quantize)
    written = copy.write(model) if copy is not None else None
    base = _resident(model, options, device, dtype, native if dtype == torch.bfloat16 else None)
    if copy is not None and written is not None:
        copy.publish(written, base.geometry.identity)
    return base


def _kernels(options: LoadOptions, device: torch.device) -> Native | None:
    """The CPU's, which compute in bf16, unless another type is asked for."""
    other = options.dtype != "auto" and pick_dtype(options.dtype, device) != torch.bfloat16
    directory = options.cpu_kernels if device.type == "cpu" and not other else None
    return None if directory is None else load_native(directory)


def _from_copy(copy: QuantizedCopy, options: LoadOptions) -> ResidentBase | None:
    """The base from its quantized copy; None if there is no copy, or none that is what was once written."""
    identity = copy.identity()
    if identity is None:
        return None
    try:
        base = load_base(replace(options, model=str(copy.path), revision=None, nf4_cache=None))
    except BaseModelError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError | MemoryError):
            raise  # which says nothing about the copy; quantizing needs more
        copy.discard(str(error))
        return None
    if base.geometry.identity != identity:
        copy.discard("its bytes have changed")
        return None
    return base


def _resident(
    model: PreTrainedModel,
    options: LoadOptions,
    device: torch.device,
    dtype: torch.dtype,
    native: Native | None,
) -> ResidentBase:
    shapes = _swap_linears(model, dtype)
    model.requires_grad_(False)
    model.eval()
    _cast_remaining(model, dtype)
    _prepare_head(model, native)
    groups = shared_inputs(model, list(shapes))
    if device.type == "cpu":
        derive_kernels(model, groups, native)
    if native is not None:
        put_behind(model, native)
    choose_few_rows(model, dtype)
    identity = base_identity(_canonical_linears(model))
    return ResidentBase(
        model=model,
        geometry=BaseGeometry(name=options.name, identity=identity, linear_shapes=shapes),
        device=device,
        dtype=dtype,
        quantization="nf4" if any(isinstance(m, NF4Linear) for m in model.modules()) else "none",
        max_position=context_length(model.config.get_text_config()),
        eos_token_ids=_end_tokens(model),
        weight_bytes=_resident_bytes(model),
        input_groups=groups,
        native=native,
    )


def _read_config(options: LoadOptions) -> Any:
    check_location(options.model)
    with faults_said(f"cannot read the model '{options.model}'"):
        config = AutoConfig.from_pretrained(
            options.model,
            revision=options.revision,
            trust_remote_code=False,
            local_files_only=options.local_files_only,
        )
        architectures = [str(name) for name in getattr(config, "architectures", None) or []]
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if getattr(config, "is_encoder_decoder", False) or not any(name in known for name in architectures):
        listed = ", ".join(architectures) or "none named"
        raise BaseModelError(
            f"'{options.model}' is not a decoder language model (architecture: {listed}); "
            "loramux serves architectures named ...ForCausalLM",
            param="model",
        )
    return config


def _read_weights(
    options: LoadOptions, config: Any, device: torch.device, *, quantize: bool
) -> PreTrainedModel:
    # The checkpoint's own dtype is kept while quantizing, so that the codes do not depend on --dtype.
    arguments: dict[str, Any] = {
        "dtype": "auto",
        "device_map": {"": str(device)},
        "attn_implementation": "eager",
    }
    if quantize:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                options.model,
                config=config,
                revision=options.revision,
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=options.local_files_only,
                output_loading_info=True,
                **arguments,
            )
    except torch.OutOfMemoryError as error:
        raise BaseModelError(
            f"not enough memory on {device} to load '{options.model}'; choose a smaller model", param="model"
        ) from error
    except _WEIGHT_FAULTS as error:
        raise BaseModelError(
            f"cannot load the weights of '{options.model}': {reason(error)}", param="model"
        ) from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise BaseModelError(
            f"'{options.model}' lacks {len(missing)} weights its config asks for, first {missing[0]}",
            param="model",
        )
    return model


def _swap_linears(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
    """Replace bitsandbytes' layers by NF4Linear on the same bytes; return every adaptable linear's shape."""
    from bitsandbytes.nn.modules import Linear4bit

    head = model.get_output_embeddings()
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is head:
            continue
        shapes[name] = (module.out_features, module.in_features)
        if isinstance(module, Linear4bit):
            weight: Any = module.weight  # bitsandbytes.nn.Params4bit
            quantized = NF4Weight.from_bitsandbytes(weight.data, weight.quant_state, name)
            if quantized.shape != shapes[name]:  # transformers checks the shapes of what it does not quantize
                raise BaseModelError(
                    f"{name} is {list(quantized.shape)} in the checkpoint, but {list(shapes[name])} by its config",
                    param="model",
                )
            replacement: nn.Linear = NF4Linear(quantized, module.bias, dtype)
        else:
            module.to(dtype)
            replacement = ResidentLinear(module)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, replacement)
    if not shapes:
        raise BaseModelError(
            f"{type(model).__name__} has no linear layers an adapter could target", param="model"
        )
    return shapes


def _cast_remaining(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Embeddings, norms and the head to the compute dtype; buffers (rotary frequencies) stay in fp32."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _prepare_head(model: PreTrainedModel, native: Native | None) -> None:
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and not isinstance(head, ResidentLinear):
        head = ResidentLinear(head)
        model.set_output_embeddings(head)
        if native is not None and multiplies(native, [head.weight]):
            head.kernel = CodesKernel(native, [head.weight], [head.bias])


def _canonical_linears(model: PreTrainedModel) -> list[tuple[str, NF4Weight | torch.Tensor]]:
    head = model.get_output_embeddings()
    found: list[tuple[str, NF4Weight | torch.Tensor]] = []
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear):
            found.append((name, module.quantized))
        elif isinstance(module, nn.Linear) and module is not head:
            found.append((name, module.weight))
    return found


def _end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    for source in (getattr(model, "generation_config", None), model.config.get_text_config()):
        ids: Any = getattr(source, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
    return ()


def _resident_bytes(model: PreTrainedModel) -> int:
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, NF4Linear):
            total += module.quantized.num_bytes - module.weight.numel()
    return total
