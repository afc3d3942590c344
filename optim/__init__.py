"""8-bit AdamW, parameter groups, clipping and the learning-rate schedule."""

from optim.adamw8bit import AdamW8bit
from optim.clip import clip_grad_norm
from optim.in_backward import StepInBackward
from optim.lr_schedule import ScheduleShape, lr_at
from optim.param_groups import param_groups

__all__ = [
    "AdamW8bit",
    "ScheduleShape",
    "StepInBackward",
    "clip_grad_norm",
    "lr_at",
    "param_groups",
]
