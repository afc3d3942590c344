"""The losses of preference tuning, over log-probabilities of whole answers.

With the policy p, the reference q, a chosen answer c and a rejected answer r to a prompt x, |y| the
trained tokens of an answer, S the logistic function and e the label smoothing:

    l(y) = log p(y | x),    d(y) = log p(y | x) - log q(y | x),    mean(y) = l(y) / |y|

    dpo    -(1 - e) log S(b (d(c) - d(r))) - e log S(-b (d(c) - d(r)))
    ipo    (d(c) / |c| - d(r) / |r| - 1 / (2 b))^2
    simpo  -(1 - e) log S(m) - e log S(-m),   m = b (mean(c) - mean(r)) - g
    cpo    -(1 - e) log S(b (l(c) - l(r))) - e log S(-b (l(c) - l(r))),   and the likelihood of c
    orpo   -b log S(o(c) - o(r)),   o(y) = mean(y) - log(1 - exp(mean(y))),   and that likelihood
    kto    w (1 - S(b (d(y) - z))) for a good answer, w' (1 - S(b (z - d(y)))) for a bad one,
           z = max(0, the mean of d over prompts with answers to other prompts)

The likelihood is -sum l(c) / sum |c| over all chosen answers of a step, times its weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

FIGURES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
"""What every objective over answers reports, by TRL's names."""


@dataclass(frozen=True)
class AnswerScores:
    """Answers of one kind (P,): log-probabilities by policy and reference, and trained tokens.

    Without a reference `reference` is zero.
    """

    policy: Tensor
    reference: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """Log-probability of a token."""
        return self.policy / self.tokens

    def ratio(self, normalised: bool = False) -> Tensor:
        """How much likelier the policy makes an answer than the reference, as a logarithm."""
        ratio = self.policy - self.reference
        return ratio / self.tokens if normalised else ratio


@dataclass(frozen=True)
class LossSettings:
    """The numbers of a loss: `beta`, label smoothing, SimPO's margin, whether lengths count."""

    beta: float
    smoothing: float = 0.0
    margin: float = 0.0
    normalised: bool = False


def dpo_loss(chosen: AnswerScores, rejected: AnswerScores, how: LossSettings) -> Tensor:
    """Direct preference optimisation (P,): Rafailov et al. 2023, arXiv 2305.18290, equation 7.

    Label smoothing is the probability that a pair is the wrong way round: Mitchell 2023, "A note on
    DPO with noisy preferences". `normalised` divides every log-ratio by its answer's tokens, as
    Lambert et al. 2024 (arXiv 2411.15124) do.
    """
    return _preferred(how.beta * _difference(chosen, rejected, how), how.smoothing)


def ipo_loss(chosen: AnswerScores, rejected: AnswerScores, how: LossSettings) -> Tensor:
    """Identity preference optimisation (P,): Azar et al. 2023, arXiv 2310.12036, equation 17.

    Its tau is `beta`. The paper writes log-probabilities of whole answers; `normalised`, the
    default of the objective, divides them by their tokens, as the authors did in their experiments.
    """
    return (_difference(chosen, rejected, how) - 1.0 / (2.0 * how.beta)) ** 2


def simpo_loss(chosen: AnswerScores, rejected: AnswerScores, how: LossSettings) -> Tensor:
    """Simple preference optimisation (P,): Meng et al. 2024, arXiv 2405.14734, equation 6."""
    margin = how.beta * (chosen.mean - rejected.mean) - how.margin
    return _preferred(margin, how.smoothing)


def cpo_loss(chosen: AnswerScores, rejected: AnswerScores, how: LossSettings) -> Tensor:
    """Contrastive preference optimisation (P,): Xu et al. 2024, arXiv 2401.08417, equation 3.

    The likelihood of the chosen answer, its second term, is added by the objective.
    """
    if how.normalised:
        return _preferred(how.beta * (chosen.mean - rejected.mean), how.smoothing)
    return _preferred(how.beta * (chosen.policy - rejected.policy), how.smoothing)


def orpo_loss(chosen: AnswerScores, rejected: AnswerScores, how: LossSettings) -> Tensor:
    """The odds-ratio term (P,) of ORPO: Hong et al. 2024, arXiv 2403.07691, equation 7.

    Its lambda is `beta`; the likelihood of the chosen answer, equation 6's first term, is added by
    the objective.
    """
    return -how.beta * logsigmoid(_log_odds(chosen.mean) - _log_odds(rejected.mean))


def kto_loss(answers: AnswerScores, good: Tensor, baseline: Tensor, how: LossSettings) -> Tensor:
    """Kahneman-Tversky optimisation (P,): Ethayarajh et al. 2024, arXiv 2402.01306, L_KTO.

    good (P,) bool; baseline () is z. The weights of good and bad answers are the objective's.
    """
    gain = answers.ratio() - baseline
    return 1.0 - torch.sigmoid(how.beta * torch.where(good, gain, -gain))


def _difference(chosen: AnswerScores, rejected: AnswerScores, how: LossSettings) -> Tensor:
    return chosen.ratio(how.normalised) - rejected.ratio(how.normalised)


def _preferred(logits: Tensor, smoothing: float) -> Tensor:
    """-log of the probability that the chosen answer is better, where labels err so often."""
    loss = -(1.0 - smoothing) * logsigmoid(logits)
    return loss - smoothing * logsigmoid(-logits) if smoothing else loss


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(log_p) < 1, exact near 0 and near 1 (Maechler 2012)."""
    # Of p = 1, which rounding can give, the odds have no end: half an ulp below it is taken.
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps / 2)
    near_one = log_p > -0.6931472
    rest = torch.where(
        near_one,
        torch.log(-torch.expm1(torch.where(near_one, log_p, -1.0))),
        torch.log1p(-torch.exp(torch.where(near_one, -1.0, log_p))),
    )
    return log_p - rest
