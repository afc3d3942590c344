"""GPUs by the names that people give them."""

import pytest

from engine.errors import ConfigError
from engine.verbs.training.plan import rate_of


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("h100", 790), ("H100", 790), ("NVIDIA H200", 790), ("RTX 4090", 165), ("rtx-3060", 25),
        ("NVIDIA GeForce RTX 4060 Ti", 44), ("RTX 6000 Ada", 364), ("L40S", 362), ("312.5", 312.5),
    ],
)  # fmt: skip
def test_gpus_are_named_as_people_name_them(name: str, tflops: float) -> None:
    assert rate_of(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["h101", "", "-1", "nan", "inf", "rtx", "0"])
def test_another_name_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(ConfigError, match=r"it should be one of h200, h100, .* number of TFLOP/s"):
        rate_of(name)
