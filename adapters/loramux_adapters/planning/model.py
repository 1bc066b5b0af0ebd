"""The shapes of a model, read from its config.json: a local directory or a hub id, of which only that file is fetched.

The module tree is built on the meta device, so which linears there are and how large everything is comes from
transformers' own modeling code. Promises: what is refused is what serving refuses; remote code is never executed; no
weight is read. Knows nothing of memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from loramux_adapters.errors import BaseModelError
from loramux_adapters.export.skeleton import empty_model
from loramux_adapters.model_config import faults_said
from loramux_adapters.planning.shape import ModelShape
from loramux_adapters.training.context import context_length
from loramux_adapters.training.memory import DecoderShape


def read_model(source: str, name: str, *, revision: str | None = None) -> ModelShape:
    """Raises BaseModelError, in one sentence, for what has no config, is no decoder or cannot be served."""
    _check_location(source)
    with faults_said(f"cannot use the config of '{source}'"):
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    architecture = _decoder(config, source)
    _check_quantization(config, source)
    with faults_said(f"cannot use the config of '{source}'"):
        return _shape(config, name, architecture)


def _shape(config: Any, name: str, architecture: str) -> ModelShape:
    model = empty_model(config)
    head = model.get_output_embeddings()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    text = config.get_text_config()
    return ModelShape(
        name=name,
        architecture=architecture,
        parameters=sum(p.numel() for path, p in model.named_parameters() if path not in tied),
        linears={
            path: (module.out_features, module.in_features)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        },
        decoder=DecoderShape.of(text),
        context_length=context_length(text),
    )


def _check_location(source: str) -> None:
    """What may be a hub id is the hub's to judge."""
    directory = Path(source)
    if directory.is_dir() and not (directory / "config.json").is_file():
        raise BaseModelError(f"{source} holds no config.json: it is not a model directory", param="model")
    if directory.is_file():
        raise BaseModelError(f"{source} is a file; name the model's directory", param="model")
    if not directory.exists() and (source.startswith(("/", ".", "~")) or source.count("/") > 1):
        raise BaseModelError(f"{source} does not exist", param="model")


def _decoder(config: Any, source: str) -> str:
    named: list[str] = getattr(config, "architectures", None) or []
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    found = [name for name in named if name in known]
    if getattr(config, "is_encoder_decoder", False) or not found:
        raise BaseModelError(
            f"'{source}' is not a decoder language model (architecture: {', '.join(named) or 'none named'}); loramux "
            "serves and trains architectures named ...ForCausalLM",
            param="model",
        )
    return found[0]


def _check_quantization(config: Any, source: str) -> None:
    """bitsandbytes NF4 holds what ours holds; other quantized checkpoints cannot be served."""
    fields = getattr(config, "quantization_config", None)
    if fields is None:
        return
    fields = fields if isinstance(fields, dict) else fields.to_dict()
    method = str(fields.get("quant_method", "an unknown method")).rsplit(".", 1)[-1].lower()
    if "bitsandbytes" not in method or fields.get("bnb_4bit_quant_type") != "nf4":
        raise BaseModelError(
            f"'{source}' is quantized with {method}; plan with the 16-bit checkpoint, or one quantized to NF4 by "
            "bitsandbytes",
            param="quantization_config",
        )
