"""Memory and time of a distillation, estimated before it starts.

Memory is counted from the shapes: `kept_of_layer` lists every tensor that a layer keeps for the backward pass. Time is
that of the work at a stated share of a device's rates: products, and the bytes that pass through memory between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dfssm.model.config import DFSSMConfig, Mamba2Config
from dfssm.model.tensors import FLOAT, LAYER, ROWS, SCAFFOLD, weights

PAPER_TOKENS = 32_000_000  # of the published recipe, both stages

# Shares of a device's rates that products, memory and links reach: assumptions, not measurements.
PRODUCT_SHARE, MEMORY_SHARE, LINK_SHARE = 0.5, 0.7, 0.5

FP32, FP64 = 4, 8  # bytes

# Bytes that pass through memory: each operation reads its inputs and writes its output. By layer and token as multiples
# of what the student's layer keeps for the backward pass; by micro-batch as multiples of its scaffold; by the head as
# multiples of a token's logits, and of the table once a chunk and once a micro-batch. Counted over the operations for
# mamba2-1.3b.
_LAYER_MOVED = {"forward": 5.8, "backward": 9.0, "teacher": 3.7}
_SCAFFOLD_MOVED = {"forward": 7, "backward": 19}
_LOGITS_MOVED, _TABLE_MOVED, _TABLE_PREPARED = 56, 6, 25
_UPDATE_MOVED = 10  # by AdamW, fused, and the gradient's norm, as multiples of the weights
_LOGITS_HELD, _TABLES_HELD = 5, 4  # at once, while a chunk's loss is computed: fp32 tensors of either shape


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet: dense FLOP/s by type, bytes/s to its memory and to the others, bytes of memory.

    Memory is in 10^9 bytes where the data sheet means 2^30: the difference, 7 %, is left to the CUDA context and to
    fragmentation.
    """

    name: str
    memory: float
    bf16: float
    tf32: float
    fp32: float
    bandwidth: float
    link: float  # one direction


DEVICES = (
    Device("A100 40 GB", 40e9, 312e12, 156e12, 19.5e12, 1555e9, 300e9),
    Device("A100 80 GB", 80e9, 312e12, 156e12, 19.5e12, 2039e9, 300e9),
    Device("H100 80 GB", 80e9, 989e12, 494e12, 67e12, 3352e9, 450e9),
    Device("RTX 4090 24 GB", 24e9, 165e12, 82.6e12, 82.6e12, 1008e9, 32e9),
)


@dataclass(frozen=True)
class Options:
    """What of a run memory and time depend on."""

    rank: int = 16
    planes: int = 1
    windows: int = 4  # of a micro-batch, on each device
    tokens: int = 512  # of a window
    batch: int = 16  # windows a step, of all devices together
    total: int = PAPER_TOKENS
    world: int = 1  # devices; FSDP2 splits weights, gradients and moments between them
    checkpointing: bool = False  # layers are computed again in the backward pass
    bf16: bool = True
    teacher: bool = True  # computed beside the student; else its logits come from elsewhere
    hidden: bool = False  # a loss on its hidden states too
    soft: bool = False  # weights on the way to one bit, or 17 levels: they exist in fp32, and so do activations
    chunk: int = 512  # tokens whose logits exist at a time

    @property
    def micro_tokens(self) -> int:
        return self.windows * self.tokens

    @property
    def parts(self) -> float:
        """Micro-batches of a step on one device."""
        return self.batch / (self.windows * self.world)


def parameters(config: Mamba2Config) -> dict[str, int]:
    """Numbers by part: of the student in training for a DFSSMConfig, of the teacher for a Mamba2Config."""
    counts = {"projections": 0, "tables": 0, "rest": 0}
    for weight in weights(replace(config, n_layer=1)):  # without a list of all layers
        size = math.prod(weight.shape(config))
        if weight.form == SCAFFOLD and isinstance(config, DFSSMConfig):  # latents, scales, low rank
            (m, k), (rank, planes) = weight.shape(config), config.scaffold(weight.path)
            size = planes * (size + m) + rank * (m + k)
        times = config.n_layer if weight.name.startswith("layers.") else 1
        counts[{SCAFFOLD: "projections", ROWS: "tables", FLOAT: "rest"}[weight.form]] += times * size
    return counts


def _projections(config: Mamba2Config) -> list[tuple[int, ...]]:
    """Outputs and inputs of each projection of a layer."""
    return [weight.shape(config) for weight in LAYER if weight.form == SCAFFOLD]


