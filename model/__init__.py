"""PyTorch models: the Mamba-2 teacher, the DF-SSM student and their checkpoints."""

PACKAGES = {"compile": ("torch",)}
"""What reading and writing models takes; see `dfssm.base.extras`."""
