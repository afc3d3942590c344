"""engine board in a browser: what a person sees of runs, and how it is operated."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from engine.errors import DataError
from engine.monitoring.app import Board
from engine.monitoring.directories import RunDirectories
from engine.storage.lock import DirectoryLock
from tests.support.pages.served import served
from tests.support.pages.waiting import eventually
from tests.support.pages.written_runs import (
    step_line,
    write_job,
    write_lines,
    write_pruned,
    write_run,
)
from tests.support.tiny_model import write_tiny_model

Opened = Callable[..., Page]
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)<∕script>"


def plan_of(run: Path) -> int:
    if run.name != "first":
        raise DataError("There is no plan.")
    return 3 * 2**30


@pytest.fixture
def board(runs: Path) -> Iterator[str]:
    """The address of a board of `runs`."""
    with served(Board(RunDirectories([runs]), plan_of).app()) as address:
        yield address


def chart(page: Page, figure: str) -> Locator:
    return page.locator(f'.chart[data-figure="{figure}"]')


def read_out(page: Page, figure: str) -> list[str]:
    """The lines under a chart: where it is read, and each run's value."""
    values = chart(page, figure).locator(".values")
    return [values.locator("caption").inner_text(), *values.locator("tr").all_inner_texts()]


def test_runs_are_drawn_over_each_other_and_taken_away(
    runs: Path, board: str, open_page: Opened
) -> None:
    write_run(runs / "first", 50)
    write_run(runs / "second", 30, status="Failure")
    page = open_page(board)
    expect(chart(page, "loss").locator(".curve:not(.raw)")).to_have_count(2)
    eventually(page, lambda: read_out(page, "tokens_per_second"), [
        "Newest, step 50", "first\t201 (mean 203)", "second\t202 (mean 203)"
    ])  # fmt: skip
    expect(chart(page, "peak_memory_bytes").locator(".plan")).to_have_count(1)
    eventually(page, lambda: read_out(page, "peak_memory_bytes")[1:], [
        "first\t1.00 GiB, plan 3.00 GiB", "second\t1.00 GiB"
    ])  # fmt: skip
    eventually(page, lambda: read_out(page, "eval_perplexity")[0], "Newest, step 50")
    assert read_out(page, "eval_perplexity")[1].startswith("first\t4.3")
    entry = page.locator("#run-list li", has_text="second")
    expect(entry).to_contain_text("failed")
    expect(entry).to_contain_text("The rows ended. Give more rows.")
    page.get_by_role("checkbox", name="second").uncheck()
    expect(chart(page, "loss").locator(".curve:not(.raw)")).to_have_count(1)
    page.get_by_role("button", name="Show none").click()
    expect(page.get_by_text("Choose a run in the list")).to_be_visible()
    page.get_by_label("Filter by name or state").fill("failed")
    expect(page.locator("#run-list li")).to_have_count(1)


def test_new_steps_and_new_runs_appear_by_themselves(
    runs: Path, board: str, open_page: Opened
) -> None:
    page = open_page(board)
    expect(page.get_by_text("There are no runs in")).to_be_visible()
    run = write_run(runs / "live", 0, status=None)
    manifest = json.loads((run / "manifest.json").read_text()) | {"total_steps": 40}
    (run / "manifest.json").write_text(json.dumps(manifest))
    with DirectoryLock(run):
        write_lines(run / "metrics.jsonl", [step_line(step) for step in range(1, 21)])
        entry = page.locator("#run-list li", has_text="live")
        expect(entry).to_contain_text("running")
        expect(entry).to_contain_text("step 20 of 40")
        entry.get_by_role("checkbox").check()
        expect(chart(page, "loss").locator(".values")).to_contain_text("Newest, step 20")
        write_lines(run / "metrics.jsonl", [step_line(21, loss=7.25)])
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 22, "lo')
        expect(chart(page, "loss").locator(".values")).to_contain_text("Newest, step 21")
        expect(chart(page, "loss").locator(".values")).to_contain_text("7.25")
    expect(entry).to_contain_text("died")
    expect(entry).to_contain_text("engine resume")


