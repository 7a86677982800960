"""The settings of every algorithm, one frozen dataclass each: the only place where their defaults stand.

Those that are entry points of the group ``crystaljax.agents`` are agents, by the name that they have there. Light to
import: the command line makes its flags of these fields. What ``Attributes`` says of a field is also the help of its
flag. Defaults of the learning agents are those of CrystalGym (arXiv 2509.23156), gamma 0.99 throughout.
"""

from __future__ import annotations

import dataclasses
import pkgutil
import sys
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from crystaljax.agents.base import Agent

FIRST_BATCHES = ("random", "neutral")
POSITIVE = ("learning_rate", "alpha", "max_gradient", "clone_rate", "mean_weight")
FRACTIONS = (
    *("discount", "trace", "exploration", "final_epsilon", "priority_exponent", "importance", "smoothing"),
    *("crossover", "mutation", "seeding"),
)
"""Settings between 0 and 1, both included."""
DECIDING = ("priority_exponent", "seeding")
"""Real numbers that decide what is compiled, as whole numbers, truth values and names do."""


def is_traced(value: Any) -> bool:
    """Whether a value is known only inside of a compiled program (``jax.jit``, ``jax.vmap`` ...)."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.core.Tracer)


LARGEST = 2**31 - 1
"""Largest whole number of a setting: devices count in 32 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """What every algorithm has.

    Real numbers may be traced, so that ``jax.vmap`` can train with several learning rates or discounts at once; nothing
    checks them then. What decides what is compiled (whole numbers above all) cannot be.

    Attributes:
        updates: updates in all; a run works it out from its episodes.
        lanes: environments in parallel; also the crystals that one DFT batch may hold.
    """

    updates: int = 100
    lanes: int = 16

    maker: ClassVar[str] = ""
    """What :meth:`make` calls, ``module:function``; imported no earlier, so that settings are light."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name = field.name
            value: Any = getattr(self, name)
            if is_traced(value):
                if "float" not in str(field.type) or name in DECIDING:
                    raise TypeError(f"{name} decides what is compiled, so it cannot be mapped over; give a number")
                continue
            if isinstance(value, int) and value < 1 and not isinstance(value, bool):  # whole numbers count something
                raise ValueError(f"{name} is {value}; give at least 1")
            if isinstance(value, int) and value > LARGEST:
                raise ValueError(f"{name} is {value}; give at most {LARGEST}")
            if name == "first_batch" and str(value) not in FIRST_BATCHES:
                raise ValueError(f"first_batch is {value!r}; give one of {', '.join(FIRST_BATCHES)}")
            if name in POSITIVE and value <= 0:
                raise ValueError(f"{name} {value} is not positive")
            if name in FRACTIONS and not 0 <= value <= 1:
                raise ValueError(f"{name} {value} is not between 0 and 1")

    def updates_for(self, episodes: int, horizon: int) -> int:
        """Updates that complete at least ``episodes`` episodes of ``horizon`` steps."""
        raise NotImplementedError

    def make(self, env: Any, trunk: Any = None) -> Agent:
        """The agent of these settings on an environment; ``trunk`` is its network, by default one that fits."""
        return pkgutil.resolve_name(self.maker)(self, env, trunk)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig(AlgorithmConfig):
    """What algorithms that act step by step share.

    Attributes:
        steps: steps of each environment per update.
    """

    steps: int = 32

    def updates_for(self, episodes: int, horizon: int) -> int:
        per_lane = -(-episodes // self.lanes)
        return -(-per_lane * horizon // self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig(AlgorithmConfig):
    """What algorithms that propose whole crystals share: an update is one crystal in each lane."""

    def updates_for(self, episodes: int, horizon: int) -> int:
        return -(-episodes // self.lanes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomConfig(RolloutConfig):
    """Random search: every element is drawn uniformly."""

    maker: ClassVar[str] = "crystaljax.agents.random_search:make_random_search"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExhaustiveConfig(SearchConfig):
    """Exhaustive search: every distinct crystal once."""

    maker: ClassVar[str] = "crystaljax.agents.exhaustive:make_exhaustive"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnealingConfig(SearchConfig):
    """Simulated annealing, one walk in each lane.

    Attributes:
        lanes: environments in parallel, each with a walk of its own.
        temperature: at first, in units of the reward; it falls linearly to 0. At 0 nothing worse is ever accepted.
        patience: a walk that has found nothing better in so many moves begins again at a random crystal; never unless
            given.
        remember: keep every crystal that was evaluated in mind, and propose none of them again.
    """

    maker: ClassVar[str] = "crystaljax.agents.annealing:make_annealing"

    lanes: int = 4
    temperature: float = 0.1
    patience: int | None = None
    remember: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_traced(self.temperature) and self.temperature < 0:
            raise ValueError(f"temperature {self.temperature} is negative; give 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BayesianConfig(SearchConfig):
    """Bayesian optimisation by a tree-structured Parzen estimator (Optuna).

    Attributes:
        startup: crystals drawn at random before the model proposes any.
        candidates: crystals that the model weighs for each one that it proposes.
    """

    maker: ClassVar[str] = "crystaljax.agents.bayesian:make_bayesian"

    lanes: int = 8
    startup: int = 32
    candidates: int = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeutralConfig(SearchConfig):
    """Random search without repeats that draws every charge-neutral formula before any other: the baseline to beat."""

    maker: ClassVar[str] = "crystaljax.agents.gaussian_process:make_random_neutral"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianProcessConfig(SearchConfig):
    """Bayesian optimisation on the value of crystals, by Gaussian processes (scikit-learn).

    Attributes:
        first_batch: crystals before the model has seen any value: neutral (formulas that common oxidation states
            balance come first) or random.
        mean_weight: weight of the expected reward beside the expected improvement.
        listed: crystals up to which all are weighed; where there are more, local search finds the best.
        shortlist: best crystals by themselves among which a batch is chosen together.
        prior: tables of the same property on other structures to learn from beforehand, names of shipped ones or files
            with commas between them; none unless given.
    """

    maker: ClassVar[str] = "crystaljax.agents.gaussian_process:make_gaussian_process"

    first_batch: str = "neutral"
    prior: str = ""
    mean_weight: float = 0.02
    listed: int = 100_000
    shortlist: int = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneticSettings:
    """The operators of the genetic algorithm.

    Attributes:
        population: best distinct crystals that are kept and bred.
        tournament: members drawn for each parent, of which the best one becomes it.
        crossover: probability that a child has two parents, each element from either; otherwise it is a copy of one.
        mutation: probability of each element of a child to be replaced by another one.
    """

    population: int = 24
    tournament: int = 3
    crossover: float = 0.8
    mutation: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneticConfig(GeneticSettings, SearchConfig):
    """Genetic algorithm: each update is a generation of ``lanes`` children.

    Attributes:
        first_batch: the first crystals: neutral (formulas that common oxidation states balance) or random.
        remember: keep every crystal that was evaluated in mind, not only the population, and propose none again.
        screen: breed more children than needed and prefer those with a neutral formula.
    """

    maker: ClassVar[str] = "crystaljax.agents.genetic:make_genetic"

    first_batch: str = "random"
    remember: bool = False
    screen: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOSettings:
    """What PPO learns with.

    Attributes:
        learning_rate: of Adam, at the first update.
        anneal: let the learning rate fall linearly to 0.
        minibatches: parts into which the steps of an update are shuffled; must divide their number.
        epochs: passes over the steps of an update.
        discount: gamma.
        trace: lambda of the generalised advantage estimate.
        clip: range of the probability ratio and of the value's change.
        entropy: weight of the entropy bonus.
        value_weight: weight of the value loss.
        max_gradient: largest norm of a gradient.
        min_deviation: advantages are divided by their standard deviation, but at least by this. Where a policy that
            has settled sees equal rewards only, it keeps noise from being blown up to full size.
        target_kl: once the policy has moved this far (nats) from the one that acted, the rest of the update's
            minibatches changes nothing; no limit unless given.
    """

    learning_rate: float = 2.5e-4
    anneal: bool = True
    minibatches: int = 2
    epochs: int = 4
    discount: float = 0.99
    trace: float = 0.95
    clip: float = 0.2
    entropy: float = 0.01
    value_weight: float = 0.5
    max_gradient: float = 0.5
    min_deviation: float = 1e-8
    target_kl: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(PPOSettings, RolloutConfig):
    """Proximal policy optimisation.

    Attributes:
        lag: with rewards that come later, updates between acting and learning from it; unless given, as few as leave
            every reward time if they come in order.
    """

    maker: ClassVar[str] = "crystaljax.agents.ppo:make_ppo"

    lag: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lanes * self.steps % self.minibatches:
            raise ValueError(
                f"{self.lanes} lanes x {self.steps} steps cannot be split into {self.minibatches} equal minibatches; "
                "choose a divisor"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayConfig(RolloutConfig):
    """What algorithms that learn from a replay buffer share. Steps count over all lanes.

    Attributes:
        learning_rate: of Adam.
        discount: gamma.
        buffer: steps that the replay buffer holds, rounded down to whole steps of all lanes.
        batch: steps of a gradient step.
        start: steps in the buffer before the first gradient step.
        train_every: steps per gradient step; must divide the steps of an update.
        n_step: rewards summed before the next state's value takes over.
    """

    steps: int = 4
    learning_rate: float = 2.5e-4
    discount: float = 0.99
    buffer: int = 2000
    batch: int = 64
    start: int = 1000
    train_every: int = 4
    n_step: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lanes * self.steps % self.train_every:
            raise ValueError(
                f"{self.lanes} lanes x {self.steps} steps are not a multiple of train_every {self.train_every}; "
                "choose a divisor"
            )
        least = self.lanes * max(self.steps, self.n_step)
        if self.buffer < max(least, self.start):
            raise ValueError(
                f"a buffer of {self.buffer} steps is too small: {self.lanes} lanes fill {least} of it at once, and "
                f"learning starts at {self.start}; enlarge buffer, or lower lanes, steps or start"
            )

    @property
    def gradient_steps(self) -> int:
        """Gradient steps of an update."""
        return self.lanes * self.steps // self.train_every


@dataclasses.dataclass(frozen=True, kw_only=True)
class DQNConfig(ReplayConfig):
    """Deep Q-learning.

    Attributes:
        target_every: steps between two copies of the network to the target network.
        exploration: fraction of the training over which the probability of a random action falls from 1.
        final_epsilon: probability of a random action after that.
    """

    maker: ClassVar[str] = "crystaljax.agents.dqn:make_dqn"

    target_every: int = 500
    exploration: float = 0.2
    final_epsilon: float = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class RainbowConfig(DQNConfig):
    """Rainbow: DQN and its improvements.

    Attributes:
        double: the network chooses the action that the target network values.
        dueling: a value of the state plus advantages of the actions.
        priority_exponent: how strongly large errors are replayed more often; 0 for not at all.
        importance: exponent of the correction for that, at first; it rises to 1.
        noisy: noisy layers explore in place of random actions.
        atoms: atoms of the distribution of returns (51 in C51); 1 learns the mean only.
    """

    maker: ClassVar[str] = "crystaljax.agents.rainbow:make_rainbow"

    n_step: int = 3
    double: bool = True
    dueling: bool = True
    priority_exponent: float = 0.6
    importance: float = 0.4
    noisy: bool = False
    atoms: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SACConfig(ReplayConfig):
    """Soft actor-critic with discrete actions.

    Attributes:
        alpha: temperature, the worth of a nat of entropy in units of the reward; the first one if it is tuned.
        tune: tune the temperature until the policy has the target entropy.
        target_entropy: that entropy, as a fraction of the largest one.
        smoothing: fraction of the critics that moves into the target critics at each gradient step.
    """

    maker: ClassVar[str] = "crystaljax.agents.sac:make_sac"

    learning_rate: float = 3e-4
    alpha: float = 0.2
    tune: bool = False
    target_entropy: float = 0.89
    smoothing: float = 0.005


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridConfig(GeneticSettings, PPOSettings, SearchConfig):
    """A genetic algorithm first, whose best crystals seed a policy that PPO then trains.

    Attributes:
        seeding: fraction of the training that the genetic algorithm has.
        clone_steps: gradient steps in which the policy learns to build the best crystals.
        clone_rate: learning rate of these steps.
    """

    maker: ClassVar[str] = "crystaljax.agents.hybrid:make_hybrid"

    seeding: float = 0.5
    clone_steps: int = 200
    clone_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lanes % self.minibatches:
            raise ValueError(
                f"{self.lanes} lanes cannot be split into {self.minibatches} equal minibatches; choose a divisor"
            )
