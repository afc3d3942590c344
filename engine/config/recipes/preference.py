"""Settings of the objective: what a run minimises, and preference tuning."""

from typing import Annotated

from pydantic import BeforeValidator

from engine.config.choices import PAIR_OBJECTIVES, ObjectiveName, Streaming
from engine.config.settings import Settings, setting
from engine.config.spelling import FolderOrWord, spelled

OBJECTIVE_NAMES = {"sigmoid": "dpo", "distillation": "distill", "kto_pair": "kto"}
"""Other spellings of objectives."""

WITH_REFERENCE = ("dpo", "ipo", "kto")
"""Objectives that measure answers against a reference model."""

WITH_LIKELIHOOD = {"dpo": 0.0, "ipo": 0.0, "simpo": 0.0, "cpo": 1.0, "orpo": 1.0}
"""Objectives with a likelihood term of the chosen answers, and its usual weight."""

_BETAS = {"simpo": 2.0}


class ObjectiveSettings(Settings):
    """What is learnt: tokens, another model's distribution, or which answers are preferred."""

    objective: Annotated[ObjectiveName, spelled(OBJECTIVE_NAMES)] = setting(
        "sft",
        "Objective",
        "what is learnt: the rows' tokens (sft), a teacher's distribution (distill), which of two "
        "answers is better (dpo, ipo, orpo, simpo, cpo), or whether an answer is good (kto)",
    )
    teacher: str | None = setting(
        None, "Objective", "learn this model's next-token probabilities, not the rows' tokens"
    )
    beta: float | None = setting(
        None,
        "Objective",
        "how strongly preferences count against the reference; by default 0.1, of simpo 2",
        gt=0,
        le=1000,
    )
    label_smoothing: float = setting(
        0.0,
        "Objective",
        "dpo, simpo, cpo: the probability that a pair is the wrong way round",
        ge=0,
        lt=0.5,
    )
    length_normalization: Annotated[Streaming, spelled({"true": "on", "false": "off"})] = setting(
        "auto",
        "Objective",
        "dpo, ipo, cpo: divide an answer's log-probability by its tokens; by default ipo does",
    )
    nll_weight: float | None = setting(
        None,
        "Objective",
        "weight of the chosen answers' negative log-likelihood; by default 1 of cpo and orpo, 0 of "
        "dpo, ipo and simpo",
        ge=0,
        le=1000,
    )
    simpo_gamma: float | None = setting(
        None, "Objective", "simpo: the margin by which chosen answers are to win (1)", ge=0, le=1000
    )
    desirable_weight: float = setting(
        1.0, "Objective", "kto: weight of the good answers", gt=0, le=1000
    )
    undesirable_weight: float = setting(
        1.0, "Objective", "kto: weight of the bad answers", gt=0, le=1000
    )
    reference: Annotated[str | None, BeforeValidator(lambda v: v or None)] = setting(
        None,
        "Objective",
        "dpo, ipo, kto: a model that answers are measured against, or base; by default the model "
        "as training begins with it: the base without adapter, or with --init-adapter that one",
    )
    reference_cache: FolderOrWord = setting(
        "auto",
        "Objective",
        "folder for the reference's log-probabilities, to be used again; auto, or none",
        min_length=1,
    )

    share_prompt: bool = setting(
        False,
        "Objective",
        "compute the prompt of a pair once for both of its answers; the same gradients, in less "
        "time and memory",
    )

    @property
    def learns_pairs(self) -> bool:
        """Whether rows are pairs of a better and a worse answer."""
        return self.objective in PAIR_OBJECTIVES

    @property
    def learns_answers(self) -> bool:
        """Whether whole answers are judged, in pairs or one by one."""
        return self.learns_pairs or self.objective == "kto"

    @property
    def has_reference(self) -> bool:
        """Whether answers are measured against a reference model."""
        return self.objective in WITH_REFERENCE

    @property
    def sequences_per_example(self) -> int:
        """Sequences that one example lays into a batch."""
        return 2 if self.learns_pairs else 1

    @property
    def chosen_beta(self) -> float:
        """`beta`, or what the objective usually has."""
        return _BETAS.get(self.objective, 0.1) if self.beta is None else self.beta

    @property
    def normalises_lengths(self) -> bool:
        """Whether log-probabilities are divided by the tokens of their answer."""
        given = self.length_normalization
        return self.objective == "ipo" if given == "auto" else given == "on"

    @property
    def likelihood_weight(self) -> float:
        """`nll_weight`, or what the objective usually has."""
        usual = WITH_LIKELIHOOD.get(self.objective, 0.0)
        return usual if self.nll_weight is None else self.nll_weight

    @property
    def margin(self) -> float:
        """SimPO's margin; 0 of every other objective."""
        if self.objective != "simpo":
            return 0.0
        return 1.0 if self.simpo_gamma is None else self.simpo_gamma
