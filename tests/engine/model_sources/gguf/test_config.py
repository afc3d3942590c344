import pytest
import torch

from engine.errors import CheckpointError
from engine.model_sources.gguf.config import llama3_factors, llama3_parameters


@pytest.mark.parametrize(
    ("theta", "dim", "factor", "high", "original"),
    [
        (500_000.0, 128, 8.0, 4.0, 8192),  # Llama 3.1
        (500_000.0, 64, 32.0, 4.0, 8192),  # Llama 3.2
        (500_000.0, 32, 8.0, 4.0, 32),
        (10_000.0, 64, 4.0, 8.0, 1000),
        (1_000_000.0, 128, 3.5, 2.5, 4096),
        (10_000.0, 16, 8.0, 4.0, 8192),  # no frequency is slow enough for the whole factor
    ],
)
def test_llama3_scaling_is_recovered_from_its_result(
    theta: float, dim: int, factor: float, high: float, original: int
) -> None:
    stored = llama3_factors(theta, dim, factor, 1.0, high, original).float()
    parameters = llama3_parameters(stored, theta, dim, "here")
    assert parameters["rope_type"] == "llama3"
    again = llama3_factors(
        theta,
        dim,
        parameters["factor"],
        parameters["low_freq_factor"],
        parameters["high_freq_factor"],
        parameters["original_max_position_embeddings"],
    )
    assert torch.allclose(again, stored.double(), rtol=1e-5, atol=0)


def test_the_parameters_in_use_are_found_exactly() -> None:
    stored = llama3_factors(500_000.0, 128, 8.0, 1.0, 4.0, 8192).float()
    assert llama3_parameters(stored, 500_000.0, 128, "here") == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_divisors_of_one_are_no_scaling() -> None:
    assert llama3_parameters(torch.ones(32), 10_000.0, 64, "here") == {}


@pytest.mark.parametrize(
    "factors",
    [
        torch.linspace(1, 8, 32),
        torch.ones(31),
        torch.ones(2, 16),
        torch.full((32,), float("nan")),
        torch.zeros(32),
        torch.cat([torch.full((16,), 8.0), torch.ones(16)]),
    ],
)
def test_divisors_that_follow_no_formula_are_refused(factors: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"here: rope_freqs\.weight"):
        llama3_parameters(factors, 500_000.0, 64, "here")
