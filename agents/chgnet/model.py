"""CHGNet 0.3.0 (Deng et al., Nat. Mach. Intell. 5, 1031 (2023)) in Flax, for one crystal; ``jax.vmap`` makes batches.

The same function as the authors' PyTorch model, in another layout (:mod:`crystaljax.agents.chgnet.geometry`):
neighbours and angles are rows and columns, so that messages are summed along an axis and nothing is scattered. A dense
layer on the concatenation of features of sites, bonds and angles is applied to each before they are broadcast against
each other.

Of the original's 412,525 parameters 379,308 are here: the 33,152 of its last angle update reach no output, and the 65
of its magnetic moments are of no use to us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from crystaljax.agents.chgnet.geometry import ATOM_CUTOFF, BOND_CUTOFF, Geometry

FEATURES = 64
RADIAL = 31
ANGULAR = 15
BLOCKS = 4
ENVELOPE = 8
"""Power of the polynomial that takes bonds smoothly to zero at the cut-off."""
NORM_EPSILON = 1e-5
ELEMENTS = 94
"""Hydrogen to plutonium."""
Combine = Callable[[list[jax.Array]], jax.Array]
"""Broadcasts features of sites, bonds and angles against each other and adds them."""


class RadialBasis(nn.Module):
    """Distances [...] in Å as sines with an envelope: [..., 31]; zero beyond the cut-off."""

    cutoff: float

    @nn.compact
    def __call__(self, distances: jax.Array) -> jax.Array:
        frequencies = self.param("frequencies", lambda _: jnp.pi * jnp.arange(1.0, RADIAL + 1))
        x, p = distances[..., None] / self.cutoff, ENVELOPE
        envelope = 1 - (p + 1) * (p + 2) / 2 * x**p + p * (p + 2) * x ** (p + 1) - p * (p + 1) / 2 * x ** (p + 2)
        waves = jnp.sqrt(2 / self.cutoff) * jnp.sin(frequencies * x) / distances[..., None]
        return jnp.where(x < 1, envelope * waves, 0.0)


class AngularBasis(nn.Module):
    """Cosines [...] of angles as a Fourier series of the angles: [..., 31]."""

    @nn.compact
    def __call__(self, cosines: jax.Array) -> jax.Array:
        frequencies = self.param("frequencies", lambda _: jnp.arange(1.0, ANGULAR + 1))
        # Slightly inside [-1, 1], where the derivative of the arc cosine is finite.
        phases = jnp.arccos(cosines * (1 - 1e-6))[..., None] * frequencies
        constant = jnp.full((*cosines.shape, 1), np.sqrt(0.5))
        return jnp.concatenate([constant, jnp.sin(phases), jnp.cos(phases)], axis=-1) / np.sqrt(np.pi)


class SplitDense(nn.Module):
    """The parts of a dense layer on a concatenation: their sum, once broadcast, is the layer's answer."""

    @nn.compact
    def __call__(self, parts: Sequence[jax.Array]) -> list[jax.Array]:
        sizes = [part.shape[-1] for part in parts]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (sum(sizes), FEATURES))
        bias = self.param("bias", nn.initializers.zeros, (FEATURES,))
        products = [part @ rows for part, rows in zip(parts, jnp.split(kernel, np.cumsum(sizes)[:-1]), strict=True)]
        return [products[0] + bias, *products[1:]]


class Branch(nn.Module):
    """One half of a gated perceptron: parts, each [..., 64], to [..., 64], normalised."""

    hidden: bool

    @nn.compact
    def __call__(self, parts: Sequence[jax.Array], combine: Combine) -> jax.Array:
        x = combine(SplitDense(name="first")(parts))
        if self.hidden:
            x = nn.Dense(FEATURES, name="second")(nn.silu(x))
        return nn.LayerNorm(epsilon=NORM_EPSILON, use_fast_variance=False, name="norm")(x)


