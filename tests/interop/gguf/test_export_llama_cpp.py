"""llama.cpp computes what this engine computes, from the files that it writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import engine
from engine.model_sources.adapter.config import AdapterConfig
from engine.model_sources.adapter.peft import save_adapter
from engine.model_sources.open import open_model_source
from engine.verbs.models.export import export_gguf
from models.tensor_names import expected_tensors
from tests.support.llama_cpp import likeliest
from tests.support.tokenizer_folder import write_byte_tokenizer

pytestmark = pytest.mark.interop
GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
# The other golden models are of forms that llama.cpp does not have; export refuses them by name.
FAMILIES = [
    "llama", "llama3", "mistral", "qwen2", "qwen3", "qwen3_yarn", "qwen3_moe", "qwen3_next",
    "qwen3_5_vl", "qwen3_5_moe_vl",
]  # fmt: skip

ROUNDED = ["qwen3_moe", "qwen3_5_vl", "qwen3_5_moe_vl"]
"""Whose small random models llama.cpp's rounding of inputs to f16 moves by up to 0.06."""


def compare(
    folder: Path,
    file: Path,
    limit: float,
    adapter: tuple[Path, Path] | None = None,
    ours_of: Path | None = None,
) -> None:
    """The log-probabilities of the model in `folder` and those of llama.cpp with `file`.

    With `ours_of` ours are those of that file, whose weights may be rounded.
    """
    config = open_model_source(str(folder)).config
    longest = min(96, config.sliding_window or 96)
    generator = torch.Generator().manual_seed(5)
    most = min(config.vocab_size - 3, 60)
    prompts = [
        torch.randint(4, most, (n,), generator=generator).tolist()
        for n in range(2, longest, max(1, longest // 10))
    ]
    model = engine.load_model(ours_of or folder, adapter=None if adapter is None else adapter[0])
    answers = likeliest(file, prompts, 4, None if adapter is None else adapter[1])
    assert sum(bool(answer) for answer in answers) >= 7
    for ids, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            ours = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        for token, theirs in answer.items():
            assert float(ours[token]) == pytest.approx(theirs, abs=limit), (len(ids), token)


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    target = tmp_path / "model"
    shutil.copytree(GOLDEN / request.param, target)
    write_byte_tokenizer(target, open_model_source(str(target)).config.vocab_size)
    return target


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_log_probabilities_of_a_model_are_the_same(folder: Path, tmp_path: Path) -> None:
    export_gguf(model=str(folder), output=tmp_path / "m.gguf", type="f32")
    compare(folder, tmp_path / "m.gguf", 0.005)


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_log_probabilities_of_weights_in_f16_are_the_same(
    folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """llama.cpp reads the rounded weights that ours reads.

    By f16 weights it multiplies inputs that it rounds to f16 too, which of a mixture may choose
    other experts; so it is also given the same weights in f32.
    """
    file, whole = tmp_path / "m.gguf", tmp_path / "whole.gguf"
    export_gguf(model=str(folder), output=file, type="f16")
    export_gguf(model=str(file), output=whole, type="f32")
    compare(folder, whole, 0.005, ours_of=file)
    if request.node.callspec.params["folder"] not in ROUNDED:
        compare(folder, file, 0.005, ours_of=file)


@pytest.mark.parametrize("folder", ["llama", "qwen3", "qwen3_5_vl"], indirect=True)
def test_an_adapter_does_the_same_on_the_base_model(folder: Path, tmp_path: Path) -> None:
    tensors = {}
    for name, shape in expected_tensors(open_model_source(str(folder)).config).items():
        module = name.removesuffix(".weight")
        if module.endswith(("q_proj", "k_proj", "down_proj", "in_proj_qkv", "out_proj")):
            pair = (0.15 * torch.randn(4, shape[1]), 0.15 * torch.randn(shape[0], 4))
            tensors[module] = pair
    names = sorted({module.rpartition(".")[2] for module in tensors})
    save_adapter(tmp_path / "a", AdapterConfig(4, 6.0, names, use_rslora=True), tensors)
    export_gguf(model=str(folder), output=tmp_path / "m.gguf", type="f32")
    export_gguf(model=str(folder), adapter=tmp_path / "a", output=tmp_path / "a.gguf")
    compare(folder, tmp_path / "m.gguf", 0.01, (tmp_path / "a", tmp_path / "a.gguf"))
