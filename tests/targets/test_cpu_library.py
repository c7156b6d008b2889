"""What the op library says of this CPU, beside the kernels' own bindings; and files that are no such library."""

import os
import subprocess
import sys

import pytest

from dfssm import _native
from dfssm.base import DfssmError
from dfssm.runtime import Engine
from dfssm.targets import library
from dfssm.targets.cpu_library import CpuLibrary
from dfssm.targets.ort_cpu import LIBRARY, find_library


@pytest.fixture(scope="module")
def installed() -> CpuLibrary:
    return CpuLibrary(find_library())


def test_it_knows_the_kernels_of_this_cpu(installed):
    assert installed.isas() == _native.isas()
    assert installed.isa() == _native.default_isa()


@pytest.mark.parametrize("isa", [*_native.isas(), "avx9000"])
def test_the_environment_forces_an_isa(isa):
    code = (
        "from dfssm.targets.cpu_library import CpuLibrary; from dfssm.targets.ort_cpu import find_library\n"
        "print(CpuLibrary(find_library()).isa())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"DFSSM_ISA": isa}, capture_output=True, text=True
    )
    if isa in _native.isas():
        assert done.stdout.strip() == isa
    else:
        last = done.stderr.strip().splitlines()[-1]
        assert f"DFSSM_ISA is 'avx9000'; this CPU can use: {' '.join(_native.isas())}; unset" in last


def test_bandwidth_is_that_of_memory(installed):
    patterns = installed.memory_patterns()
    assert len(set(patterns)) == 12
    for pattern in range(len(patterns)):
        for threads, writes in ((1, False), (3, False), (2, True)):
            assert 0.05 < installed.memory_bandwidth(1 << 22, threads, pattern, writes) < 2000


def test_time_is_counted_while_it_is_wanted(installed, tiny_bundle):
    engine = Engine.load(tiny_bundle)
    state = engine.new_state()

    def step():
        engine.step([0], state)
        return installed.op_seconds("RMSNorm")

    installed.time_ops(True)
    first, second = step(), step()
    installed.time_ops(False)
    assert 0 < first < second == step()
    installed.time_ops(True)
    assert installed.op_seconds("RMSNorm") == 0
    installed.time_ops(False)
    assert installed.op_seconds("Softmax") == -1


def test_the_clock_is_that_of_a_core(installed):
    # No CPU is faster: 16.5 GHz were once measured, where the core renames chains of additions away.
    assert 0.05e9 < installed.clock() < 8e9


@pytest.mark.parametrize(
    ("size", "threads", "pattern"),
    [((1 << 20) - 1, 1, 0), (1 << 62, 1, 0), (1 << 22, 0, 0), (1 << 22, 1, 12), (1 << 22, 1, -1)],
)
def test_what_cannot_be_read_is_an_error(installed, size, threads, pattern):
    with pytest.raises(DfssmError, match=f"{size} bytes of memory could not be read with {threads} threads"):
        installed.memory_bandwidth(size, threads, pattern)


def test_a_file_that_is_no_library_is_named(tmp_path):
    path = tmp_path / "lib.so"
    path.write_text("not a library")
    with pytest.raises(DfssmError, match=f"{path} does not load: "):
        CpuLibrary(path)


def test_another_library_is_named():
    path = type(find_library())(_native.__file__)
    with pytest.raises(DfssmError, match="is not the op library of this dfssm: reinstall dfssm"):
        CpuLibrary(path)


def test_a_folder_of_that_name_on_the_path_is_not_the_installation(tmp_path):
    """Of a namespace package, any folder of that name on sys.path would be a part, a stranger's too."""
    (tmp_path / "dfssm").mkdir()
    (tmp_path / "dfssm" / LIBRARY).write_text("not ours")
    code = f"from dfssm.targets.library import installed; print(installed({LIBRARY!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True
    )
    assert done.stdout.decode().strip() == str(library.installed(LIBRARY)), done.stderr
