"""What cannot be done is refused by name, with a status in the four hundreds."""

from collections.abc import Callable
from typing import Any

import pytest

from engine.serving.service import Bounds
from tests.engine.serving.conftest import Api

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
OTHER_TOOL = {"type": "function", "function": {"name": "g"}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
Scripted = Callable[..., Api]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "king", "content": "Hi"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [PICTURE]}]}, "messages[0]"),
        ({"messages": MESSAGES, "temperature": "hot"}, "temperature"),
        ({"messages": MESSAGES, "temperature": 3}, "temperature"),
        ({"messages": MESSAGES, "temperature": True}, "temperature"),
        ({"messages": MESSAGES, "top_p": -0.1}, "top_p"),
        ({"messages": MESSAGES, "top_k": -2}, "top_k"),
        ({"messages": MESSAGES, "n": 0}, "n"),
        ({"messages": MESSAGES, "n": 1.5}, "n"),
        ({"messages": MESSAGES, "n": 10**6}, "n"),
        ({"messages": MESSAGES, "seed": 2**70}, "seed"),
        ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
        ({"messages": MESSAGES, "max_tokens": 10**9}, "max_tokens"),
        ({"messages": MESSAGES, "max_tokens": 600}, "max_tokens"),
        ({"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"messages": MESSAGES, "stop": ["a"] * 5}, "stop"),
        ({"messages": MESSAGES, "stop": ""}, "stop"),
        ({"messages": MESSAGES, "stop": [1]}, "stop"),
        ({"messages": MESSAGES, "stop": {}}, "stop"),
        ({"messages": MESSAGES, "logit_bias": {"x": 1}}, "logit_bias"),
        ({"messages": MESSAGES, "logit_bias": {"1": 101}}, "logit_bias"),
        ({"messages": MESSAGES, "logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": MESSAGES, "logprobs": 1}, "logprobs"),
        ({"messages": MESSAGES, "stream": "yes"}, "stream"),
        ({"messages": MESSAGES, "stream_options": {}}, "stream_options"),
        ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": MESSAGES, "response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": MESSAGES, "modalities": ["text", "audio"]}, "modalities"),
        ({"messages": MESSAGES, "functions": [{"name": "f"}]}, "functions"),
        ({"messages": MESSAGES, "guided_json": {"type": "object"}}, "guided_json"),
        ({"messages": MESSAGES, "use_beam_search": True}, "use_beam_search"),
        ({"messages": MESSAGES, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"messages": MESSAGES, "max_token": 5}, "max_token"),
        ({"messages": MESSAGES, "temperatures": 1}, "temperatures"),
        ({"messages": MESSAGES, "tools": [{}]}, "tools[0]"),
        ({"messages": MESSAGES, "tools": [{**TOOL, "function": {"name": ""}}]}, "tools[0]"),
        ({"messages": MESSAGES, "tools": {"a": 1}}, "tools"),
        ({"messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
        ({"messages": MESSAGES, "tools": [TOOL], "tool_choice": OTHER_TOOL}, "tool_choice"),
        ({"messages": MESSAGES, "model": 5}, "model"),
    ],
)  # fmt: skip
def test_chats_are_refused_by_name(scripted: Scripted, body: dict[str, Any], param: str) -> None:
    status, error = scripted("x").refused(CHAT, **body)
    assert status == 400
    assert (error["param"] or "").removeprefix("messages[0].").startswith(param)
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) > 20


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": ["a"] * 300}, "prompt"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "word " * 5000}, "prompt"),
    ],
)
def test_completions_are_refused_by_name(
    scripted: Scripted, body: dict[str, Any], param: str
) -> None:
    status, error = scripted("x").refused(TEXT, **body)
    assert (status, error["param"]) == (400, param)


def test_a_prompt_without_tokens_is_refused_or_begins_with_bos(scripted: Scripted) -> None:
    assert scripted("x").refused(TEXT, prompt="")[1]["param"] == "prompt"
    assert scripted("x", family="chatml").post(TEXT, prompt="")["usage"]["prompt_tokens"] == 1


def test_the_context_bounds_prompt_and_answer(scripted: Scripted) -> None:
    api = scripted("word " * 40, bounds=Bounds(context=20, answer=512, seconds=60))
    _, error = api.refused(TEXT, prompt="quick", max_tokens=20)
    assert error["code"] == "context_length_exceeded"
    assert "20" in error["message"]
    # Where no length is asked for, the answer ends where the context does.
    usage = api.chat("Hi")["usage"]
    assert usage["total_tokens"] == 20


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"text"', 400),
        (b'{"prompt": "a", "prompt": "b"}', 400),
        (b'{"prompt": NaN}', 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "\xff"}', 400),
        ('{"prompt": "a"}'.encode("utf-16"), 400),
        (b"[" * 100_000, 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"prompt": "a"} x', 400),
    ],
)
def test_bodies_that_are_no_json_object_are_refused(
    scripted: Scripted, body: bytes, status: int
) -> None:
    headers = {"content-type": "application/json"}
    response = scripted("x").http.post(TEXT, content=body, headers=headers)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", TEXT, {"content-type": "text/plain"}, 415),
        ("POST", TEXT, {}, 415),
        ("POST", TEXT, {"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ("GET", TEXT, {}, 405),
        ("DELETE", CHAT, {}, 405),
        ("GET", "/v1/embeddings", {}, 404),
        ("GET", "/", {}, 404),
        ("GET", "/v1/../../etc/passwd", {}, 404),
        ("GET", "/%2e%2e/%00", {}, 404),
    ],
)
def test_routes_methods_and_types_are_refused_in_openais_shape(
    scripted: Scripted, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    response = scripted("x").http.request(method, path, headers=headers, content=b"{}")
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_json_type_of_any_kind_is_read(scripted: Scripted) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON", "application/x+json"):
        response = scripted("x").http.post(
            TEXT, content=b'{"prompt": "a"}', headers={"content-type": kind}
        )
        assert response.status_code == 200


def test_numbers_of_another_spelling_are_read(scripted: Scripted) -> None:
    answer = scripted("a b c d").post(TEXT, prompt="a", max_tokens=2.0, temperature=1, top_p=0)
    assert answer["usage"]["completion_tokens"] == 2
