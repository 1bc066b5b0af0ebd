"""The only reader of configuration: flags, then LORAMUX_* variables, then a TOML file, then defaults.

One model holds every setting of `loramux serve` with its description; the command line, its help and the file's
schema all come from it. A flag, variable or key that does not exist is an error that names it; nothing is ignored.
Names are vLLM's where vLLM has the setting.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from loramux_adapters.errors import ConfigError
from loramux_server.keys.setting import Keys
from loramux_server.sizes import Bytes
from loramux_server.speculative_setting import Speculative

# Variables that other parts of the project document and read at their own place.
_OTHER_VARIABLES = frozenset({"LORAMUX_CACHE_DIR", "LORAMUX_CONFIG"})


def default_data_dir() -> Path:
    """$XDG_DATA_HOME/loramux, or ~/.local/share/loramux."""
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "loramux"


class ServeConfig(BaseSettings):
    """Serve one base model and any number of LoRA adapters of it over an OpenAI-style API."""

    model_config = SettingsConfigDict(
        env_prefix="LORAMUX_",
        extra="forbid",
        cli_prog_name="loramux serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        frozen=True,
    )

    model: CliPositionalArg[str] = Field(
        "",  # required, but the file or a variable may bring it
        description="directory or hub id of the base model; 'demo' is the embedded SmolLM2-135M-Instruct",
    )
    config: Path | None = Field(
        None, description="TOML file with these settings, dashes written as underscores"
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    served_model_name: list[str] = Field(
        [], description="name(s) of the base in the API; default: MODEL's own"
    )
    chat_template: Path | None = Field(
        None, description="Jinja file used instead of the tokenizer's chat template"
    )
    max_body_size: Bytes = Field(32 * 2**20, ge=1024, description="largest request body, such as 32MiB")
    grace: float = Field(30.0, ge=0, description="seconds that running requests get to finish after SIGTERM")
    request_timeout: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="seconds an answer may take; default: no limit"
    )
    hang_timeout: float = Field(
        300.0,
        ge=10,
        allow_inf_nan=False,
        description="seconds without a sign of life after which a worker that has work is restarted",
    )

    api_key: Keys = Field(
        [], description="a key that may do everything; may repeat. loramux keys makes keys that may do less"
    )
    rate_limit_requests: int | None = Field(None, ge=1, description="requests a minute, of each key")
    rate_limit_tokens: int | None = Field(None, ge=1, description="tokens a minute, of each key")
    max_queued_per_key: int | None = Field(None, ge=1, description="answers at once, of each key")
    max_adapters_per_tenant: int | None = Field(None, ge=1, description="adapters that a tenant may have")
    max_adapter_bytes_per_tenant: Bytes | None = Field(
        None, ge=1, description="size of a tenant's adapters with their earlier generations, such as 2GiB"
    )

    revision: str | None = Field(None, description="hub revision of the base: branch, tag or commit")
    device: str = Field("auto", description="auto, cpu or cuda")
    dtype: str = Field("auto", description="compute type: auto, bfloat16, float16 or float32")
    quantization: Literal["nf4", "none"] = Field(
        "nf4", description="nf4 (4-bit, double quantization) or none"
    )
    nf4_cache: bool = Field(
        True, description="keep a quantized copy in the cache directory: later starts take seconds"
    )
    max_model_len: int | None = Field(
        None, ge=32, description="longest prompt plus answer in tokens; default: the model's"
    )
    seed: int | None = Field(None, description="seed of the random draws of requests that bring none")
    threads: int | None = Field(None, ge=1, description="CPU threads of the engine; default: all cores")

    max_num_seqs: int = Field(64, ge=1, le=1024, description="requests that run at once")
    max_num_batched_tokens: int = Field(512, ge=16, description="tokens computed per step, prompts included")
    max_queued: int = Field(1024, ge=1, description="requests accepted at once, waiting ones included")
    scheduling_policy: Literal["fcfs", "priority"] = Field("fcfs", description="whether 'priority' counts")
    kv_cache_memory: Bytes | None = Field(
        None, ge=2**20, description="KV cache size, such as 4GiB; default: what is free"
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0.1, le=0.99, description="share of the GPU's memory to use"
    )
    block_size: int = Field(16, ge=8, le=256, description="tokens per KV block")
    enforce_eager: bool = Field(False, description="no recorded decoding steps, no compiled CPU kernels")
    enable_prefix_caching: bool = Field(
        True, description="keep the KV blocks of finished requests for prompts that begin alike"
    )

    speculative_config: Speculative = Field(None, description="drafts from the text before, as JSON")

    enable_lora: bool = Field(True, description="accepted for familiarity; adapters are always served")
    adapter_dir: list[Path] = Field(
        [], description="folder of adapter folders, scanned at start and on change"
    )
    lora_modules: list[str] = Field([], description="name=path of an adapter to serve; may repeat")
    max_loras: int = Field(8, ge=1, le=1024, description="adapters resident on the device at once")
    max_lora_rank: int = Field(64, ge=1, le=512, description="largest adapter rank")
    max_cpu_loras: int = Field(64, ge=1, description="adapters kept in host memory")
    max_adapter_size: Bytes = Field(
        2 * 2**30, ge=2**16, le=2 * 2**30, description="largest weights file of an adapter, such as 500MiB"
    )
    demo_adapters: bool | None = Field(
        None, description="serve the shipped demo adapters; default: with 'demo' only"
    )

    training_latency_budget: float = Field(
        10.0,
        ge=0,
        le=60_000,
        allow_inf_nan=False,
        description="milliseconds that training may add to the 99th percentile of inter-token latency",
    )

    tensorboard: Path | None = Field(
        None,
        description="directory where fine-tuning jobs write TensorBoard files; needs loramux[tensorboard]",
    )

    data_dir: Path = Field(default_data_dir(), description="where everything that must last is kept")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged")
    log_format: Literal["text", "json"] = Field(
        "text", description="text for people, or json: one object a line"
    )
    otlp_traces_endpoint: str | None = Field(
        None,
        pattern=r"^https?://",
        description="send OpenTelemetry traces there, such as http://127.0.0.1:4318/v1/traces",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.model:
            raise ValueError("model: name a directory or hub id, or 'demo' for the embedded model")
        if not self.enable_lora:
            raise ValueError(
                "enable_lora: cannot be turned off; without adapters nothing is computed for them"
            )
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ValueError(
                "max_num_batched_tokens: must be at least max_num_seqs, one token per running request"
            )
        for entry in self.lora_modules:
            name, separator, path = entry.partition("=")
            if not (name and separator and path):
                raise ValueError(f"lora_modules: '{entry}' is not name=path")
        return self

    @property
    def is_demo(self) -> bool:
        return self.model == "demo"

    @property
    def names(self) -> list[str]:
        """The base's names in the API; the first is canonical."""
        if self.served_model_name:
            return self.served_model_name
        return ["demo", "SmolLM2-135M-Instruct"] if self.is_demo else [self.model.rstrip("/")]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings  # what `read_config` passes as arguments comes from the file


