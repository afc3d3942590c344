"""Both pages: on a phone, dark and light, by keyboard, and for who listens to them."""

import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Page, expect

from engine.monitoring.app import Board
from engine.monitoring.directories import RunDirectories
from tests.support.pages.chat_stub import ChatStub
from tests.support.pages.served import served
from tests.support.pages.waiting import eventually
from tests.support.pages.written_runs import (
    step_line,
    write_job,
    write_lines,
    write_pruned,
    write_run,
)

Opened = Callable[..., Page]
CHECK = (Path(__file__).parent / "accessibility.js").read_text()
SCREENS: list[tuple[int, Literal["light", "dark"]]] = [
    (360, "light"), (360, "dark"), (1280, "light"), (1280, "dark")
]  # fmt: skip
LOADED = re.compile(r"\d runs, |One model|\d models")
"""What a page says once it has what it shows; before, that it asks for it."""

VIEWS = ("charts", "settings", "samples", "rows", "pruning", "forge")


@pytest.fixture
def board(runs: Path) -> Iterator[str]:
    """A board of runs of every kind and state, with more curves than there are colours."""
    for number in range(9):
        status = (None, "Failure", "Success")[number % 3]
        write_run(runs / f"a-run-with-a-long-name-{number}", 30, status=status, seed=number)
    sample = {"step": 1, "prompt": "What is it?", "text": "It is " + "long " * 50}
    (runs / "a-run-with-a-long-name-2" / "samples.jsonl").write_text(json.dumps(sample))
    write_pruned(runs / "pruned", 6, 16)
    write_job(runs / "job")
    with served(Board(RunDirectories([runs]), lambda run: 2**30).app()) as address:
        yield address


@pytest.fixture
def chat() -> Iterator[str]:
    with served(ChatStub(("base-model-of-a-long-name", "tuned")).app) as address:
        yield address


def faults(page: Page, at_least: int) -> list[str]:
    """What the check names; there must have been `at_least` texts to look at."""
    told = page.evaluate(CHECK)
    assert told["texts"] >= at_least
    return list(told["faults"])


def faults_on_screens(page: Page, at_least: int) -> list[str]:
    """The faults on a phone and a desktop, light and dark."""
    told = []
    for width, scheme in SCREENS:
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        told += [f"{width} {scheme}: {fault}" for fault in lasting_faults(page, at_least)]
    return told


def lasting_faults(page: Page, at_least: int) -> list[str]:
    """The faults of a page that has come to rest: what is drawn anew may be found half done."""
    for _ in range(50):
        told = faults(page, at_least)
        if not told:
            break
        page.wait_for_timeout(200)
    return told


def test_the_board_can_be_read(board: str, open_page: Opened) -> None:
    page = open_page(board)
    for box in page.locator("#run-list input").all():
        box.check()
    expect(page.locator('.chart[data-figure="loss"] .curve:not(.raw)')).to_have_count(9)
    for view in VIEWS:
        page.locator(f'.views a[href="#{view}"]').click()
        expect(page.locator(f"#{view}-body :visible").first).to_be_visible()
        assert not faults_on_screens(page, 40), view


def test_the_chat_can_be_read(chat: str, open_page: Opened) -> None:
    page = open_page(chat)
    expect(page.locator("#send")).to_be_enabled()
    page.get_by_text("Settings of the answers").click()
    for message in ("Hello " + "x" * 100, "Please refuse", "Count slowly"):
        expect(page.locator("#send")).to_be_enabled()
        page.get_by_label("Message").fill(message)
        page.keyboard.press("Enter")
        expect(page.locator('[data-side="right"] .said.assistant').last).to_contain_text(
            re.compile(r"tokens/s|at least 1|and and")
        )
    assert not faults_on_screens(page, 20)


def test_the_check_finds_planted_faults(chat: str, open_page: Opened) -> None:
    page = open_page(chat)
    page.evaluate(
        """() => {
            document.querySelector('h1').style.color = '#999';
            document.querySelector('#stop').style.cssText = 'min-height: 0; height: 9px';
            document.querySelector('#message').style.borderColor = '#ddd';
            document.querySelector('main').style.width = '3000px';
            document.documentElement.lang = '';
        }"""
    )
    told = "\n".join(faults(page, 5))
    for fault in (
        'contrast 2.85 of "engine chat"',
        "too small",
        "a border",
        "too wide",
        "language",
    ):
        assert fault in told


