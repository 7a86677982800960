"""Exact tables: their files, the evaluator that looks values up, and the tasks that come with one."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.data import atomic_numbers

import crystaljax
from crystaljax import Status, TableEvaluator, library, tables
from crystaljax.dft_bridge import Request
from crystaljax.dft_bridge.engines.planewave import PlanewaveEngine
from crystaljax.elements import SMALL
from crystaljax.objectives import OBJECTIVES
from crystaljax.tables import Entry, Table, TableError
from crystaljax.tasks import TABLES

ORIGIN = {"engine": "made-up", "preset": "none", "calculated_as": "band_gap", "versions": {}, "settings": {}}


def made_up(crystals: str = "RocksaltAB", property_name: str = "band_gap") -> Table:
    """Values between 0 and 4, a third of them failures."""
    skeleton = library.PROTOTYPES[crystals]()
    distinct, _ = tables.labelings(skeleton, SMALL)
    values = np.random.default_rng(0).uniform(0.0, 4.0, len(distinct))
    entries = (
        Entry(tables.symbols_of(numbers), Status.ODD_ELECTRONS, None, f"{numbers.sum()} electrons")
        if numbers.sum() % 3 == 0
        else Entry(tables.symbols_of(numbers), Status.OK, float(value))
        for numbers, value in zip(distinct, values, strict=True)
    )
    return Table(property_name, skeleton, SMALL, tuple(entries), ORIGIN)


def final_steps(env, params, labels):
    """The last step's reward and info of an episode for every labeling by orbit, int [B, horizon], vmapped."""

    def episode(labels):
        _, state = env.reset(jax.random.key(0), params)
        # The start site is drawn; actions follow its order of the orbits.
        order = env.table.row(0).order[state.start, : env.horizon]
        for time in range(env.horizon):
            _, state, reward, *_, info = env.step(jax.random.key(1), state, labels[order[time]], params)
        return reward, info

    return jax.jit(jax.vmap(episode))(jnp.asarray(labels, jnp.int32))


@pytest.mark.parametrize(("crystals", "distinct"), [("RocksaltAB", 171), ("ZincblendeAB", 171), ("CsClAB", 171)])
def test_binaries_have_171_distinct_crystals(crystals: str, distinct: int) -> None:
    numbers, row = tables.labelings(library.PROTOTYPES[crystals](), SMALL)
    assert len(numbers) == distinct and row.shape == (324,)
    pairs = row.reshape(18, 18)
    assert (pairs == pairs.T).all() and len(np.unique(pairs)) == distinct


@pytest.mark.parametrize(("crystals", "count"), [("FluoriteAX2", 324), ("PerovskiteABX3", 5832)])
def test_compounds_with_unlike_sites_have_one_crystal_for_each_assignment(crystals: str, count: int) -> None:
    numbers, row = tables.labelings(library.PROTOTYPES[crystals](), SMALL)
    assert len(numbers) == count and sorted(row) == list(range(count))


@pytest.mark.parametrize("crystals", ["RocksaltAB", "FluoriteAX2"])
def test_every_labeling_gets_its_entry_under_jit_and_vmap(crystals: str) -> None:
    table = made_up(crystals)
    env, params = crystaljax.make_custom(
        "band_gap", library.PROTOTYPES[crystals](), TableEvaluator(table), mode="orbit"
    )
    labels = np.array(list(itertools.product(range(18), repeat=2)))
    rewards, info = final_steps(env, params, labels)
    best = max(
        float(OBJECTIVES["band_gap"].reward(v, s, 1.12)) for v, s in zip(table.values, table.statuses, strict=True)
    )
    for i, (a, x) in enumerate(labels):
        symbols = [SMALL.symbols[a], *[SMALL.symbols[x]] * (env.max_sites - 1)]
        entry = table.entry(symbols)
        assert sorted(entry.elements) == sorted(symbols)
        assert info["status"][i] == entry.status
        if entry.status == Status.OK:
            assert info["value"][i] == np.float32(entry.value)
        else:
            assert info["value"][i] == 0.0 and rewards[i] == -1.0 and "electrons" in entry.message
        assert info["regret"][i] == pytest.approx(best - float(rewards[i]), abs=1e-6)
    assert float(info["regret"].min()) == 0.0


