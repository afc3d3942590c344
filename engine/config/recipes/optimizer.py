"""Settings of the optimizer and of what it does with gradients."""

from typing import Annotated

from pydantic import BeforeValidator, field_validator

from engine.config.choices import Optimizer
from engine.config.settings import Settings, setting
from engine.config.spelling import OPTIMIZERS, comma_list, spelled


class OptimizerSettings(Settings):
    """How gradients become updates."""

    learning_rate: float = setting(2e-4, "Optimisation", "peak learning rate", gt=0, le=10)
    loraplus_lr_ratio: float | None = setting(
        None,
        "Optimisation",
        "LoRA+: how many times faster the adapter's matrices B learn than its A, such as 16",
        gt=0,
        le=10_000,
    )
    weight_decay: float = setting(0.01, "Optimisation", "decoupled weight decay", ge=0, lt=1)
    betas: Annotated[tuple[float, float], BeforeValidator(comma_list)] = setting(
        (0.9, 0.999), "Optimisation", "decay rates of AdamW's two moments, or Lion's"
    )
    eps: float = setting(1e-8, "Optimisation", "AdamW's epsilon", gt=0, le=1e-2)
    max_grad_norm: float = setting(
        1.0,
        "Optimisation",
        "clip the global gradient norm to this; 0 for no clipping",
        ge=0,
        le=1e30,
    )
    optimizer: Annotated[Optimizer, spelled(OPTIMIZERS)] = setting(
        "adamw8bit",
        "Optimisation",
        "AdamW with 8-bit or with 32-bit moments; Lion in 8 bits; Adafactor, without moments; or, "
        "for method full, Muon",
    )
    ema_decay: float | None = setting(
        None,
        "Optimisation",
        "keep an exponential moving average of the trained weights, such as 0.999, and save it as "
        "the result; the weights of the last step are saved beside it",
        gt=0,
        lt=1,
    )
    nonfinite: str = setting(
        "stop",
        "Optimisation",
        "a loss or gradient that is not finite: stop, or skip:N (stop after N in a row)",
        pattern=r"^(stop|skip:[1-9][0-9]{0,5})$",
        expected="stop, or skip:5 (stop after 5 in a row)",
    )

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both should be at least 0 and less than 1")
        return value

    @property
    def nonfinite_limit(self) -> int:
        """How many steps in a row may be skipped for a value that is not finite; 0 is to stop."""
        return 0 if self.nonfinite == "stop" else int(self.nonfinite.removeprefix("skip:"))
