"""/tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from loramux_adapters.errors import RequestError
from loramux_server.api.adapter_wire import AdapterOptions, parse
from tests.api.conftest import MAX_MODEL_LEN, FakeRecord, Stand

HELLO = [{"role": "user", "content": "hi"}]


async def test_text_and_back(client: httpx.AsyncClient, stand: Stand) -> None:
    text = "Grüße, 日本語 <|im_end|>"
    answer = (await client.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
    tokens = stand.tokenizer.encode(text)
    assert answer == {
        "count": len(tokens),
        "max_model_len": MAX_MODEL_LEN,
        "tokens": tokens,
        "token_strs": stand.tokenizer.convert_ids_to_tokens(tokens),
    }
    back = await client.post("/detokenize", json={"model": "pirate", "tokens": tokens})
    assert back.json() == {"prompt": text}
    assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_a_conversation(client: httpx.AsyncClient, stand: Stand) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": HELLO}
    asked = (await client.post("/tokenize", json=body)).json()["tokens"]
    await client.post("/v1/chat/completions", json=body)
    assert asked == stand.engine.calls[0].prompt
    bare = (await client.post("/tokenize", json=body | {"add_generation_prompt": False})).json()
    assert stand.tokenizer.decode(bare["tokens"]) == "<|im_start|>user\nhi<|im_end|>\n"
    assert bare["token_strs"] is None
    tool = {"type": "function", "function": {"name": "look_up"}}
    told = (await client.post("/tokenize", json=body | {"tools": [tool]})).json()
    assert "look_up" in stand.tokenizer.decode(told["tokens"])


async def test_an_adapters_system_prompt_begins_a_conversation(
    client: httpx.AsyncClient, stand: Stand
) -> None:
    stand.adapters.records["pirate"] = FakeRecord("pirate", "a1", metadata={"system_prompt": "Say arr."})
    stand.adapters.records["odd"] = FakeRecord("odd", "b2", metadata={"system_prompt": 3})

    async def prompt(model: str, messages: list[dict[str, str]]) -> str:
        await client.post("/v1/chat/completions", json={"model": model, "messages": messages})
        asked = await client.post("/tokenize", json={"model": model, "messages": messages})
        assert asked.json()["tokens"] == stand.engine.calls[-1].prompt
        return stand.tokenizer.decode(stand.engine.calls[-1].prompt)

    assert (await prompt("pirate", HELLO)).startswith(
        "<|im_start|>system\nSay arr.<|im_end|>\n<|im_start|>user"
    )
    own = [{"role": "developer", "content": "Be plain."}, *HELLO]
    assert "arr" not in await prompt("pirate", own)
    assert "system" not in await prompt("tiny", HELLO)
    assert "system" not in await prompt("odd", HELLO)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "model": "nobody"}, 404, "model"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [1, "a"]}, 400, "tokens[1]"),
        ("/detokenize", {"tokens": [100_000]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "nobody"}, 404, "model"),
    ],
)
async def test_faults(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    response = await client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


async def test_unknown_fields_are_listed(client: httpx.AsyncClient) -> None:
    response = await client.post("/detokenize", json={"tokens": [5], "foo": 1})
    assert response.headers["x-loramux-ignored-fields"] == "foo"


def test_a_system_prompt_has_to_be_text() -> None:
    assert parse(AdapterOptions, {"metadata": {"system_prompt": "Say arr."}}).options().metadata
    with pytest.raises(RequestError) as caught:
        parse(AdapterOptions, {"metadata": {"system_prompt": ["x"]}}).options()
    assert caught.value.param == "metadata.system_prompt"
