"""A real server in a process of its own: sockets, signals, crowds and ill-behaved clients."""

import asyncio
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.config.tasks.serving import ServeSettings
from engine.errors import ConfigError
from engine.verbs.models.serve import checked_key
from tests.support.processes.served import ServedModel, completion_request
from tests.support.request_fuzzer import campaign
from tests.support.tiny_model import write_tiny_model

LONG = {"prompt": "abc", "max_tokens": 3000, "ignore_eos": True}


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("served") / "model")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 8192  # so that an answer can take its time
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServedModel]:
    options = ("--max-running", "4", "--max-connections", "300", "--name", "tiny")
    with ServedModel(model, *options) as running:
        yield running


async def crowd(port: int, count: int) -> list[tuple[int, dict[str, Any]]]:
    """Status and answer of many requests that are sent at the same moment."""

    async def one(number: int) -> tuple[int, dict[str, Any]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"prompt": f"n{number}", "max_tokens": 4, "temperature": 0, "echo": True})
        size = b"Content-Length: %d" % len(body)
        writer.write(completion_request(body.encode(), size, b"Connection: close"))
        answer = await asyncio.wait_for(reader.read(), 120)
        writer.close()
        status, _, rest = answer.partition(b"\r\n")
        return int(status.split()[1]), json.loads(rest.partition(b"\r\n\r\n")[2])

    return await asyncio.gather(*map(one, range(count)))


def test_two_hundred_requests_at_once_lose_nothing(server: ServedModel) -> None:
    answers = asyncio.run(crowd(server.port, 200))
    assert [status for status, _ in answers] == [200] * 200
    texts = [answer["choices"][0]["text"] for _, answer in answers]
    assert all(text.startswith(f"n{number}") for number, text in enumerate(texts))
    body = {"prompt": "n7", "max_tokens": 4, "temperature": 0, "echo": True}
    alone = json.loads(server.request("POST", "/v1/completions", body)[1])
    assert alone["choices"][0]["text"] == texts[7]
    assert server.health() == {"status": "ok", "running": 0, "waiting": 0}


def test_a_client_that_leaves_frees_its_slot(server: ServedModel) -> None:
    streams = [server.open_stream("abc", 3000) for _ in range(4)]
    assert server.health()["running"] == 4
    for stream in streams[:2]:
        stream.close()
    for stream in streams[2:]:  # as a killed process leaves: with a reset
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        stream.close()
    until(lambda: server.health()["running"] == 0)


def test_a_client_that_leaves_while_it_waits_frees_its_turn(server: ServedModel) -> None:
    streams = [server.open_stream("abc", 3000) for _ in range(4)]
    waiting = [server.connect() for _ in range(3)]
    for sock in waiting:
        sock.sendall(completion_request(json.dumps(LONG).encode()))
    until(lambda: server.health()["waiting"] == 3)
    for sock in (*waiting, *streams):
        sock.close()
    until(lambda: server.health() == {"status": "ok", "running": 0, "waiting": 0})


def test_slow_heads_keep_nobody_from_being_served(server: ServedModel) -> None:
    slow = []
    for _ in range(400):  # more than may be connected: the oldest of them give way
        sock = server.connect()
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        slow.append(sock)
    started = time.monotonic()
    assert server.health()["status"] == "ok"
    assert time.monotonic() - started < 2
    for sock in slow:
        sock.close()


def test_a_head_that_is_never_whole_is_refused(server: ServedModel) -> None:
    with server.connect() as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nX: " + b"a" * 10_000)
        time.sleep(0.2)
        sock.sendall(b"a" * 10_000)
        answer = b""
        while part := sock.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET / HTTP/x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 150 + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: abc\r\n\r\n", 400),
        (completion_request(b"", b"Content-Length: 999999999999999"), 413),
        (completion_request(b"zz\r\n", b"Transfer-Encoding: chunked"), 400),
    ],
)
def test_what_is_no_request_is_refused_with_a_reason(
    server: ServedModel, sent: bytes, status: int
) -> None:
    with server.connect() as sock:
        sock.sendall(sent)
        answer = b""
        while part := sock.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status
    assert json.loads(body)["error"]["message"]


