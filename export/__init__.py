"""From a packed student to the ONNX step graph; docs/export.md describes the graph."""

PACKAGES = {"compile": ("onnx", "onnx-ir")}
"""What it takes besides those of `dfssm.model`; see `dfssm.base.extras`."""