def test_site_mode_on_a_binary_is_the_same_table() -> None:
    env, params = crystaljax.make_custom("band_gap", library.rocksalt(), TableEvaluator(made_up()), mode="site")
    rewards, _ = final_steps(env, params, [[0, 1], [1, 0], [5, 5]])
    orbit_env, _ = crystaljax.make_custom("band_gap", library.rocksalt(), TableEvaluator(made_up()), mode="orbit")
    assert rewards.tolist() == final_steps(orbit_env, params, [[0, 1], [1, 0], [5, 5]])[0].tolist()
    assert rewards[0] == rewards[1]


def test_regret_follows_the_target() -> None:
    table = made_up()
    env, params = crystaljax.make_custom("band_gap", library.rocksalt(), TableEvaluator(table), mode="orbit")
    for target in (0.5, 3.5):
        aimed = env.with_target(target)
        nearest = np.nanargmin(np.abs(table.values - target))
        labels = SMALL.indices(list(table.entries[nearest].elements))
        rewards, info = final_steps(env, aimed, [labels])
        assert float(info["regret"][0]) == 0.0
        assert float(rewards[0]) == pytest.approx(float(env.best_reward(aimed)))


def test_regret_is_zero_before_the_end_and_absent_without_a_table() -> None:
    env, params = crystaljax.make_custom("band_gap", library.rocksalt(), TableEvaluator(made_up()), mode="orbit")
    crystaljax.api_test(env, params)
    _, state = env.reset(jax.random.key(0), params)
    assert env.step(jax.random.key(0), state, 3, params)[-1]["regret"] == 0.0
    other, params = crystaljax.make("Density-RocksaltAB-v0", "unrelaxed-density")
    _, state = other.reset(jax.random.key(0), params)
    assert "regret" not in other.step(jax.random.key(0), state, 3, params)[-1]
    with pytest.raises(ValueError, match="does not know the best crystal"):
        other.best_reward(params)


def test_a_table_that_does_not_fit_is_refused() -> None:
    evaluator, rocksalt = TableEvaluator(made_up()), library.rocksalt()
    with pytest.raises(TableError, match="holds band_gap, not density"):
        crystaljax.make_custom("density", rocksalt, evaluator)
    with pytest.raises(TableError, match="cell and sites of RocksaltAB"):
        crystaljax.make_custom("band_gap", library.zincblende(), evaluator)
    stretched = dataclasses.replace(rocksalt, lattice=rocksalt.lattice * 1.001)
    with pytest.raises(TableError, match="cell and sites of RocksaltAB"):
        crystaljax.make_custom("band_gap", [rocksalt, stretched], evaluator)
    with pytest.raises(TableError, match="B Si Ge .* of vocabulary medium; use vocabulary 'small'"):
        crystaljax.make_custom("band_gap", rocksalt, evaluator, vocabulary="medium")
    with pytest.raises(TableError, match="use mode='orbit'"):
        crystaljax.make_custom("band_gap", library.fluorite(), TableEvaluator(made_up("FluoriteAX2")))
    with pytest.raises(TableError, match="no table of band_gap for C1, only .*make-tables"):
        crystaljax.make("BandGap-C1-v0", "table")


def test_a_vocabulary_within_the_tables_is_allowed() -> None:
    salts = crystaljax.Vocabulary("salts", ("Cl", "Na"))
    env, params = crystaljax.make_custom(
        "band_gap", library.rocksalt(), TableEvaluator(made_up()), mode="orbit", vocabulary=salts
    )
    _, info = final_steps(env, params, [[0, 1]])
    assert info["status"][0] == made_up().entry(["Na", "Cl"]).status


def test_unknown_crystals_of_a_table_are_refused() -> None:
    with pytest.raises(TableError, match="got Na Fe"):
        made_up().entry(["Na", "Fe"])
    with pytest.raises(TableError, match="one element for each orbit"):
        made_up("FluoriteAX2").entry(["Ca", "F", "Cl"])


def test_files_are_read_as_written_and_damage_is_noticed(tmp_path) -> None:
    table = made_up()
    path = tables.write(table, tmp_path)
    again = tables.read(path)
    assert again.entries == table.entries and again.origin == table.origin
    assert again.skeleton.digest == table.skeleton.digest and again.vocabulary == table.vocabulary
    content = json.loads(path.read_text())
    value = next(entry for entry in content["entries"] if entry["value"] is not None)
    value["value"] += 1e-6
    path.write_text(json.dumps(content))
    with pytest.raises(TableError, match="checksum differs"):
        tables.read(path)
    path.write_text(path.read_text()[:-10])
    with pytest.raises(TableError, match="not a table"):
        tables.read(path)
    tables.write(dataclasses.replace(table, entries=table.entries[:-1]), tmp_path)
    with pytest.raises(TableError, match="lacks crystals"):
        tables.read(path)