def test_a_kept_connection_serves_request_after_request(server: ServedModel) -> None:
    one = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with server.connect() as sock:
        sock.sendall(one * 3)  # pipelined
        answer = b""
        while answer.count(b'"waiting":0}') < 3:
            part = sock.recv(65536)
            assert part, answer
            answer += part
    assert answer.count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_has_begun_and_refuses_what_waits(
    model: Path, number: signal.Signals
) -> None:
    with ServedModel(model, "--max-running", "1") as server, ThreadPoolExecutor(2) as pool:
        begun = pool.submit(
            server.request, "POST", "/v1/completions", {**LONG, "max_tokens": 400}
        )  # fmt: skip
        until(lambda: server.health()["running"] == 1)
        waits = pool.submit(server.request, "POST", "/v1/completions", LONG)
        until(lambda: server.health()["waiting"] == 1)
        server.process.send_signal(number)
        status, body = waits.result(20)
        assert (status, json.loads(body)["error"]["code"]) == (503, "shutting_down")
        status, body = begun.result(60)
        assert status == 200
        assert json.loads(body)["usage"]["completion_tokens"] == 400
        assert server.process.wait(20) == 0
    assert "Stopping: 1 answers have begun" in server.output
    assert "Traceback" not in server.output


def test_what_takes_too_long_at_the_end_is_refused_by_name(model: Path) -> None:
    with ServedModel(model, "--shutdown-timeout", "0.2") as server:
        rest = b""
        with server.open_stream("abc", 4000) as stream:
            server.process.send_signal(signal.SIGTERM)
            while part := stream.recv(65536):
                rest += part
        assert b'"code":"shutting_down"' in rest
        assert b"data: [DONE]" in rest
        assert server.process.wait(20) == 0


def test_a_second_signal_ends_at_once(model: Path) -> None:
    with ServedModel(model) as server:
        stream = server.open_stream("abc", 4000)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "Stopping" in server.output)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 128 + signal.SIGTERM
        stream.close()


def test_the_key_of_the_environment_is_asked_for_and_never_told(model: Path) -> None:
    with ServedModel(model, variables={"ENGINE_API_KEY": "a-secret-of-some-length"}) as server:
        assert server.request("GET", "/v1/models")[0] == 401
        key = {"Authorization": "Bearer a-secret-of-some-length"}
        assert server.request("GET", "/v1/models", headers=key)[0] == 200
        assert server.request("GET", "/health")[0] == 200
    assert "a-secret" not in server.output


@pytest.mark.parametrize(
    ("host", "key", "reason"),
    [
        ("0.0.0.0", None, "needs an API key"),
        ("192.168.0.1", "", "needs an API key"),
        ("0.0.0.0", "short", "16"),
        ("127.0.0.1", "with space in it", "spaces"),
    ],
)
def test_keys_that_would_not_protect_are_refused(host: str, key: str | None, reason: str) -> None:
    settings = ServeSettings(model="m", host=host, api_key=key)
    with pytest.raises(ConfigError, match=reason):
        checked_key(settings, host.startswith("127."))


def test_an_address_that_is_taken_is_told_before_the_model_loads(model: Path) -> None:
    from engine.verbs.models.serve import serve

    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ConfigError, match="cannot listen"),
    ):
        serve(model / "nothing", port=taken.getsockname()[1])
    with pytest.raises(ConfigError, match="cannot listen"):
        serve(model, host="no such host", api_key="a-key-of-some-length")


def test_nearly_right_requests_are_answered_with_a_reason(server: ServedModel) -> None:
    outcomes = campaign(server, 250, seed=1)
    assert set(outcomes) <= {"200", "400", "403", "404", "405", "408", "413", "415", "431"}, (
        outcomes
    )
    assert outcomes["400"] > 50
    assert server.health() == {"status": "ok", "running": 0, "waiting": 0}
    assert "Traceback" not in server.output