def test_values_are_read_with_keys_and_pointer(runs: Path, board: str, open_page: Opened) -> None:
    run = write_run(runs / "first", 0)
    lines = [step_line(step, loss=float(step)) for step in range(1, 51)]
    lines[29]["loss"] = None
    write_lines(run / "metrics.jsonl", lines)
    page = open_page(board)
    plot = page.get_by_role("slider", name="Loss by step")
    plot.focus()
    expect(plot).to_have_attribute("aria-valuetext", "Newest, step 50: first 50 (mean 45.99)")
    for keys, step in (
        ("ArrowLeft", 49), ("Home", 1), ("ArrowRight", 2), ("Shift+ArrowRight", 12), ("End", 50),
    ):  # fmt: skip
        page.keyboard.press(keys)
        expect(plot).to_have_attribute("aria-valuenow", str(step))
        eventually(page, lambda: read_out(page, "loss")[0], f"Step {step}")
    page.keyboard.press("Home")
    eventually(page, lambda: read_out(page, "loss")[1], "first\t1 (mean 1)")
    page.keyboard.press("Escape")
    eventually(page, lambda: read_out(page, "loss")[0], "Newest, step 50")
    expect(chart(page, "loss").locator(".missing title")).to_have_text(
        "step 30: the loss is not a number"
    )
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 58 + (box["width"] - 76) * 9 / 49, box["y"] + 100)
    expect(chart(page, "loss").locator(".values caption")).to_have_text("Step 10")
    page.mouse.move(5, 5)
    expect(chart(page, "loss").locator(".values caption")).to_have_text("Newest, step 50")


def test_controls_change_what_is_drawn(runs: Path, board: str, open_page: Opened) -> None:
    write_run(runs / "first", 50)
    page = open_page(board)
    curve = chart(page, "loss").locator(".curve:not(.raw)")
    linear = curve.get_attribute("d")
    page.get_by_label("Log scale").check()
    expect(curve).not_to_have_attribute("d", linear or "")
    page.get_by_label("Smoothing").fill("0")
    expect(chart(page, "loss").locator(".raw")).to_have_count(0)
    page.get_by_label("From step").fill("11")
    page.get_by_label("to step", exact=True).fill("20")
    expect(chart(page, "loss").locator(".values caption")).to_have_text("Newest, step 20")
    plot = page.get_by_role("slider", name="Loss by step")
    expect(plot).to_have_attribute("aria-valuemin", "11")


def test_settings_show_what_differs(runs: Path, board: str, open_page: Opened) -> None:
    write_run(runs / "first", 5, lora_rank=16)
    write_run(runs / "second", 5, lora_rank=4)
    page = open_page(board + "#settings")
    rows = page.locator("#settings-body tbody tr")
    expect(rows).to_have_count(1)
    expect(rows).to_have_text("lora_rank164")
    page.get_by_label("Only what differs").uncheck()
    expect(rows).to_have_count(4)


def test_samples_stages_and_pruned_heads_are_shown(
    runs: Path, board: str, open_page: Opened
) -> None:
    write_job(runs / "job")
    write_pruned(runs / "pruned")
    page = open_page(board + "#samples")
    expect(page.locator("#samples-body h3")).to_have_text("What?")
    expect(page.locator("#samples-body .answers > div").nth(1)).to_have_text(
        "cycle 1, prunedof cycle-1-pruned"
    )
    page.get_by_role("link", name="Forge").click()
    table = page.get_by_role("table", name="job: held-out perplexity")
    expect(table.get_by_role("row", name="cycle 1, pruned")).to_contain_text("+57.5 %")
    page.get_by_role("link", name="Pruned heads").click()
    page.locator("#view-pruning").get_by_label("Model").select_option("pruned")
    heat = page.get_by_role("table", name="pruned: by l2, mode zero, 4 heads pruned")
    expect(heat.get_by_role("row")).to_have_count(5)
    cell = heat.get_by_role("row", name="layer 2").get_by_role("cell").nth(2)
    expect(cell).to_have_text("× 3.2")
    expect(cell).to_have_attribute("title", "layer 2, head 2: 3.2, pruned")


