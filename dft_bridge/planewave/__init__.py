"""Batched plane-wave Kohn-Sham DFT in JAX."""
