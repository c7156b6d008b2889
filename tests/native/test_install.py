"""What `cmake --install` leaves is all that a program needs: the example by find_package, another by pkg-config."""

import os
import re
import shlex
import shutil

import pytest
from native.runtime_library import BIN, BUILD, ROOT, SANITIZE, C, environment, library, run

import dfssm

EXAMPLES = ROOT / "examples/runtime_cpp"
FLAGS = " ".join(SANITIZE)
BESIDE = {"LD_LIBRARY_PATH": str(BUILD)}
"""Where the stand-in for tokenizers-cpp lies, which is installed nowhere: for the linker, and for programs."""

pytestmark = pytest.mark.xdist_group("native")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    library()
    folder = tmp_path_factory.mktemp("install") / "prefix"
    run(BIN / "cmake", "--install", BUILD, "--component", "dfssm_runtime", "--prefix", folder)
    return folder


def test_it_has_its_headers_and_no_more(prefix):
    (headers,) = prefix.glob("include/*")
    assert {path.name for path in headers.iterdir()} == {"runtime.h", "runtime.hpp"}
    names = {path.name for path in prefix.glob("lib*/*") if path.is_file()}
    assert {"libdfssm_runtime.so", "libdfssm_runtime.so.0"} <= names


def test_find_package(prefix, tiny_bundle, tmp_path):
    flags = [f"-DCMAKE_{language}_FLAGS={FLAGS}" for language in ("C", "CXX")]
    place = f"-DCMAKE_PREFIX_PATH={prefix}"
    run(
        BIN / "cmake",
        "-S",
        EXAMPLES,
        "-B",
        tmp_path,
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}",
        place,
        *flags,
    )
    run(BIN / "cmake", "--build", tmp_path, env=os.environ | BESIDE)
    done = run(tmp_path / "generate", tiny_bundle, "hello", "3", env=environment(**BESIDE))
    assert (
        done.stdout.endswith("\n")
        and run(tmp_path / "ids", tiny_bundle, "2", "5", env=environment(**BESIDE)).stdout.count("\n") == 2
    )


@pytest.mark.skipif(not shutil.which("pkg-config"), reason="no pkg-config here")
def test_pkg_config(prefix, tiny_bundle, tmp_path):
    (folder,) = prefix.glob("lib*/pkgconfig")
    where = {"env": os.environ | {"PKG_CONFIG_PATH": str(folder)}}
    assert run("pkg-config", "--modversion", "dfssm_runtime", **where).stdout.strip() == dfssm.__version__
    flags = shlex.split(run("pkg-config", "--cflags", "--libs", "dfssm_runtime", **where).stdout)
    run(
        *C,
        *SANITIZE,
        EXAMPLES / "ids.c",
        *flags,
        f"-Wl,-rpath,{folder.parent}",
        "-o",
        tmp_path / "ids",
        env=os.environ | BESIDE,
    )
    assert run(tmp_path / "ids", tiny_bundle, "2", "5", env=environment(**BESIDE)).stdout.count("\n") == 2


def test_the_library_exports_its_interface_alone(prefix):
    """No name of its C++ is visible to a program."""
    (file,) = prefix.glob("lib*/libdfssm_runtime.so")
    listed = run("nm", "-D", "--defined-only", "--format=posix", file).stdout.splitlines()
    header = (ROOT / "native/include/dfssm/runtime.h").read_text()
    assert {line.split()[0] for line in listed} == set(re.findall(r"^DFSSM_API .*?(\w+)\(", header, re.MULTILINE))
