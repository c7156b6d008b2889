"""Running a compiled bundle: NumPy, ONNX Runtime and tokenizers; docs/runtime.md shows the API in use."""

from .engine import Engine
from .generation import Generation, GenerationConfig
from .sampler import Sampler, TokenLogprobs
from .sampling import Sampling
from .slots import Slot, Slots
from .state import State

__all__ = ["Engine", "Generation", "GenerationConfig", "Sampler", "Sampling", "Slot", "Slots", "State", "TokenLogprobs"]
