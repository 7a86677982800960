"""Policy networks: what must not change their answer, and what must."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crystaljax
from crystaljax.agents.chgnet.weights import pretrained
from crystaljax.agents.evaluation import make_designer, refuse_other_shapes
from crystaljax.agents.networks import (
    ActorCritic,
    GraphTransformer,
    QValues,
    count_parameters,
    make_network,
    make_trunk,
)
from crystaljax.agents.networks.base import masked_mean
from crystaljax.agents.networks.transformer import pair_features
from crystaljax.agents.ppo import PPOConfig, make_ppo, make_train
from crystaljax.library import benchmark
from crystaljax.observation import GraphObservation
from crystaljax.skeleton import Skeleton

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles in half the time."""


@pytest.fixture(scope="module")
def env():
    return crystaljax.make("Density-C3-v0", "unrelaxed-density")[0]


@pytest.fixture(scope="module")
def observation(env):
    """Two decisions into an episode."""
    params = env.default_params
    seen, state = env.reset(jax.random.key(3), params)
    for action in (4, 11):
        seen, state, *_ = env.step(jax.random.key(0), state, action, params)
    return seen


@pytest.fixture(scope="module")
def network(env):
    return ActorCritic(GraphTransformer(env.num_actions, 3.0, features=32, blocks=1), env.num_actions)


@pytest.fixture(scope="module")
def first_params(network, observation):
    return quick_jit(network.init)(jax.random.key(0), observation)


@pytest.fixture(scope="module")
def params(first_params):
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: np.asarray(leaf) + 0.05 * random.normal(size=leaf.shape).astype("f4"), first_params
    )


def apply(network, params, observation):
    logits, value = quick_jit(network.apply)(params, observation)
    return np.asarray(logits), np.asarray(value)


def relabel(observation: GraphObservation, order: np.ndarray) -> GraphObservation:
    """The same graph with its site ``order[i]`` called ``i``."""
    new_name = np.argsort(order)
    return observation.replace(
        elements=observation.elements[order],
        site_mask=observation.site_mask[order],
        focus=jnp.asarray(new_name)[observation.focus],
        focus_mask=observation.focus_mask[order],
        senders=jnp.asarray(new_name)[observation.senders],
        receivers=jnp.asarray(new_name)[observation.receivers],
    )


def pad(observation: GraphObservation, sites: int, edges: int, blank: int) -> GraphObservation:
    def extended(leaf, count, fill):
        return jnp.concatenate([leaf, jnp.full(count, fill, leaf.dtype)])

    return observation.replace(
        elements=extended(observation.elements, sites, blank),
        site_mask=extended(observation.site_mask, sites, False),
        focus_mask=extended(observation.focus_mask, sites, False),
        senders=extended(observation.senders, edges, 0),
        receivers=extended(observation.receivers, edges, 0),
        distances=extended(observation.distances, edges, 0.0),
        edge_mask=extended(observation.edge_mask, edges, False),
    )


def test_default_network_has_the_size_that_the_documentation_says(env, observation):
    shapes = jax.eval_shape(make_network(env).init, jax.random.key(0), observation)
    assert 100_000 < count_parameters(shapes) < 150_000


def test_shapes_and_an_almost_uniform_first_policy(env, network, first_params, observation):
    logits, value = apply(network, first_params, observation)
    assert logits.shape == (env.num_actions,) and value.shape == ()
    assert np.abs(logits - logits.mean()).max() < 0.2


def test_relabeling_the_sites_changes_nothing(network, params, observation):
    order = np.random.default_rng(0).permutation(len(observation.elements))
    logits, value = apply(network, params, observation)
    again, value_again = apply(network, params, relabel(observation, order))
    np.testing.assert_allclose(again, logits, atol=2e-5)
    np.testing.assert_allclose(value_again, value, atol=2e-5)


