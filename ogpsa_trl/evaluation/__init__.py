"""Safety and capability measures of a causal language model, and reports of them."""
