"""Policy networks: what must not change their answer, and what must."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import crystaljax
from agents.networks import ActorCritic, GraphTransformer, count_parameters, make_network
from agents.networks.base import masked_mean
from agents.networks.transformer import pair_features
from crystaljax.observation import GraphObservation

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
    return jax.tree.map(lambda leaf: leaf + 0.05 * random.normal(size=leaf.shape).astype(np.float32), first_params)


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
