"""`/v1/completions`: prompts in every form, echo, log-probabilities, streams."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.model_sources.load_model import load_model
from tests.engine.serving.conftest import Api

PATH = "/v1/completions"
Scripted = Callable[..., Api]


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def test_prompts_come_in_every_form(scripted: Scripted) -> None:
    asked: list[str] = []
    api = scripted(lambda prompt: asked.append(prompt) or "yes")  # type: ignore[func-returns-value]
    ids = api.service.tokenizer.encode("quick fox", add_special_tokens=False)
    assert texts(api.post(PATH, prompt="quick fox")) == ["yes"]
    assert texts(api.post(PATH, prompt=["quick fox", "two"])) == ["yes", "yes"]
    assert texts(api.post(PATH, prompt=ids)) == ["yes"]
    assert texts(api.post(PATH, prompt=[ids, ids])) == ["yes", "yes"]
    assert asked == ["quick fox", "quick fox", "two", *["quick fox"] * 3]


def test_several_prompts_with_several_choices_are_in_order(scripted: Scripted) -> None:
    api = scripted(lambda prompt: f"{prompt}!")
    answer = api.post(PATH, prompt=["a", "b"], n=2)
    assert texts(answer) == ["a!", "a!", "b!", "b!"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 2


def test_sixteen_tokens_where_no_limit_is_given(scripted: Scripted) -> None:
    answer = scripted("word " * 40).post(PATH, prompt="a")
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_echo_brings_the_prompt_and_its_log_probabilities(scripted: Scripted) -> None:
    api = scripted("lazy dog")
    answer = api.post(PATH, prompt="quick fox ", echo=True, logprobs=1)
    (choice,) = answer["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "quick fox lazy dog" == "".join(told["tokens"])
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    ends = [*told["text_offset"][1:], len(choice["text"])]
    spans = zip(told["text_offset"], ends, strict=True)
    assert [choice["text"][start:end] for start, end in spans] == told["tokens"]
    events = api.stream(PATH, prompt="quick fox ", echo=True, logprobs=1)
    assert "".join(e["choices"][0]["text"] for e in events) == choice["text"]
    parts = [e["choices"][0]["logprobs"] for e in events]
    for key, value in told.items():
        assert [item for part in parts for item in part[key]] == value


def test_a_prompt_can_be_scored_alone(tiny_api: Api, tiny_model: Any) -> None:
    answer = tiny_api.post(PATH, prompt="abcab", echo=True, logprobs=3, max_tokens=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "abcab"
    assert answer["usage"]["completion_tokens"] == 0
    told = choice["logprobs"]
    ids = tiny_api.service.tokenizer.encode("abcab", add_special_tokens=False)
    model = load_model(tiny_model)
    with torch.no_grad():
        scores = model(torch.tensor([ids]))[0].double().log_softmax(-1)
    truth = [scores[i, token].item() for i, token in enumerate(ids[1:])]
    assert told["token_logprobs"][1:] == pytest.approx(truth, abs=1e-5)
    best = scores[0].topk(3).values.tolist()
    assert sorted(told["top_logprobs"][1].values(), reverse=True)[:3] == pytest.approx(
        best, abs=1e-5
    )


def test_a_stream_of_a_completion_says_the_same(scripted: Scripted) -> None:
    api = scripted("one two three")
    whole = api.post(PATH, prompt="x", stop=" three", max_tokens=50)
    events = api.stream(
        PATH, prompt="x", stop=" three", max_tokens=50, stream_options={"include_usage": True}
    )
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == texts(whole)[0] == "one two"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["usage"] == whole["usage"]
    assert {e["object"] for e in events} == {whole["object"]} == {"text_completion"}


def test_seeds_repeat_an_answer(tiny_api: Api) -> None:
    def drawn(seed: int) -> list[str]:
        return texts(tiny_api.post(PATH, prompt="ab", temperature=1.5, seed=seed, n=3))

    first = drawn(1)
    assert first == drawn(1) != drawn(2)
    assert len(set(first)) > 1
