"""Learning-rate schedules of Hugging Face's trainer and of programs built on it."""

from engine.config.programs.translation import GivenKeys

SCHEDULES = {
    **dict.fromkeys(("cosine", "cosine_with_min_lr"), "cosine"),
    "linear": "linear",
    **dict.fromkeys(("constant", "constant_with_warmup"), "constant"),
    "polynomial": "polynomial",
    "cosine_with_restarts": "cosine_with_restarts",
    "warmup_stable_decay": "warmup_stable_decay",
}
_ARGUMENTS = {
    "cosine_with_min_lr": {"min_lr_rate": "min_lr_ratio"},
    "polynomial": {"power": "lr_power"},
    "cosine_with_restarts": {"num_cycles": "lr_num_cycles"},
    "warmup_stable_decay": {
        "num_decay_steps": "lr_decay_steps",
        "min_lr_ratio": "min_lr_ratio",
        "decay_type": "lr_decay_shape",
    },
}
"""Arguments of a schedule by the names that `transformers.get_scheduler` has for them."""

_LOWEST = {"cosine_with_min_lr": "min_lr", "polynomial": "lr_end"}
"""Arguments that are a rate, where ours is its share of the highest."""


def schedule(source: GivenKeys, key: str, default: str) -> None:
    """Take a schedule's name and its `lr_scheduler_kwargs`; the learning rate is known already."""
    name = str(source.left.get(key, default)).lower()
    source.choose(key, "lr_schedule", SCHEDULES, default)
    given = source.table("lr_scheduler_kwargs")
    for argument, setting in _ARGUMENTS.get(name, {}).items():
        if argument in given:
            source.put(setting, given.pop(argument), f"lr_scheduler_kwargs: {argument}")
    lowest = _LOWEST.get(name, "")
    # transformers ends a polynomial at 1e-7 where nothing is said.
    origin = f"lr_scheduler_kwargs: {lowest}"
    rate = source.as_number(origin, given.pop(lowest, 1e-7 if name == "polynomial" else None))
    named = source.result.settings.get("learning_rate")
    peak = None if named is None else source.as_number("learning_rate", named.value)
    if rate is not None and peak is not None and 0 <= rate <= peak:
        source.put("min_lr_ratio", rate / peak, origin)
    elif rate is not None and name in SCHEDULES:
        source.miss(origin, f"{rate:g} is no share of the learning rate")
    for argument in given:
        source.miss(f"lr_scheduler_kwargs: {argument}", f"the schedule {name} has no such argument")
