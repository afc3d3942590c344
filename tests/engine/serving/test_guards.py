"""Pages from elsewhere, foreign names, missing keys and large bodies are kept out."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from engine.serving.guards import AccessRules, Guard, host_name, is_local, rules_for_host
from tests.engine.serving.conftest import LOCAL, Api

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hi"}]}
Scripted = Callable[..., Api]


def status_of(api: Api, **headers: str) -> int:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return api.http.post(CHAT, json=BODY, headers=named).status_code


def test_a_local_server_answers_under_its_own_names_alone(scripted: Scripted) -> None:
    api = scripted("x")
    for host in ("localhost:8000", "127.0.0.1", "LOCALHOST:1", "[::1]:8000"):
        assert status_of(api, host=host) == 200, host
    for host in ("evil.example:8000", "localhost.evil.example", "", "127.0.0.1.evil", "[::2]", "["):
        assert status_of(api, host=host) == 403, host


def test_pages_from_elsewhere_are_refused(scripted: Scripted) -> None:
    api = scripted("x")
    assert status_of(api, origin="http://localhost:8000") == 200
    for origin in (
        "https://evil.example",
        "null",
        "http://localhost:9000",
        "https://localhost:8000",
    ):
        assert status_of(api, origin=origin) == 403, origin
    assert status_of(api, sec_fetch_site="cross-site") == 403
    assert status_of(api, sec_fetch_site="same-origin") == 200
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert api.http.get("/health", headers=followed).status_code == 200


def test_an_allowed_origin_may_read_answers(scripted: Scripted) -> None:
    rules = AccessRules(hosts=LOCAL.hosts, origins=frozenset({"https://good.example"}))
    api = scripted("x", rules=rules)
    origin = {"origin": "https://good.example"}
    response = api.http.post(CHAT, json=BODY, headers=origin)
    assert response.headers["access-control-allow-origin"] == "https://good.example"
    asked = {**origin, "access-control-request-method": "POST"}
    response = api.http.options(CHAT, headers=asked)
    assert response.status_code == 204
    assert "authorization" in response.headers["access-control-allow-headers"]
    asked["origin"] = "https://evil.example"
    response = api.http.options(CHAT, headers=asked)
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers


def test_a_key_is_asked_for_everywhere_but_at_health(scripted: Scripted) -> None:
    api = scripted("x", rules=AccessRules(api_key="the-long-secret"))
    for path in ("/v1/models", "/metrics", "/nowhere"):
        response = api.http.get(path)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert api.http.get("/health").status_code == 200
    for wrong in ("Bearer", "Bearer the-long-secre", "Basic the-long-secret", "Bearer th\xe9", ""):
        headers = {"authorization": wrong.encode("latin-1")}
        assert api.http.get("/v1/models", headers=headers).status_code == 401  # type: ignore[arg-type]
    assert status_of(api, authorization="Bearer the-long-secret") == 200
    assert status_of(api, authorization="bearer  the-long-secret ") == 200


def test_a_large_body_is_refused_whether_it_says_so_or_not(scripted: Scripted) -> None:
    api = scripted("x", rules=AccessRules(body_bytes=1000))
    big = b'{"prompt": "' + b"a" * 2000 + b'"}'
    headers = {"content-type": "application/json"}
    assert api.http.post(CHAT, content=big, headers=headers).status_code == 413
    response = api.http.post(CHAT, content=iter([big[:500], big[500:]]), headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    lying = {**headers, "content-length": "9" * 40}
    assert api.http.post(CHAT, content=b"{}", headers=lying).status_code == 413


def test_a_body_that_does_not_come_is_given_up() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await receive()

    async def slow() -> dict[str, Any]:
        if not sent:
            sent.append("part")
            return {"type": "http.request", "body": b"{", "more_body": True}
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"host", b"x")]}
    from engine.serving.openai.api_errors import ApiError

    with pytest.raises(ApiError, match=r"0\.1 s"):
        asyncio.run(Guard(app, AccessRules(body_seconds=0.1))(scope, slow, send))


def test_rules_follow_from_the_address() -> None:
    local = rules_for_host("127.0.0.1", ["proxy.example"], ["https://A.example/"], None)
    assert {"localhost", "127.0.0.1", "::1", "proxy.example"} <= local.hosts
    assert local.origins == {"https://a.example"}
    assert rules_for_host("0.0.0.0", [], [], "k").hosts == frozenset()


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.3.2.1", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("192.168.1.2", False), ("example.org", False)],
)  # fmt: skip
def test_addresses_of_this_machine_are_told_from_others(host: str, local: bool) -> None:
    assert is_local(host) is local


def test_names_in_host_headers() -> None:
    assert host_name("LocalHost:80") == "localhost"
    assert host_name("[::1]:80") == "::1"
    assert host_name("[bad") == ""
