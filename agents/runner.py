"""Trains an agent on the host's behalf: compiled updates in a loop, with logs, checkpoints, resume and interruption."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from crystaljax.agents import config as configs
from crystaljax.agents import interrupt, networks, report, tracking
from crystaljax.agents.accounting import Accounting
from crystaljax.agents.base import LEARNED, Agent, Records
from crystaljax.agents.checkpoints import Checkpoints
from crystaljax.agents.config import RunConfig
from crystaljax.agents.display import Display
from crystaljax.agents.hyperparameters import PPOConfig, ReplayConfig
from crystaljax.agents.journal import Journal, history_at
from crystaljax.agents.ledger import Ledger
from crystaljax.agents.networks import make_trunk
from crystaljax.agents.outstanding import Outstanding, tickets_at
from crystaljax.agents.runs import member_folder
from crystaljax.agents.tracking import Tracker
from crystaljax.delayed import NO_TICKET, DelayedRewards
from crystaljax.env import CrystalEnv, EnvParams
from crystaljax.evaluators import BudgetSpent, Deferred, Evaluator
from crystaljax.files import replace_text
from crystaljax.objectives import parse
from crystaljax.run_folder import CHECKPOINTS, CURVE, EPISODES, SWEEP, RunFolderError, read_best, refuse_taken
from crystaljax.signals import no_interrupt_is_lost
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
        "observation": networks.network(config.network).observation,
        # Lanes that finish together share host calls, and so the workers.
        "in_phase": True,
        "target": config.target,
    }
    if config.mode:
        options["mode"] = config.mode
    objective = parse(*config.objective, combine=config.combine) if config.objective else None
    if config.structures:
        return make_custom(objective or config.property, list(config.structures), evaluator, **options)
    if objective is not None:
        options["objective"] = objective
    return make(config.task, evaluator, **options)


def build_agent(config: RunConfig, env: CrystalEnv | DelayedRewards) -> Agent:
    """The algorithm of a run; raises ``ValueError`` for one that would not complete the run's episodes."""
    settings = dataclasses.replace(config.algorithm, updates=config.updates(env.horizon))
    agent = settings.make(env, make_trunk(env, config.network))
    _refuse_other_length(config, agent, settings.updates, env.horizon)
    return agent


def _refuse_other_length(config: RunConfig, agent: Agent, updates: int, horizon: int) -> None:
    """Raise ``ValueError`` unless so many updates of an agent complete the episodes of a run, and not one too many."""

    def episodes(updates: int) -> int:
        return updates * agent.steps // horizon * agent.lanes

    if episodes(updates) < config.episodes or (updates > 1 and episodes(updates - 1) >= config.episodes):
        raise ValueError(
            f"{updates} updates of agent {config.agent} complete {episodes(updates)} episodes ({agent.steps} steps in "
            f"{agent.lanes} lanes each, {horizon} to an episode), but the run has {config.episodes}; let "
            f"{type(config.algorithm).__name__}.updates_for count the steps and lanes that the agent takes"
        )