def read_config(arguments: Sequence[str]) -> ServeConfig:
    """Build the configuration of `loramux serve`. Raises ConfigError; --help and wrong flags exit as usual."""
    _refuse_unknown_variables()
    flags = _expand_lists(arguments)
    source: CliSettingsSource[Any] = CliSettingsSource(ServeConfig, cli_parse_args=flags)
    path = _config_path(flags)
    from_file = _read_file(path) if path is not None else {}
    try:
        return ServeConfig(_cli_settings_source=source, **from_file)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["loc"]:
            message = f"{'.'.join(str(part) for part in first['loc'])}: {message}"
        # a check across settings begins its message with the one to change
        where = str(first["loc"][0]) if first["loc"] else message.partition(":")[0]
        raise ConfigError(message, param=where) from error
    except SettingsError as error:
        raise ConfigError(f'{error}; give a list as JSON, such as ["name=path"]') from error


def read_data_dir(given: Path | None, file: Path | None) -> Path:
    """Where the server has its data, for commands that work on it: `given`, LORAMUX_DATA_DIR, `file` or LORAMUX_CONFIG's,
    the default. Raises ConfigError."""
    variable = os.environ.get("LORAMUX_DATA_DIR")
    if given is not None or variable:
        return given or Path(variable or "")
    path = file or _config_path(())
    value = None if path is None else _read_file(path).get("data_dir")
    if not isinstance(value, str | None):
        raise ConfigError(f"--config {path}: data_dir: is not a path", param="data_dir")
    return default_data_dir() if value is None else Path(value)


def _refuse_unknown_variables() -> None:
    known = {f"LORAMUX_{name.upper()}" for name in ServeConfig.model_fields} | _OTHER_VARIABLES
    for variable in os.environ:
        if variable.startswith("LORAMUX_") and variable not in known:
            raise ConfigError(
                f"{variable} is not a setting of loramux; see loramux serve --help", param=variable
            )


def _expand_lists(arguments: Sequence[str]) -> list[str]:
    """Lists after one flag, as vLLM takes them, to one flag per value.

    `--lora-modules a=x b=y`, and `MODEL --served-model-name a b`: a name looks like a model, so MODEL has to come first.
    """
    model_first = not "".join(arguments[:1]).startswith("-")
    expanded: list[str] = []
    flag = ""
    for position, argument in enumerate(arguments):
        after = "".join(arguments[position + 1 : position + 2])
        if _in_list(argument, after, model_first):
            flag = argument
            continue
        flag = flag if _in_list(flag, argument, model_first) else ""
        expanded.append(f"{flag}={argument}" if flag else argument)
    return expanded


def _in_list(flag: str, word: str, model_first: bool) -> bool:
    if not word or word.startswith("-"):
        return False
    return (flag == "--lora-modules" and "=" in word) or (flag == "--served-model-name" and model_first)


def _config_path(flags: Sequence[str]) -> Path | None:
    for index, flag in enumerate(flags):
        if flag.startswith("--config="):
            return Path(flag.removeprefix("--config="))
        if flag == "--config" and index + 1 < len(flags):
            return Path(flags[index + 1])
    variable = os.environ.get("LORAMUX_CONFIG")
    return Path(variable) if variable else None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        settings = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}", param="config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}", param="config") from error
    unknown = sorted(set(settings) - set(ServeConfig.model_fields))
    if unknown:
        raise ConfigError(f"--config {path}: {unknown[0]} is not a setting of loramux", param=unknown[0])
    return settings


if sys.platform == "win32":
    raise ConfigError("loramux serves on Linux and macOS; on Windows use WSL 2")
