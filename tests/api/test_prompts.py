"""What becomes of a prompt: it fits into the context or not, and a conversation goes through the template."""

from __future__ import annotations

import httpx
import pytest

from tests.api.conftest import MAX_MODEL_LEN, Stand, build, byte_level_tokenizer
from tests.api.test_requests import chat, completion, refused


class TestContext:
    async def test_a_prompt_that_fills_the_context(self, client: httpx.AsyncClient, stand: Stand) -> None:
        message = await refused(
            await completion(client, prompt=[5] * MAX_MODEL_LEN), "prompt", "context_length_exceeded"
        )
        assert message == (
            f"This model's maximum context length is {MAX_MODEL_LEN} tokens. However, your prompt resulted "
            f"in {MAX_MODEL_LEN} tokens. Please reduce the length of the prompt."
        )
        long = [{"role": "user", "content": "Q" * 300}]
        await refused(await chat(client, messages=long), "messages", "context_length_exceeded")
        assert stand.engine.calls == []

    async def test_an_explicit_max_tokens_must_fit(self, client: httpx.AsyncClient) -> None:
        message = await refused(
            await completion(client, prompt=[[5], [5] * 250], max_tokens=7),
            "prompt",
            "context_length_exceeded",
        )
        assert "you requested 257 tokens (250 in the prompt, 7 in the completion)" in message

    async def test_a_default_shrinks_to_what_fits(self, client: httpx.AsyncClient, stand: Stand) -> None:
        assert (await completion(client, prompt=[5] * 250)).status_code == 200
        assert stand.engine.calls[0].params.max_tokens == MAX_MODEL_LEN - 250


class TestTemplate:
    async def test_roles_and_parts(self, client: httpx.AsyncClient, stand: Stand) -> None:
        await chat(
            client,
            messages=[
                {"role": "developer", "content": "be"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": None, "refusal": "no"},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "never"}]},
                {"role": "tool", "content": "r", "tool_call_id": "1"},
            ],
            chat_template_kwargs={"prefix": "Hm"},
        )
        assert stand.tokenizer.decode(stand.engine.calls[0].prompt) == (
            "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
            "<|im_start|>assistant\nno<|im_end|>\n<|im_start|>assistant\nnever<|im_end|>\n<|im_start|>tool\nr<|im_end|>\n<|im_start|>assistant\nHm"
        )

    async def test_its_own_complaint_is_the_callers_400(self, client: httpx.AsyncClient) -> None:
        response = await chat(client, messages=[{"role": "tool", "content": "r"}])
        message = await refused(response, "messages", "chat_template_error")
        assert "a tool message needs tool_call_id" in message

    async def test_what_goes_wrong_inside_is_the_callers_400(self, client: httpx.AsyncClient) -> None:
        response = await chat(client, chat_template_kwargs={"prefix": 1})
        await refused(response, "messages", "chat_template_error")

    async def test_arguments_of_the_renderer_are_no_variables(self, client: httpx.AsyncClient) -> None:
        for name in ("tokenize", "chat_template", "conversation", "tools"):
            response = await chat(client, chat_template_kwargs={name: True})
            await refused(response, f"chat_template_kwargs.{name}")

    async def test_a_base_without_one_says_what_to_do(
        self, client: httpx.AsyncClient, stand: Stand, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stand.tokenizer, "chat_template", None)
        message = await refused(await chat(client), "messages", "no_chat_template")
        assert "/v1/completions" in message
        assert "--chat-template" in message


class TestSuffix:
    """What is between two texts, for a base that has the tokens for it."""

    MARKERS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")

    async def test_a_base_with_the_tokens(self) -> None:
        tokenizer = byte_level_tokenizer(chat_template="x")
        tokenizer.add_tokens(list(self.MARKERS))
        stand = build(tokenizer)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(stand.app), base_url="http://test"
        ) as client:
            assert (await completion(client, prompt=["a", "b"], suffix="c")).status_code == 200
            prompts = [tokenizer.decode(call.prompt) for call in stand.engine.calls]
            assert prompts == [f"<fim_prefix>{before}<fim_suffix>c<fim_middle>" for before in "ab"]
            assert len(stand.engine.calls[0].prompt) == 5
            for fields, param in (({"prompt": [5]}, "suffix"), ({"prompt": "a", "echo": True}, "suffix")):
                await refused(await completion(client, suffix="c", **fields), param)
            response = await completion(client, prompt="a", suffix="c" * MAX_MODEL_LEN)
            await refused(response, "prompt", "context_length_exceeded")

    async def test_a_base_without_them(self, client: httpx.AsyncClient, stand: Stand) -> None:
        response = await completion(client, prompt="a", suffix="c")
        assert "no tokens for filling in" in await refused(response, "suffix", "unsupported_parameter")
        for nothing in ("", None):
            assert (await completion(client, prompt="a", suffix=nothing)).status_code == 200
        assert all(len(call.prompt) == 1 for call in stand.engine.calls)
