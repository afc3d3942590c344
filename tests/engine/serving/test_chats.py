"""`/v1/chat/completions`: answers, streams, tools, reasoning and log-probabilities."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
from tests.engine.serving.conftest import Api

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
Scripted = Callable[..., Api]


def deltas(events: list[dict[str, Any]], key: str = "content") -> str:
    return "".join(e["choices"][0]["delta"].get(key) or "" for e in events if e["choices"])


def test_an_answer_has_openais_shape(scripted: Scripted) -> None:
    answer = scripted("Hello, you.").chat(model="base")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "base"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello, you.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 3


def test_a_stream_says_the_same(scripted: Scripted) -> None:
    api = scripted("Hello, dear you.")
    events = api.stream(CHAT, messages=MESSAGES, stream_options={"include_usage": True})
    assert deltas(events) == "Hello, dear you."
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert len({e["id"] for e in events}) == 1
    reasons = [e["choices"][0]["finish_reason"] for e in events[:-1]]
    assert reasons == [None] * (len(events) - 2) + ["stop"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == api.chat()["usage"]
    assert [e["usage"] for e in events[:-1]] == [None] * (len(events) - 1)
    assert "usage" not in api.stream(CHAT, messages=MESSAGES)[-1]


def test_stop_texts_end_an_answer_and_are_never_shown(scripted: Scripted) -> None:
    api = scripted("one, two, three, four")
    for stop, shown in (
        ("three", "one, two, "),
        (["xyz", ", thr", "ee"], "one, two"),
        ([" two, three"], "one,"),
        (["o"], ""),
    ):
        whole = api.chat(stop=stop)["choices"][0]
        events = api.stream(CHAT, messages=MESSAGES, stop=stop)
        assert whole["message"]["content"] == deltas(events) == shown
        assert whole["finish_reason"] == events[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_limit_cuts(scripted: Scripted) -> None:
    for key in ("max_tokens", "max_completion_tokens"):
        answer = scripted("Hello, dear you.").post(CHAT, messages=MESSAGES, **{key: 2})
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 2


def test_characters_of_several_tokens_come_whole(scripted: Scripted) -> None:
    text = "Zoë 日本 🎉!"
    api = scripted(text)
    events = api.stream(CHAT, messages=MESSAGES)
    assert deltas(events) == text
    assert all("\ufffd" not in json.dumps(event, ensure_ascii=False) for event in events)


def test_several_choices_are_numbered(scripted: Scripted) -> None:
    api = scripted("Hello.")
    answer = api.chat(n=3, seed=5)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    seeds = [settings.sampling.seed for settings in api.service.thread._generator.asked]  # type: ignore[attr-defined]
    assert len(set(seeds)) == 3
    assert seeds[0] == 5
    events = api.stream(CHAT, messages=MESSAGES, n=2)
    for index in (0, 1):
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in own) == "Hello."


def test_log_probabilities_are_told_of_every_token(scripted: Scripted) -> None:
    api = scripted("Zoë is.")
    answer = api.chat(logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "Zoë is.".encode()
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    events = api.stream(CHAT, messages=MESSAGES, logprobs=True, top_logprobs=2)
    told = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
    assert [entry for one in told for entry in one["content"]] == content


def test_tokens_of_a_stop_text_are_not_told_of(scripted: Scripted) -> None:
    api = scripted("one two three")
    whole = api.chat(stop=" three", logprobs=True)["choices"][0]
    told = b"".join(bytes(entry["bytes"]) for entry in whole["logprobs"]["content"])
    assert told.decode() == whole["message"]["content"] == "one two"
    events = api.stream(CHAT, messages=MESSAGES, stop=" three", logprobs=True)
    parts = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
    assert b"".join(bytes(t["bytes"]) for p in parts for t in p["content"]) == b"one two"


def test_calls_of_tools_are_parsed(scripted: Scripted) -> None:
    api = scripted(f"Let me look.\n{CALL}")
    (choice,) = api.chat(tools=[WEATHER])["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look."
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo"}
    events = api.stream(CHAT, messages=MESSAGES, tools=[WEATHER])
    assert deltas(events) == "Let me look."
    told = [c for e in events for c in e["choices"][0]["delta"].get("tool_calls", ())]
    assert [(c["index"], c["function"]) for c in told] == [(0, call["function"])]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_tools_stand_in_the_prompt_unless_they_may_not_be_used(scripted: Scripted) -> None:
    asked: list[str] = []

    def script(prompt: str) -> str:
        asked.append(prompt)
        return CALL

    api = scripted(script)
    assert api.chat(tools=[WEATHER], tool_choice="none")["choices"][0]["message"]["content"] == CALL
    assert "weather" not in asked[0]
    api.chat(tools=[WEATHER])
    assert "weather" in asked[1]


def test_tools_that_the_template_passes_over_are_named(scripted: Scripted, tiny_api: Api) -> None:
    def ignored(api: Api, **body: object) -> str | None:
        answer = api.http.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1, **body})
        assert answer.status_code == 200, answer.text
        header: str | None = answer.headers.get("x-engine-ignored")
        return header

    assert ignored(tiny_api, tools=[WEATHER]) == "tools"
    assert ignored(tiny_api, tools=[WEATHER], tool_choice="none") is None
    assert ignored(scripted("yes"), tools=[WEATHER]) is None  # Qwen's template knows them


def test_a_call_can_be_required(scripted: Scripted) -> None:
    begun = '<tool_call>\n{"name": "weather", '
    api = scripted(lambda prompt: CALL.partition(begun)[2] if prompt.endswith(begun) else "no")
    named = {"type": "function", "function": {"name": "weather"}}
    (choice,) = api.chat(tools=[WEATHER], tool_choice=named)["choices"]
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


def test_only_one_call_where_one_is_wanted(scripted: Scripted) -> None:
    api = scripted(f"{CALL}\n{CALL}")
    assert len(api.chat(tools=[WEATHER])["choices"][0]["message"]["tool_calls"]) == 2
    one = api.chat(tools=[WEATHER], parallel_tool_calls=False)["choices"][0]
    assert len(one["message"]["tool_calls"]) == 1


def test_reasoning_is_told_apart(scripted: Scripted) -> None:
    api = scripted("<think>\nHm.\n</think>\n\nFour.")
    message = api.chat()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Four.")
    events = api.stream(CHAT, messages=MESSAGES)
    assert deltas(events, "reasoning_content") == "Hm."
    assert deltas(events) == "Four."
    # A model whose template knows no reasoning may write the tags.
    plain = scripted("<think>a</think>", "chatml").chat()["choices"][0]["message"]
    assert plain == {"role": "assistant", "content": "<think>a</think>", "refusal": None}


def test_conversations_are_rendered_as_training_renders_them(scripted: Scripted) -> None:
    asked: list[str] = []
    api = scripted(lambda prompt: asked.append(prompt) or "x")  # type: ignore[func-returns-value]
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": parts},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "cold"},
    ]
    kwargs = {"enable_thinking": False}
    api.post(CHAT, messages=messages, tools=[WEATHER], chat_template_kwargs=kwargs)
    assert "Be kind." in asked[0]
    assert '"arguments": {"city": "Oslo"}' in asked[0]
    assert "<tool_response>\ncold" in asked[0]
    assert asked[0].endswith("<think>\n\n</think>\n\n")


def test_adapters_are_models(scripted: Scripted) -> None:
    api = scripted("x")
    api.chat(model="tuned")
    api.chat(model="base")
    api.chat()
    assert [s.adapter for s in api.service.thread._generator.asked] == ["tuned", None, None]  # type: ignore[attr-defined]
    status, error = api.refused(CHAT, messages=MESSAGES, model="other")
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    listed = api.http.get("/v1/models").json()
    assert [(m["id"], m["parent"]) for m in listed["data"]] == [("base", None), ("tuned", "base")]
    assert api.http.get("/v1/models/tuned").json()["id"] == "tuned"
    assert api.http.get("/v1/models/none/such").status_code == 404


def test_parameters_reach_the_model(scripted: Scripted) -> None:
    api = scripted("x")
    api.chat(
        temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=-3, presence_penalty=0.5,
        frequency_penalty=-0.5, logit_bias={"7": -100}, stop_token_ids=[9], max_tokens=11,
    )  # fmt: skip
    (asked,) = api.service.thread._generator.asked  # type: ignore[attr-defined]
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p) == (0.7, 0.9)
    assert (sampling.top_k, sampling.min_p) == (5, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert sampling.logit_bias == {7: -100}
    assert (sampling.seed, asked.max_new_tokens) == (-3, 11)
    assert 9 in asked.stop_ids


def test_defaults_are_the_models_and_then_openais(scripted: Scripted) -> None:
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    api = scripted("x", loaded={"generation_config": config})
    api.chat()
    api.chat(temperature=0)
    plain = scripted("x")
    plain.chat()
    first, second = (s.sampling for s in api.service.thread._generator.asked)  # type: ignore[attr-defined]
    assert (first.temperature, first.top_p, first.top_k) == (0.6, 0.95, 20)
    assert second.temperature == 0
    (asked,) = plain.service.thread._generator.asked  # type: ignore[attr-defined]
    assert (asked.sampling.temperature, asked.sampling.top_p) == (1.0, 1.0)


def test_what_is_ignored_is_named(scripted: Scripted) -> None:
    response = scripted("x").http.post(
        CHAT, json={"messages": MESSAGES, "user": "me", "somethingelse": 1, "functions": []}
    )
    assert response.status_code == 200
    assert response.headers["x-engine-ignored"] == "functions, somethingelse, user"


def test_greedy_answers_are_those_of_generate(tiny_api: Api, tiny_model: Path) -> None:
    for prompt in ("Hi", "What is two and two?", "abc"):
        said = engine.generate(tiny_model, prompt, max_new_tokens=24, temperature=0)
        answer = tiny_api.chat(prompt, temperature=0, max_tokens=24)
        assert answer["choices"][0]["message"]["content"] == said.text
        assert answer["usage"]["completion_tokens"] == said.completion_tokens
        drawn = engine.generate(tiny_model, prompt, max_new_tokens=24, temperature=0.8, seed=11)
        answer = tiny_api.chat(prompt, temperature=0.8, seed=11, max_tokens=24)
        assert answer["choices"][0]["message"]["content"] == drawn.text
