"""engine serve --ui in a browser: two conversations side by side."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.support.pages.chat_stub import ChatStub
from tests.support.pages.served import served
from tests.support.pages.waiting import eventually

Opened = Callable[..., Page]
AT_ITS_END = "e => e.scrollHeight - e.scrollTop - e.clientHeight < 60"


@pytest.fixture(params=["base", "tuned"])
def stub(request: pytest.FixtureRequest) -> ChatStub:
    """A server on which one of the two models is late: no test may depend on which."""
    return ChatStub(late=request.param)


@pytest.fixture
def address(stub: ChatStub) -> Iterator[str]:
    with served(stub.app) as where:
        yield where


def say(page: Page, text: str) -> None:
    expect(page.locator("#send")).to_be_enabled()
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def answer(page: Page, side: str) -> Locator:
    """The last answer of a side."""
    return page.locator(f'[data-side="{side}"] .said.assistant').last


def test_both_models_answer_side_by_side(stub: ChatStub, address: str, open_page: Opened) -> None:
    page = open_page(address)
    page.get_by_text("Settings of the answers").click()
    page.get_by_label("System prompt").fill("Be short.")
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Most tokens").fill("32")
    page.get_by_label("Seed").fill("5")
    say(page, "Hello there")
    expect(answer(page, "left")).to_contain_text("base heard: Hello there")
    expect(answer(page, "right")).to_contain_text("tuned heard: Hello there")
    expect(answer(page, "right")).to_contain_text("3 tokens")
    say(page, "Again")
    for side in ("left", "right"):
        expect(answer(page, side)).to_contain_text("heard: Again")
    asked = [body for body in stub.asked if body["model"] == "tuned"]
    assert [message["role"] for message in asked[1]["messages"]] == [
        "system", "user", "assistant", "user"
    ]  # fmt: skip
    assert asked[1]["messages"][2]["content"] == "tuned heard: Hello there "
    chosen = {key: asked[0][key] for key in ("temperature", "max_tokens", "seed", "stream")}
    assert chosen == {"temperature": 0.7, "max_tokens": 32, "seed": 5, "stream": True}
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".said")).to_have_count(0)
    say(page, "Anew")
    for side in ("left", "right"):
        expect(answer(page, side)).to_contain_text("Anew")
    assert [len(body["messages"]) for body in stub.asked[4:]] == [2, 2]


def test_one_model_may_be_asked_alone(stub: ChatStub, address: str, open_page: Opened) -> None:
    page = open_page(address)
    page.get_by_label("Right model").select_option("none: one conversation")
    page.get_by_label("Left model").select_option("tuned")
    say(page, "Hello")
    expect(answer(page, "left")).to_contain_text("tuned heard: Hello")
    assert [body["model"] for body in stub.asked] == ["tuned"]
    expect(page.locator('[data-side="right"] .said')).to_have_count(0)


def test_stop_ends_the_streams_and_keeps_what_came(
    stub: ChatStub, address: str, open_page: Opened
) -> None:
    page = open_page(address)
    log = page.get_by_role("log", name="Left conversation")
    expect(log).to_have_attribute("aria-live", "polite")
    say(page, "Count slowly")
    for side in ("left", "right"):
        expect(answer(page, side)).to_contain_text("and and")
    expect(log).to_have_attribute("aria-busy", "true")
    expect(page.locator("#send")).to_be_disabled()
    page.get_by_role("button", name="Stop").click()
    expect(answer(page, "left")).to_contain_text("Stopped.")
    expect(log).to_have_attribute("aria-busy", "false")
    say(page, "Hello")
    for side, model in (("left", "base"), ("right", "tuned")):
        expect(answer(page, side)).to_contain_text(f"{model} heard: Hello")
    assert all("and and" in body["messages"][1]["content"] for body in stub.asked[2:])
    eventually(page, lambda: stub.ended, 4)


def test_refusals_and_faults_are_told_and_can_be_tried_again(
    stub: ChatStub, address: str, open_page: Opened
) -> None:
    page = open_page(address)
    say(page, "Please refuse")
    expect(answer(page, "left")).to_contain_text("max_tokens is 0; it should be at least 1.")
    answer(page, "left").get_by_role("button", name="Try again").click()
    expect(page.locator('[data-side="left"] .said')).to_have_count(2)
    eventually(page, lambda: [body["model"] for body in stub.asked].count("base"), 2)
    page.get_by_role("button", name="New conversation").click()
    say(page, "Please fail")
    expect(answer(page, "right")).to_contain_text("tuned heard: Please fail")
    expect(answer(page, "right")).to_contain_text("The server ran out of memory.")


def test_an_answer_is_copied(address: str, open_page: Opened) -> None:
    page = open_page(address, permissions=["clipboard-read", "clipboard-write"])
    say(page, "Copy me")
    answer(page, "left").get_by_role("button", name="Copy").click()
    expect(answer(page, "left").get_by_role("button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "base heard: Copy me "


def test_the_key_is_asked_for_and_stays_in_the_tab(open_page: Opened) -> None:
    with served(ChatStub(key="secret-key").app) as address:
        page = open_page(address)
        expect(page.get_by_label("API key")).to_be_focused()
        expect(page.locator("#send")).to_be_disabled()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_text("did not accept the key: The API key is wrong")).to_be_visible()
        page.get_by_label("API key").fill("secret-key")
        page.get_by_role("button", name="Use this key").click()
        expect(page.locator("#connection")).to_have_text("2 models")
        expect(page.get_by_label("API key")).to_be_hidden()
        say(page, "Hello")
        expect(answer(page, "left")).to_contain_text("base heard: Hello")
        page.reload()
        expect(page.locator("#connection")).to_have_text("2 models")
        assert (
            page.evaluate("JSON.stringify({...localStorage}) + document.cookie").count("secret")
            == 0
        )
        assert "secret" not in page.content()


def test_what_is_written_like_a_script_is_text(address: str, open_page: Opened) -> None:
    page = open_page(address)
    say(page, "<img src=x onerror=alert(1)> <script>alert(2)</script>")
    expect(answer(page, "left")).to_contain_text("<script>alert(2)</script>")
    assert page.locator("img, body script").count() == 0


def test_a_long_conversation_scrolls_inside_its_pane(address: str, open_page: Opened) -> None:
    page = open_page(address)
    say(page, "word\n" * 200)
    say(page, "and more " * 400)
    for side in ("left", "right"):
        expect(answer(page, side)).to_contain_text("801 tokens")
        log = page.locator(f'[data-side="{side}"] .transcript')
        assert log.evaluate("e => e.scrollHeight > e.clientHeight + 1000")
        eventually(page, partial(log.evaluate, AT_ITS_END), True)
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    expect(page.get_by_label("Message")).to_be_in_viewport()
