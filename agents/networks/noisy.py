"""Layers whose weights are noisy, so that a network explores by itself."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

NOISE = "noise"
"""Name of the random stream; without it (``rngs={"noise": key}``) a layer is the mean of its noise."""


class NoisyDense(nn.Module):
    """A dense layer with factorised Gaussian noise of learned size (Fortunato et al. 2018).

    Attributes:
        features: outputs.
        deviation: size of the noise at first, over the square root of the number of inputs.
    """

    features: int
    deviation: float = 0.5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = x.shape[-1]
        uniform = nn.initializers.uniform(2.0 * inputs**-0.5)

        def centred(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
            return uniform(key, shape, dtype) - inputs**-0.5

        size = nn.initializers.constant(self.deviation * inputs**-0.5)
        kernel = self.param("kernel", centred, (inputs, self.features))
        bias = self.param("bias", centred, (self.features,))
        kernel_size = self.param("kernel_size", size, (inputs, self.features))
        bias_size = self.param("bias_size", size, (self.features,))
        if not self.has_rng(NOISE):
            return x @ kernel + bias
        draws = jax.random.normal(self.make_rng(NOISE), (inputs + self.features,))
        before, after = jnp.split(jnp.sign(draws) * jnp.sqrt(jnp.abs(draws)), [inputs])
        return x @ (kernel + kernel_size * jnp.outer(before, after)) + bias + bias_size * after
