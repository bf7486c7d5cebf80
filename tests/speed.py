"""
What makes tests faster and changes nothing else; imported before the libraries are.

TRL and accelerate ask in every training what is installed, 35 times, and each time a file is
parsed: a third of a short training. What is installed does not change while the tests run.
"""

import functools
import gc
import importlib.metadata

importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)
importlib.metadata.version = functools.cache(importlib.metadata.version)


def leave_libraries_out_of_garbage_collection():
    """Every training collects garbage: half a second's work among what the libraries hold."""
    gc.collect()
    gc.freeze()
