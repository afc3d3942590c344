"""The lock names what was tested, with hashes; a source distribution is the same at any time."""

import importlib.util
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
LOCKS = (ROOT / "requirements.lock", ROOT / ".ci" / "release_tools.lock")


def load(name: str) -> ModuleType:
    """A program of .ci, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(path: Path) -> set[tuple[str, str]]:
    """Canonical names and versions of the lines that name one."""
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)", path.read_text(), re.MULTILINE)
    return {(canonicalize_name(name), version) for name, version in lines}


def test_the_lock_holds_the_tested_versions_and_no_others() -> None:
    assert pins(ROOT / "requirements.lock") == pins(ROOT / "constraints.txt")


def test_the_tools_of_a_release_are_locked() -> None:
    assert pins(ROOT / ".ci" / "release_tools.in") <= pins(LOCKS[1])


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_pin_has_hashes_and_nothing_tells_where_it_was_made(path: Path) -> None:
    text = path.read_text()
    entries = re.split(r"(?<!\\)\n", text)
    for entry in entries:
        if not entry or entry.startswith("#"):
            continue
        pin, *hashes = entry.split(" \\\n")
        assert hashes, f"{pin} has no hash"
        assert all(re.fullmatch(r" {4}--hash=sha256:[0-9a-f]{64}", line) for line in hashes), pin
        requirement = Requirement(pin)
        assert requirement.url is None and str(requirement.specifier).startswith("=="), pin
    assert "://" not in text and "/home" not in text


def test_a_lock_that_is_read_and_written_again_is_the_same() -> None:
    lock = load("lock")
    text = LOCKS[0].read_text()
    head = lock.HEAD.format(source="constraints.txt")
    assert head + lock.listed(lock.entries(text)) == text


def packed(folder: Path, names: list[str], mode: int) -> Path:
    """An sdist as a build makes it, with the clock's times."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(name * 100)
        (folder / name).chmod(mode)
    target = folder / "a.tar.gz"
    with tarfile.open(target, "w:gz") as archive:
        for name in names:
            archive.add(folder / name, f"a/{name}")
    return target


def test_a_source_distribution_is_the_same_at_any_time(tmp_path: Path) -> None:
    first = packed(tmp_path / "first", ["x", "y"], 0o644)
    time.sleep(1.1)  # gzip writes whole seconds
    second = packed(tmp_path / "second", ["y", "x"], 0o600)
    assert first.read_bytes() != second.read_bytes()
    normalised = load("release").normalised
    for path in (first, second):
        normalised(path, 1_700_000_000)
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        assert archive.getnames() == ["a/x", "a/y"]
        content = archive.extractfile("a/y")
        assert content is not None and content.read() == b"y" * 100


def test_what_is_needed_follows_an_extra_only_where_it_is_asked_for() -> None:
    graph = load("needed").graph
    plain, more = graph(["jsonschema"]), graph(["psycopg[binary]"])
    assert plain[""] == ["jsonschema"]
    assert "referencing" in plain["jsonschema"] and "referencing" in plain
    assert "psycopg-binary" in more["psycopg"] and "psycopg-binary" in more
    assert "psycopg-binary" not in graph(["psycopg"])
    with pytest.raises(ModuleNotFoundError):
        graph(["no-such-package"])


def test_make_names_what_a_release_needs() -> None:
    said = subprocess.run(
        ["make", "--dry-run", "release", f"PYTHON={sys.executable}", "VENV_LOCKED=not-made-yet"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "--require-hashes --no-deps" in said
    assert ".ci/release.py" in said
