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
            "frequency_penalty": 0.5,  # a small model repeats itself inside of strings until it is cut off
            "max_retries": 0,
            "stream_usage": True,  # which it leaves out by itself for any server but OpenAI's
        }
