"""Capability groups to train with: chosen, completed, written and measured before training."""
