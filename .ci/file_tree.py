"""Write the list of files in docs/architecture.md from the first line of each module's docstring.

``python .ci/file_tree.py`` writes it, ``--check`` ends with status 1 where it is out of date.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- files: begin -->\n", "<!-- files: end -->\n"
TOP = ("kernels", "models", "optim", "engine", "cli", "bench", "examples")
REST = """\
examples/*.yaml               configurations to copy, for engine train --config
examples/notebook.ipynb       training, figures and answers in a notebook
examples/sweep/               a sweep to copy, for engine sweep
tests/                        mirrors the tree
  interop/                    comparisons with transformers, PEFT, bitsandbytes and llama.cpp
  support/                    what tests share: helper processes, writers of fixtures, slow_tests
  fixtures/golden/            tiny models with logits and gradients from another program
docs/                         this documentation; mkdocs.yml is its table of contents
Makefile                      demo, test, lint, docs, interop, bench and more: `make help`
constraints.txt               the exact versions that were tested
pyproject.toml                packages, dependencies, and the settings of ruff, mypy and pytest
"""


def first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    if docstring is None:
        raise SystemExit(f"{path.relative_to(ROOT)} has no module docstring")
    return docstring.splitlines()[0].rstrip(".").replace("`", "")


def folders() -> list[Path]:
    """Every package under the top-level ones, in their order, a package before those in it."""
    return [init.parent for top in TOP for init in sorted((ROOT / top).rglob("__init__.py"))]


def tree() -> str:
    lines = []
    for folder in folders():
        name = folder.relative_to(ROOT).as_posix() + "/"
        lines.append(f"{name:<29} {first_line(folder / '__init__.py')}")
        files = sorted(path for path in folder.glob("*.py") if path.stem != "__init__")
        lines += [f"  {path.name:<27} {first_line(path)}" for path in files]
    return "```text\n" + "\n".join(lines) + "\n" + REST + "```\n"


def main() -> int:
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = before + BEGIN + tree() + END + after
    if sys.argv[1:] == ["--check"]:
        if text != wanted:
            print("docs/architecture.md lists other files than there are: python .ci/file_tree.py")
        return int(text != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
