"""Running a compiled bundle: NumPy, ONNX Runtime and tokenizers; docs/runtime.md shows the API in use."""

from .chat import Chat
from .engine import Engine
from .generation import Completion, Generation, GenerationConfig
from .request import Request
from .sampler import Sampler, TokenLogprobs
from .sampling import Sampling
from .scheduler import QueueFull, Scheduler
from .slots import Slot, Slots
from .state import State

__all__ = [
    "Chat",
    "Completion",
    "Engine",
    "Generation",
    "GenerationConfig",
    "QueueFull",
    "Request",
    "Sampler",
    "Sampling",
    "Scheduler",
    "Slot",
    "Slots",
    "State",
    "TokenLogprobs",
]
