"""What the commands that work on runs share: the evaluator of their settings, and what these may ask for."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crystaljax.agents.config import RunConfig
    from crystaljax.evaluators import Evaluator


@contextlib.contextmanager
def open_evaluator(config: RunConfig) -> Iterator[Evaluator]:
    """The bridge to a DFT engine, closed at the end, or an on-device evaluator."""
    from crystaljax import evaluators
    from crystaljax.dft_bridge.engines.registry import check_options, is_engine

    check_options(config.engine, config.engine_options)
    if not is_engine(config.engine):
        yield evaluators.evaluator(config.engine)
        return
    from crystaljax.dft_bridge import open_bridge

    with open_bridge(
        config.engine,
        config.preset,
        store=config.store,
        workers=config.workers,
        scheduler=config.scheduler,
        timeout=config.timeout,
        memory=config.memory,
        max_calls=config.max_dft_calls,
        max_core_hours=config.max_core_hours,
        **config.engine_options,
    ) as bridge:
        yield bridge


def refuse_unasked(config: RunConfig, given: Mapping[str, Any], source: str) -> None:
    """Refuse what would run because a file says so, and the flags that were given do not."""
    from crystaljax import trust
    from crystaljax.dft_bridge.engines.registry import programs

    named = programs(config.engine, config.engine_options)
    asked = programs(config.engine, given.get("engine_options") or {})
    if given.get("engine") != config.engine:
        asked.pop("--engine", None)
    if config.scheduler is not None:  # its workers and this process send each other code
        named["--scheduler"], asked["--scheduler"] = config.scheduler, given.get("scheduler")
    trust.refuse_unasked(named, asked, source)


def findable(structures: Sequence[str]) -> tuple[str, ...]:
    """Structure files by their absolute paths, so that a run can be resumed from anywhere; other names as they are."""
    return tuple(str(Path(name).absolute()) if Path(name).exists() else name for name in structures)


def usable_anywhere(config: RunConfig) -> RunConfig:
    """The settings with absolute paths of structure files and of a folder of pseudopotentials."""
    options = dict(config.engine_options)
    if isinstance(options.get("pseudopotentials"), str):
        (options["pseudopotentials"],) = findable([options["pseudopotentials"]])
    return dataclasses.replace(config, structures=findable(config.structures), engine_options=options)
