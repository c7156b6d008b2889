"""From a packed student to the ONNX step graph; docs/export.md describes the graph."""
