"""The model's thread: queue, time, giving up, shutting down, and a model that fails."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from engine.serving.server import SHUTTING_DOWN
from engine.serving.service import Bounds
from tests.engine.serving.conftest import Api

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
Scripted = Callable[..., Api]


def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def generator_of(api: Api) -> Any:
    return api.service.thread._generator


def test_a_full_queue_is_told_and_nothing_of_it_is_lost(scripted: Scripted) -> None:
    api = scripted("done", slots=2, waiting=3)
    generator_of(api).gate.clear()
    with ThreadPoolExecutor(9) as pool:
        futures = [pool.submit(api.http.post, CHAT, json=BODY) for _ in range(5)]
        until(lambda: api.service.thread.running + api.service.thread.waiting == 5)
        refused = api.http.post(CHAT, json=BODY)
        generator_of(api).gate.set()
        answers = [future.result() for future in futures]
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["code"] == "queue_full"
    assert [a.json()["choices"][0]["message"]["content"] for a in answers] == ["done"] * 5


def test_an_answer_that_takes_too_long_is_given_up(scripted: Scripted) -> None:
    api = scripted("word " * 200, slots=1, bounds=Bounds(context=4096, answer=512, seconds=0.2))
    generator = generator_of(api)
    generator.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(api.http.post, CHAT, json=BODY) for _ in range(2)]
        until(lambda: api.service.thread.running == 1 and api.service.thread.waiting == 1)
        time.sleep(0.25)
        generator.gate.set()
        answers = [future.result() for future in futures]
    assert [a.status_code for a in answers] == [504, 504]
    assert answers[0].json()["error"]["code"] == "timeout"
    until(lambda: not generator.lines and api.service.thread.running == 0)


def test_an_error_in_a_stream_is_an_event_of_it(scripted: Scripted) -> None:
    api = scripted("one two three", fail_at=3)
    response = api.http.post(CHAT, json={**BODY, "stream": True})
    assert response.status_code == 200
    events = [line for line in response.text.split("\n\n") if line]
    assert '"error":{"message":"the model failed' in events[-2]
    assert events[-1] == "data: [DONE]"


def test_a_model_that_fails_is_told_everywhere(scripted: Scripted) -> None:
    api = scripted("x", fail_at=1, slots=1)
    assert api.http.get("/health").json()["status"] == "ok"
    generator_of(api).gate.clear()
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(api.http.post, CHAT, json=BODY) for _ in range(3)]
        until(lambda: api.service.thread.running + api.service.thread.waiting == 3)
        generator_of(api).gate.set()
        answers = [future.result(5) for future in futures]
    for answer in (*answers, api.http.post(CHAT, json=BODY)):
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "model_failed"
        assert "planted" not in answer.text
        assert "Traceback" not in answer.text
    health = api.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "failed")
    assert "engine_healthy 0" in api.http.get("/metrics").text


def test_a_shutdown_finishes_what_has_begun_and_refuses_the_rest(scripted: Scripted) -> None:
    api = scripted("done", slots=1)
    generator_of(api).gate.clear()
    with ThreadPoolExecutor(3) as pool:
        begun = pool.submit(api.http.post, CHAT, json=BODY)
        until(lambda: api.service.thread.running == 1)
        waits = pool.submit(api.http.post, CHAT, json=BODY)
        until(lambda: api.service.thread.waiting == 1)
        api.service.thread.drain(SHUTTING_DOWN)
        assert waits.result(5).json()["error"]["code"] == "shutting_down"
        assert api.http.post(CHAT, json=BODY).status_code == 503
        assert api.http.get("/health").status_code == 503
        generator_of(api).gate.set()
        assert begun.result(5).status_code == 200


def test_a_stop_refuses_what_is_not_finished(scripted: Scripted) -> None:
    api = scripted("word " * 400, slots=1)
    generator = generator_of(api)
    generator.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        begun = pool.submit(api.http.post, CHAT, json=BODY)
        until(lambda: api.service.thread.running == 1)
        stopping = pool.submit(api.service.thread.stop, SHUTTING_DOWN)
        generator.gate.set()
        stopping.result(5)
        answer = begun.result(5)
    assert answer.status_code in (200, 503)
    assert api.service.thread.running == 0
    assert not api.service.thread.alive


def test_wrong_prompts_fail_alone(tiny_api: Api) -> None:
    # The tokenizer knows 83 of the model's 128 ids; those of no model are refused before it.
    status, error = tiny_api.refused("/v1/completions", prompt=[500])
    assert (status, error["param"]) == (400, "prompt")
    assert tiny_api.post("/v1/completions", prompt=[127])["usage"]["prompt_tokens"] == 1


def test_metrics_count_what_was_done(scripted: Scripted) -> None:
    api = scripted("one two three")
    usage = api.chat()["usage"]
    api.chat(max_tokens=1)
    api.refused(CHAT)
    api.http.get("/somewhere")
    lines = api.http.get("/metrics").text.splitlines()
    assert 'engine_http_requests_total{route="/v1/chat/completions",status="200"} 2' in lines
    assert 'engine_http_requests_total{route="/v1/chat/completions",status="400"} 1' in lines
    assert 'engine_http_requests_total{route="other",status="404"} 1' in lines
    assert 'engine_answers_total{reason="stop"} 1' in lines
    assert 'engine_answers_total{reason="length"} 1' in lines
    assert f"engine_generated_tokens_total {usage['completion_tokens'] + 1}" in lines
    assert f"engine_prompt_tokens_total {2 * usage['prompt_tokens']}" in lines
    assert "engine_request_duration_seconds_count 2" in lines
    assert "engine_running_answers 0" in lines


def test_metrics_are_in_prometheus_format(scripted: Scripted) -> None:
    api = scripted("x")
    api.chat()
    response = api.http.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    types: dict[str, str] = {}
    for line in response.text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            types[name] = kind
        elif not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            float(value)
            base = name.partition("{")[0]
            stripped = base.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
            assert base in types or types.get(stripped) == "histogram", line
    assert set(types.values()) == {"counter", "gauge", "histogram"}


@pytest.mark.parametrize("value", ['a"b', "a\\b", "a\nb"])
def test_labels_are_escaped(value: str) -> None:
    from engine.serving.metrics import Metrics

    metrics = Metrics()
    metrics.count(metrics.finished, value)
    (line,) = [x for x in metrics.text().splitlines() if x.startswith("engine_answers_total{")]
    assert line.endswith('"} 1')
    assert "\n" not in line
