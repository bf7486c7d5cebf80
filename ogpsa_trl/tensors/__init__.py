"""Pure functions of tensors: the arithmetic of the method."""
