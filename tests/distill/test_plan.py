"""The plan against what PyTorch does: bytes of real tensors, counted operations."""

import dataclasses
import math
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from dfssm.distill import plan as planning
from dfssm.distill.density import densify
from dfssm.distill.objective import Distillation
from dfssm.distill.plan import DEVICES, PAPER_TOKENS, Device, Options, Work, kept_of_layer, parameters, plan, work
from dfssm.model.config import DFSSMConfig, Mamba2Config, preset
from dfssm.model.student import DFSSMLM
from dfssm.model.teacher import Mamba2LM

# Unlike in every size that a formula could mix up; the second is narrow, in groups, of a window that ends in mid-chunk.
SHAPES = {
    "wide": (Mamba2Config(vocab_size=300, d_model=192, n_layer=2, d_state=48, headdim=32, chunk_size=32), 128),
    "odd": (
        Mamba2Config(
            *(500, 96, 3),
            **{"d_state": 16, "headdim": 16, "ngroups": 3, "d_conv": 3, "chunk_size": 24, "tie_embeddings": False},
        ),
        100,
    ),
}


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def student(config: Mamba2Config, **options) -> DFSSMLM:
    return DFSSMLM(DFSSMConfig.from_teacher(config, **options))


def ids(config: Mamba2Config, windows: int, tokens: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, (windows, tokens))


