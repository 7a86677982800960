"""CHGNet, a pre-trained network for crystals, in JAX: geometry, model, weights, and a surrogate for DFT."""