def test_padding_changes_nothing(env, network, params, observation):
    logits, value = apply(network, params, observation)
    again, value_again = apply(network, params, pad(observation, 3, 7, env.vocabulary.blank))
    np.testing.assert_allclose(again, logits, atol=2e-5)
    np.testing.assert_allclose(value_again, value, atol=2e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o.replace(elements=o.elements.at[o.focus].set(2)),
        lambda o: o.replace(focus_mask=~o.focus_mask),
        lambda o: o.replace(distances=o.distances * 1.1),
        lambda o: o.replace(edge_mask=o.edge_mask.at[0].set(False)),
        lambda o: o.replace(lattice=o.lattice.at[0].mul(1.2)),
        lambda o: o.replace(target=o.target * 2),
    ],
    ids=["element", "focus", "distance", "bond", "cell", "target"],
)
def test_everything_that_is_observed_matters(network, params, observation, change):
    logits, _ = apply(network, params, observation)
    changed, _ = apply(network, params, change(observation))
    assert np.abs(changed - logits).max() > 1e-4


def test_parallel_bonds_add_up(observation):
    bonds = observation.replace(
        senders=jnp.array([0, 0, 1]),
        receivers=jnp.array([1, 1, 0]),
        distances=jnp.array([2.0, 2.0, 2.0]),
        edge_mask=jnp.array([True, True, True]),
    )
    pairs = pair_features(bonds, 16, 6.0)
    np.testing.assert_allclose(pairs[0, 1], 2 * pairs[1, 0], rtol=1e-6)
    assert (np.asarray(pairs[1, 0]) > 0.05).sum() >= 3, "a distance shows in several Gaussians"
    assert not np.asarray(pairs[2:]).any()


def test_an_empty_focus_is_harmless(network, params, observation):
    logits, value = apply(network, params, observation.replace(focus_mask=jnp.zeros_like(observation.focus_mask)))
    assert np.isfinite(logits).all() and np.isfinite(value)
    assert not np.asarray(masked_mean(jnp.ones((4, 2)), jnp.zeros(4, bool))).any()


def test_flat_observations_get_the_mlp():
    env, params = crystaljax.make("Density-RocksaltAB-v0", "unrelaxed-density", observation="flat")
    network = make_network(env)
    seen, _ = env.reset(jax.random.key(0), params)
    logits, value = apply(network, quick_jit(network.init)(jax.random.key(0), seen), seen)
    assert logits.shape == (env.num_actions,) and value.shape == ()
    with pytest.raises(ValueError, match="use 'mlp'"):
        make_network(env, "transformer")
    with pytest.raises(ValueError, match="unknown network"):
        make_network(env, "cnn")


GRAPH_NETWORKS = ("transformer", "megnet", "chgnet", "chgnet-pretrained")


def observe(env, elements, start, index=0):
    """The observation before the first decision, in a crystal with these elements on its own sites."""
    own = np.full(env.max_sites, env.vocabulary.blank)
    own[: len(elements)] = elements

    def before(own, start, index):
        _, state = env.reset(jax.random.key(0), env.default_params)
        return env.observe(None, state.replace(elements=own, start=start, skeleton=index), None, env.default_params)

    return quick_jit(before)(jnp.asarray(own), jnp.int32(start), jnp.int32(index))


@pytest.fixture(scope="module", params=GRAPH_NETWORKS)
def case(request):
    """An environment of one crystal with four sites (C5), its network, and parameters away from where they start."""
    env = crystaljax.make("Density-C5-v0", "unrelaxed-density", mode="substitution")[0]
    network = make_network(env, request.param)
    seen = observe(env, [3, 18, 7, 7], 1)
    params = quick_jit(network.init)(jax.random.key(1), seen)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.03 * random.normal(size=leaf.shape).astype("f4"), params)
    return request.param, network, params, seen, apply(network, params, seen)


def test_the_name_of_a_site_and_padding_change_nothing(case):
    """The same crystal with its sites in another order, and as one of several, padded to eight sites."""
    name, _, params, _, (logits, value) = case
    own, order = benchmark("C5"), np.array([2, 0, 3, 1])
    renamed = Skeleton("renamed", own.lattice, own.frac_coords[order], tuple(own.species[i] for i in order))
    elements = np.array([3, 18, 7, 7])
    others = {
        "renamed": ([renamed], elements[order], int(np.argsort(order)[1]), 0),
        "padded": ([benchmark("C3"), own], elements, 1, 1),
    }
    for what, (skeletons, chosen, start, index) in others.items():
        env = crystaljax.make("Density-C5-v0", "unrelaxed-density", mode="substitution", skeletons=skeletons)[0]
        again, value_again = apply(make_network(env, name), params, observe(env, chosen, start, index))
        np.testing.assert_allclose(again, logits, atol=1e-4, err_msg=what)
        np.testing.assert_allclose(value_again, value, atol=1e-4, err_msg=what)


