"""Rules between the settings of recipes."""

from engine.config.rules.rule import Rule

RECIPE_RULES = (
    Rule(
        "min_lr_ratio",
        lambda c, _: c.min_lr_ratio > 0 and c.lr_schedule == "constant",
        "min_lr_ratio {c.min_lr_ratio:g} is where a schedule ends, and a constant one stays at its "
        "peak.",
        "Leave it out, or choose another --lr-schedule",
    ),
    Rule(
        "lr_power",
        lambda c, _: c.lr_power != 1 and c.lr_schedule != "polynomial",
        "lr_power is of the schedule polynomial, and lr_schedule is {c.lr_schedule}.",
        "Leave it out, or give --lr-schedule polynomial",
    ),
    Rule(
        "lr_num_cycles",
        lambda c, _: c.lr_num_cycles != 1 and c.lr_schedule != "cosine_with_restarts",
        "lr_num_cycles is of the schedule cosine_with_restarts, and lr_schedule is "
        "{c.lr_schedule}.",
        "Leave it out, or give --lr-schedule cosine_with_restarts",
    ),
    Rule(
        "lr_decay_steps",
        lambda c, _: c.lr_decay_ratio is not None and c.lr_decay_steps is not None,
        "lr_decay_ratio and lr_decay_steps give the same length twice.",
        "Set one of them, not both",
    ),
    Rule(
        "lr_decay_shape",
        lambda c, _: (
            (c.lr_decay_ratio, c.lr_decay_steps, c.lr_decay_shape) != (None, None, "cosine")
            and c.lr_schedule != "warmup_stable_decay"
        ),
        "lr_decay_ratio, lr_decay_steps and lr_decay_shape are of the schedule "
        "warmup_stable_decay, and lr_schedule is {c.lr_schedule}.",
        "Leave them out, or give --lr-schedule warmup_stable_decay",
    ),
)
