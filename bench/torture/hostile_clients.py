"""A server under spoilt requests, slow clients and clients that leave."""

from __future__ import annotations

import json
import socket
import tempfile
import time
from pathlib import Path

import psutil

from bench.torture.campaign import Campaign, Figures
from tests.support.processes.served import ServedModel
from tests.support.request_fuzzer import campaign
from tests.support.tiny_model import write_tiny_model

_QUESTION = {"prompt": "abc", "max_tokens": 2}


def requests(trials: int, seed: int) -> Figures:
    """So many spoilt requests, slow sockets and streams whose reader leaves."""
    slow, leaving = min(1000, max(10, trials // 100)), min(200, max(4, trials // 500))
    with tempfile.TemporaryDirectory() as name:
        model = write_tiny_model(Path(name) / "model")
        figures = _left_streams(Path(name) / "long", leaving)
        with ServedModel(model, "--name", "tiny") as server:
            process = psutil.Process(server.process.pid)
            for _ in range(20):
                server.request("POST", "/v1/completions", _QUESTION)
            resident, threads = process.memory_info().rss, process.num_threads()
            outcomes = campaign(server, trials, seed)
            wrong = sum(
                n for told, n in outcomes.items() if not told.isdigit() and told != "closed"
            )
            answered = _beside_slow_sockets(server, slow)
            return {
                "requests": trials,
                "wrong_answers": wrong,
                "tracebacks": figures.pop("tracebacks") + server.output.count("Traceback"),
                "alive": int(server.process.poll() is None),
                "slow_sockets": slow,
                "answered_beside_them_seconds": round(answered, 2),
                **figures,
                "more_threads": process.num_threads() - threads,
                "more_resident_mib": round((process.memory_info().rss - resident) / 2**20, 1),
                **{f"status_{told}": n for told, n in sorted(outcomes.items()) if told.isdigit()},
            }


def _left_streams(folder: Path, leaving: int) -> Figures:
    """Long answers whose readers leave at once: what is generated afterwards all the same."""
    config = write_tiny_model(folder) / "config.json"
    whole = json.loads(config.read_text()) | {"max_position_embeddings": 8192}
    config.write_text(json.dumps(whole))
    with ServedModel(folder, "--name", "tiny") as server:
        for _ in range(leaving):
            server.open_stream("abc", 3000).close()
        ends = time.monotonic() + 10
        while server.health()["running"] and time.monotonic() < ends:
            time.sleep(0.05)
        health = server.health()
        return {
            "readers_that_left": leaving,
            "generations_left_over": health["running"] + health["waiting"],
            "tracebacks": server.output.count("Traceback"),
        }


def _beside_slow_sockets(server: ServedModel, count: int) -> float:
    """Seconds until a good client is answered while so many send half a request."""
    sockets: list[socket.socket] = []
    for _ in range(count):
        connection = server.connect()
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX")
        sockets.append(connection)
        if len(sockets) % 50 == 0:
            time.sleep(0.05)
    time.sleep(0.5)
    started, answered = time.monotonic(), False
    while not answered and time.monotonic() < started + 60:
        try:
            answered = server.request("POST", "/v1/completions", _QUESTION)[0] == 200
        except OSError:
            answered = False
        if not answered:
            time.sleep(0.05)
    seconds = time.monotonic() - started
    for connection in sockets:
        connection.close()
    return seconds


def _passes(figures: Figures) -> bool:
    bad = ("wrong_answers", "tracebacks", "generations_left_over")
    return (
        not any(figures[key] for key in bad)
        and figures["alive"] == 1
        and figures["more_resident_mib"] < 50
    )


CLIENTS = {"T17": Campaign("spoilt requests, slow and leaving clients", 100_000, requests, _passes)}