def test_tasks_and_shipped_tables_belong_together() -> None:
    for property_name, prototypes in TABLES.items():
        for crystals in prototypes:
            table = tables.load(f"{property_name}-{crystals}")
            assert table.property == property_name and table.origin["engine"] == "planewave"
            assert table.skeleton.digest == library.PROTOTYPES[crystals]().digest
            assert table.vocabulary == SMALL
    rewarded = [name for name in tables.shipped() if not name.startswith("total_energy")]
    assert rewarded == sorted(f"{p}-{crystals}" for p, prototypes in TABLES.items() for crystals in prototypes)


@pytest.mark.parametrize("name", tables.shipped())
def test_shipped_tables_are_whole(name: str) -> None:
    table = tables.read(tables.FOLDER / f"{name}.json")  # verifies checksum and crystals
    for entry in table.entries:
        assert (entry.value is not None) == (entry.status == Status.OK)
        assert entry.status == Status.OK or entry.message
        if entry.status == Status.OK:
            assert np.isfinite(entry.value) and entry.details["cutoff"] > 0
    assert len(table.origin["settings"]["pseudopotential_files"]) >= 16


def test_a_task_with_a_table_needs_no_engine() -> None:
    env, params = crystaljax.make("BandGap-Rocksalt-Table-v0")
    rewards, info = final_steps(env, params, [SMALL.indices(["Na", "Cl"])])
    # PBE at 5.64 Å; published gaps are 5.0 to 5.2 eV.
    assert float(info["value"][0]) == pytest.approx(5.1, abs=0.15)
    assert env.evaluator.label == "table: planewave, fast"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("crystals", "options"),
    [
        ("RocksaltAB", {"total_energy": True}),
        # Calculated on a GPU, and recalculated on the CPU of this test.
        ("PerovskiteABX3", {"total_energy": True}),
    ],
)
def test_the_engine_recomputes_entries(crystals: str, options: dict) -> None:
    gaps, energies = tables.load(f"band_gap-{crystals}"), tables.load(f"total_energy-{crystals}")
    engine = PlanewaveEngine.preset(gaps.origin["preset"], **options)
    facts = engine.fingerprint_of(gaps.skeleton.lattice, gaps.skeleton.frac_coords, "band_gap")
    assert json.loads(json.dumps(facts)) == gaps.origin["settings"]
    rng = np.random.default_rng(0)
    every = [
        Request.of(gaps.skeleton, [atomic_numbers[s] for s in entry.elements], "band_gap").crystal
        for entry in gaps.entries
    ]
    # Three entries that share a compiled program; half a minute would go into three programs.
    kinds = [members for members in engine.kinds(every, "band_gap").values() if len(members) >= 3]
    chosen = rng.choice(kinds[rng.integers(len(kinds))], 3, replace=False)
    with_energy = dataclasses.replace(engine, total_energy=True)
    results = with_energy.compute_many([every[i] for i in chosen], "band_gap")
    for i, result in zip(chosen, results, strict=True):
        assert result.status == gaps.entries[i].status == Status.OK
        assert result.value == pytest.approx(gaps.entries[i].value, abs=1e-3)
        assert result.details["energy"] == pytest.approx(energies.entries[i].value, abs=1e-4)


@pytest.mark.parametrize("name", tables.shipped())
def test_the_engine_refuses_what_tables_call_refused(name: str) -> None:
    table = tables.load(name)
    engine = PlanewaveEngine.preset(table.origin["preset"])
    calculated = table.origin["calculated_as"]
    for entry in table.entries:
        numbers = [atomic_numbers[symbol] for symbol in entry.elements]
        refusal = engine.refuse(Request.of(table.skeleton, numbers, calculated).crystal, calculated)
        assert (refusal is not None) == (entry.status in (Status.ODD_ELECTRONS, Status.ATOMS_TOO_CLOSE))
        if refusal is not None:
            assert (refusal.status, refusal.message) == (entry.status, entry.message)
