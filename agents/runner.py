"""Trains an agent on the host's behalf: compiled updates in a loop, with logs, checkpoints, resume and interruption."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from agents import config as configs
from agents import interrupt, report
from agents.accounting import Accounting
from agents.base import Agent, Records
from agents.checkpoints import Checkpoints
from agents.config import RunConfig
from agents.display import Display
from agents.journal import Journal
from agents.ledger import Ledger
from agents.networks import make_network
from agents.ppo import PPOConfig, make_ppo
from agents.random_search import RandomConfig, make_random_search
from crystaljax.env import CrystalEnv, EnvParams
from crystaljax.evaluators import BudgetSpent, Evaluator
from crystaljax.status import Status
from crystaljax.tasks import make, make_custom

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What became of a run.

    Attributes:
        folder: where everything is.
        interrupted: whether it was stopped before its last update; it can be resumed.
        stopped: why it stopped by itself before its last update (a budget that is spent), for people.
        updates: updates done, in all.
        planned: updates to do, in all.
        state: the train state after them.
        env, ledger, origin, metrics: what the reports are made of.
    """

    folder: Path
    interrupted: bool
    stopped: str
    updates: int
    planned: int
    state: Any
    env: CrystalEnv
    ledger: Ledger
    origin: report.Origin
    metrics: list[dict[str, Any]]


def build_env(config: RunConfig, evaluator: str | Evaluator) -> tuple[CrystalEnv, EnvParams]:
    """The environment of a run and its parameters; raises ``ValueError`` for settings that do not fit."""
    options: dict[str, Any] = {
        "vocabulary": config.vocabulary,
        "observation": "flat" if config.network == "mlp" else "graph",
        # Lanes that finish together share host calls, and so the workers.
        "in_phase": True,
        "target": config.target,
    }
    if config.mode:
        options["mode"] = config.mode
    if config.structures:
        return make_custom(config.property, list(config.structures), evaluator, **options)
    return make(config.task, evaluator, **options)


def build_agent(config: RunConfig, env: CrystalEnv) -> Agent:
    """The algorithm of a run."""
    if config.agent == "random":
        return make_random_search(RandomConfig(config.lanes, config.steps), env)
    names = {field.name for field in dataclasses.fields(PPOConfig)} - {"updates"}
    chosen = {name: value for name, value in dataclasses.asdict(config).items() if name in names}
    ppo = PPOConfig(updates=config.updates(env.horizon), **chosen)
    return make_ppo(ppo, env, make_network(env, config.network))


