"""Inputs that fuzzing came upon are read, or named, within 50 milliseconds."""

import random
import time

import pytest

from bench.fuzz.__main__ import MOST_SECONDS, at_random, fault_of, shortened
from bench.fuzz.targets import CORPUS, TARGETS, Target
from bench.torture.damage import damaged

FINDS = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    for target in TARGETS.values():
        target.fuzz_one(target.seeds()[0])


def test_every_reader_has_finds_and_accepts_its_seeds() -> None:
    assert {path.parent.name for path in FINDS} == set(TARGETS)
    for name, target in TARGETS.items():
        assert {target.fuzz_one(data) for data in target.seeds()} == {"accepted"}, name


@pytest.mark.parametrize("path", FINDS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_find_is_read_or_named_in_time(path: object) -> None:
    from pathlib import Path

    assert isinstance(path, Path)
    target, data = TARGETS[path.parent.name], path.read_bytes()
    target.fuzz_one(data)
    seconds = []
    for _ in range(3):
        started = time.process_time()
        target.fuzz_one(data)
        seconds.append(time.process_time() - started)
    assert min(seconds) < MOST_SECONDS


@pytest.mark.parametrize("name", TARGETS)
def test_some_damage_is_read_or_named(name: str) -> None:
    target, chance = TARGETS[name], random.Random(5)
    seeds = target.seeds()
    for _ in range(40):
        target.fuzz_one(damaged(chance.choice(seeds), chance, first=4096))


def test_a_fault_is_shortened_and_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    def read(data: bytes) -> None:
        if b"x" in data:
            raise ZeroDivisionError

    target = Target(read, lambda: [b"a" * 50 + b"x" + b"b" * 50])
    assert fault_of(target, target.seeds()[0]) == "ZeroDivisionError"
    assert shortened(target, target.seeds()[0], "ZeroDivisionError") == b"x"
    monkeypatch.setitem(TARGETS, "planted", target)
    monkeypatch.setattr("bench.fuzz.__main__.CORPUS", tmp_path)
    assert at_random("planted", 0.2, 1) == 1
