"""instructor: structured answers by forced tools and by response_format, whole and streamed."""

import checks
import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


MESSAGES = [{"role": "user", "content": "Ann is 30 years old. Extract the person."}]
CLIENT = OpenAI(base_url=checks.URL, api_key=checks.KEY, max_retries=0)


def extract(mode: instructor.Mode, model: str = "demo") -> Person:
    client = instructor.from_openai(CLIENT, mode=mode)
    return client.chat.completions.create(
        model=model, messages=MESSAGES, response_model=Person, max_tokens=300, max_retries=1, temperature=0
    )


def tools() -> None:
    assert 0 <= extract(instructor.Mode.TOOLS).age <= 120


def json_schema() -> None:
    assert 0 <= extract(instructor.Mode.JSON_SCHEMA).age <= 120


def tools_of_an_adapter() -> None:
    assert isinstance(extract(instructor.Mode.TOOLS, checks.ADAPTER), Person)


def partial_objects() -> None:
    client = instructor.from_openai(CLIENT, mode=instructor.Mode.JSON_SCHEMA)
    parts = list(
        client.chat.completions.create_partial(
            model="demo", messages=MESSAGES, response_model=Person, max_tokens=300, temperature=0
        )
    )
    assert isinstance(parts[-1].age, int)


def responses_tools() -> None:
    assert isinstance(extract(instructor.Mode.RESPONSES_TOOLS), Person)


checks.run(tools, json_schema, tools_of_an_adapter, partial_objects, responses_tools)
