"""Log-probabilities of llama.cpp itself against ours, for the files its converter wrote."""

from pathlib import Path

import pytest
import torch

from engine.model_sources.load_model import load_model
from tests.support.llama_cpp import likeliest

pytestmark = pytest.mark.interop
FIXTURES = Path(__file__).parents[2] / "fixtures" / "gguf"
FAMILIES = sorted(path.stem for path in FIXTURES.glob("*.gguf"))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_equal_those_of_llama_cpp(family: str) -> None:
    path = FIXTURES / f"{family}.gguf"
    model = load_model(path)
    generator = torch.Generator().manual_seed(5)
    lengths = range(2, 120, 6)
    prompts = [torch.randint(4, 64, (n,), generator=generator).tolist() for n in lengths]
    answers = likeliest(path, prompts, 8)
    assert sum(1 for answer in answers if answer) >= 15
    for ids, answer in zip(prompts, answers, strict=True):
        ours = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        for token, theirs in answer.items():
            # Both read F16 weights; llama.cpp computes with F16 activations and cache as well.
            assert float(ours[token]) == pytest.approx(theirs, abs=0.1), (len(ids), token)
