"""Write the README's list of files from the first line of each module's docstring.

``python .ci/file_tree.py`` writes it, ``--check`` ends with status 1 where it is out of date.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- files: begin -->\n", "<!-- files: end -->\n"
TOP = ("kernels", "models", "optim", "engine", "cli", "bench")
FOLDERS = {
    "kernels": "arithmetic: tensors in, tensors out",
    "models": "the graph, its configuration, and LoRA on it",
    "optim": "the optimiser and what belongs to it",
    "engine": "what a user would call the program",
    "engine/benchmark": "ops against the machine's limits",
    "engine/data": "from rows of text to batches of token ids",
    "engine/formats": "what is read from disk and written to it",
    "cli": "one file per verb",
    "bench": "measurements, and the demonstration",
}
REST = """\
tests/                        mirrors the tree
  interop/                    comparisons with transformers, PEFT, bitsandbytes and llama.cpp
  fixtures/golden/            tiny checkpoints with logits and gradients of another program
Makefile                      demo, test, lint, interop, bench and more: `make help`
constraints.txt               the exact versions that were tested
pyproject.toml                packages, dependencies, and the settings of ruff, mypy and pytest
"""


def first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    if docstring is None:
        raise SystemExit(f"{path.relative_to(ROOT)} has no module docstring")
    return docstring.splitlines()[0].rstrip(".").replace("`", "")


def folders() -> list[str]:
    """Every package of the six top-level ones, in their order, a package before those in it."""
    inits = [init for top in TOP for init in sorted((ROOT / top).rglob("__init__.py"))]
    return [init.parent.relative_to(ROOT).as_posix() for init in inits]


def tree() -> str:
    lines = []
    for folder in folders():
        text = FOLDERS.get(folder) or first_line(ROOT / folder / "__init__.py")
        lines.append(f"{folder + '/':<29} {text}")
        files = sorted(path for path in (ROOT / folder).glob("*.py") if path.stem != "__init__")
        lines += [f"  {path.name:<27} {first_line(path)}" for path in files]
    return "```text\n" + "\n".join(lines) + "\n" + REST + "```\n"


def main() -> int:
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = before + BEGIN + tree() + END + after
    if sys.argv[1:] == ["--check"]:
        if text != wanted:
            print("README.md lists other files than there are; run: python .ci/file_tree.py")
        return int(text != wanted)
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
