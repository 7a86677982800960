"""Weights of CHGNet 0.3.0, their licence, and the script that converts them."""