def build_delayed_agent(config: RunConfig, evaluator: str | Evaluator) -> Agent:
    """The algorithm of a run whose rewards come later; raises ``ValueError`` for settings that do not fit."""
    if not hasattr(evaluator, "delayed"):
        raise ValueError(f"engine {config.engine} answers at once, on the device; leave out delayed, or choose DFT")
    env = build_env(config, Deferred())[0]
    settings = config.algorithm
    if isinstance(settings, PPOConfig) and settings.lag is None:
        steps = env.horizon * -(-config.delayed // settings.lanes)  # of each lane, until so many episodes have ended
        settings = dataclasses.replace(settings, lag=1 + -(-steps // settings.steps))
    agent = build_agent(dataclasses.replace(config, algorithm=settings), DelayedRewards(env, settings.lanes))
    if agent.deliver is None:
        raise ValueError(
            f"{config.agent} needs the rewards of all its crystals before it makes others; leave out delayed, or "
            "choose an agent that can learn from them later (gp, ppo, dqn, rainbow, sac)"
        )
    if isinstance(settings, ReplayConfig):
        ends = settings.lanes * -(-settings.steps // int(env.horizons.min()))
        needed = settings.start + settings.n_step * (config.delayed + ends)
        if needed > settings.buffer:
            raise ValueError(
                f"with up to {config.delayed} + {ends} rewards still to come, a buffer of {settings.buffer} steps may "
                f"hold fewer than {settings.start} to learn from; enlarge buffer to {needed}, or lower delayed or start"
            )
    return agent


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
    with no_interrupt_is_lost():
        return _Run([(config, Path(folder))], Path(folder), evaluator, resume, console).train()[0]


def sweep(
    config: RunConfig,
    seeds: Sequence[int],
    evaluator: str | Evaluator,
    folder: Path | str,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> list[RunResult]:
    """Runs that differ by their seed, as one program: their lanes share DFT batches, and nothing is computed twice.

    Each has a folder of its own in ``folder``, like that of :func:`train`, and gets its numbers but for rounding: sums
    are ordered differently in a larger batch. Their checkpoints are resumed together. ``dft_calls`` and ``cache_hits``
    of their metrics count for all of them. Arguments and errors are those of :func:`train`.
    """
    folder = Path(folder)
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds {' '.join(map(str, seeds))}: give each seed once")
    runs = [(dataclasses.replace(config, seed=seed), member_folder(folder, seed)) for seed in seeds]
    if not resume:
        for place in (folder, *(of_member for _, of_member in runs)):
            refuse_taken(place)
    with no_interrupt_is_lost():
        run = _Run(runs, folder, evaluator, resume, console)
        replace_text(folder / SWEEP, json.dumps({"seeds": list(seeds)}) + "\n")
        return run.train()


def _claim(folder: Path, config: RunConfig, env: CrystalEnv, resume: bool) -> None:
    """Make the folder of a new run, or see that the run in it is the one to resume."""
    digests = [skeleton.digest for skeleton in env.skeletons]
    if not resume:
        refuse_taken(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config.save(folder, digests)
        return
    saved, saved_digests = configs.load(folder)
    anywhere = {name: getattr(config, name) for name in configs.MOVABLE}
    if dataclasses.replace(saved, **anywhere) != config:
        raise ValueError(f"the settings are not those of the run in {folder}; a resumed run keeps its own")
    if saved_digests != digests:
        raise ValueError(f"the structures are not those that the run in {folder} began with; restore the files")


def _refuse_too_large(agent: Agent, env: CrystalEnv, params: EnvParams, runs: int) -> None:
    """Refuse settings whose train state and rollout do not fit into memory, before anything is compiled for them."""
    key = jax.random.key(0)
    state, observation = jax.eval_shape(agent.init, key, params), jax.eval_shape(env.reset, key, params)[0]
    needed = runs * (_bytes(state) + agent.steps * agent.lanes * _bytes(observation))
    limits = jax.local_devices()[0].memory_stats() or {}
    there = limits.get("bytes_limit", psutil.virtual_memory().total)
    if needed > there:
        raise ValueError(
            f"{agent.lanes} lanes x {agent.steps} steps and what the agent keeps need {needed / 2**30:,.0f} GiB or "
            f"more, and the device has {there / 2**30:,.0f}; lower lanes, steps or what is kept (buffer ...)"
        )


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class _Member:
    """What a run leaves in its folder."""

    def __init__(self, config: RunConfig, folder: Path, env: CrystalEnv, origin: report.Origin):
        self.config, self.folder, self.env, self.origin = config, folder, env, origin
        self.checkpoints = Checkpoints(folder)
        self.ledger = Ledger(env.skeletons, env.vocabulary, env.objective.names)

    def refuse_lost_checkpoints(self) -> None:
        """Raise ``RunFolderError`` if the checkpoint that ``best.json`` goes with, and the one before it, are gone."""
        try:
            reached = read_best(self.folder).get("updates", 0)
        except FileNotFoundError:
            return
        except RunFolderError as error:
            raise RunFolderError(f"{error}; or remove the file: this run makes it again") from error
        latest = self.checkpoints.latest or 0
        # The one before it does if somebody has removed a damaged one.
        if reached > latest + (self.config.checkpoint_every if latest else 0):
            raise RunFolderError(
                f"{self.folder} has come to update {reached}, but its last checkpoint is of update {latest}, and what "
                f"was done since would be lost: restore {self.folder / CHECKPOINTS} from a copy, or start the run anew "
                "in another folder, where the store has its calculations"
            )

    def read(self, update: int) -> None:
        """Read what there was after an update, and write nothing: whatever is damaged is left as it is.

        Raises:
            RunFolderError, FileRefused: with the file, and the line, that is damaged or missing.
        """
        self.history = history_at(self.folder, update)
        for number, episode in enumerate(self.history.episodes, start=1):
            place = f"{self.folder / EPISODES}, line {number}"
            try:
                entered = self.ledger.add_line(dataclasses.asdict(episode))
            except ValueError as error:
                raise RunFolderError(f"{place} is not of this run: {error}; restore the file from a copy") from error
            if entered != episode:
                raise RunFolderError(
                    f"{place} says crystal {episode.crystal}, {episode.formula}, where the lines before it and its own "
                    f"elements make it crystal {entered.crystal}, {entered.formula}; restore the file from a copy"
                )

    def open(self, update: int) -> None:
        """Go back to what :meth:`read` has read: whatever came after it is made again."""
        project, settings = self.config.wandb, configs.to_table(self.config)
        tracker = Tracker(project, self.folder, settings) if project else None
        self.journal = Journal(self.folder, self.history, tracker)
        self._write_best(update)

    def checkpoint(self, update: int, state: Any) -> None:
        self.journal.sync()
        self.checkpoints.save(update, state)
        self._write_best(update)

    def close(self) -> None:
        self.checkpoints.close()
        self.journal.close()

    def draw_curve(self) -> None:
        path, metrics = self.folder / CURVE, self.journal.metrics
        report.draw_curve(path, self.env, metrics, self.origin, agent=self.config.agent)

    def _write_best(self, update: int) -> None:
        # Kept up to date, so that a run that is killed can be shown too.
        report.write_best(self.folder, self.env, self.ledger, self.origin, update)


class _Run:
    """A training in progress; of several seeds at once, if there are several."""

    def __init__(
        self,
        runs: Sequence[tuple[RunConfig, Path]],
        folder: Path,
        evaluator: str | Evaluator,
        resume: bool,
        console: Console | None,
    ):
        self.config = runs[0][0]
        self.env, self.params = build_env(self.config, evaluator)
        if self.config.delayed and len(runs) > 1:
            raise ValueError("the runs of a sweep act together, so each would wait for the slowest; leave out delayed")
        if self.config.delayed:
            self.agent = build_delayed_agent(self.config, evaluator)
        else:
            self.agent = build_agent(self.config, self.env)
        _refuse_too_large(self.agent, self.env, self.params, len(runs))
        if self.config.wandb:
            tracking.log_in()
        for config, of_member in runs:
            _claim(of_member, config, self.env, resume)
        self.accounting = Accounting(folder, evaluator)
        self.stopped = ""
        self.stats = getattr(evaluator, "stats", lambda: None)
        self.cancel = getattr(evaluator, "cancel", lambda: None)
        fingerprint = _fingerprint(self.env, evaluator)
        self.origin = report.Origin.of(self.env, self.params, fingerprint)
        self.console = console
        self.updates = self.config.updates(self.env.horizon)
        self.members = [_Member(config, of_member, self.env, self.origin) for config, of_member in runs]
        for member in self.members:
            member.refuse_lost_checkpoints()
        # A crash between the checkpoints of two members leaves one of them behind.
        self.update = min(member.checkpoints.latest or 0 for member in self.members)
        # Everything is read before anything is written: what is damaged must stay as it is.
        for member in self.members:
            member.read(self.update)
        past = tickets_at(folder, self.update, self.env) if self.config.delayed else []
        self.state = self._first_state()
        for member in self.members:
            member.open(self.update)
        self.outstanding: Outstanding | None = None
        if self.config.delayed:
            evaluation = evaluator.delayed(self.env, self.origin.objective.target)
            self.outstanding = Outstanding(folder, past, evaluation, self.config.delayed, len(self.env.objective.names))
            self.deliver = jax.jit(self.agent.deliver)

    @property
    def _together(self) -> bool:
        return len(self.members) > 1

    def _first_state(self) -> Any:
        """The train state; of several members, leaves have them on the first axis."""
        keys = [jax.random.key(member.config.seed) for member in self.members]
        if self.update:
            like = jax.eval_shape(self.agent.init, keys[0], self.params)
            states = [member.checkpoints.restore(self.update, like) for member in self.members]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states) if self._together else states[0]
        if self._together:
            return jax.jit(jax.vmap(self.agent.init, in_axes=(0, None)))(jnp.stack(keys), self.params)
        return jax.jit(self.agent.init)(keys[0], self.params)

    def _each(self, tree: Any) -> list[Any]:
        """A state, losses or records of all members, by member."""
        if not self._together:
            return [tree]
        return [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for i in range(len(self.members))]

    def train(self) -> list[RunResult]:
        """All remaining updates; reports are written in any case."""
        compiled = jax.jit(jax.vmap(self.agent.update) if self._together else self.agent.update)
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
            for member in self.members:
                member.close()
            if self.outstanding is not None:
                self.outstanding.close()
        for member in self.members:
            member.draw_curve()
        return [
            RunResult(
                member.folder,
                self.update < self.updates,
                self.stopped,
                self.update,
                self.updates,
                state,
                self.env,
                member.ledger,
                self.origin,
                member.journal.metrics,
            )
            for member, state in zip(self.members, self._each(self.state), strict=True)
        ]

    def _one_update(self, compiled: Any, stop: interrupt.Stop, display: Display) -> bool:
        """One update; false if it was cancelled, so that nothing of it was used."""
        begin = time.perf_counter(), self._waiting_seconds()
        ledgers = [member.ledger for member in self.members]

        def waiting() -> None:
            display.show(ledgers, self.stats())
            self.accounting.write(always=False)

        if self.outstanding is not None:
            return self._one_delayed_update(compiled, stop, display, waiting, begin)
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
        self._finish(state, losses, records, begin, display)
        return True

    def _one_delayed_update(
        self,
        compiled: Any,
        stop: interrupt.Stop,
        display: Display,
        waiting: Callable[[], None],
        begin: tuple[float, float],
    ) -> bool:
        """One update that enters the rewards of earlier ones; false if evaluation or the run was stopped."""
        # Only a run that was stopped while it waited, and is resumed, has something to wait for.
        if len(self.outstanding) > self.outstanding.limit and not self.outstanding.wait(stop, waiting):
            self.stopped = self.outstanding.stopped
            return False
        state, losses, records = interrupt.call(compiled, self.state, stop=stop, cancel=lambda: None, waiting=waiting)
        self.outstanding.send(records)
        last = self.update + 1 == self.updates
        going_on = self.outstanding.wait(stop, waiting, all_of_them=last)
        self.stopped = self.outstanding.stopped
        if last and not going_on:  # it ends with the last reward
            return False
        tickets, records = self.outstanding.take()
        answers = [tickets, records.reward[0]]
        if self.agent.needs_values:
            answers += [records.values[0], records.status[0]]
        state = self.deliver(state, *_padded(*answers))
        self.outstanding.write(self.update + 1, tickets)
        self._finish(state, losses, records, begin, display)
        return going_on

    def _finish(self, state: Any, losses: Any, records: Records, begin: tuple[float, float], display: Display) -> None:
        """An update counts: enter its episodes. It began at these readings of the clock and of the waiting time."""
        spent = {"seconds": time.perf_counter() - begin[0], "waiting_seconds": self._waiting_seconds() - begin[1]}
        self.update += 1
        self.state = state
        losses, records = jax.device_get((losses, records))
        for member, mine, seen in zip(self.members, self._each(losses), self._each(records), strict=True):
            episodes = member.ledger.add_records(seen, self.update)
            member.journal.write(self._metrics(member.ledger, mine, episodes) | spent, episodes)
        self.accounting.write()
        display.finished(self.update)
        display.show([member.ledger for member in self.members], self.stats(), always=True)
        if self.update % self.config.checkpoint_every == 0:
            self._checkpoint()

    def _checkpoint(self) -> None:
        if self.outstanding is not None:
            self.outstanding.sync()
        for member, state in zip(self.members, self._each(self.state), strict=True):
            member.checkpoint(self.update, state)

    def _waiting_seconds(self) -> float:
        stats = self.stats()
        return stats.waiting_seconds if stats else 0.0

    def _metrics(self, ledger: Ledger, losses: dict[str, Any], episodes: list[Any]) -> dict[str, Any]:
        """The metrics line of an update, but for what it cost. A resumed run has the same, but for the last two."""
        rewards = [episode.reward for episode in episodes]
        valued = [episode.values for episode in episodes if episode.values is not None]
        means = {name: float(np.mean([values[name] for values in valued])) for name in ledger.properties if valued}
        stats = self.stats()
        learned = losses.get(LEARNED, 1) != 0
        return {
            "update": self.update,
            "episodes": ledger.episodes,
            "env_steps": self.update * self.agent.steps * self.agent.lanes,
            "mean_reward": float(np.mean(rewards)) if rewards else None,
            "best_reward": ledger.best_reward,
            **{f"mean_{name}": means.get(name) for name in ledger.properties},
            "distinct": len(ledger.crystals),
            "refused": ledger.refused,
            "failures": {k: n for k, n in sorted(ledger.statuses.items()) if k != Status.OK.name},
            **({} if self.outstanding is None else {"outstanding": len(self.outstanding)}),
            **{name: _number(value) if learned else None for name, value in losses.items() if name != LEARNED},
            "dft_calls": stats.calls if stats else 0,
            "cache_hits": stats.memory_hits + stats.store_hits + stats.shared if stats else 0,
        }


def _padded(tickets: np.ndarray, *answers: np.ndarray) -> tuple[np.ndarray, ...]:
    """Tickets and answers [K], padded to the next power of two, so that few programs are compiled."""
    padding = (1 << max(len(tickets) - 1, 0).bit_length()) - len(tickets)
    padded = (np.pad(answer, [(0, padding)] + [(0, 0)] * (answer.ndim - 1)) for answer in answers)
    return np.pad(tickets, (0, padding), constant_values=NO_TICKET), *padded


def _cancelled(records: Records) -> bool:
    """Whether a rollout asked for a crystal that was not evaluated because the run was stopped."""
    return bool(np.any(np.asarray(records.finished) & (np.asarray(records.status) == Status.CANCELLED)))


def _fingerprint(env: CrystalEnv, evaluator: Any) -> dict[str, Any]:
    """The engine's fingerprint, if the evaluator has an engine."""
    engine = getattr(evaluator, "engine", None)
    if engine is None:
        return {}
    found = {name: engine.fingerprint(name) for name in env.objective.names}
    return found if len(found) > 1 else found[env.objective.names[0]]


def _number(value: Any) -> float | None:
    """A JSON number; ``None`` for what JSON has no word for."""
    number = float(value)
    return number if math.isfinite(number) else None
