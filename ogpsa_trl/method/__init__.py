"""The method: capability gradients, the subspace that they span, and the projection."""
