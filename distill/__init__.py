"""Distillation: from a Mamba-2 teacher to the 1-bit student that ships."""

PACKAGES = {"distill": ("torch",)}
"""What training takes, its data and sinks aside; see `dfssm.base.extras`."""

PREFIX = "hf:"
"""Before the name of a data set that is streamed; other data are files and folders."""
