"""LangChain's standard tests for chat models, with ChatOpenAI pointed at us. A pytest module, run in its own environment."""

import os

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestLoramux(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, object]:
        return {
            "model": "demo",
            "base_url": os.environ["CONFORMANCE_URL"],
            "api_key": "none",
            "temperature": 0,
            "max_tokens": 150,
            # A small model repeats itself: inside of strings, and whole calls, until it is cut off.
            "frequency_penalty": 1.0,
            "model_kwargs": {"parallel_tool_calls": False},
            "max_retries": 0,
            "stream_usage": True,  # which it leaves out by itself for any server but OpenAI's
        }

    @property
    def model_override_value(self) -> str:
        return "pirate"

    @property
    def supports_json_mode(self) -> bool:
        return True
