"""litellm: chat, streams, text completions, and the exceptions that it makes of our errors."""

import checks
import litellm

litellm.telemetry = False
MESSAGES = [{"role": "user", "content": "Say hello."}]
ASK = {"api_base": checks.URL, "api_key": checks.KEY, "max_tokens": 20, "num_retries": 0}


def chat() -> None:
    answer = litellm.completion(model="openai/demo", messages=MESSAGES, **ASK)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens > 0


def as_vllm() -> None:
    answer = litellm.completion(model=f"hosted_vllm/{checks.ADAPTER}", messages=MESSAGES, **ASK)
    assert answer.choices[0].message.content


def stream() -> None:
    parts = litellm.completion(
        model="openai/demo", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **ASK
    )
    chunks = list(parts)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage.completion_tokens > 0


def text() -> None:
    answer = litellm.text_completion(model="text-completion-openai/demo", prompt="Roses are", **ASK)
    assert answer.choices[0].text


def responses() -> None:
    answer = litellm.responses(
        model="openai/demo", input="Say hello.", max_output_tokens=20, api_base=checks.URL, api_key=checks.KEY
    )
    assert answer.output[0].content[0].text


def context_window() -> None:
    try:
        litellm.completion(model="openai/demo", messages=[{"role": "user", "content": "word " * 9000}], **ASK)
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("no ContextWindowExceededError")


def unknown_model() -> None:
    try:
        litellm.completion(model="openai/nobody", messages=MESSAGES, **ASK)
    except litellm.NotFoundError:
        return
    raise AssertionError("no NotFoundError")


checks.run(chat, as_vllm, stream, text, responses, context_window, unknown_model)
