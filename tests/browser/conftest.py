"""Pages in a real Chromium: a browser that notes what a page must not do."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from tests.support.pages.browsers import CHROMIUM

# Other tests run at the same time.
expect.set_options(timeout=90_000)


# Not for the session: while the browser is open, its event loop runs in this thread, and tests that
# start one of their own cannot.
@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # The sandbox needs rights that a container's root does not have.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """``open_page(address, width=1280, scheme="light")`` opens a page of its own.

    At the end of the test no script may have failed, nothing may have been asked of another
    address, and the content policy may have been broken nowhere.
    """
    faults: list[str] = []
    contexts = []

    def opened(address: str, width: int = 1280, scheme: Any = "light", **options: Any) -> Page:
        context = chromium.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, **options
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(90_000)

        def asked(request: Request) -> None:
            if not request.url.startswith(address.partition("#")[0]):
                faults.append(f"asked for {request.url}")

        page.on("request", asked)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(dialog.message))
        page.on(
            "console",
            lambda told: faults.append(told.text) if "Content Security" in told.text else None,
        )
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder for runs."""
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder
