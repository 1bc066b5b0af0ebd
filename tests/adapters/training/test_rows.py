"""Training files: what a row becomes, and errors that name line, message and key."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from loramux_adapters.errors import TrainingError
from loramux_adapters.training import rows
from loramux_adapters.training.rows import ChatRow, CompletionRow, TextRow, check_rows, read_rows

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "ho"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_chat_rows(tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            USER | {"name": "ann"},
            ASSISTANT | {"weight": 0},
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
            ASSISTANT | {"weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "parallel_tool_calls": False,
    }
    path = write(tmp_path / "data.jsonl", row, "", {"messages": [USER, ASSISTANT]})
    found = read_rows(path)
    first, second = found.rows
    assert isinstance(first, ChatRow)
    assert isinstance(second, ChatRow)
    assert first.messages[0] == {"role": "system", "content": "a\nb"}
    assert first.messages[1] == {"role": "user", "content": "hi", "name": "ann"}
    assert first.messages[4]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert first.weights == (False, False, False, False, True, False, True)
    assert first.tools == row["tools"]
    assert (first.line, second.line) == (1, 3)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_other_kinds(tmp_path: Path) -> None:
    found = read_rows(write(tmp_path / "a.jsonl", {"prompt": "", "completion": "b"}))
    assert found.rows == [CompletionRow(1, "", "b")]
    path = tmp_path / "b.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "caf\u00e9"}).encode())
    assert read_rows(path).rows == [TextRow(1, "caf\u00e9")]


BAD: list[tuple[Any, str]] = [
    ({"messages": [USER, {"role": "user", "content": "x"}, {"role": "assistant", "content": 3}]},
     'Line 2, message 3, key "content": Input should be a valid string'),
    ({"messages": []}, 'Line 2, key "messages": Input should be a list'),
    ({"messages": [USER, {"role": "bot", "content": ""}]}, 'message 2, key "role": Input should be one of system'),
    ({"messages": [USER]}, 'message 1, key "role": the last message should be the assistant'),
    ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "nothing to learn"),
    ({"messages": [USER, ASSISTANT | {"weight": 0.5}]}, 'message 2, key "weight": Input should be 0 or 1, not 0.5'),
    ({"messages": [USER | {"weight": 1}, ASSISTANT]}, 'message 1, key "weight": it is not known here'),
    ({"messages": [USER, ASSISTANT | {"content": None}]}, 'message 2, key "content"'),
    ({"messages": [USER | {"content": [{"type": "image_url"}]}, ASSISTANT]}, "only parts of type"),
    ({"messages": [USER, ASSISTANT | {"tool_calls": [{"id": "x"}]}]}, 'key "tool_calls", call 1'),
    ({"messages": [USER, ASSISTANT], "tools": {}}, 'key "tools"'),
    ({"messages": [USER, ASSISTANT], "system": "x"}, 'key "system": it is not known here'),
    ({"prompt": "a"}, 'key "completion": Input should be a valid string'),
    ({"prompt": "a", "completion": ""}, 'key "completion": Input should not be empty'),
    ({"text": "x"}, 'key "text": the lines above have "messages"'),
    ({"input": "x"}, 'should have the key "messages"'),
    ([1], "should be a JSON object"),
    ('{"messages": [}', "is not JSON: Expecting value at column 15"),
    ('{"messages": NaN}', "is not JSON: NaN"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), BAD, ids=[words[:40] for _, words in BAD])
def test_faults_name_line_message_and_key(tmp_path: Path, line: Any, words: str) -> None:
    path = write(tmp_path / "data.jsonl", {"messages": [USER, ASSISTANT]}, line)
    with pytest.raises(TrainingError) as caught:
        read_rows(path, param="validation_file")
    assert words in caught.value.message
    assert "Line 2" in caught.value.message
    assert (caught.value.param, caught.value.code) == ("validation_file", "invalid_training_file")


def test_many_faults_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="Line 1, .* and 5 more lines"):
        read_rows(write(tmp_path / "data.jsonl", *[{}] * 25))


def test_a_file_is_checked_without_being_held(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", *({"text": "x" * 4000} for _ in range(1000)))
    tracemalloc.start()
    try:
        sha256 = check_rows(path, lambda row: None)
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 8
    finally:
        tracemalloc.stop()
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == read_rows(path).sha256


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be read"):
        read_rows(tmp_path)
    with pytest.raises(TrainingError, match="has no rows"):
        read_rows(write(tmp_path / "empty.jsonl", ""))
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b'{"text": "\xff"}')
    with pytest.raises(TrainingError, match="is not UTF-8"):
        read_rows(binary)


def test_an_endless_line_is_refused_and_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 64)
    path = write(tmp_path / "data.jsonl", {"text": "x" * 500}, {"text": 5})
    with pytest.raises(TrainingError, match=r"Line 1, it is longer than 64 bytes; Line 2, key .text."):
        read_rows(path)
