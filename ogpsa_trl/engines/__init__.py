"""Gradients, weights and optimizer states, wherever the training engine keeps them."""
