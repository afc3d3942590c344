"""Rules between the settings of recipes."""

from engine.config.rules.rule import Facts, Rule, RunSettings


def _chooses_modules(config: RunSettings) -> bool:
    """Whether layers, exclusions or patterns are given."""
    return bool(
        config.layers or config.exclude_modules or config.rank_pattern or config.alpha_pattern
    )


def _divides(config: RunSettings) -> bool:
    """Whether the adapter starts as a part of the weights."""
    return config.init_lora_weights not in ("default", "gaussian")


def _trains_head(config: RunSettings, facts: Facts) -> bool:
    """Whether the output head is trained beside an adapter: by itself, or as the embedding."""
    saved = config.saved_modules
    return "lm_head" in saved or (bool(saved) and facts.tied is True)


RECIPE_RULES = (
    Rule(
        "modules_to_save",
        lambda c, _: bool(c.modules_to_save) and c.every_weight,
        "modules_to_save names what is trained beside an adapter, and method {c.method} trains "
        "every weight.",
        "Leave it out, or give method lora or qlora",
    ),
    Rule(
        "modules_to_save",
        lambda c, _: c.add_tokens is not None and len(set(c.modules_to_save)) == 1,
        "add_tokens needs rows in embedding and head, and modules_to_save names one of them.",
        "Leave out --modules-to-save: with new tokens both are trained and saved",
    ),
    Rule(
        "add_tokens",
        lambda c, _: c.add_tokens is not None and c.method == "scratch",
        "add_tokens extends the vocabulary of a pretrained model, and method is scratch.",
        "Put the tokens into the tokenizer itself: engine data tokenizer",
    ),
    Rule(
        "add_tokens",
        lambda c, _: c.add_tokens is not None and c.init_adapter is not None,
        "add_tokens extends the model's vocabulary, and init_adapter goes on with an adapter, "
        "whose own new tokens come with it.",
        "Merge the adapter first (engine merge) and add tokens to what comes of it, or leave out "
        "one or the other",
    ),
    Rule(
        "head_precision",
        lambda c, f: c.head_precision == "8bit" and _trains_head(c, f),
        "head_precision 8bit is for a frozen head, and modules_to_save or add_tokens train it.",
        "Leave out one or the other",
    ),
    Rule(
        "embedding_on",
        lambda c, _: c.embedding_on == "host" and "embed_tokens" in c.saved_modules,
        "embedding_on host is for a frozen embedding, and modules_to_save or add_tokens train it.",
        "Leave out one or the other",
    ),
    Rule(
        "teacher",
        lambda c, f: c.teacher is not None and _trains_head(c, f),
        "teacher needs a frozen head, and modules_to_save or add_tokens train it.",
        "Leave out one or the other",
    ),
    Rule(
        "init_lora_weights",
        lambda c, _: c.init_lora_weights != "default" and c.every_weight,
        "init_lora_weights {c.init_lora_weights} is how an adapter starts, and method is "
        "{c.method}.",
        "Leave it out, or give method lora or qlora",
    ),
    Rule(
        "init_lora_weights",
        lambda c, _: c.init_lora_weights != "default" and c.init_adapter is not None,
        "init_lora_weights {c.init_lora_weights} is how a new adapter starts, and init_adapter "
        "goes on with an earlier one.",
        "Leave out one or the other",
    ),
    Rule(
        "init_lora_weights",
        lambda c, _: _divides(c) and c.use_dora,
        "init_lora_weights {c.init_lora_weights} takes the adapter's start from the weights, and "
        "use_dora measures the lengths of their rows: what comes of both cannot be written as an "
        "adapter of the model's own weights.",
        "Leave out one or the other",
    ),
    Rule(
        "init_lora_weights",
        lambda c, _: _divides(c) and c.objective in ("dpo", "ipo", "kto"),
        "init_lora_weights {c.init_lora_weights} changes the base, and objective {c.objective} "
        "measures answers against the base without the adapter.",
        "Leave it out, or give --objective orpo, simpo or cpo",
    ),
    Rule(
        "init_lora_weights",
        lambda c, _: c.init_lora_weights == "loftq" and (c.method != "qlora" or c.double_quant),
        "init_lora_weights loftq makes up for what NF4 leaves out of the weights, as PEFT computes "
        "it again: with plain scales, and method qlora.",
        "Give --method qlora --no-double-quant, or another start such as pissa",
    ),
    Rule(
        "loftq_iter",
        lambda c, _: c.loftq_iter != 1 and c.init_lora_weights != "loftq",
        "loftq_iter is of init_lora_weights loftq, which is {c.init_lora_weights}.",
        "Leave it out, or give --init-lora-weights loftq",
    ),
    Rule(
        "layers",
        lambda c, _: c.every_weight and _chooses_modules(c),
        "layers, exclude_modules, rank_pattern and alpha_pattern say where an adapter is, and "
        "method is {c.method}, which trains every weight.",
        "Leave them out, or give method lora or qlora",
    ),
    Rule(
        "layers",
        lambda c, _: c.init_adapter is not None and _chooses_modules(c),
        "layers, exclude_modules, rank_pattern and alpha_pattern say where a new adapter is, and "
        "init_adapter goes on with one that says so itself.",
        "Leave out one or the other",
    ),
    Rule(
        "loraplus_lr_ratio",
        lambda c, _: c.every_weight and c.loraplus_lr_ratio is not None,
        "loraplus_lr_ratio is about the two matrices of an adapter, and method is {c.method}.",
        "Leave it out, or give method lora or qlora",
    ),
    Rule(
        "label_smoothing_factor",
        lambda c, _: (
            (c.objective != "sft" or c.teacher is not None)
            and (c.label_smoothing_factor > 0 or c.z_loss > 0)
        ),
        "label_smoothing_factor and z_loss are of the loss of a row's tokens, which a teacher and "
        "objective {c.objective} do not learn by.",
        "Leave out one or the other",
    ),
    Rule(
        "optimizer",
        lambda c, _: c.optimizer == "muon" and not c.every_weight,
        "muon makes the updates of whole weights orthogonal, and method is {c.method}, which "
        "trains pairs of narrow matrices.",
        "Choose another --optimizer, or give --method full",
    ),
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
