"""Configuration: flag before variable before file before default; what nobody knows is named and refused."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from loramux_adapters.errors import ConfigError
from loramux_server.config import ServeConfig, default_data_dir, read_config
from loramux_server.sizes import parse_bytes


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    path = tmp_path / "loramux.toml"
    path.write_text('port = 3\nmax_loras = 3\nmax_num_seqs = 3\nadapter_dir = ["/from/file"]\n')
    return path


def refusal(arguments: list[str]) -> ConfigError:
    """The error, which must be one sentence on one line."""
    with pytest.raises(ConfigError) as caught:
        read_config(arguments)
    assert "\n" not in str(caught.value)
    return caught.value


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        read_config(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


# --- precedence --------------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    config = read_config(["org/model"])
    assert (config.model, config.host, config.port) == ("org/model", "127.0.0.1", 8000)
    assert (config.max_loras, config.max_lora_rank, config.quantization) == (8, 64, "nf4")
    assert config.names == ["org/model"]
    assert config.lora_modules == []
    assert config.kv_cache_memory is None


def test_flag_before_variable_before_file_before_default(
    settings_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAMUX_PORT", "2")
    monkeypatch.setenv("LORAMUX_MAX_LORAS", "2")
    config = read_config(["m", "--port", "1", "--config", str(settings_file)])
    assert (config.port, config.max_loras, config.max_num_seqs, config.max_queued) == (1, 2, 3, 1024)
    assert config.adapter_dir == [Path("/from/file")]


@pytest.mark.parametrize("form", ["separate", "joined", "variable"])
def test_the_file_may_be_named_in_three_ways(
    form: str, settings_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"separate": ["--config", str(settings_file)], "joined": [f"--config={settings_file}"]}
    if form == "variable":
        monkeypatch.setenv("LORAMUX_CONFIG", str(settings_file))
    assert read_config(["m", *arguments.get(form, [])]).port == 3


def test_the_model_may_come_from_the_file_or_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.toml"
    path.write_text('model = "from-file"\n')
    assert read_config(["--config", str(path)]).model == "from-file"
    monkeypatch.setenv("LORAMUX_MODEL", "from-variable")
    assert read_config(["--config", str(path)]).model == "from-variable"
    assert read_config(["--config", str(path), "from-flag"]).model == "from-flag"


def test_every_setting_can_come_from_the_file(tmp_path: Path) -> None:
    """The file's keys are the settings' names; a value of each kind."""
    path = tmp_path / "c.toml"
    path.write_text(
        'host = "0.0.0.0"\nlora_modules = ["a=/x", "b=/y"]\nkv_cache_memory = "2GiB"\nmax_body_size = 4096\n'
        'grace = 1.5\ndemo_adapters = false\nlog_level = "debug"\nserved_model_name = ["one", "two"]\n'
    )
    config = read_config(["m", "--config", str(path)])
    assert config.host == "0.0.0.0"
    assert config.lora_modules == ["a=/x", "b=/y"]
    assert (config.kv_cache_memory, config.max_body_size) == (2 * 2**30, 4096)
    assert (config.grace, config.demo_adapters, config.log_level) == (1.5, False, "debug")
    assert config.names == ["one", "two"]


# --- what is unknown or wrong ------------------------------------------------------------------------------------------


def test_an_unknown_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--tensor-parallel-size" in usage_error(["m", "--tensor-parallel-size", "2"], capsys)


def test_a_flag_is_not_guessed_from_its_beginning(
    capsys: pytest.CaptureFixture[str], settings_file: Path
) -> None:
    """`--conf file` would otherwise set `config` without the file ever being read."""
    assert "--conf" in usage_error(["m", "--conf", str(settings_file)], capsys)


def test_the_model_is_required() -> None:
    error = refusal([])
    assert str(error).startswith("model: name a directory or hub id")
    assert error.param == "model"


def test_an_unknown_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_MAX_LORRAS", "4")
    error = refusal(["m"])
    assert error.param == "LORAMUX_MAX_LORRAS"
    assert str(error).startswith("LORAMUX_MAX_LORRAS is not a setting of loramux")


def test_variables_of_other_parts_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAMUX_CACHE_DIR", str(tmp_path))
    assert read_config(["m"]).port == 8000


def test_an_unknown_key_of_the_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("port = 1\nmax-loras = 4\n")
    error = refusal(["m", "--config", str(path)])
    assert error.param == "max-loras"
    assert "max-loras is not a setting of loramux" in str(error)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "No such file or directory"), (b"port = ", "Invalid value"), (b"\xff\xfe", "codec can't decode")],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_bytes(content)
    error = refusal(["m", "--config", str(path)])
    assert str(error).startswith(f"--config {path}: ")
    assert sentence in str(error)
    assert error.param == "config"


@pytest.mark.parametrize(
    ("flags", "param", "sentence"),
    [
        (["--port", "99999"], "port", "less than or equal to 65535"),
        (["--port", "http"], "port", "valid integer"),
        (["--max-loras", "0"], "max_loras", "greater than or equal to 1"),
        (["--kv-cache-memory", "4 apples"], "kv_cache_memory", "give a size such as 4GiB"),
        (["--kv-cache-memory", "1KiB"], "kv_cache_memory", "greater than or equal to 1048576"),
        (["--gpu-memory-utilization", "1"], "gpu_memory_utilization", "less than or equal to 0.99"),
        (["--quantization", "gptq"], "quantization", "'nf4' or 'none'"),
        (["--log-level", "loud"], "log_level", "'debug'"),
        (["--lora-modules", "acme"], "lora_modules", "'acme' is not name=path"),
        (["--lora-modules", "=path"], "lora_modules", "'=path' is not name=path"),
        (["--lora-modules", "name="], "lora_modules", "'name=' is not name=path"),
        (
            ["--max-num-seqs", "64", "--max-num-batched-tokens", "32"],
            "max_num_batched_tokens",
            "at least max_num_seqs",
        ),
        (["--no-enable-lora"], "enable_lora", "cannot be turned off"),
    ],
)
def test_a_wrong_value_is_one_sentence_that_names_the_setting(
    flags: list[str], param: str, sentence: str
) -> None:
    error = refusal(["m", *flags])
    assert sentence in str(error)
    assert str(error).startswith(f"{param}: ")
    assert error.param == param


def test_a_wrong_variable_and_a_wrong_key_are_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.toml"
    path.write_text('port = "many"\n')
    assert refusal(["m", "--config", str(path)]).param == "port"
    monkeypatch.setenv("LORAMUX_MAX_LORAS", "several")
    assert refusal(["m"]).param == "max_loras"


def test_a_list_in_a_variable_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_LORA_MODULES", '["a=/x"]')
    assert read_config(["m"]).lora_modules == ["a=/x"]
    monkeypatch.setenv("LORAMUX_LORA_MODULES", "a=/x")
    error = refusal(["m"])
    assert "lora_modules" in str(error)
    assert '["name=path"]' in str(error)


# --- forms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4GiB", 4 * 2**30),
        ("512MB", 512 * 10**6),
        ("512 mib", 512 * 2**20),
        ("1.5GB", 15 * 10**8),
        (" 2g ", 2 * 2**30),
        ("7", 7),
        ("7b", 7),
        ("0.5KiB", 512),
    ],
)
def test_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count
    assert parse_bytes(count) == count


@pytest.mark.parametrize("text", ["", "GiB", "4 apples", "-1GiB", "4GiB2", "1e9", "0x10", "٣GiB,"])
def test_not_bytes(text: str) -> None:
    with pytest.raises(ValueError, match="give a size such as"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["m", "--lora-modules", "a=/x", "b=/y"],
        ["--lora-modules", "a=/x", "b=/y", "m"],
        ["m", "--lora-modules", "a=/x", "--lora-modules", "b=/y"],
        ["m", "--lora-modules=a=/x", "--lora-modules=b=/y"],
        ["--lora-modules", "a=/x", "b=/y", "--port", "1", "m"],
    ],
)
def test_lora_modules_as_vllm_takes_them(arguments: list[str]) -> None:
    config = read_config(arguments)
    assert config.model == "m"
    assert config.lora_modules == ["a=/x", "b=/y"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["m", "--served-model-name", "a", "b"],
        ["m", "--port", "1", "--served-model-name", "a", "b", "--enable-lora"],
        ["m", "--served-model-name", "a", "--served-model-name", "b"],
        ["--served-model-name", "a", "--served-model-name=b", "m"],
        ["m", "--lora-modules", "x=/x", "--served-model-name", "a", "b", "--lora-modules", "y=/y", "z=/z"],
    ],
)
def test_served_names_as_vllm_takes_them(arguments: list[str]) -> None:
    config = read_config(arguments)
    assert config.model == "m"
    assert config.names == ["a", "b"]


def test_a_model_after_its_name_is_no_name() -> None:
    config = read_config(["--served-model-name", "a", "m"])
    assert (config.model, config.names) == ("m", ["a"])


def test_other_lists_repeat_their_flag() -> None:
    config = read_config(["m", "--adapter-dir", "/a", "--adapter-dir", "/b=c", "--served-model-name", "x"])
    assert config.adapter_dir == [Path("/a"), Path("/b=c")]
    assert config.names == ["x"]


def test_switches_have_two_forms() -> None:
    assert read_config(["m"]).demo_adapters is None
    assert read_config(["m", "--demo-adapters"]).demo_adapters is True
    assert read_config(["m", "--no-demo-adapters"]).demo_adapters is False
    assert read_config(["m"]).scheduling_policy == "fcfs"
    assert read_config(["m", "--scheduling-policy", "priority"]).scheduling_policy == "priority"
    assert read_config(["m"]).enforce_eager is False
    assert read_config(["m", "--enforce-eager"]).enforce_eager is True
    assert read_config(["m"]).enable_prefix_caching is True
    assert read_config(["m", "--no-enable-prefix-caching"]).enable_prefix_caching is False
    assert read_config(["m", "--enable-lora"]).enable_lora


def test_the_names_of_the_base() -> None:
    assert read_config(["demo"]).is_demo
    assert read_config(["demo"]).names[0] == "demo"
    assert read_config(["/models/llama/"]).names == ["/models/llama"]
    assert not read_config(["/models/llama/"]).is_demo


def test_the_data_directory_follows_the_desktop_standard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_data_dir() == Path("/data/loramux")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_data_dir() == Path("/home/someone/.local/share/loramux")


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read_config(["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in ServeConfig.model_fields.items():
        assert field.description, name
        assert field.description[:20] in shown, name
        if name != "model":
            assert f"--{name.replace('_', '-')}" in shown


def test_a_configuration_is_not_changed_later() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_config(["m"]).port = 1  # type: ignore[misc]


def test_the_help_of_the_file_is_valid_toml(tmp_path: Path) -> None:
    """Every default can be written to the file and read back: the file has no form of its own."""
    defaults = read_config(["m"]).model_dump(mode="json", exclude_none=True, exclude={"model", "config"})
    lines = [
        f"{key} = {re.sub('True|False', lambda m: m[0].lower(), repr(value))}"
        for key, value in defaults.items()
    ]
    path = tmp_path / "c.toml"
    path.write_text("\n".join(lines).replace("'", '"'))
    assert tomllib.loads(path.read_text()) == defaults
    again = read_config(["m", "--config", str(path)])
    assert again.model_dump(exclude={"config"}) == read_config(["m"]).model_dump(exclude={"config"})
