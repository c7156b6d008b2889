"""The step graph of a DF-SSM student: prefill and decode in one graph, T tokens in, logits and new states out.

Written directly from the config and the packed tensors, not traced; docs/export.md says why, and describes the names.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version

import numpy as np
import onnx_ir as ir

from dfssm.model.config import DFSSMConfig
from dfssm.model.tensors import PARTS, SCAFFOLD
from dfssm.opset import DOMAIN, VERSION
from dfssm.opset.functions import IR_VERSION, ONNX_OPSET
from dfssm.opset.ops import IN_PLACE_OF
from dfssm.opset.schema import DEFERRED, LAYOUT_CANONICAL

from .builder import GraphBuilder, Shape

FORMAT_VERSION = 1
"""Version of the graph's interface (names, dtypes, order of inputs and outputs); `dfssm.format_version` in the file."""

F32, I8, I64 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT64


def build_step_graph(
    config: DFSSMConfig, tensors: Mapping, *, state_dtype: str = "fp32", layout: int = LAYOUT_CANONICAL
) -> ir.Model:
    """The step graph as an onnx-ir model whose weights are still to be read.

    `tensors` maps the names of model.pt to arrays (anything with .shape, .dtype and `__array__`), with the scaffold's
    `bits` and `up` in `layout`; an array is read each time the model is written, one at a time. `state_dtype` is a
    `--state-dtype` and decides how the states are stored between steps; all arithmetic is fp32.

    Inputs: `input_ids` i64 [B,T]; `logits_to_keep` i64 [] with default 0; for each layer i `conv_state.{i}` f32
    [B,C,W-1], `ssm_state.{i}` [B,H,N,P] and, for int8, `ssm_scale.{i}` f32 [B,H,N]; where the state is deferred,
    `conv_state.{i}` is [B,W+15,C] and there are `pending_x.{i}`, `pending_B.{i}`, `pending_decay.{i}` and
    `pending_count.{i}` (`Sizes.states`). Outputs: `logits` f32 [B,keep,V], then the states as `*_out.{i}`, shaped as
    the inputs.
    """
    return _StepGraph(config, tensors, state_dtype, layout).build()


