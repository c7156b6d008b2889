"""PyTorch models: the Mamba-2 teacher, the DF-SSM student and their checkpoints."""
