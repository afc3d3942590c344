"""Configurations of published models, out of a package that carries them, are read."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from models.config.model_config import MODEL_TYPES, ModelConfig

pytestmark = pytest.mark.interop


def published() -> list[Path]:
    """The files whose family this program knows."""
    spec = find_spec("aiconfigurator_core")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model_configs"
    files = sorted(folder.glob("*_config.json"))
    return [path for path in files if json.loads(path.read_text()).get("model_type") in MODEL_TYPES]


def test_every_published_configuration_of_a_supported_family_is_read() -> None:
    files = published()
    assert len(files) >= 20
    for path in files:
        ModelConfig.from_dict(json.loads(path.read_text()))
