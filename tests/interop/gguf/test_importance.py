"""Importance of inputs beside transformers' activations, and our blocks beside llama.cpp's own."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xllamacpp
from gguf import GGMLQuantizationType, dequantize
from transformers import AutoModelForCausalLM

from engine.data.examples import Example
from engine.exporting.gguf_importance import importance_of
from engine.model_sources.load_model import build_model
from engine.model_sources.open import open_model_source
from kernels.gguf import FORMATS, quantize

pytestmark = pytest.mark.interop


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_importance_equals_the_inputs_of_transformers_layers(
    golden: Callable[[str], Path], family: str
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(golden(family), dtype=torch.float32).eval()
    sums: dict[str, torch.Tensor] = {}
    for path, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear):

            def add(module: object, inputs: tuple[torch.Tensor], path: str = path) -> None:
                squares = inputs[0].double().square().flatten(0, -2).sum(0)
                sums[path] = sums.get(path, torch.zeros_like(squares)) + squares

            module.register_forward_pre_hook(add)
    texts = [torch.randint(theirs.config.vocab_size, (n,)).tolist() for n in (17, 40)]
    with torch.no_grad():
        for ids in texts:
            theirs(torch.tensor([ids]))
    model = build_model(open_model_source(golden(family)), dtype=torch.float32)
    examples = [Example(ids, [True] * len(ids), "x:1") for ids in texts]
    measured = importance_of(model, examples)
    tokens = sum(map(len, texts))
    compared = 0
    for path, squares in sums.items():
        name = f"{path}.weight"
        if path == "lm_head" and model.config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        assert torch.allclose(measured[name].double(), squares / tokens, rtol=1e-3), path
        compared += 1
    assert compared == 7 * model.config.num_hidden_layers + 1


def llama_cpp_blocks(weight: torch.Tensor, kind: str, importance: torch.Tensor | None) -> bytes:
    """The bytes that llama.cpp's own quantiser makes of a matrix."""
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    form, (rows, columns) = FORMATS[kind], weight.shape
    made = ctypes.create_string_buffer(rows * columns // form.size * form.bytes)
    values = weight.float().contiguous()
    weights = None if importance is None else importance.float().contiguous()
    size = library.ggml_quantize_chunk(
        ctypes.c_int(form.number),
        ctypes.c_void_p(values.data_ptr()),
        made,
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_void_p(None if weights is None else weights.data_ptr()),
    )
    assert size == len(made)
    return bytes(made.raw)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_our_blocks_err_no_more_than_llama_cpp_s(kind: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(48, 1024, generator=generator) * 0.03
    importance = torch.rand(1024, generator=generator).pow(4) + 1e-3 if weighted else None
    ours = quantize(weight, kind, importance).numpy()
    theirs = llama_cpp_blocks(weight, kind, importance)
    number = GGMLQuantizationType(FORMATS[kind].number)
    counts = torch.ones(1024) if importance is None else importance
    errors = []
    for blocks in (ours, np.frombuffer(theirs, np.uint8).reshape(ours.shape)):
        error = (torch.from_numpy(dequantize(blocks, number)) - weight).square() * counts
        errors.append(float(error.double().sum()))
    assert errors[0] <= 1.01 * errors[1], errors
