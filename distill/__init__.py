"""Distillation: from a Mamba-2 teacher to the 1-bit student that ships."""