def train(
    config: RunConfig,
    evaluator: str | Evaluator,
    folder: Path | str,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> RunResult:
    """Run, or resume, a training in a folder.

    A run that is resumed, after an interruption or a crash, goes on from its last checkpoint with the same numbers as
    if it had never stopped.

    Args:
        config: settings; those of a resumed run must be the saved ones, apart from where calculations happen.
        evaluator: what computes the property. A DFT bridge (an object with ``stats()`` and ``cancel()``) is shown in
            the progress and stopped by Ctrl-C; it stays the caller's to close.
        folder: of the run; made if it is not there.
        resume: go on with the run in the folder.
        console: where the progress bar goes; ``None`` for log lines.

    Raises:
        ValueError: for settings that do not fit, or a folder that holds a run already (not with ``resume``).
        Exception: whatever the evaluator's ``check()`` raises, after a checkpoint; a budget that is spent ends the run.
    """
    env, params = build_env(config, evaluator)
    agent = build_agent(config, env)
    folder = Path(folder)
    _claim(folder, config, env, resume)
    return _Run(config, env, params, agent, evaluator, folder, console).train()


def _claim(folder: Path, config: RunConfig, env: CrystalEnv, resume: bool) -> None:
    """Make the folder of a new run, or see that the run in it is the one to resume."""
    digests = [skeleton.digest for skeleton in env.skeletons]
    if not resume:
        if (folder / configs.FILE).exists():
            raise ValueError(f"{folder} holds a run already: resume it, or choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder, digests)
        return
    saved, saved_digests = configs.load(folder)
    anywhere = {name: getattr(config, name) for name in configs.MOVABLE}
    if dataclasses.replace(saved, **anywhere) != config:
        raise ValueError(f"the settings are not those of the run in {folder}; a resumed run keeps its own")
    if saved_digests != digests:
        raise ValueError(f"the structures are not those that the run in {folder} began with; restore the files")


class _Run:
    """A training in progress."""

    def __init__(
        self,
        config: RunConfig,
        env: CrystalEnv,
        params: EnvParams,
        agent: Agent,
        evaluator: str | Evaluator,
        folder: Path,
        console: Console | None,
    ):
        self.config, self.env, self.params, self.agent, self.folder = config, env, params, agent, folder
        self.accounting = Accounting(folder, evaluator)
        self.stopped = ""
        self.stats = getattr(evaluator, "stats", lambda: None)
        self.cancel = getattr(evaluator, "cancel", lambda: None)
        self.origin = report.Origin(env.evaluator.label, _fingerprint(env, evaluator), float(params.target))
        self.console = console
        self.updates = config.updates(env.horizon)
        self.checkpoints = Checkpoints(folder)
        self.update = self.checkpoints.latest or 0
        self.journal = Journal(folder, self.update)
        self.ledger = Ledger(env.skeletons, env.vocabulary)
        for line in self.journal.past_episodes:
            self.ledger.add_line(line)
        self.state = self._first_state()

    def _first_state(self) -> Any:
        key = jax.random.key(self.config.seed)
        if not self.update:
            return jax.jit(self.agent.init)(key, self.params)
        return self.checkpoints.restore(jax.eval_shape(self.agent.init, key, self.params))

    def train(self) -> RunResult:
        """All remaining updates; reports are written in any case."""
        compiled = jax.jit(self.agent.update)
        interrupted = False
        try:
            with (
                interrupt.stop_on_signals() as stop,
                Display(self.updates, self.update, self.console) as display,
            ):
                while self.update < self.updates and not interrupted:
                    interrupted = not self._one_update(compiled, stop, display) or stop.requested
        finally:
            self.accounting.write()
            self._checkpoint()
            self.checkpoints.close()
            self.journal.close()
        self._report()
        interrupted = self.update < self.updates
        return RunResult(
            self.folder,
            interrupted,
            self.stopped,
            self.update,
            self.updates,
            self.state,
            self.env,
            self.ledger,
            self.origin,
            self.journal.metrics,
        )

    def _one_update(self, compiled: Any, stop: interrupt.Stop, display: Display) -> bool:
        """One update; false if it was cancelled, so that nothing of it was used."""
        start = time.perf_counter()

        def waiting() -> None:
            display.show(self.ledger, self.stats())
            self.accounting.write(always=False)

        state, losses, records = interrupt.call(compiled, self.state, stop=stop, cancel=self.cancel, waiting=waiting)
        try:
            self.env.evaluator.check()
        except KeyboardInterrupt:  # an evaluator that hears Ctrl-C by itself
            return False
        except BudgetSpent as spent:
            self.stopped = str(spent)
            return False
        if _cancelled(records):
            return False
        self.update += 1
        self.state = state
        episodes = self.ledger.add_records(records, self.update)
        self.accounting.write()
        self.journal.write(self._metrics(losses, episodes, time.perf_counter() - start), episodes)
        display.finished(self.update)
        display.show(self.ledger, self.stats(), always=True)
        if self.update % self.config.checkpoint_every == 0:
            self._checkpoint()
        return True

    def _checkpoint(self) -> None:
        self.journal.sync()
        self.checkpoints.save(self.update, self.state)

    def _metrics(self, losses: dict[str, jax.Array], episodes: list[Any], seconds: float) -> dict[str, Any]:
        """The metrics line of an update. All but the last two lines of it are the same in a resumed run."""
        rewards = [episode.reward for episode in episodes]
        values = [episode.value for episode in episodes if episode.value is not None]
        stats = self.stats()
        return {
            "update": self.update,
            "episodes": self.ledger.episodes,
            "env_steps": self.update * self.agent.steps * self.agent.lanes,
            "mean_reward": float(np.mean(rewards)) if rewards else None,
            "best_reward": self.ledger.best_reward,
            "mean_value": float(np.mean(values)) if values else None,
            "distinct": len(self.ledger.crystals),
            "refused": self.ledger.refused,
            "failures": {k: n for k, n in sorted(self.ledger.statuses.items()) if k != Status.OK.name},
            **{name: _number(value) for name, value in losses.items()},
            "dft_calls": stats.calls if stats else 0,
            "cache_hits": stats.memory_hits + stats.store_hits + stats.shared if stats else 0,
            "seconds": seconds,
        }

    def _report(self) -> None:
        report.write_best(self.folder, self.env, self.ledger, self.origin)
        curve = self.folder / report.CURVE
        report.draw_curve(curve, self.env, self.journal.metrics, self.origin, self.config.agent)


def _cancelled(records: Records) -> bool:
    """Whether a rollout asked for a crystal that was not evaluated because the run was stopped."""
    return bool(np.any(np.asarray(records.finished) & (np.asarray(records.status) == Status.CANCELLED)))


def _fingerprint(env: CrystalEnv, evaluator: Any) -> dict[str, Any]:
    """The engine's fingerprint, if the evaluator has an engine."""
    engine = getattr(evaluator, "engine", None)
    return engine.fingerprint(env.objective.property) if engine is not None else {}


def _number(value: jax.Array) -> float | None:
    """A JSON number; ``None`` for what JSON has no word for."""
    number = float(value)
    return number if math.isfinite(number) else None