def test_element_focus_and_target_matter_to_every_network(case):
    _, network, params, seen, (logits, _) = case
    changes = {
        "element": seen.replace(elements=seen.elements.at[2].set(0)),
        "blank": seen.replace(elements=seen.elements.at[0].set(18)),
        "focus": seen.replace(focus_mask=jnp.array([True, False, False, False])),
        "target": seen.replace(target=2 * seen.target),
    }
    for what, changed in changes.items():
        assert np.abs(apply(network, params, changed)[0] - logits).max() > 1e-5, what


def test_batches_are_single_observations(case):
    _, network, params, seen, _ = case
    elements = jnp.array([[0, 1, 2, 3], [4, 18, 18, 18], [5, 5, 5, 6]])
    together = jax.vmap(lambda chosen: seen.replace(elements=chosen))(elements)
    found = quick_jit(jax.vmap(network.apply, (None, 0)))(params, together)
    for lane in range(3):
        alone = apply(network, params, seen.replace(elements=elements[lane]))
        for one, many in zip(alone, found, strict=True):
            np.testing.assert_allclose(many[lane], one, atol=1e-4)


def test_pretrained_weights_are_where_the_policy_starts():
    env = crystaljax.make("Density-C5-v0", "unrelaxed-density")[0]
    network = make_network(env, "chgnet-pretrained")
    trunk = quick_jit(network.init)(jax.random.key(0), observe(env, [0, 1, 2, 3], 0))["params"]["trunk"]
    jax.tree.map(np.testing.assert_array_equal, trunk["rounds"], pretrained()["trunk"])
    np.testing.assert_array_equal(trunk["elements"][3], pretrained()["embedding"]["embedding"][37 - 1])  # Rb
    assert not np.asarray(trunk["elements"][env.vocabulary.blank]).any()


def test_dueling_advantages_have_mean_zero(env, observation):
    network = make_network(env, "megnet", partial(QValues, dueling=True))
    params = quick_jit(network.init)(jax.random.key(0), observation)
    more = jax.tree.map(lambda leaf: 2 * np.asarray(leaf), params["params"]["advantage"])
    values = [
        quick_jit(network.apply)({"params": {**params["params"], "advantage": advantage}}, observation)
        for advantage in (params["params"]["advantage"], more)
    ]
    assert values[0].shape == (env.num_actions,)
    assert float(values[0].mean()) == pytest.approx(float(values[1].mean()), abs=1e-4)


def shallow(trunk):
    """With one block where the depth is a choice: a deeper one takes in proportion longer to compile."""
    return trunk.clone(blocks=1) if hasattr(trunk, "blocks") else trunk


@pytest.mark.slow
@pytest.mark.parametrize("name", GRAPH_NETWORKS)
def test_trained_on_mixed_crystals_a_policy_designs_held_out_ones(name):
    """Random initial elements; then C1 and C7 at a target outside of the training's."""
    mode = "substitution"
    env, params = crystaljax.make("Density-Mixed-v0", "unrelaxed-density", mode=mode, in_phase=True)
    trunk = shallow(make_trunk(env, name))
    config = PPOConfig(updates=2, lanes=4, steps=env.horizon, epochs=1)
    state, losses, records = quick_jit(make_train(config, env, params, trunk))(jax.random.key(0))
    assert np.isfinite(losses["loss"]).all() and records.finished.sum() == 8
    seen = observe(env, [0, 1, 2, 3], 0)
    before = quick_jit(ActorCritic(trunk, env.num_actions).init)(jax.random.key(0), seen)
    moved = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), state.network["params"], before["params"])
    assert all(jax.tree.leaves(moved["trunk"])) or name != "chgnet-pretrained"
    for held_out in ("C1", "C7"):
        other, _ = crystaljax.make(f"Density-{held_out}-v0", "unrelaxed-density", mode=mode)
        agent = make_ppo(config, other, shallow(make_trunk(other, name)))
        refuse_other_shapes(other, agent, state.network)
        design = quick_jit(make_designer(other, agent.policy, episodes=3))
        designs = design(jax.random.key(1), state.network, other.with_target(other.objective.far_targets))
        assert designs.finished.sum() == 3 and np.isfinite(np.asarray(designs.values[..., 0])[designs.finished]).all()
