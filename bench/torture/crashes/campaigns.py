"""The campaigns of kills, refusals, signals and long runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.torture.campaign import PART, Campaign, Figures, merged
from bench.torture.crashes.every_verb import LINES
from bench.torture.crashes.refused import COMMANDS
from bench.torture.crashes.resume_algebra import RESUMES
from tests.support.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[3]
STATES = 50_000


def measured(module: str, *words: object, before: tuple[str, ...] = ()) -> Figures:
    """The figures that a program of this folder prints, in a folder that goes with it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", f"bench.torture.crashes.{module}", folder]
        done = subprocess.run(
            [*before, *command, *map(str, words)],
            capture_output=True, text=True, check=False, cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{module} ended with {done.returncode}: {done.stderr[-2000:]}")
    figures: Figures = json.loads(done.stdout)
    return figures


def faults(kind: str, seed: int) -> Figures:
    """Faults in one verb at each of its file operations, or in saving by strace."""
    number = seed % PART
    if number == len(LINES):
        return measured("system_calls", 1, kind)
    name = [*LINES][number]
    if (kind, name) == ("kills", "forge"):
        return forge_kills()
    figures: Figures = measured("file_faults", 1, kind, name)[name]
    return figures


def forge_kills() -> Figures:
    """SIGKILL before the file operations of a forge, each followed by a life that finishes it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"prompt": f"What is {n}?", "completion": f"It is {n + 1}."} for n in range(24)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "rows.jsonl").write_text(text, encoding="utf-8")
        model = write_tiny_model(folder / "model")
        command = [sys.executable, "-m", "tests.support.processes.forge_kill_server", str(model)]
        done = subprocess.run(
            [*command, str(folder / "rows.jsonl"), str(folder / "kills")],
            capture_output=True, check=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    told = json.loads(done.stdout)
    whole = told["killed"] == told["same"] > 0
    return {
        "operations": told["operations"],
        "killed": told["killed"],
        "wrong": [] if whole else [f"forge: {told}"],
    }


def kills(trials: int, seed: int) -> Figures:
    """SIGKILL at each file operation of a verb, and at each system call of saving."""
    return faults("kills", seed)


def errors(trials: int, seed: int) -> Figures:
    """An error of the system at the same."""
    return faults("errors", seed)


def power(trials: int, seed: int) -> Figures:
    """States of the disk after a loss of power."""
    return measured("power_loss", trials)


def signals(trials: int, seed: int) -> Figures:
    """Signals to a training run."""
    return measured("signals", trials, seed)


def namespace() -> tuple[str, ...]:
    """The words before a command that give it mounts of its own."""
    return ("unshare", "-m") if os.geteuid() == 0 else ("unshare", "-Urm")


def refusals(trials: int, seed: int) -> Figures:
    """Every command with every refusal."""
    return measured("refused", before=namespace())


def small_disks(trials: int, seed: int) -> Figures:
    """So many verbs, each on disks of several sizes."""
    first = seed % PART
    figures: Figures = {}
    for told in measured(
        "full_disks", *[*LINES][first : first + trials], before=namespace()
    ).values():
        figures = merged(figures, told)
    return figures


def same(trials: int, seed: int) -> Figures:
    """The same training in fresh processes."""
    return measured("long_runs", "same", trials)


def soak(trials: int, seed: int) -> Figures:
    """One long run."""
    return measured("long_runs", "soak", trials)


def _none_wrong(figures: Figures) -> bool:
    return not figures["wrong"]


CRASHES: dict[str, Campaign] = {
    "T2": Campaign(
        "SIGKILL at each file operation of every verb, and at each system call of saving",
        len(LINES) + 1,
        kills,
        _none_wrong,
        part=1,
    ),
    "T3": Campaign(
        "an error of the system at each of them",
        len(LINES) + 1,
        errors,
        _none_wrong,
        part=1,
    ),
    "T4": Campaign(
        "states of the disk after a loss of power",
        STATES,
        power,
        lambda f: f["good"] == f["trials"] > 0,
    ),
    "T6-verbs": Campaign(
        "every verb that writes, on file systems too small for it",
        len(LINES),
        small_disks,
        _none_wrong,
        part=8,
    ),
    "T7": Campaign(
        "signals to a training run",
        200,
        signals,
        lambda f: f["good"] == f["trials"] and f["runs_ended"] == f["same_bytes"],
        part=20,
    ),
    **RESUMES,
    "T21": Campaign(
        "every command with every refusal",
        6 * len(COMMANDS),
        refusals,
        lambda f: f["good"] == f["trials"],
    ),
    "T22": Campaign(
        "the same training in so many fresh processes, by each method",
        3,
        same,
        lambda f: not f["differ"],
    ),
    "T24": Campaign(
        "steps of one run",
        100_000,
        soak,
        lambda f: f["status"] == 0 and f["mib_per_10k_steps"] <= 1 and len(f["threads"]) == 1,
    ),
}
