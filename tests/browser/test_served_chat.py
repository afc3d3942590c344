"""The page of engine serve --ui talks to the real server."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.support.source_tree import ROOT
from tests.support.tiny_model import write_tiny_model


def test_a_model_answers_in_the_page(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    command = [sys.executable, "-m", "cli.main", "serve", "--ui", "--port", "0"]
    command += ["--model", str(model), "--device", "cpu"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"ENGINE_API_KEY": "a-key-for-tests"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stderr is not None
            address = None
            while address is None:
                line = process.stderr.readline()
                assert line, "the server ended before it said where its page is"
                address = re.search(r"http://127\.0\.0\.1:\d+/$", line.strip())
            page = open_page(address[0])
            page.get_by_label("API key").fill("a-key-for-tests")
            page.keyboard.press("Enter")
            expect(page.locator("#connection")).to_have_text("One model")
            page.get_by_text("Settings of the answers").click()
            page.get_by_label("Most tokens").fill("8")
            page.get_by_label("Message").fill("Hi")
            page.keyboard.press("Enter")
            answer = page.locator('[data-side="left"] .said.assistant')
            expect(answer).to_contain_text(re.compile(r"[1-8] tokens"))
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
        finally:
            process.kill()
