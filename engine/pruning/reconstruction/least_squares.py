"""The order in which units cost least, and the survivors' best update.

A projection y = W z + b reads units (heads, channels) that own columns of W. Over calibration
tokens, C = E[z z^T]; where there is a bias, it is the covariance, for b then follows the means.
With P the columns that go, S those that stay and a ridge r > 0,

    W'_S = W_S + W_P C_PS (C_SS + r I)^-1,    b' = b + W E[z] - W'_S E[z_S]

is the minimum of E|W z - W'_S z_S|^2 + r |W - W'|^2 with W'_P = 0: the ridge draws towards the
weights as they are. With K = (C + r I)^-1, what that minimum grows by when one more unit u goes is

    tr(W_u K_uu^-1 W_u^T),    after which W -= W_u K_uu^-1 K_u:,  K -= K_:u K_uu^-1 K_u:

(the optimal brain surgeon: Hassibi and Stork 1993; for blocks of a language model's weights
Kurtic et al. 2023, arXiv 2302.04089). One Cholesky factor per projection is all the
inverting there is, and the sums of the growths are exact. Everything here is float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class InputMoments:
    """Sums over calibration tokens of z z^T (n, n) and of z (n,), in float64."""

    products: Tensor
    sums: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, width: int, device: torch.device | str = "cpu") -> InputMoments:
        """Nothing yet, of inputs z (n,)."""
        products = torch.zeros(width, width, dtype=torch.float64, device=device)
        return cls(products, torch.zeros_like(products[0]))

    @classmethod
    def of(cls, batches: Sequence[Tensor]) -> InputMoments:
        """Those of these batches of inputs (N, n)."""
        moments = cls.empty(batches[0].shape[1], batches[0].device)
        for z in batches:
            moments.add(z)
        return moments

    def add(self, z: Tensor) -> None:
        """Add the tokens z (N, n)."""
        wide = z.double()
        self.products.addmm_(wide.mT, wide)
        self.sums.add_(wide.sum(0))
        self.tokens += len(z)

    @property
    def means(self) -> Tensor:
        """E[z] (n,)."""
        return self.sums / max(self.tokens, 1)

    def second(self, centred: bool) -> Tensor:
        """E[z z^T] (n, n), or the covariance."""
        second = self.products / max(self.tokens, 1)
        return second - torch.outer(self.means, self.means) if centred else second


@dataclass(frozen=True)
class Regression:
    """A projection's weight (m, n), what it reads, and how strongly the ridge draws.

    `ridge` is a share of the mean square of the inputs. `centred` where there is a bias to update.
    """

    weight: Tensor
    moments: InputMoments
    ridge: float
    centred: bool = False

    def damped(self, columns: Tensor) -> Tensor:
        """C + r I of some columns, whose mean square the ridge is a share of."""
        second = self.moments.second(self.centred)[columns][:, columns]
        size = second.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        second.diagonal().add_(self.ridge * size)
        return second


def removal_order(
    given: Regression, units: Sequence[Tensor], groups: Sequence[int] | None = None
) -> tuple[list[int], list[float]]:
    """Units in the order in which they cost least, and what the error grows by with each.

    `units` are the columns of each. Columns that no unit has are taken to do nothing: they belong
    to what was pruned before. Errors are shares of E|W z|^2. With `groups`, the group of each unit,
    no group gives up its next unit before every other that has one has given up as many.
    """
    alive = torch.cat(list(units))
    damped = given.damped(alive)
    weight = given.weight.double()[:, alive].clone()
    whole = float(((weight @ damped) * weight).sum().clamp(min=torch.finfo(torch.float64).tiny))
    inverse = torch.cholesky_inverse(_factor(damped))
    starts = torch.tensor([0, *(len(unit) for unit in units)]).cumsum(0).tolist()
    spans = {n: slice(starts[n], starts[n + 1]) for n in range(len(units))}
    order: list[int] = []
    errors = []
    while spans:
        growth = {n: _growth(weight, inverse, spans[n]) for n in _next(spans, order, groups)}
        best = min(growth, key=lambda n: (growth[n], n))
        span = spans.pop(best)
        order.append(best)
        errors.append(max(growth[best], 0.0) / whole)
        _take_out(weight, inverse, span)
    return order, errors


def _next(left: Iterable[int], order: Sequence[int], groups: Sequence[int] | None) -> list[int]:
    """Units that may go next: of the groups with units left, those that gave up fewest."""
    if groups is None:
        return list(left)
    given = Counter(groups[unit] for unit in order)
    fewest = min(given[groups[unit]] for unit in left)
    return [unit for unit in left if given[groups[unit]] == fewest]


def _take_out(weight: Tensor, inverse: Tensor, columns: slice | Tensor) -> None:
    """Zero these columns W_u in place, and update what is left of W and K = `inverse`."""
    rows = inverse[columns]
    update = torch.linalg.solve(rows[:, columns], rows)
    weight -= weight[:, columns] @ update
    inverse -= rows.mT @ update
    # Rounding must not bring back what went: its block of the inverse is zero from here on.
    weight[:, columns] = inverse[columns] = inverse[:, columns] = 0.0


def _growth(weight: Tensor, inverse: Tensor, span: slice) -> float:
    """tr(W_u K_uu^-1 W_u^T)."""
    part = weight[:, span]
    return float((torch.linalg.solve(inverse[span, span], part.mT) * part.mT).sum())


def solved(given: Regression, products: Tensor) -> Tensor:
    """products (m, n) (C + r I)^-1: the update that adds what products are of, and z."""
    everything = torch.arange(given.weight.shape[1])
    return torch.cholesky_solve(products.mT, _factor(given.damped(everything))).mT


def cheapest_columns(given: Regression, count: int, rounds: int = 16) -> Tensor:
    """The `count` single columns that cost least, in as many `rounds`, the rest updated between.

    Of a round, those with the least |W_j|^2 / K_jj go together.
    """
    inverse = torch.cholesky_inverse(_factor(given.damped(torch.arange(given.weight.shape[1]))))
    weight = given.weight.double().clone()
    going: list[Tensor] = []
    size = -(-count // rounds)
    for start in range(0, count, size):
        growth = weight.square().sum(0) / inverse.diagonal()
        if going:
            growth[torch.cat(going)] = torch.inf
        taken = growth.topk(min(size, count - start), largest=False).indices
        _take_out(weight, inverse, taken)
        going.append(taken)
    return torch.cat(going)


def repaired(given: Regression, staying: Tensor, going: Tensor) -> tuple[Tensor, Tensor]:
    """W'_S (m, |S|), and what is to be added to the bias (m,); zeros unless `centred`."""
    count, weight = len(staying), given.weight.double()
    damped = given.damped(torch.cat([staying, going]))
    cross = damped[count:, :count]
    factor = _factor(damped[:count, :count])
    update = torch.cholesky_solve((weight[:, going] @ cross).mT, factor).mT
    after = weight[:, staying] + update
    if not given.centred:
        return after, weight.new_zeros(len(weight))
    means = given.moments.means
    return after, weight[:, going] @ means[going] - update @ means[staying]


def _factor(damped: Tensor) -> Tensor:
    """The Cholesky factor; rounding is met with a ridge that grows until there is one."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(damped)
    size = damped.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    ridge = 1e-14
    while int(info):
        more = torch.eye(len(damped), dtype=damped.dtype, device=damped.device) * (ridge * size)
        factor, info = torch.linalg.cholesky_ex(damped + more)
        ridge *= 10
    return factor