def kept_of_layer(config: DFSSMConfig, tokens: int, bf16: bool = True, soft: bool = False) -> dict[str, float]:
    """Bytes a token that each layer of the student keeps for the backward pass, in windows of `tokens`."""
    c = config
    cast = 2 if bf16 else FP32  # of the convolution, and of soft projections; all else is fp32 of its own accord
    inner, group = c.d_inner, c.ngroups * c.d_state
    length = min(c.chunk_size, tokens)
    padded = math.ceil(tokens / length) * length / tokens  # the scan pads the last chunk of a window
    copied = bf16 or padded > 1  # B and C; otherwise they lie in what the convolution gave
    scan = (
        (5 if padded > 1 else 4) * inner  # x as padded, x delta (as it is, transposed, decayed to the end), C . state
        + 2 * length * c.nheads  # the decay between two tokens of a chunk, alone and times C . B
        + 2 * group * (copied + (c.ngroups > 1))  # B, C; of more than one group a copy each for the product
        + 2 * c.d_state * inner / length  # the state at each chunk's beginning, twice
        + 4 * c.nheads  # the step size and the decays to the ends of the chunk
    ) * FP32 + 2 * c.nheads * FP64  # their logarithms
    low_rank = 0 if soft else (1 + c.scaffolds[0].rank) * FP32  # and the scale of the codes
    narrow = soft and bf16  # z, x, B, C and dt are widened, and kept so
    return {
        "norm": 2 * c.d_model * FP32,  # input, normalised
        "in_proj": c.d_model * (cast if soft else 1) + low_rank + (c.nheads if narrow else c.d_in_proj) * FP32,
        "convolution": c.conv_dim * (1 + (tokens + c.d_conv - 1) / tokens) * cast  # input, before silu
        + (inner if bf16 else c.conv_dim) * FP32,
        "scan": padded * scan,
        "gated norm": (5 if narrow else 4) * inner * FP32,  # y, silu(z), their product, normalised; z
        "out_proj": inner * (cast if soft else 1) + low_rank,
    }


def working_space(config: Mamba2Config, tokens: int) -> float:
    """Bytes a token of the largest temporaries of a layer's backward pass: those of the scan, or of the gated norm."""
    return 20 * max(min(config.chunk_size, tokens) * config.nheads, config.d_inner)


@dataclass(frozen=True)
class Work:
    """What one token costs: FLOPs by the type that they run in, and bytes that pass through memory."""

    bf16: float = 0.0
    tf32: float = 0.0
    fp32: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, factor: float) -> Work:
        return Work(*(factor * a for a in vars(self).values()))

    def seconds(self, device: Device) -> float:
        products = self.bf16 / device.bf16 + self.tf32 / device.tf32 + self.fp32 / device.fp32
        return products / PRODUCT_SHARE + self.moved / (device.bandwidth * MEMORY_SHARE)


def work(config: DFSSMConfig, options: Options) -> Work:
    """What a token of training costs."""
    c, o = config, options
    rank, planes = c.scaffolds[0]
    scaffold = sum(m * k for m, k in _projections(c))
    low_rank = rank * sum(m + k for m, k in _projections(c))
    length, group = min(c.chunk_size, o.tokens), c.ngroups * c.d_state
    scan = 2 * length * (group + c.d_inner) + 4 * c.d_state * c.d_inner
    head = 2 * c.vocab_size * c.d_model
    kept = sum(kept_of_layer(c, o.tokens, o.bf16).values())  # soft weights move about as much
    moved = {name: times * kept for name, times in _LAYER_MOVED.items()}

    def cast(flops: float) -> dict[str, float]:
        return {"bf16" if o.bf16 else "tf32": flops}

    # Codes are exact in TF32; gradients and the teacher's products are of the type of autocast; the scan's are fp32.
    forward = Work(tf32=2 * (planes * scaffold + low_rank), fp32=scan, moved=moved["forward"])
    backward = Work(**cast(4 * scaffold + 4 * low_rank), fp32=2 * scan, moved=moved["backward"])
    layer = forward * (2 if o.checkpointing else 1) + backward
    total = Work(tf32=head) + Work(**cast(2 * head))
    if o.teacher:
        layer += Work(**cast(2 * scaffold), fp32=scan, moved=moved["teacher"])
        total += Work(**cast(head))
    table = _TABLE_MOVED / min(o.chunk, o.micro_tokens) + _TABLE_PREPARED / o.micro_tokens
    logits = _LOGITS_MOVED * c.vocab_size + table * c.vocab_size * c.d_model
    times = _SCAFFOLD_MOVED["forward"] * (2 if o.checkpointing else 1) + _SCAFFOLD_MOVED["backward"]
    scaffolds = times * c.n_layer * planes * scaffold / o.micro_tokens
    return layer * c.n_layer + total + Work(moved=FP32 * (logits + scaffolds))


