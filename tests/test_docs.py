"""The README and the docs name files, modules, options and variables that exist."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.prune_pages import measured_blocks
from cli.main import VERBS
from tests.support.source_tree import product_sources

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
PARTS = ("kernels", "models", "optim", "engine", "cli", "bench", "examples", "tests", "docs")


def prose(page: Path) -> str:
    """The text of a page without the list of files, which a tool writes."""
    text = page.read_text()
    return re.sub(r"<!-- files: begin -->.*?<!-- files: end -->", "", text, flags=re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", prose(page), flags=re.MULTILINE | re.DOTALL)


def test_the_readme_is_of_one_screen() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_tables_of_pruning_are_those_of_the_measured_lines() -> None:
    """Otherwise: python -m bench.prune_pages."""
    for block in measured_blocks():
        assert block.text in block.page.read_text(), (block.page, block.name)


def test_the_readme_reads_in_its_order() -> None:
    headings = re.findall(r"^## (.*)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert headings == [
        "What it does better",
        "Install",
        "First run on a GPU",
        "First run on a CPU",
        "Verbs",
        "Links",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(rf"(?<![\w/])((?:{'|'.join(PARTS)})/[\w/.*<>-]+)", prose(page))
    named += [
        str((page.parent / link).relative_to(ROOT) if page.parent == ROOT else page.parent / link)
        for link in re.findall(r"\]\((?!https?:)([\w/.-]+)(?:#[\w-]+)?\)", prose(page))
    ]
    # The family that docs/add_a_family.md adds, and a file that CONTRIBUTING.md warns of.
    absent = {"models/families/seed_oss.py", "tests/kernels/__init__.py"}
    missing = [
        name
        for name in (name.rstrip(".") for name in named)
        if not re.search(r"[*<>]", name) and name not in absent and not (ROOT / name).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_modules_that_are_run_exist(page: Path) -> None:
    modules = re.findall(r"python -m ([\w.]+)", prose(page))
    assert [name for name in modules if find_spec(name) is None] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_is_python(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_the_options_they_are_given(page: Path) -> None:
    from importlib import import_module

    from typer.main import get_command

    wrong = []
    for line in "\n".join(blocks(page, "bash")).splitlines():
        words = line.partition("#")[0].split()
        if words[:1] != ["engine"]:
            continue
        command = get_command(import_module(VERBS[words[1]][0]).app)
        commands = [command, *getattr(command, "commands", {}).values()]
        known = {name for one in commands for option in one.params for name in option.opts}
        wrong += [f"{words[1]} {w}" for w in words if w.startswith("--") and w not in known]
    assert wrong == []


def test_every_variable_of_the_product_is_described() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    read = {
        name
        for source in product_sources().values()
        for name in re.findall(r"\bENGINE_[A-Z_]+\b", source)
    }
    assert read == set(re.findall(r"\bENGINE_[A-Z_]+\b", page))
