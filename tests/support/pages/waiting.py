"""Waiting for what a page does in its own time."""

import time
from collections.abc import Callable
from typing import TypeVar

from playwright.sync_api import Page

SECONDS = 90
Value = TypeVar("Value")


def eventually(page: Page, read: Callable[[], Value], wanted: Value) -> None:
    """Wait until `read` gives `wanted`; fail with what it gave last.

    For what Playwright's own expectations do not see: what a server was asked, what a script
    computes. A page answers a click, a key or an event in its own time, so that a value read right
    after one may be the one before.
    """
    end = time.monotonic() + SECONDS
    while (got := read()) != wanted and time.monotonic() < end:
        page.wait_for_timeout(50)
    assert got == wanted, f"{got!r}, not {wanted!r}"