@dataclass(frozen=True)
class Plan:
    """`memory`: bytes on each device at the peak, by item. `kept`: bytes a token a layer, by item."""

    config: DFSSMConfig
    options: Options
    memory: dict[str, float]
    kept: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    def fits(self, device: Device) -> bool:
        return self.total <= device.memory

    def seconds(self, device: Device) -> float:
        """Time of `options.total` tokens on options.world such devices, evaluations apart."""
        o, bandwidth, link = self.options, device.bandwidth * MEMORY_SHARE, device.link * LINK_SHARE
        size = FP32 * sum(parameters(self.config).values())
        micro = o.micro_tokens * work(self.config, o).seconds(device)
        update = _UPDATE_MOVED * size / o.world / bandwidth
        if o.world > 1:  # weights are gathered for both passes beside the computation, gradients reduced once a step
            micro = max(micro, 2 * size / link)
            update += size / link
        return o.total / (o.batch * o.tokens) * (o.parts * micro + update)

    def lines(self) -> list[str]:
        """The plan for the terminal."""
        o, width = self.options, max(map(len, self.memory))
        devices = "1 device" if o.world == 1 else f"{o.world} devices"
        lines = [
            f"{o.batch} windows of {o.tokens} tokens per step on {devices}, {o.windows} at a time on each:",
            *(f"  {item:<{width}}  {size / 1e9:7.2f} GB" for item, size in self.memory.items()),
            f"  {'total':<{width}}  {self.total / 1e9:7.2f} GB",
            f"time of {o.total / 1e6:.4g} M tokens at {PRODUCT_SHARE:.0%} of the data sheet's FLOP/s and "
            f"{MEMORY_SHARE:.0%} of its memory bandwidth:",
        ]
        for device in DEVICES:
            time = f"{self.seconds(device) / 3600:7.1f} h" if self.fits(device) else "does not fit"
            lines.append(f"  {f'{o.world} x {device.name}':<{width}}  {time}")
        return lines


def plan(teacher: Mamba2Config, options: Options) -> Plan:
    """What distilling a teacher of this shape takes."""
    o = options
    config = DFSSMConfig.from_teacher(teacher, o.rank, o.planes)
    kept = kept_of_layer(config, o.tokens, o.bf16, o.soft)
    counts, n, logits = parameters(config), o.micro_tokens, FP32 * config.vocab_size * min(o.chunk, o.micro_tokens)
    trained, table = FP32 * sum(counts.values()), FP32 * config.vocab_size * config.d_model
    layer = sum(kept.values()) * n
    if o.soft:
        scaffold = sum(m * k for m, k in _projections(config))
        layer += scaffold * (o.planes * (FP32 + 1) + (2 if o.bf16 else FP32))

    memory: dict[str, float] = {
        "weights in training, fp32": trained / o.world,
        # Between the micro-batches of a step FSDP2 keeps them whole.
        "gradients": trained / o.world if o.parts <= 1 else trained,
        "AdamW moments": 2 * trained / o.world,
    }
    if o.teacher:
        memory["teacher"] = (2 if o.bf16 else FP32) * sum(parameters(teacher).values())
    if o.world > 1:  # the table; weights of this layer and the next, as received and as used; gradients to be reduced
        memory["gathered by FSDP2"] = table + 5 * FP32 * counts["projections"] / config.n_layer

    # A pass through the model; the update after it has no temporaries.
    if o.checkpointing:
        state = (config.d_inner * config.d_state + config.conv_dim * (config.d_conv - 1)) / o.tokens
        memory["inputs of the layers"] = config.n_layer * (config.d_model + state) * FP32 * n
    else:
        memory["activations"] = config.n_layer * layer
    if o.hidden:
        memory["distances of hidden states"] = config.n_layer * config.d_model * FP32 * n
    head = _TABLES_HELD * table + _LOGITS_HELD * logits
    backward = table + working_space(config, o.tokens) * n + (layer if o.checkpointing else 0)
    memory["space for the head" if head > backward else "space for a layer"] = max(head, backward)
    return Plan(config, o, memory, kept)