def test_rows_show_which_text_is_trained_on(
    runs: Path, tmp_path: Path, board: str, open_page: Opened
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Word {n}?", "response": f"Answer {n}."} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_run(runs / "run", 1, model=str(write_tiny_model(tmp_path / "model")), data=[str(data)])
    page = open_page(board + "#rows")
    expect(page.locator("#rows-body .trained")).to_contain_text("Answer 0.")
    expect(page.locator("#rows-body h3")).to_have_text("Row 1 of 4")
    expect(page.locator("#rows-body pre")).to_contain_text("<|im_start|>user")
    page.get_by_role("button", name="Next").click()
    expect(page.locator("#rows-body .trained")).to_contain_text("Answer 1.")
    page.locator("#row").fill("9")
    expect(page.get_by_text("There are 4 rows; choose a smaller number.")).to_be_visible()
    page.locator("#row-controls").get_by_label("Rows").select_option("held out")
    expect(page.get_by_text("This run holds out no rows.")).to_be_visible()
    data.unlink()
    (runs / "run" / "config.yaml").touch()
    page.locator("#row-controls").get_by_label("Rows").select_option("trained on")
    expect(page.locator("#rows-body .error")).to_contain_text("rows.jsonl")


def test_what_is_named_like_a_script_is_text(runs: Path, board: str, open_page: Opened) -> None:
    run = write_run(runs / HOSTILE, 20, status="Failure", lora_rank=HOSTILE)
    summary = {"verb": "train", "status": "Failure", "error_message": HOSTILE, "metrics": {}}
    (run / "summary.json").write_text(json.dumps(summary))
    sample = {"step": 1, "prompt": HOSTILE, "text": HOSTILE}
    (run / "samples.jsonl").write_text(json.dumps(sample))
    write_pruned(runs / f"pruned {HOSTILE}")
    write_job(runs / f"job {HOSTILE}")
    page = open_page(board)
    expect(page.locator("#run-list .error").first).to_be_visible()
    for view in ("settings", "samples", "rows", "pruning", "forge", "charts"):
        page.locator(f'.views a[href="#{view}"]').click()
        expect(page.locator(f"#view-{view}")).to_contain_text(HOSTILE)
        assert page.locator("img, body script, iframe").count() == 0, view


def test_a_board_that_is_gone_is_told_and_its_return_noticed(runs: Path, open_page: Opened) -> None:
    write_run(runs / "first", 20)
    app = Board(RunDirectories([runs]), plan_of).app()
    with served(app) as address:
        page = open_page(address)
        expect(page.locator("#connection")).to_have_text("1 runs, 0 running")
    expect(page.locator("#connection")).to_contain_text("Is `engine board` still running?")
    expect(chart(page, "loss").locator(".curve").first).to_be_visible()
    with served(app, int(address.rsplit(":", 1)[1].strip("/"))):
        expect(page.locator("#connection")).to_have_text("1 runs, 0 running")


def test_a_view_is_opened_from_its_top(runs: Path, board: str, open_page: Opened) -> None:
    write_run(runs / "first", 20)
    page = open_page(board + "#charts")
    expect(chart(page, "loss").locator(".curve").first).to_be_visible()
    page.get_by_role("link", name="Settings").click()
    expect(page.locator("#settings-body table")).to_be_visible()
    eventually(page, lambda: page.evaluate("scrollY"), 0)
    page.reload()
    expect(page.locator("#settings-body table")).to_be_visible()