class Gated(nn.Module):
    """A gated perceptron on parts, see :class:`Branch`."""

    hidden: bool = True

    @nn.compact
    def __call__(self, parts: Sequence[jax.Array], combine: Combine) -> jax.Array:
        core, gate = (Branch(self.hidden, name=name)(parts, combine) for name in ("core", "gate"))
        return nn.silu(core) * nn.sigmoid(gate)


class Trunk(nn.Module):
    """Features of sites [N, 64] from first ones [N, 64], by four rounds of messages; normalised."""

    @nn.compact
    def __call__(self, atoms: jax.Array, geometry: Geometry) -> jax.Array:
        near = geometry.reverse.shape[1]
        # Products of a one-hot matrix, not gathers, whose derivatives are scatters: repeatable on accelerators.
        neighbour = jax.nn.one_hot(geometry.sites, len(atoms))
        radial = RadialBasis(ATOM_CUTOFF, name="atom_basis")(geometry.distances)
        bonds = dense(radial, "bond_embedding")
        atom_weights = dense(radial, "atom_weights")
        bond_weights = dense(RadialBasis(BOND_CUTOFF, name="bond_basis")(geometry.distances[:, :near]), "bond_weights")
        angles = dense(AngularBasis(name="angle_basis")(geometry.cosines), "angle_embedding")
        pair_weights = bond_weights[:, :, None] * bond_weights[:, None] * geometry.angle_mask[..., None]

        def around_atom(parts: list[jax.Array]) -> jax.Array:
            centre, bond, other = parts
            return centre[:, None] + bond + jnp.einsum("imj,jd->imd", neighbour, other)

        def around_angle(parts: list[jax.Array]) -> jax.Array:
            first, second, angle, centre = parts
            return first[:, :, None] + second[:, None] + angle + centre[:, None, None]

        for block in range(BLOCKS):
            messages = Gated(name=f"atom_gate_{block}")([atoms, bonds, atoms], around_atom)
            atoms = atoms + dense((messages * atom_weights).sum(axis=1), f"atom_out_{block}")
            if block == BLOCKS - 1:
                break
            parts = [bonds[:, :near], bonds[:, :near], angles, atoms]
            messages = Gated(name=f"bond_gate_{block}")(parts, around_angle)
            # A bond is one thing seen from two ends: it gets the messages of both.
            arrived = (messages * pair_weights).sum(axis=2)
            arrived = arrived + arrived.reshape(-1, FEATURES)[geometry.reverse]
            bonds = bonds.at[:, :near].add(dense(arrived, f"bond_out_{block}"))
            if block < BLOCKS - 2:  # angles of the last round would reach nothing
                parts = [bonds[:, :near], bonds[:, :near], angles, atoms]
                angles = angles + Gated(hidden=False, name=f"angle_gate_{block}")(parts, around_angle)
        return nn.LayerNorm(epsilon=NORM_EPSILON, use_fast_variance=False, name="norm")(atoms)


def dense(x: jax.Array, name: str) -> jax.Array:
    """A layer without a bias, inside the module that calls."""
    return nn.Dense(FEATURES, use_bias=False, name=name)(x)


class CHGNet(nn.Module):
    """Energy of a crystal in eV, float32 [].

    Called with atomic numbers int32 [N], of which padding may have any, and a geometry. The derivative of
    ``geometry.measure`` with respect to positions and lattice makes forces and stress of it.
    """

    @nn.compact
    def __call__(self, numbers: jax.Array, geometry: Geometry) -> jax.Array:
        index = jnp.clip(numbers - 1, 0, ELEMENTS - 1)
        atoms = Trunk(name="trunk")(nn.Embed(ELEMENTS, FEATURES, name="embedding")(index), geometry)
        for layer in range(3):
            atoms = nn.silu(nn.Dense(FEATURES, name=f"energy_{layer}")(atoms))
        energies = nn.Dense(1, name="energy_3")(atoms)[:, 0]
        references = self.param("references", nn.initializers.zeros, (ELEMENTS,))[index]
        return jnp.where(geometry.site_mask, energies + references, 0.0).sum()
