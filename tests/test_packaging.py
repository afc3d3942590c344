"""What an installation brings: which packages, in which versions, under which names."""

import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PEERS = {"transformers", "peft", "bitsandbytes", "datasets", "accelerate"}


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def constraints() -> dict[str, str]:
    """Canonical package name -> exact version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


def closure(requirements: list[str]) -> set[str]:
    """Names of everything the requirements bring in, read from the installed packages."""
    seen: set[tuple[str, str]] = set()
    queue = [Requirement(text) for text in requirements]
    while queue:
        wanted = queue.pop()
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        name = canonicalize_name(wanted.name)
        new = {(name, extra) for extra in ("", *wanted.extras)} - seen
        if not new:
            continue
        seen |= new
        for text in importlib.metadata.requires(name) or []:
            child = Requirement(text)
            marker, child.marker = child.marker, None
            if marker is None or any(marker.evaluate({"extra": extra}) for _, extra in new):
                queue.append(child)
    return {name for name, _ in seen}


def test_base_installation_holds_no_peer() -> None:
    installed = closure(project()["dependencies"])
    assert {"torch", "sympy", "tokenizers", "httpx2"} <= installed, "the walk follows dependencies"
    assert not installed & PEERS


def test_walk_of_dependencies_finds_a_planted_peer() -> None:
    with pytest.raises(importlib.metadata.PackageNotFoundError, match="no-such-package"):
        closure([*project()["dependencies"], "no-such-package"])


def test_every_installed_dependency_is_constrained() -> None:
    base = [text for text in project()["dependencies"] if Requirement(text).name != "triton"]
    missing = closure(base) - set(constraints())
    assert not missing, f"not in constraints.txt: {sorted(missing)}"


def test_constraints_satisfy_every_declared_requirement() -> None:
    pins = constraints()
    declared = list(project()["dependencies"])
    for extra in project()["optional-dependencies"].values():
        declared += extra
    for requirement in map(Requirement, declared):
        if requirement.name == project()["name"]:
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} has no tested version"
        assert requirement.specifier.contains(pin, prereleases=True), f"{requirement} against {pin}"


def test_constraints_name_versions_and_nothing_else() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line


def test_pre_commit_uses_the_constrained_versions() -> None:
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    named = re.findall(r"\"([\w.-]+)==([\w.]+)\"", text)
    assert {name for name, _ in named} == {"ruff", "codespell"}
    assert {(name, constraints()[name]) for name, _ in named} == set(named)


def test_every_package_is_typed_and_says_so() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert table["package-data"]["*"] == ["py.typed"]
    for pattern in table["packages"]["find"]["include"]:
        assert (ROOT / pattern.rstrip("*") / "py.typed").exists(), pattern


def test_a_wheel_holds_the_pages(tmp_path: Path) -> None:
    # Of links, so that what building leaves behind is not left in the tree.
    for name in ("pyproject.toml", "README.md", "LICENSE", "engine", "cli"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", "wheels", "."]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    pages = {
        f"engine/pages/static/{path.name}" for path in (ROOT / "engine/pages/static").iterdir()
    }
    assert len(pages) >= 5
    assert pages <= set(zipfile.ZipFile(wheel).namelist())


def test_every_package_directory_is_installed() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    included = {pattern.rstrip("*") for pattern in table["packages"]["find"]["include"]}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - included == {"examples"}
    for package in included:
        folders = {file.parent for file in (ROOT / package).rglob("*.py")}
        assert all((folder / "__init__.py").exists() for folder in folders), package


def test_version_is_a_date_and_kernels_claims_none() -> None:
    assert re.fullmatch(r"20\d\d\.\d{1,2}\.\d{1,2}", project()["version"])
    # A library that looks for Hugging Face's package `kernels` reads this attribute.
    assert not hasattr(importlib.import_module("kernels"), "__version__")


def test_console_command_names_a_function() -> None:
    module, function = project()["scripts"]["engine"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_product_imports_without_triton() -> None:
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for package in ("kernels", "models", "optim", "engine", "cli")
        for file in sorted((ROOT / package).rglob("*.py"))
        if file.stem not in {"__init__", "__main__"}
    ]
    program = (
        "import importlib, sys\n"
        "sys.modules['triton'] = None\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
