"""Drop the function bodies of our ops: TensorRT's parser would expand them instead of asking for the plugins."""

import onnx_graphsurgeon as gs


def run(graph: gs.Graph) -> list[str]:
    """Returns the names of the functions that were dropped."""
    dropped = [function.name for function in graph.functions]
    graph.functions = []
    return dropped
