"""A model of a property over crystals, and what a crystal may earn by it: two exact Gaussian processes.

Composite Bayesian optimisation (Astudillo and Frazier 2019): the *value* is modelled and the reward composed from its
distribution. A reward is a bad thing to model: it is flat far from its target, and the same on both sides of it. One
process tells crystals with a value worth the name from failures and metals (regression on labels +1 and -1), the other
gives the value where there is one. Scikit-learn fits them, in double precision and without a compilation for each
number of data; hyperparameters are those of the largest evidence, with a wide prior.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage, optimize, stats
from scipy.linalg import cho_solve, solve_triangular
from scipy.stats import qmc
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Hyperparameter, Kernel

BOUNDS = np.log([[0.05, 5.0]] * 2 + [[0.3, 10.0]] * 5 + [[0.03, 1.0]])
"""Of the logarithms of the hyperparameters; see :class:`CrystalKernel`."""
STARTS = np.log([[0.7, 0.7, 1.0, 2.0, 1.0, 1.0, 2.0, 0.1], [0.5, 1.2, 0.95, 3.7, 1.5, 0.8, 6.6, 0.06]])
"""Hyperparameters [2, 8] of the two processes before there is enough to choose them by, and centre of their prior.

Those of values are the geometric means of what the evidence chooses on the shipped gaps of two and three sites, which
raises the likelihood of each of these tables left out; for labels it does not, so they have round numbers.
"""
ITERATIONS = 12
"""Of L-BFGS in a choice of hyperparameters; the next choice begins where it ended."""
PRIOR_WIDTH = 1.0
"""Standard deviation of the log-normal prior of hyperparameters around STARTS: few crystals determine none of them."""
GRID = 2048
"""Points on which a curve of rewards is known."""
DRAWN = 64
"""Draws by which what several properties are worth is estimated."""
WIDTHS = 40
"""Standard deviations for which its expectations are tabulated."""


class CrystalKernel(Kernel):
    """What two crystals have in common; for the features of :class:`crystaljax.agents.chemistry.Features`.

    A sum of two squared exponentials and noise: one of *balance* and *composition*, across skeletons; one of *balance*,
    *sites* and *elements*, of crystals on the same skeleton.

    ``theta`` [8] are logarithms: amplitudes (standard deviations) of the two, length scales of balance and composition
    in the first and of balance, sites and elements in the second, and the standard deviation of the noise.
    """

    PARTS = ((0, 1), (0, 2, 3))
    """Blocks of features in each of the two parts."""

    def __init__(self, slices: Sequence[slice], theta: np.ndarray = STARTS[0]):
        self.slices = slices
        self.theta = np.asarray(theta, float)
        self._distances: tuple[np.ndarray, list[np.ndarray], np.ndarray] | None = None

    @property
    def theta(self) -> np.ndarray:
        return self._theta

    @theta.setter
    def theta(self, theta: np.ndarray) -> None:
        self._theta = np.asarray(theta, float)

    @property
    def bounds(self) -> np.ndarray:
        return BOUNDS

    @property
    def hyperparameters(self) -> list[Hyperparameter]:
        return [Hyperparameter("theta", "numeric", np.exp(BOUNDS), len(BOUNDS))]

    @property
    def noise(self) -> float:
        """Variance of the noise."""
        return float(np.exp(2 * self.theta[-1]))

    def __call__(self, X: np.ndarray, Y: np.ndarray | None = None, eval_gradient: bool = False) -> Any:
        """Covariances [n, m]; with ``Y`` missing those of noisy observations of ``X``, and their gradient [n, n, 8]."""
        amplitudes, lengths = np.exp(2 * self.theta[:2]).tolist(), np.exp(-2 * self.theta[2:7]).tolist()
        # A choice of hyperparameters asks for the same crystals again and again.
        if Y is not None or self._distances is None or self._distances[0] is not X:
            other = X if Y is None else Y
            distances = [_squared_distances(X[:, s], other[:, s]) for s in self.slices[:4]]
            same = X[:, self.slices[4]] @ other[:, self.slices[4]].T
            if Y is None:
                self._distances = X, distances, same
        else:
            _, distances, same = self._distances
        kernels, gradients, place = [], [], 0
        for part, blocks in enumerate(self.PARTS):
            scaled = [distances[block] * lengths[place + i] for i, block in enumerate(blocks)]
            kernel = np.exp(-0.5 * sum(scaled))
            kernel *= amplitudes[part]
            if part:
                kernel *= same
            kernels.append(kernel)
            gradients += [kernel * one for one in scaled] if eval_gradient else []
            place += len(blocks)
        total = kernels[0] + kernels[1]
        if Y is None:
            total[np.diag_indices_from(total)] += self.noise
        if not eval_gradient:
            return total
        noise = 2 * self.noise * np.eye(len(X))
        return total, np.stack([2 * kernels[0], 2 * kernels[1], *gradients, noise], axis=-1)

    def diag(self, X: np.ndarray) -> np.ndarray:
        """Variances without noise, float64 [n]."""
        return np.full(len(X), np.exp(2 * self.theta[:2]).sum())

    def is_stationary(self) -> bool:
        return True

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        return {"slices": self.slices, "theta": self.theta}


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = a @ (-2 * b.T)
    squares += np.einsum("ij,ij->i", a, a)[:, None]
    squares += np.einsum("ij,ij->i", b, b)
    return np.maximum(squares, 0, out=squares)


def _by_evidence(center: np.ndarray, objective: Any, start: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, float]:
    """scikit-learn's optimiser hook: a few steps of L-BFGS, from where the last choice ended; prior around a centre."""

    def penalised(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(theta)
        off = (theta - center) / PRIOR_WIDTH
        return value + 0.5 * off @ off, gradient + off / PRIOR_WIDTH

    found = optimize.minimize(
        penalised, start, method="L-BFGS-B", jac=True, bounds=bounds, options={"maxiter": ITERATIONS}
    )
    return found.x, found.fun


class Posterior(NamedTuple):
    """Of a Gaussian process at C crystals: mean [C] and covariance [C, C], without noise, and the noise's variance."""

    mean: np.ndarray
    covariance: np.ndarray
    noise: float

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviations [C]."""
        return np.sqrt(np.maximum(np.diag(self.covariance), 1e-9))


def given(row: int, covariance: np.ndarray, noise: float) -> np.ndarray:
    """Covariance [C, C] once the crystal of a row is observed with that noise (a variance), whatever comes out."""
    column = covariance[:, row]
    return covariance - np.outer(column, column / (column[row] + noise))


@dataclasses.dataclass(frozen=True)
class Process:
    """A Gaussian process that has seen data: its kernel, training features [n, F], Cholesky factor and weights."""

    kernel: CrystalKernel
    seen: np.ndarray
    factor: np.ndarray
    weights: np.ndarray
    evidence: float

    @classmethod
    def fit(
        cls, features: np.ndarray, targets: np.ndarray, kernel: CrystalKernel, center: np.ndarray | None = None
    ) -> Process:
        """The process given targets [n], standardised.

        Hyperparameters are those of the kernel or, given a ``center`` [8] of their prior, chosen from there on.
        """
        optimizer = None if center is None else partial(_by_evidence, center)
        model = GaussianProcessRegressor(kernel, alpha=1e-10, optimizer=optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a hyperparameter at its bound is fine
            model.fit(features, targets)
        return cls(model.kernel_, features, model.L_, model.alpha_, model.log_marginal_likelihood_value_)

    def marginals(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of crystals [C, F], without noise; in single precision, for there may be many."""
        cross = self.kernel(features.astype(np.float32), self.seen.astype(np.float32))
        mean = cross @ self.weights
        reduced = solve_triangular(
            self.factor.astype(np.float32), cross.T, lower=True, overwrite_b=True, check_finite=False
        )
        variance = self.kernel.diag(features) - np.einsum("ij,ij->j", reduced, reduced)
        return mean, np.sqrt(np.maximum(variance, 1e-9))

    def joint(self, features: np.ndarray) -> Posterior:
        """At crystals [C, F] together."""
        cross = self.kernel(features, self.seen)
        covariance = self.kernel(features, features) - cross @ cho_solve((self.factor, True), cross.T)
        return Posterior(cross @ self.weights, covariance, self.kernel.noise)


class Expectation:
    """The expectation of a curve g(v) for Gaussian v, from a table over mean and standard deviation."""

    def __init__(self, grid: np.ndarray, curve: np.ndarray):
        """``grid``: evenly spaced values [G] that leave room on both sides; ``curve``: g there."""
        step = grid[1] - grid[0]
        self._low, self._step = grid[0], step
        self._widths = np.log(np.geomspace(step / 4, grid[-1] - grid[0], WIDTHS))
        padded = np.pad(curve, len(curve), mode="edge")
        frequencies = 2 * np.pi * np.fft.rfftfreq(len(padded), step)
        damping = np.exp(-0.5 * (frequencies * np.exp(self._widths)[:, None]) ** 2)
        smooth = np.fft.irfft(np.fft.rfft(padded) * damping, len(padded))
        self._table = smooth[:, len(curve) : 2 * len(curve)]

    def __call__(self, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
        """Float64, shape of ``mean``."""
        width = (np.log(np.maximum(deviation, 1e-12)) - self._widths[0]) / (self._widths[1] - self._widths[0])
        at = np.stack([np.clip(width, 0, None), (mean - self._low) / self._step])
        return ndimage.map_coordinates(self._table, at, order=1, mode="nearest")


class Marginal(NamedTuple):
    """Of a property at C crystals: probability of a value worth the name, and mean and deviation of it, [C] each."""

    alive: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


class Belief:
    """What is believed of one property: which crystals have a value worth the name, and what it is."""

    def __init__(
        self,
        features: np.ndarray,
        values: np.ndarray,
        slices: Sequence[slice],
        theta: np.ndarray,
        choose: bool,
        point_mass: float,
        target: float,
    ):
        """
        Args:
            features: [n, F], of all outcomes that tell something, at least one.
            values: [n], NaN where there is none.
            slices: of the features' blocks.
            theta: hyperparameters [2, 8] of the two processes, from which to start.
            choose: whether to choose hyperparameters by the evidence.
            point_mass: a value up to here is like none: metals have no gap.
            target: where values are expected before there are any.
        """
        with np.errstate(invalid="ignore"):
            alive = np.isfinite(values) & (values > point_mass)
        self.alive = alive
        """bool [n]: which outcomes are a value worth the name."""
        self._has_both = 0 < alive.sum() < len(alive)
        self._share = (alive.sum() + 0.5) / (len(alive) + 1.0)
        labels = np.where(alive, 1.0, -1.0)
        enough = choose and min(alive.sum(), (~alive).sum()) >= 3
        self._label = labels.mean()
        kernel = CrystalKernel(slices, theta[0])
        self._class = Process.fit(features, labels - self._label, kernel, STARTS[0] if enough else None)
        values = values[alive]
        guess = max(abs(target) / 2, 1e-6)
        self._scale = max(values.std(), 0.1 * guess) if len(values) >= 4 else guess
        self._center = values.mean() if len(values) else target
        where = features[alive] if len(values) else features[:1]
        targets = (values - self._center) / self._scale if len(values) else np.zeros(1)
        kernel = CrystalKernel(slices, theta[1])
        self._value = Process.fit(where, targets, kernel, STARTS[1] if choose and len(values) >= 6 else None)
        self.theta = np.stack([self._class.kernel.theta, self._value.kernel.theta])

    @property
    def processes(self) -> tuple[Process, Process]:
        """Of labels and of values."""
        return self._class, self._value

    def marginal(
        self, label: np.ndarray, label_deviation: np.ndarray, value: np.ndarray, deviation: np.ndarray
    ) -> Marginal:
        """From means and standard deviations [C] of the two processes."""
        spread = np.sqrt(label_deviation**2 + self._class.kernel.noise)
        alive = stats.norm.cdf((label + self._label) / spread) if self._has_both else self._share
        return Marginal(alive, self._center + self._scale * value, self._scale * deviation)


class Worth:
    """Expected improvement plus a little of the expected reward, of crystals with one property: exact."""

    def __init__(self, grid: np.ndarray, curve: np.ndarray, best: float, mean_weight: float, dead: np.ndarray):
        """
        Args:
            grid, curve: rewards of values, [G] each.
            best: reward to improve on.
            mean_weight: weight of the expected reward.
            dead: rewards of outcomes without a value worth the name.
        """
        self._best, self._mean_weight = best, mean_weight
        self._expected = Expectation(grid, self._of(curve))
        self._dead = float(np.mean(self._of(dead))) if len(dead) else 0.0

    def _of(self, reward: np.ndarray) -> np.ndarray:
        return np.maximum(reward - self._best, 0.0) + self._mean_weight * reward

    def __call__(self, marginals: Sequence[Marginal]) -> np.ndarray:
        (only,) = marginals
        return only.alive * self._expected(only.mean, only.deviation) + (1 - only.alive) * self._dead


@dataclasses.dataclass(frozen=True)
class ScoreCurve:
    """A term of an objective: the row of its property, and its scores on an even grid of values."""

    row: int
    grid: np.ndarray
    scores: np.ndarray

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return np.interp(values, self.grid, self.scores)


@dataclasses.dataclass(frozen=True)
class DrawnWorth:
    """The same for several properties, whose rewards have no table: a mean over draws, the same ones each time.

    Attributes:
        terms: of the objective.
        combined: the reward of scores, :meth:`crystaljax.objectives.Objective.combined`.
        best, mean_weight: as :class:`Worth`.
        failure: reward of a crystal that has not all values.
        dead: value [P] of each property where it has none worth the name, as metals have no gap.
        failed: share [P] of failures among those.
    """

    terms: Sequence[ScoreCurve]
    combined: Callable[[Sequence[np.ndarray]], np.ndarray]
    best: float
    mean_weight: float
    failure: float
    dead: np.ndarray
    failed: np.ndarray

    @functools.cached_property
    def _draws(self) -> np.ndarray:
        """[DRAWN, 2 + P]: two that are uniform, which say whether a crystal lives and fails, and normal ones."""
        draws = np.clip(qmc.Sobol(len(self.dead) + 2, seed=0).random(DRAWN), 1e-6, 1 - 1e-6)
        return np.hstack([draws[:, :2], stats.norm.ppf(draws[:, 2:])])

    def __call__(self, marginals: Sequence[Marginal]) -> np.ndarray:
        total = 0.0
        for lives, fails, *normal in self._draws:
            values, sound = [], True
            for row, (marginal, z) in enumerate(zip(marginals, normal, strict=True)):
                # One draw decides for all properties: what fails, fails as a whole.
                alive = lives < marginal.alive
                sound = sound & (alive | (fails >= self.failed[row]))
                values.append(np.where(alive, marginal.mean + marginal.deviation * z, self.dead[row]))
            reward = np.where(sound, self.combined([term(values[term.row]) for term in self.terms]), self.failure)
            total = total + np.maximum(reward - self.best, 0.0) + self.mean_weight * reward
        return total / DRAWN


class Surrogate:
    """Scores crystals by what is believed of their properties, and what that is worth."""

    def __init__(self, beliefs: Sequence[Belief], worth: Worth | DrawnWorth):
        self._beliefs, self._worth = beliefs, worth

    @property
    def theta(self) -> np.ndarray:
        """Hyperparameters [P, 2, 8]."""
        return np.stack([belief.theta for belief in self._beliefs])

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Of crystals [C, F], each by itself."""
        return self._worth(
            [
                belief.marginal(*(x for process in belief.processes for x in process.marginals(features)))
                for belief in self._beliefs
            ]
        )

    def batch(self, features: np.ndarray, size: int, pending: np.ndarray) -> list[int]:
        """Rows of ``size`` crystals of [C, F], one by one, as if what was chosen had come out as expected (GP-BUCB).

        ``pending`` crystals [K, F] are treated as chosen already.
        """
        everyone = np.concatenate([features, pending])
        joint = [[process.joint(everyone) for process in belief.processes] for belief in self._beliefs]
        available = np.arange(len(everyone)) < len(features)
        for row in range(len(features), len(everyone)):
            joint = _observed(joint, row)
        chosen = []
        for _ in range(min(size, len(features))):
            scores = self._worth(
                [
                    belief.marginal(*(x for posterior in pair for x in (posterior.mean, posterior.deviation)))
                    for belief, pair in zip(self._beliefs, joint, strict=True)
                ]
            )
            chosen.append(int(np.argmax(np.where(available, scores, -np.inf))))
            available[chosen[-1]] = False
            joint = _observed(joint, chosen[-1])
        return chosen


def _observed(joint: list[list[Posterior]], row: int) -> list[list[Posterior]]:
    """All posteriors once the crystal of a row is observed."""
    return [
        [posterior._replace(covariance=given(row, posterior.covariance, posterior.noise)) for posterior in pair]
        for pair in joint
    ]
