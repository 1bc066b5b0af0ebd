"""pydantic-ai: agents with text, structured output, tools and streams, over chat and over responses."""

import checks
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

PROVIDER = OpenAIProvider(base_url=checks.URL, api_key=checks.KEY)
SETTINGS = {"max_tokens": 80, "temperature": 0.0}
KINDS = (OpenAIChatModel, OpenAIResponsesModel)


class City(BaseModel):
    name: str
    country: str


def text_of(kind: type) -> None:
    agent = Agent(kind("demo", provider=PROVIDER), instructions="Be brief.", model_settings=SETTINGS)
    result = agent.run_sync("Say hello.")
    assert result.output
    assert result.usage.output_tokens > 0


def structured_by(kind: type) -> None:
    agent = Agent(kind("demo", provider=PROVIDER), output_type=City, model_settings=SETTINGS)
    assert isinstance(agent.run_sync("The capital of France.").output, City)


def chat_text() -> None:
    text_of(KINDS[0])


def responses_text() -> None:
    text_of(KINDS[1])


def chat_structured() -> None:
    structured_by(KINDS[0])


def responses_structured() -> None:
    structured_by(KINDS[1])


def conversation_of_an_adapter() -> None:
    agent = Agent(OpenAIChatModel(checks.ADAPTER, provider=PROVIDER), model_settings=SETTINGS)
    first = agent.run_sync("Who are you?")
    second = agent.run_sync("And where do you live?", message_history=first.all_messages())
    assert second.output


def stream() -> None:
    agent = Agent(OpenAIChatModel("demo", provider=PROVIDER), model_settings=SETTINGS)
    parts = []

    async def listen() -> None:
        async with agent.run_stream("Count to five.") as result:
            parts.extend([part async for part in result.stream_text(delta=True, debounce_by=None)])

    import asyncio

    asyncio.run(listen())
    assert "".join(parts)


def unknown_model() -> None:
    agent = Agent(OpenAIChatModel("nobody", provider=PROVIDER))
    try:
        agent.run_sync("Hi")
    except ModelHTTPError as error:
        assert error.status_code == 404
    else:
        raise AssertionError("no error")


checks.run(
    chat_text,
    responses_text,
    chat_structured,
    responses_structured,
    conversation_of_an_adapter,
    stream,
    unknown_model,
)
