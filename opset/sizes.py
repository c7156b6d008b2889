"""The sizes of a Mamba-2 language model, and those that follow from them. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from .schema import DEFERRED, SLOTS, STATE_FORMS


@dataclass(frozen=True)
class Sizes:
    """What the configurations of all models have, in elements."""

    vocab_size: int
    d_model: int
    n_layer: int
    d_state: int = 128
    headdim: int = 64
    expand: int = 2
    ngroups: int = 1
    d_conv: int = 4

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.ngroups * self.d_state

    @property
    def d_in_proj(self) -> int:
        """Outputs of in_proj, in this order: z, x, B, C, dt."""
        return self.d_inner + self.conv_dim + self.nheads

    def states(self, state_dtype: str = "fp32") -> dict[str, tuple[str, tuple[int, ...]]]:
        """What a layer keeps of one sequence: the name in the step graph, the dtype by NumPy's name, the shape.

        `state_dtype`: a `--state-dtype`.
        """
        dtype, deferred = STATE_FORMS[state_dtype], state_dtype.endswith(DEFERRED)
        past = self.d_conv - 1
        stored: dict[str, tuple[str, tuple[int, ...]]] = {
            "conv_state": ("float32", (past + SLOTS, self.conv_dim) if deferred else (self.conv_dim, past)),
            "ssm_state": (dtype, (self.nheads, self.d_state, self.headdim)),
        }
        if deferred:
            stored |= {
                "pending_x": ("float32", (SLOTS, self.d_inner)),
                "pending_B": ("float32", (SLOTS, self.ngroups * self.d_state)),
                "pending_decay": ("float32", (SLOTS, self.nheads)),
                "pending_count": ("uint8", ()),
            }
        if dtype == "int8":
            stored["ssm_scale"] = ("float32", (self.nheads, self.d_state))
        return stored