def size(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Operations(TorchDispatchMode):
    """Counts operations: `moved`, bytes that they read and write; `peak`, bytes alive of what they make."""

    def __init__(self, known=()):
        super().__init__()
        self.moved = self.alive = self.peak = 0
        self._known = {t.untyped_storage()._cdata: None for t in known}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        made = tensors(result)
        # Of lists in place nothing is returned: those of the fused AdamW are weights, gradients and two moments.
        lists = {"_foreach_": (0,), "_fused_": (0, 2, 3)}
        written = made
        for name, places in lists.items():
            if name in function.__name__ and not made:
                written = tensors([arguments[i] for i in places])
        if written and not function.is_view and "empty" not in function.__name__:
            self.moved += size(written) + size(tensors((arguments, options)))
        for storage in (t.untyped_storage() for t in made):
            if storage._cdata not in self._known:
                self._known[storage._cdata] = weakref.ref(storage, self._end(storage._cdata, storage.nbytes()))
                self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        return result

    def _end(self, key: int, count: int):
        def end(_):
            del self._known[key]
            self.alive -= count

        return end


class TestParameters:
    @pytest.mark.parametrize("options", [{"rank": 3}, {"rank": 2, "planes": 2}, {"rank": 0}])
    def test_weights_gradients_and_moments_are_exact(self, shape, options):
        config, tokens = shape
        model = student(config, **options)
        optimiser = torch.optim.AdamW(model.parameters())
        model(ids(config, 1, tokens))[0].sum().backward()
        optimiser.step()
        moments = [t for state in optimiser.state.values() for t in state.values() if t.ndim]  # not the step count
        found = plan(config, Options(windows=1, tokens=tokens, **options)).memory
        assert found["weights in training, fp32"] == size(model.parameters())
        assert found["gradients"] == size(p.grad for p in model.parameters())
        assert found["AdamW moments"] == size(moments)

    def test_the_teacher(self, shape):
        config, _ = shape
        expected = sum(p.numel() for p in Mamba2LM(config).parameters())
        assert sum(parameters(config).values()) == expected
        assert plan(config, Options()).memory["teacher"] == 2 * expected
        assert plan(config, Options(bf16=False)).memory["teacher"] == 4 * expected
        assert "teacher" not in plan(config, Options(teacher=False)).memory


def kept_bytes(model: DFSSMLM, batch: torch.Tensor, bf16: bool) -> int:
    """Bytes of the storages that a forward pass keeps, weights apart."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held: an address is not used twice
        return tensor

    with saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model.hidden_states(batch)
    return sum(storage.nbytes() for storage in kept.values())


class TestActivations:
    @pytest.mark.parametrize("bf16", [False, True])
    @pytest.mark.parametrize("soft", [False, True])
    @pytest.mark.parametrize("planes", [1, 2])
    def test_what_a_layer_keeps(self, shape, bf16, soft, planes):
        config, tokens = shape
        options = Options(rank=5, planes=planes, windows=3, tokens=tokens, bf16=bf16, soft=soft)

        def kept(layers: int) -> int:
            model = student(dataclasses.replace(config, n_layer=layers), rank=5, planes=planes)
            if soft:
                densify(model, blend=0.5)
            return kept_bytes(model, ids(config, 3, tokens), bf16)

        per_layer = plan(config, options).memory["activations"] / config.n_layer
        # 3 %: what is left out are scales and means of rows, and the rows of the low rank.
        assert kept(2) - kept(1) == pytest.approx(per_layer, rel=0.03)

    def test_items(self):
        """By hand, for one layer of mamba2-1.3b: a few of the sizes."""
        items = kept_of_layer(DFSSMConfig.from_teacher(preset("mamba2-1.3b")), 512)
        assert items["norm"] == 2 * 2048 * 4
        assert items["in_proj"] == 2048 + 4 + 16 * 4 + 8512 * 4
        assert items["gated norm"] == 4 * 4096 * 4
        assert sum(items.values()) == pytest.approx(323e3, rel=0.01)


@pytest.fixture(scope="module")
def whole():
    """whole(layers, windows, **options of Distillation) -> operations of a step of mamba2-1.3b, without its tensors."""

    def run(layers: int, windows: int, tokens: int = 128, soft: bool = False, **options) -> Operations:
        config = dataclasses.replace(preset("mamba2-1.3b"), n_layer=layers)
        with FakeTensorMode():
            torch.set_default_dtype(torch.bfloat16)
            try:
                teacher = Mamba2LM(config)
            finally:
                torch.set_default_dtype(torch.float32)
            model = student(config, rank=16)
            if soft:
                densify(model, blend=0.5)
            batch = torch.zeros(windows, tokens + 1, dtype=torch.long)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            known = [*model.parameters(), *(p.grad for p in model.parameters()), *teacher.parameters(), batch]
            distillation = Distillation(model, teacher, **options)
            with Operations(known) as counted:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = distillation(batch)["loss"]
                loss.backward()
        return counted

    return run


class TestAtScale:
    """One to three layers of mamba2-1.3b, as fake tensors: sizes without memory."""

    @pytest.mark.parametrize(
        "windows, options",
        [(16, {}), (16, {"hidden": 1.0}), (16, {"recompute": True}), (64, {"recompute": True}), (16, {"soft": True})],
    )
    def test_the_peak(self, whole, windows, options):
        found = whole(3, windows, **options).peak
        settings = Options(
            **{"windows": windows, "tokens": 128, "batch": windows, "hidden": "hidden" in options},
            **{"checkpointing": "recompute" in options, "soft": "soft" in options},
        )
        memory = plan(dataclasses.replace(preset("mamba2-1.3b"), n_layer=3), settings).memory
        there = ("weights in training, fp32", "gradients", "AdamW moments", "teacher")
        # 10 %: temporaries are estimated by their largest.
        assert found == pytest.approx(sum(size for item, size in memory.items() if item not in there), rel=0.1)

    @pytest.mark.parametrize("windows, recompute", [(16, False), (32, False), (16, True)])
    def test_bytes_moved(self, whole, windows, recompute):
        found = whole(2, windows, recompute=recompute).moved
        config = DFSSMConfig.from_teacher(dataclasses.replace(preset("mamba2-1.3b"), n_layer=2))
        options = Options(windows=windows, tokens=128, checkpointing=recompute)
        # 10 %: the multiples are round, and the gradient of the tokens' look-up is left out.
        assert found == pytest.approx(work(config, options).moved * options.micro_tokens, rel=0.1)


class TestWork:
    def test_products(self, shape):
        def product(a, b, fast, out_shape):
            return 2 * math.prod(a) * b[-1]

        config, tokens = shape
        model, batch = student(config, rank=4), ids(config, 2, tokens)
        with FlopCounterMode(display=False, custom_mapping={torch.ops.dfssm.product: product}) as counter:
            model(batch)[0].sum().backward()
        flops = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "conv" not in str(op))
        expected = work(model.config, Options(windows=2, tokens=tokens, bf16=False, teacher=False))
        padded = math.ceil(tokens / config.chunk_size) * config.chunk_size / tokens
        # 3 %: the state before the first chunk has no gradient, and a window has few chunks.
        assert flops / batch.numel() == pytest.approx(expected.tf32 + padded * expected.fp32, rel=0.03)

    def test_an_update(self):
        model = student(Mamba2Config(vocab_size=5000, d_model=64, n_layer=2))
        optimiser = torch.optim.AdamW(model.parameters(), fused=True, weight_decay=0.0)
        for _ in range(2):  # the first makes the moments
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            with Operations() as counted:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
                optimiser.step()
        weights = size(model.parameters())
        assert counted.peak < 1e-3 * weights
        assert counted.moved == pytest.approx(planning._UPDATE_MOVED * weights, rel=0.01)

    def test_seconds_by_hand(self):
        device = Device("a", memory=1.0, bf16=100.0, tf32=50.0, fp32=10.0, bandwidth=1000.0, link=1.0)
        once = Work(bf16=200.0, tf32=50.0, fp32=5.0, moved=2100.0)
        assert once.seconds(device) == pytest.approx((2 + 1 + 0.5) / 0.5 + 2.1 / 0.7)
        assert (once + once * 2).seconds(device) == pytest.approx(3 * once.seconds(device))

    def test_planes_add_products_and_recomputing_a_forward_pass(self):
        config = DFSSMConfig.from_teacher(preset("mamba2-1.3b"))
        weights = config.n_layer * config.d_model * (config.d_in_proj + config.d_inner)
        plain, two = (work(dataclasses.replace(config, planes=n), Options(planes=n)) for n in (1, 2))
        assert two.tf32 - plain.tf32 == 2 * weights and two.bf16 == plain.bf16  # one product for the gradients of all
        again = work(config, Options(checkpointing=True))
        head = 2 * config.vocab_size * config.d_model
        assert again.tf32 - head == 2 * (plain.tf32 - head) and again.bf16 == plain.bf16


class TestPlan:
    CONFIG = preset("mamba2-1.3b")

    def test_devices_share_weights_gradients_and_moments(self):
        one = plan(self.CONFIG, Options(windows=4, batch=32)).memory
        eight = plan(self.CONFIG, Options(windows=4, batch=32, world=8)).memory
        for item in ("weights in training, fp32", "gradients", "AdamW moments"):
            assert eight[item] == one[item] / 8
        assert eight["teacher"] == one["teacher"] and eight["activations"] == one["activations"]
        assert eight["gathered by FSDP2"] > 0 and "gathered by FSDP2" not in one
        # Gradients stay whole until the last of several micro-batches.
        assert plan(self.CONFIG, Options(windows=2, batch=32, world=8)).memory["gradients"] == one["gradients"]

    def test_any_number_of_layers_is_counted_at_once(self):
        one, two, many = (parameters(dataclasses.replace(self.CONFIG, n_layer=n)) for n in (1, 2, 10**9))
        assert many == {part: one[part] + (10**9 - 1) * (two[part] - one[part]) for part in one}

    def test_what_fits(self):
        small, large = DEVICES[0], DEVICES[1]
        plain, again = (plan(self.CONFIG, Options(checkpointing=on)) for on in (False, True))
        assert not plain.fits(small) and plain.fits(large) and again.fits(small)
        assert plain.seconds(large) < again.seconds(large) < again.seconds(small)

    def test_time_is_proportional_to_tokens_and_shared_by_devices(self):
        def hours(**options) -> float:
            return plan(self.CONFIG, Options(windows=4, **options)).seconds(DEVICES[1])

        assert hours(batch=32, total=2 * PAPER_TOKENS) == pytest.approx(2 * hours(batch=32))
        assert hours(batch=32) / 8 < hours(batch=32, world=8) < hours(batch=32) / 6

    def test_lines(self):
        found = plan(self.CONFIG, Options(total=32_000_000, checkpointing=True))
        lines = found.lines()
        assert "16 windows of 512 tokens per step on 1 device, 4 at a time on each" in lines[0]
        sizes = [float(line.split()[-2]) for line in lines if line.endswith(" GB") and "x" not in line]
        assert sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=0.05) == pytest.approx(found.total / 1e9, abs=0.05)
        assert any("A100 40 GB" in line and line.endswith(" h") for line in lines)
        assert any("RTX 4090" in line and line.endswith("does not fit") for line in lines)
