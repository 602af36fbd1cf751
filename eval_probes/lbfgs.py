"""L-BFGS on many smooth problems at once (Nocedal & Wright 2006, algorithm 7.5), each with a history and a line search
of its own: nothing passes from one problem to another, they only share the passes over the data.

In: a function that gives values and gradients of all problems still running. Out: where each of them ended.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.linalg import vecdot

DECREASE, CURVATURE = 1e-4, 0.9  # of the Wolfe conditions
TRIALS = 50  # steps tried along one direction before a problem is left where it is
LOOK_EVERY = 8  # evaluations between two looks at who is done, for which a GPU has to be waited for

# (points (h, P), which of the problems they belong to: int64 (h,)) → values (h,) float64, gradients (h, P)
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Minima:
    """Where each of H problems ended."""

    theta: Tensor  # (H, P)
    gradient: Tensor  # (H,), its largest entry there
    iterations: Tensor  # (H,) int64


@dataclass
class _Searches:
    """Problems under way; the first dimension of everything is theirs."""

    which: Tensor  # (h,)
    theta: Tensor  # (h, P)
    value: Tensor  # (h,)
    gradient: Tensor  # (h, P)
    direction: Tensor  # (h, P)
    slope: Tensor  # (h,) of the value along the direction
    step: Tensor  # (h,) to be tried next
    low: Tensor  # (h,) too short
    high: Tensor  # (h,) too long
    trials: Tensor  # (h,) along this direction
    iterations: Tensor  # (h,)
    done: Tensor  # (h,) bool
    changes: Tensor  # (h, m, P) of theta: s
    turns: Tensor  # (h, m, P) of the gradient: y
    rho: Tensor  # (h, m): 1 / (s·y), 0 where nothing is kept yet
    gamma: Tensor  # (h,): s·y / y·y of the newest
    slot: Tensor  # (h,) where the next pair goes

    def of(self, rows: Tensor) -> "_Searches":
        return _Searches(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


@torch.no_grad()
def minimise(objective: Objective, theta: Tensor, *, tol: float, iterations: int, memory: int = 10) -> Minima:
    """Minimises H problems from `theta` (H, P), each until no entry of its gradient exceeds `tol`, or for `iterations`
    steps, or until rounding hides any further descent."""
    H = len(theta)
    ended, largest = theta.clone(), theta.new_empty(H)
    steps = torch.zeros(H, dtype=torch.int64, device=theta.device)
    searches = _begin(objective, theta, tol, memory)
    while len(searches.which):
        for _ in range(LOOK_EVERY):
            _advance(searches, objective, tol, iterations)
        ended[searches.which] = searches.theta
        largest[searches.which] = searches.gradient.abs().amax(dim=1)
        steps[searches.which] = searches.iterations
        searches = searches.of((~searches.done).nonzero()[:, 0])
    return Minima(ended, largest, steps)


def _begin(objective: Objective, theta: Tensor, tol: float, memory: int) -> _Searches:
    H, P = theta.shape
    which = torch.arange(H, device=theta.device)
    value, gradient = objective(theta, which)
    length = gradient.norm(dim=1)
    zeros = torch.zeros_like(length)
    return _Searches(
        which=which,
        theta=theta.clone(),
        value=value,
        gradient=gradient,
        direction=-gradient,
        slope=-length.square(),
        step=1 / length.clamp_min(1.0),
        low=zeros,
        high=torch.full_like(zeros, torch.inf),
        trials=torch.zeros_like(which),
        iterations=torch.zeros_like(which),
        done=gradient.abs().amax(dim=1) <= tol,
        changes=theta.new_zeros(H, memory, P),
        turns=theta.new_zeros(H, memory, P),
        rho=theta.new_zeros(H, memory),
        gamma=torch.ones_like(zeros),
        slot=torch.zeros_like(which),
    )


def _advance(s: _Searches, objective: Objective, tol: float, iterations: int) -> None:
    """One evaluation: every problem takes the step that it tries, or learns that this is too long or too short."""
    point = torch.addcmul(s.theta, s.step[:, None], s.direction)
    value, gradient = objective(point, s.which)
    slope = vecdot(gradient, s.direction)
    # Near the minimum the value's rounding hides its decrease, and the slope alone tells (Hager & Zhang 2005).
    rounding = 8 * torch.finfo(point.dtype).eps * s.value.abs()
    low_enough = (value <= s.value + DECREASE * s.step * s.slope) | (
        (value <= s.value + rounding) & (slope <= (2 * DECREASE - 1) * s.slope)
    )
    taken = low_enough & (slope >= CURVATURE * s.slope) & ~s.done

    _remember(s, taken, point - s.theta, gradient - s.gradient)
    s.theta = torch.where(taken[:, None], point, s.theta)
    s.gradient = torch.where(taken[:, None], gradient, s.gradient)
    s.value = torch.where(taken, value, s.value)
    s.direction = torch.where(taken[:, None], -_times_inverse_hessian(s, s.gradient), s.direction)
    s.slope = vecdot(s.gradient, s.direction)
    s.low = torch.where(low_enough, s.step, s.low).masked_fill(taken, 0)
    s.high = torch.where(low_enough, s.high, s.step).masked_fill(taken, torch.inf)
    s.step = torch.where(s.high.isinf(), 2 * s.low, (s.low + s.high) / 2).masked_fill(taken, 1)
    s.trials = (s.trials + 1).masked_fill(taken, 0)
    s.iterations += taken
    s.done |= (s.gradient.abs().amax(dim=1) <= tol) | (s.iterations >= iterations) | (s.trials >= TRIALS)


def _remember(s: _Searches, taken: Tensor, change: Tensor, turn: Tensor) -> None:
    along, squared = vecdot(change, turn), vecdot(turn, turn)
    kept = taken & (along > torch.finfo(turn.dtype).eps * squared)
    at = torch.arange(len(kept), device=kept.device), s.slot
    s.changes[at] = torch.where(kept[:, None], change, s.changes[at])
    s.turns[at] = torch.where(kept[:, None], turn, s.turns[at])
    s.rho[at] = torch.where(kept, 1 / along, s.rho[at])
    s.gamma = torch.where(kept, along / squared, s.gamma)
    s.slot = (s.slot + kept) % s.rho.shape[1]


def _times_inverse_hessian(s: _Searches, q: Tensor) -> Tensor:
    """The two loops over each problem's history."""
    rows, m = torch.arange(len(q), device=q.device), s.rho.shape[1]
    newest_first = [(rows, (s.slot - back) % m) for back in range(1, m + 1)]
    alphas = []
    for at in newest_first:
        alphas.append(s.rho[at] * vecdot(s.changes[at], q))
        q = torch.addcmul(q, alphas[-1][:, None], s.turns[at], value=-1)
    q = q * s.gamma[:, None]
    for at in reversed(newest_first):
        beta = s.rho[at] * vecdot(s.turns[at], q)
        q = torch.addcmul(q, (alphas.pop() - beta)[:, None], s.changes[at])
    return q
