"""Rules between the objective and the other settings."""

from collections.abc import Callable, Sequence

from engine.config.rules.rule import Facts, Rule, RunSettings


def _only_for(name: str, default: object, objectives: Sequence[str], what: str) -> Rule:
    """The rule that a setting is given only where the objective reads it."""

    def given_elsewhere(c: RunSettings, _: Facts) -> bool:
        return getattr(c, name) != default and c.objective not in objectives

    return Rule(
        name,
        given_elsewhere,
        f"{name} is {what}, and objective is {{c.objective}}.",
        f"Leave it out, or give --objective {' or '.join(objectives)}",
    )


def _answers(c: RunSettings) -> bool:
    return c.objective not in ("sft", "distill")


def _learns_answers(when: Callable[[RunSettings], bool]) -> Callable[[RunSettings, Facts], bool]:
    return lambda c, _: _answers(c) and when(c)


_PAIRS = ("dpo", "ipo", "simpo", "cpo", "orpo")

PREFERENCE_RULES = (
    Rule(
        "teacher",
        _learns_answers(lambda c: c.teacher is not None),
        "teacher is what objective distill learns from, and objective is {c.objective}.",
        "Leave it out, or give --objective distill; --reference names the model that preferences "
        "are measured against",
    ),
    Rule(
        "objective",
        lambda c, _: c.objective == "distill" and c.teacher is None,
        "objective distill learns another model's distribution, and none is named.",
        "Give --teacher MODEL",
    ),
    _only_for("beta", None, (*_PAIRS, "kto"), "the strength of a preference"),
    _only_for("label_smoothing", 0.0, ("dpo", "simpo", "cpo"), "the share of pairs that err"),
    _only_for("length_normalization", "auto", ("dpo", "ipo", "cpo"), "about answers' lengths"),
    _only_for("nll_weight", None, _PAIRS, "the weight of the chosen answers' likelihood"),
    _only_for("simpo_gamma", None, ("simpo",), "SimPO's margin"),
    _only_for("desirable_weight", 1.0, ("kto",), "the weight of good answers"),
    _only_for("undesirable_weight", 1.0, ("kto",), "the weight of bad answers"),
    _only_for("reference", None, ("dpo", "ipo", "kto"), "what answers are measured against"),
    Rule(
        "reference",
        lambda c, _: c.reference not in (None, "base") and c.memory_budget is not None,
        "memory_budget does not count what another model takes as the reference.",
        "Set one of them",
    ),
    Rule(
        "share_prompt",
        lambda c, _: c.share_prompt and c.objective not in _PAIRS,
        "share_prompt is about the two answers of a pair, and objective {c.objective} has none.",
        "Leave it out, or give --objective dpo or another that learns from pairs",
    ),
    Rule(
        "share_prompt",
        lambda c, _: c.share_prompt and c.cuda_graphs,
        "share_prompt was given with cuda_graphs. Recorded launches know no tokens that two "
        "documents share.",
        "Leave out one or the other",
    ),
    Rule(
        "share_prompt",
        lambda c, f: c.share_prompt and f.model_type is not None and f.hybrid is True,
        "share_prompt was given for a {f.model_type} model, whose Gated DeltaNet layers carry a "
        "state from token to token: two answers cannot go on from one.",
        "Leave it out",
    ),
    Rule(
        "packing",
        _learns_answers(lambda c: c.packing),
        "packing fills batches with rows up to a number of tokens, and objective {c.objective} "
        "counts answers. Its batches have no padding either way.",
        "Leave it out",
    ),
    Rule(
        "streaming",
        _learns_answers(lambda c: c.streaming == "on"),
        "streaming reads rows as they are needed, and objective {c.objective} looks at all of them "
        "before it begins.",
        "Leave it out",
    ),
    Rule(
        "train_on",
        _learns_answers(lambda c: c.train_on not in ("all", "last")),
        "train_on {c.train_on!r} says where answers begin, and objective {c.objective} knows that "
        "from the rows: answers are what follows the prompt.",
        "Leave it out",
    ),
)