class _StepGraph:
    def __init__(self, config: DFSSMConfig, tensors: Mapping, state_dtype: str, layout: int):
        self.config, self.state_dtype, self.layout = config, state_dtype, layout
        self.g = GraphBuilder(tensors)
        self.states: dict[str, tuple[ir.DataType, Shape]] = {
            kind: (ir.DataType.from_numpy(np.dtype(dtype)), ("B", *shape))
            for kind, (dtype, shape) in config.states(state_dtype).items()
        }
        self.deferred = state_dtype.endswith(DEFERRED)
        self.scan_states = [  # of each layer
            {kind: ir.val(f"{kind}.{i}", *stored) for kind, stored in self.states.items() if kind != "conv_state"}
            for i in range(config.n_layer)
        ]
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []

        self.last_axis = self.g.initializer(ir.tensor([-1], name="axes.last"))

    def form(self, op: str) -> str:
        """The op, or the one of a deferred state."""
        return IN_PLACE_OF[op] if self.deferred else op

    def build(self) -> ir.Model:
        ids = ir.val("input_ids", I64, ("B", "T"))
        # An input with an initialiser: a caller that does not feed it gets the logits of all tokens.
        keep = self.g.initializer(ir.tensor(0, name="logits_to_keep"))
        self.inputs += [ids, keep]

        h = self.embed(ids)
        for i in range(self.config.n_layer):
            h = self.block(i, h)
        self.outputs.insert(0, self.head(h, keep))

        return ir.Model(
            ir.Graph(
                self.inputs,
                self.outputs,
                nodes=self.g.nodes,
                initializers=self.g.initializers,
                opset_imports={"": ONNX_OPSET, DOMAIN: VERSION},
                name="dfssm_step",
            ),
            ir_version=IR_VERSION,
            producer_name="dfssm",
            producer_version=version("dfssm"),
            functions=self.g.functions,
            metadata_props={
                "dfssm.format_version": str(FORMAT_VERSION),
                "dfssm.config": json.dumps(self.config.to_dict()),
                "dfssm.state_dtype": self.state_dtype,
                "dfssm.layout": str(self.layout),
            },
        )

    def embed(self, ids: ir.Value) -> ir.Value:
        """Rows of the int8 table times their scales, [B,T,D]: the table stays the one initialiser a tied head reads."""
        g, D = self.g, self.config.d_model
        rows = g.standard("Gather", [g.weight("embedding.weight"), ids], I8, ("B", "T", D), "/embed/gather", axis=0)
        scales = g.standard(
            "Gather", [g.weight("embedding.scale"), ids], F32, ("B", "T"), "/embed/gather_scale", axis=0
        )
        rows = g.standard("Cast", [rows], F32, ("B", "T", D), "/embed/cast", to=F32)
        scales = g.standard("Unsqueeze", [scales, self.last_axis], F32, ("B", "T", 1), "/embed/unsqueeze_scale")
        return g.standard("Mul", [rows, scales], F32, ("B", "T", D), "/embed/mul")

    def block(self, i: int, h: ir.Value) -> ir.Value:
        """Layer i on the residual stream h [B,T,D].

        The columns of in_proj's output are z, xBC, dt, those of the convolution's x, B, C: nothing is split, each op
        reads its range.
        """
        g, c = self.g, self.config
        name = f"/layers.{i}"
        x = self.rms_norm(h, "T", f"layers.{i}.norm.weight", f"{name}/norm")
        zxBCdt = self.scaffold(x, f"layers.{i}.in_proj", c.d_in_proj, f"{name}/in_proj")
        xBC = self.conv(i, zxBCdt, f"{name}/conv")
        y = self.scan(i, xBC, zxBCdt, f"{name}/scan")
        (y,) = g.dfssm(
            "GatedRMSNorm",
            [y, zxBCdt, g.weight(f"layers.{i}.gated_norm.weight")],
            [(F32, ("B", "T", c.d_inner))],
            f"{name}/gated_norm",
            eps=c.norm_eps,
            groups=c.norm_groups,
            z_start=0,
        )
        y = self.scaffold(y, f"layers.{i}.out_proj", c.d_model, f"{name}/out_proj")
        return g.standard("Add", [h, y], F32, ("B", "T", c.d_model), f"{name}/residual")

    def head(self, h: ir.Value, keep: ir.Value) -> ir.Value:
        """Logits of the last `keep` tokens; a slice from -0 = 0 keeps all of them."""
        g, c = self.g, self.config
        end = g.initializer(ir.tensor([np.iinfo(np.int64).max], name="slice.end"))
        tokens = g.initializer(ir.tensor([1], name="axes.tokens"))
        start = g.standard("Neg", [keep], I64, (), "/keep/neg")
        start = g.standard("Reshape", [start, self.last_axis], I64, (1,), "/keep/reshape")
        h = g.standard("Slice", [h, start, end, tokens], F32, ("B", "keep", c.d_model), "/keep/slice")
        h = self.rms_norm(h, "keep", "norm_f.weight", "/norm_f")
        table = "embedding" if c.tie_embeddings else "lm_head"
        (logits,) = g.dfssm(
            "Int8MatMul",
            [h, g.weight(f"{table}.weight"), g.weight(f"{table}.scale")],
            [(F32, ("B", "keep", c.vocab_size))],
            "/lm_head",
            rename={"y": "logits"},
        )
        return logits

    def rms_norm(self, x: ir.Value, tokens: str, weight: str, name: str) -> ir.Value:
        """Of x [B,tokens,D]."""
        shape = ("B", tokens, self.config.d_model)
        (y,) = self.g.dfssm("RMSNorm", [x, self.g.weight(weight)], [(F32, shape)], name, eps=self.config.norm_eps)
        return y

    def scaffold(self, x: ir.Value, tensors: str, rows: int, name: str) -> ir.Value:
        """The projection whose packed tensors are `tensors`.*: [B,T,K] -> [B,T,rows]."""
        (y,) = self.g.dfssm(
            "BinaryScaffoldMatMul",
            [x, *(self.g.weight(f"{tensors}.{part}") for part in PARTS[SCAFFOLD])],
            [(F32, ("B", "T", rows))],
            name,
            planes=self.config.scaffold(tensors).planes,
            layout=self.layout,
        )
        return y

    def conv(self, i: int, zxBCdt: ir.Value, name: str) -> ir.Value:
        """xBC [B,T,conv_dim], convolved."""
        c, stored = self.config, self.states["conv_state"]
        state = ir.val(f"conv_state.{i}", *stored)
        count = [self.scan_states[i]["pending_count"]] if self.deferred else []
        y, new_state = self.g.dfssm(
            self.form("CausalConv1dStep"),
            [zxBCdt, state, *(self.g.weight(f"layers.{i}.conv.{part}") for part in ("weight", "bias")), *count],
            [(F32, ("B", "T", c.conv_dim)), stored],
            name,
            rename=dict.fromkeys(("new_state", "new_window"), f"conv_state_out.{i}"),
            activation="silu",
            x_start=c.d_inner,
        )
        self.inputs.append(state)
        self.outputs.append(new_state)
        return y

    def scan(self, i: int, xBC: ir.Value, zxBCdt: ir.Value, name: str) -> ir.Value:
        """The recurrence's y [B,T,d_inner]."""
        c = self.config
        states = self.scan_states[i]
        parameters = [self.g.weight(f"layers.{i}.scan.{part}") for part in ("A_log", "D", "dt_bias")]
        y, *new_states = self.g.dfssm(
            self.form("SelectiveScanStep"),
            [xBC, zxBCdt, xBC, xBC, *parameters, *states.values()],
            [(F32, ("B", "T", c.d_inner)), *(self.states[kind] for kind in states)],
            name,
            rename={"new_state": f"ssm_state_out.{i}", "new_state_scale": f"ssm_scale_out.{i}"}
            | {f"new_{kind}": f"{kind}_out.{i}" for kind in states},
            ngroups=c.ngroups,
            dt_min=c.dt_limit[0],
            dt_max=c.dt_limit[1],
            x_start=0,
            dt_start=c.d_inner + c.conv_dim,
            B_start=c.d_inner,
            C_start=c.d_inner + c.ngroups * c.d_state,
        )
        self.inputs += states.values()
        self.outputs += new_states
        return y