@pytest.mark.parametrize("name", ["board", "chat"])
def test_every_control_has_a_name(
    request: pytest.FixtureRequest, open_page: Opened, name: str
) -> None:
    page = open_page(request.getfixturevalue(name))
    expect(page.locator("#connection")).to_contain_text(LOADED)
    for view in VIEWS if name == "board" else ("",):
        page.evaluate(f"location.hash = '{view}'")
        if view:
            expect(page.locator(f"#view-{view}")).to_be_visible()
        snapshot = page.locator("body").aria_snapshot()
        controls = re.findall(
            r"- (button|textbox|searchbox|spinbutton|combobox|checkbox|slider|link|region|log|"
            r"table|main)\b(.*)",
            snapshot,
        )
        assert len(controls) > 5
        nameless = [kind for kind, rest in controls if not rest.startswith(' "')]
        assert nameless == ["main"], snapshot
        levels = [int(level) for level in re.findall(r"heading .*\[level=(\d)\]", snapshot)]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("name", ["board", "chat"])
def test_everything_is_reached_by_the_tab_key_and_shows_it(
    request: pytest.FixtureRequest, open_page: Opened, name: str
) -> None:
    page = open_page(request.getfixturevalue(name))
    expect(page.locator("#connection")).to_contain_text(LOADED)
    if name == "chat":
        page.get_by_text("Settings of the answers").click()
        page.evaluate("document.activeElement.blur()")
        page.locator("body").evaluate("scrollTo(0, 0)")
    else:
        expect(page.locator(".chart .curve").first).to_be_visible()
    wanted = page.evaluate(
        """() => [...document.querySelectorAll(
            'a[href], button, input, select, textarea, summary, [tabindex="0"]')].filter(
            (e) => e.checkVisibility() && !e.disabled).length"""
    )
    page.locator(".skip").focus()
    page.keyboard.press("Tab")  # from here on the browser knows that keys are used
    page.keyboard.press("Shift+Tab")
    seen = []
    for _ in range(wanted):
        outlined = page.evaluate(
            """() => {
                const e = document.activeElement;
                e.dataset.seen = 'yes';
                const style = getComputedStyle(e);
                const box = e.getBoundingClientRect();
                return style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2
                    && box.left >= 0 && box.width > 0;
            }"""
        )
        seen.append(outlined)
        page.keyboard.press("Tab")
    assert all(seen)
    assert page.locator("[data-seen]").count() == wanted


def test_the_skip_link_leads_past_the_runs(board: str, open_page: Opened) -> None:
    page = open_page(board)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    expect(page.locator(".skip")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()


def test_the_theme_is_chosen_and_stays(board: str, open_page: Opened) -> None:
    page = open_page(board, scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.get_by_role("button", name="Theme: system").click()
    eventually(page, lambda: page.evaluate(colour) != dark, True)
    page.reload()
    expect(page.get_by_role("button", name="Theme: light")).to_be_visible()
    eventually(page, lambda: page.evaluate(colour) != dark, True)
    page.get_by_role("button", name="Theme: light").click()
    eventually(page, lambda: page.evaluate(colour), dark)


def test_nothing_jumps_while_a_run_goes_on(runs: Path, board: str, open_page: Opened) -> None:
    page = open_page(board)
    caption = page.locator('.chart[data-figure="loss"] .values caption')
    expect(caption).to_have_text("Newest, step 30")
    page.evaluate(
        """() => {
            window.jumps = 0;
            new PerformanceObserver((list) => {
                for (const entry of list.getEntries()) window.jumps += entry.value;
            }).observe({type: 'layout-shift'});
        }"""
    )
    for run in runs.glob("a-run*"):
        write_lines(run / "metrics.jsonl", [step_line(31, loss=123.0, eval_perplexity=7.0)])
    expect(caption).to_have_text("Newest, step 31")
    assert page.evaluate("window.jumps") < 0.01
