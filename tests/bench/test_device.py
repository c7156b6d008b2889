"""Measuring a TensorRT bundle: over a device made of NumPy, so the figures mean nothing, but they are there."""

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from fake_device import FakeCuda, FakeEngine

from dfssm.bench import decode, device, gpu
from dfssm.bench.child import follow_script
from dfssm.cli.main import dfssm
from dfssm.model import ledger
from dfssm.model.config import DFSSMConfig
from dfssm.runtime import Engine
from dfssm.runtime.tensorrt import TensorRTBackend
from dfssm.targets import cuda

SHAPE = DFSSMConfig(vocab_size=50288, d_model=2048, n_layer=48, d_state=128, headdim=64, rank=16).to_dict()


@pytest.fixture
def on_gpu(tiny_bundle, monkeypatch):
    """`dfssm bench` of a TensorRT bundle for up to 8 rows, on a GPU called L4. Returns that GPU's memory."""
    memory = FakeCuda()
    cpu = Engine.load(tiny_bundle, threads=1)
    made = {"builder": "tensorrt-rtx", "version": "1.7.1", "lowering": "plugin"}
    files = cpu.manifest.files | {"model.engine": {"sha256": cpu.model, "bytes": 0}}
    manifest = dataclasses.replace(cpu.manifest, target="trt", engine=made, files=files)

    def load(*arguments, **options):
        engine = FakeEngine(memory, cpu.backend.session, max_batch=8, max_tokens=16, rtx=True)
        return Engine(tiny_bundle, manifest, TensorRTBackend(engine, memory), threads=1)

    def run_child(bundle, threads, prompt, steps, logits="", isa=""):
        if logits:
            np.save(logits, follow_script(cpu, cpu.new_state(), prompt, steps))
        return {"load_seconds": 1.0} | dict.fromkeys(
            ("rss_bytes", "peak_rss_bytes", "file_bytes", "anonymous_bytes"), 10**6
        )

    monkeypatch.setattr(decode.Engine, "load", load)
    monkeypatch.setattr(decode, "run_child", run_child)
    monkeypatch.setattr(cuda, "devices", lambda: ([cuda.Device("NVIDIA L4", 89)], ""))
    return memory


def run(tiny_bundle, *arguments) -> str:
    command = ["bench", str(tiny_bundle), "--rounds", "2", "--tokens", "4", "--prompt", "5", *arguments]
    return CliRunner().invoke(dfssm, command, catch_exceptions=False).stdout


def test_figures_of_every_batch(on_gpu, tiny_bundle):
    result = json.loads(run(tiny_bundle, "--json"))
    assert result["gpu"] == {"name": "NVIDIA L4", "builder": "tensorrt-rtx", "version": "1.7.1", "lowering": "plugin"}
    assert [batch["batch"] for batch in result["batches"]] == [1, 8]
    for batch in result["batches"]:
        low, high = batch["tok_s_quartiles"]
        assert 0 < low <= batch["tok_s"] <= high and batch["floor_tok_s"] > 0 and batch["floor_share"] > 0
        assert batch["recorded"] is True and batch["predicted_tok_s"] is None
    assert result["tok_s"] > 0 and result["read_gb_s"] > 0 and not on_gpu.memory


def test_text(on_gpu, tiny_bundle, monkeypatch):
    monkeypatch.setattr(device, "predicted", lambda *arguments: 12345.6)
    text = run(tiny_bundle)
    assert text.startswith("NVIDIA L4, tensorrt-rtx 1.7.1, lowering plugin, fp16 states\n")
    assert "batch 8" in text and "predicted 12,346 tok/s" in text and "not recorded" not in text


def test_a_cpu_bundle_has_no_batches(tiny_bundle):
    result = decode.bench(str(tiny_bundle), prompt=2, tokens=2, rounds=1)
    assert result["gpu"] is None and result["batches"] == []


def test_copies_of_both_directions_are_counted(monkeypatch):
    clock = iter(np.arange(100.0))
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(clock))
    probe = device.CopyBandwidth(memory := FakeCuda(), 10**8)
    assert probe.read() == probe.read_write() == 2 * device.COPIES * 0.1
    probe.close()
    assert not memory.memory


@pytest.mark.parametrize(
    "name, known",
    [
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("Orin", "Orin AGX"),
        *[
            (name, None)
            for name in (
                "NVIDIA A100-SXM4-80GB",
                "NVIDIA H200 NVL",
                "NVIDIA L40S",
                "NVIDIA GeForce RTX 4090 Laptop GPU",
            )
        ],
    ],
)
def test_predicted_for_the_gpus_of_the_tables(name, known):
    found = device.predicted(name, SHAPE, "fp16", 8)
    assert found == (known and 8 / gpu.step(next(gpu_ for gpu_ in gpu.GPUS if gpu_.name == known), 8, "fp16"))
    assert set(device.DRIVER_NAMES) == {gpu_.name for gpu_ in gpu.GPUS}


def test_nothing_is_predicted_for_other_shapes():
    assert ledger.sizes(SHAPE) == (4096, 64, 4352, 8512)
    assert device.predicted("NVIDIA L4", SHAPE | {"n_layer": 24}, "fp16", 1) is None
