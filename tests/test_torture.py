"""Campaigns go on where they were stopped, and their programs notice planted faults."""

import json
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench.torture.__main__ import MOST_LISTED, in_parts, shortened
from bench.torture.campaign import PART, Campaign, Figures, merged
from bench.torture.campaigns import CAMPAIGNS
from bench.torture.crashes import resume_algebra
from bench.torture.crashes.campaigns import namespace
from bench.torture.crashes.every_verb import LINES
from bench.torture.crashes.full_disks import SHARES
from bench.torture.crashes.resume_algebra import resumes
from bench.torture.group_kills import GROUP_KILLS
from engine.training import step

ROOT = Path(__file__).parent.parent
EACH_COMMIT = {
    "T5": 300, "T6": 4, "T9": 3000, "T11": 1, "T12": 600, "T13": 400, "T15": 1500, "T16": 30_000,
    "T18": 4, "T19": 8,
}  # fmt: skip
"""Trials of the campaigns that need no form of their own here; the others have a test each."""


def printed(module: str, *words: object, before: tuple[str, ...] = ()) -> dict[str, Any]:
    """The figures of one of the programs."""
    done = subprocess.run(
        [*before, sys.executable, "-m", f"bench.torture.crashes.{module}", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def test_a_campaign_that_is_stopped_goes_on_with_the_next_part(tmp_path: Path) -> None:
    begun: list[tuple[int, int]] = []

    def run(trials: int, seed: int) -> Figures:
        begun.append((trials, seed))
        if len(begun) == 3:
            raise KeyboardInterrupt
        return {"trials": trials, "worst_ms": seed % 7, "wrong": [seed]}

    campaign = Campaign("counts", 50, run, lambda f: True, part=20)
    partial, same = tmp_path / "partial.json", {"campaign": "T0", "asked": 50, "commit": "c"}
    with pytest.raises(KeyboardInterrupt):
        in_parts(campaign, 50, same, partial, 2)
    figures, _ = in_parts(campaign, 50, same, partial, 2)
    first = 2 * PART
    assert begun == [(20, first), (20, first + 20), (10, first + 40), (10, first + 40)]
    assert figures["trials"] == 50
    assert figures["wrong"] == [first, first + 20, first + 40]
    assert figures["worst_ms"] == max((first + n) % 7 for n in (0, 20, 40))
    assert not partial.exists()
    # Of another commit nothing is taken over.
    partial.write_text(json.dumps(same | {"figures": {"trials": 9}, "next": 40, "seconds": 1.0}))
    begun.clear()
    in_parts(Campaign("all", 5, lambda n, _: {"trials": n}, bool), 5, {"commit": "d"}, partial, 0)


def test_campaigns_run_beside_each_other_and_are_not_run_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.torture", "--share", "0.001", "--jobs", "2"]
    for _ in range(2):
        subprocess.run(
            [*command, "--results", str(tmp_path), "T10", "T12"],
            cwd=ROOT, capture_output=True, check=True, timeout=300,
        )  # fmt: skip
        lines = (tmp_path / "reliability.jsonl").read_text().splitlines()
        assert sorted(json.loads(line)["campaign"] for line in lines) == ["T10", "T12"]
    assert (
        "| T12 | damaged configurations | 30 | yes |" in (tmp_path / "reliability.md").read_text()
    )
    assert {path.name for path in tmp_path.iterdir()} == {"reliability.jsonl", "reliability.md"}


def test_figures_are_added_but_for_the_worst_of_them() -> None:
    one = {"good": 1, "slowest_s": 2.0, "passed": True, "kinds": {"a": 1}, "wrong": ["x"]}
    other = {"good": 2, "slowest_s": 1.0, "passed": False, "kinds": {"a": 1, "b": 3}, "bad": 1}
    assert merged(one, other) == {
        "good": 3, "slowest_s": 2.0, "passed": False, "kinds": {"a": 2, "b": 3}, "wrong": ["x"],
        "bad": 1,
    }  # fmt: skip


def test_a_row_lists_the_first_complaints_and_counts_the_others() -> None:
    told = shortened({"wrong": [str(n) for n in range(2000)], "few": [1, 2], "good": 3})
    assert told["wrong"] == [*map(str, range(MOST_LISTED)), f"and {2000 - MOST_LISTED:,} more"]
    assert (told["few"], told["good"]) == ([1, 2], 3)


@pytest.mark.parametrize("fault", ["none", "folders", "files"])
def test_no_loss_of_power_loses_a_step_unless_a_flush_is_missing(
    fault: str, tmp_path: Path
) -> None:
    seen = printed("power_loss", tmp_path / "disk", 150, fault)
    assert seen["trials"] == 150
    lost = seen["lost"] + seen["unloadable"] + seen["wrong"]
    assert lost + seen["good"] == 150
    assert (lost == 0) == (fault == "none")


def test_runs_that_stop_and_go_on_end_as_others_do() -> None:
    seen = resumes(1, 3)
    assert seen["wrong"] == []
    assert seen["equal"] == 1
    assert seen["stops"] >= 1


def test_dropout_that_depends_on_the_process_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter(range(1000))
    monkeypatch.setattr(step, "dropout_seed", lambda seed, number, micro: next(made))
    drawn = partial(resume_algebra.drawn, random.Random(0), Path())
    dropout = {"lora_dropout": 0.1, "streaming": "off", "max_steps": 3, "method": "lora"}
    monkeypatch.setattr(resume_algebra, "drawn", lambda *_: drawn() | dropout)
    seen = resumes(1, 3)
    assert seen["equal"] == 0 and len(seen["wrong"]) == 1


def test_plans_and_budgets_are_met() -> None:
    # In a process of its own: budgets count what a process has, and one of the tests has grown.
    program = "import json; from bench.torture.campaigns import CAMPAIGNS as c; " + (
        "print(json.dumps(c['T20'].run(1, 0)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert CAMPAIGNS["T20"].passed(figures), figures


@pytest.mark.parametrize("name", EACH_COMMIT)
def test_a_small_share_of_a_campaign_holds(name: str) -> None:
    figures = CAMPAIGNS[name].run(EACH_COMMIT[name], 0)
    assert CAMPAIGNS[name].passed(figures), figures


@pytest.mark.parametrize("name", GROUP_KILLS)
def test_a_process_that_is_killed_changes_nothing_whatever_they_divide(name: str) -> None:
    campaign = GROUP_KILLS[name]
    figures = campaign.run(1, 3)
    assert campaign.passed(figures), figures


def test_verbs_on_disks_that_are_too_small_end_well_once_these_grow() -> None:
    campaign, verb = CAMPAIGNS["T6-verbs"], [*LINES].index("data mix")
    figures = campaign.run(1, verb)
    assert campaign.passed(figures) and figures["disks"] == len(SHARES), figures


def test_saving_survives_kills_and_errors_at_its_system_calls(tmp_path: Path) -> None:
    for kind in ("kills", "errors"):
        seen = printed("system_calls", tmp_path, 20, kind)
        assert seen["wrong"] == []
        assert seen["good"] >= 4


def test_fresh_processes_train_to_equal_bytes(tmp_path: Path) -> None:
    assert printed("long_runs", tmp_path, "same", 2, "qlora") == {
        "trials": 2, "methods": 1, "differ": [],
    }  # fmt: skip


def test_a_long_run_takes_no_more_of_anything(tmp_path: Path) -> None:
    seen = printed("long_runs", tmp_path, "soak", 200)
    assert (seen["trials"], seen["status"]) == (200, 0)
    assert len(seen["threads"]) == 1
    assert seen["most_files_more"] <= 1
    # Steps that left their gradients behind would be 20 MiB; the campaign's line needs more steps.
    assert seen["most_mib_more"] < 8


def test_signals_end_a_run_with_its_checkpoint(tmp_path: Path) -> None:
    seen = printed("signals", tmp_path, 3)
    assert seen["wrong"] == []
    assert seen["good"] == seen["trials"] == 3


def test_commands_that_are_refused_end_with_one_paragraph(tmp_path: Path) -> None:
    seen = printed("refused", tmp_path, "export gguf", "data convert", before=namespace())
    assert seen["wrong"] == []
    assert seen["good"] == seen["trials"] == 12
    # A refusal that refuses nothing would prove nothing.
    assert all(seen["statuses"][name]["2"] == 2 for name in ("missing", "empty folder"))
    assert seen["statuses"]["not permitted"] == {"2": 2}
    assert seen["statuses"]["closed output"] == {"0": 2}
