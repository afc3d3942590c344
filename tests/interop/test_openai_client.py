"""OpenAI's own client works with the server: models, chats, streams, completions, errors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AuthenticationError, BadRequestError, NotFoundError, OpenAI

import engine
from tests.support.processes.served import ServedModel
from tests.support.tiny_model import write_tiny_model

pytestmark = pytest.mark.interop

KEY = "a-key-of-some-length"
HELLO: Any = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("openai") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServedModel]:
    with ServedModel(model, variables={"ENGINE_API_KEY": KEY}) as running:
        yield running


@pytest.fixture
def client(server: ServedModel) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, max_retries=0) as own:
        yield own


def test_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "engine"


def test_a_chat_is_the_same_whole_streamed_and_generated(client: OpenAI, model: Path) -> None:
    whole = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=20, logprobs=True, top_logprobs=3
    )
    text = whole.choices[0].message.content
    assert text == engine.generate(model, "Hello", max_new_tokens=20, temperature=0).text
    told = whole.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert all(len(entry.top_logprobs) == 3 for entry in told.content)
    stream = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=20, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_the_clients_own_stream_helper_accumulates(client: OpenAI) -> None:
    whole = client.chat.completions.create(
        model="tiny", messages=HELLO, temperature=0, max_tokens=20
    )
    text = whole.choices[0].message.content
    assert text is not None
    with client.chat.completions.stream(
        model="tiny", messages=HELLO, temperature=0, stop=text[-3:], max_tokens=20
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.content == text[: text.find(text[-3:])]


def test_completions_with_log_probabilities(client: OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["abc", "xyz"], max_tokens=5, temperature=0, logprobs=2, echo=True, n=2
    )
    assert [choice.text[:3] for choice in answer.choices] == ["abc", "abc", "xyz", "xyz"]
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert told.token_logprobs[0] is None
    assert len(told.token_logprobs) == 8
    assert told.tokens is not None
    assert told.tokens[:3] == ["a", "b", "c"]
    stream = client.completions.create(
        model="tiny", prompt="abc", max_tokens=5, temperature=0, stream=True
    )
    assert "abc" + "".join(c.choices[0].text for c in stream) == answer.choices[0].text


def test_tools_and_stops_are_taken(client: OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, tools=[tool], stop=["zzz"], seed=4, max_tokens=4,
        presence_penalty=0.1, frequency_penalty=0.1, logit_bias={"5": -100}, user="me",
    )  # fmt: skip
    assert answer.choices[0].finish_reason in ("length", "stop")


def test_errors_are_the_clients_own(client: OpenAI, server: ServedModel) -> None:
    with pytest.raises(NotFoundError, match="no model 'gpt-9'"):
        client.chat.completions.create(model="gpt-9", messages=HELLO)
    with pytest.raises(BadRequestError) as raised:
        client.chat.completions.create(
            model="tiny", messages=HELLO, response_format={"type": "json_object"}
        )
    assert raised.value.param == "response_format"
    assert raised.value.code == "unsupported"
    with (
        OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="wrong") as other,
        pytest.raises(AuthenticationError, match="API key"),
    ):
        other.models.list()


def test_a_stream_that_is_closed_frees_its_slot(client: OpenAI, server: ServedModel) -> None:
    stream = client.completions.create(
        model="tiny", prompt="abc", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices
