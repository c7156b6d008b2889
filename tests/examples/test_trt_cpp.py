"""examples/trt_cpp: it compiles against TensorRT's and CUDA's headers, and decodes what a toy behind them computes."""

import subprocess
from pathlib import Path

import pytest
from plugins_trt import adapter, emulated
from plugins_trt.test_nvcc import find_nvcc

SOURCE = Path(__file__).parents[2] / "examples/trt_cpp/decode.cpp"
TOY = Path(__file__).with_name("toy_tensorrt")
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror"]


def compile(*arguments) -> None:
    command = [emulated.compiler() or pytest.skip("no g++ here"), *FLAGS, *map(str, arguments), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_is_short():
    assert len(SOURCE.read_text().splitlines()) <= 150


def cuda_headers() -> str:
    """The folder of CUDA's headers, by nvcc."""
    nvcc = find_nvcc() or pytest.skip("no CUDA toolkit here")
    listed = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    include = next(line for line in listed.splitlines() if "INCLUDES=" in line).partition("INCLUDES=")[2]
    return include.replace('"', "").split()[0].removeprefix("-I")


def test_it_compiles_against_the_headers_of_tensorrt_and_cuda():
    tensorrt = adapter.headers()[adapter.TRT_HEADER] or pytest.skip(f"no {adapter.TRT_HEADER} here")
    compile("-fsyntax-only", "-isystem", tensorrt, "-isystem", cuda_headers())


@pytest.fixture(scope="module")
def decode(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trt_cpp") / "decode"
    compile(f"-I{TOY}", "-fsanitize=address,undefined", "-o", out)
    return out


def bundle(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "libdfssm_trt.so").touch()
    (folder / "model.engine").write_text(text)
    return folder


def expected(ids: list[int], count: int, vocab: int) -> list[int]:
    number = tokens = last = 0
    made = []
    for _ in range(count):
        for token in ids:
            number, last = (7 * number + token + tokens + last) % vocab, token
            tokens += 1
        ids = [number]
        made.append(number)
    return made


@pytest.mark.parametrize("inputs", [3, 4], ids=["--max-logits 1", "logits_at"])
@pytest.mark.parametrize("profiles", [1, 2], ids=["TensorRT-RTX", "TensorRT"])
@pytest.mark.parametrize("longest", [1, 4])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 9])
def test_it_decodes(length, longest, profiles, inputs, decode, tmp_path):
    """Prompts of one token, of a part of a run, a whole one, and of runs whose last has one token."""
    folder = bundle(tmp_path / "bundle", f"97 {longest} {profiles} {inputs}")
    ids = [(13 * i + 5) % 97 for i in range(length)]
    command = [decode, folder, "12", *map(str, ids)]
    done = subprocess.run(command, capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == expected(ids, 12, 97)


@pytest.mark.parametrize(
    "engine, library, words",
    [("97 4 1 4", False, "cannot load {}/libdfssm_trt.so"), ("", True, "TensorRT cannot load the engine of {}")],
)
def test_its_errors_are_one_line(engine, library, words, decode, tmp_path):
    folder = bundle(tmp_path / "bundle", engine)
    if not library:
        (folder / "libdfssm_trt.so").unlink()
    done = subprocess.run([decode, folder, "3", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"decode: {words.format(folder)}\n")
    done = subprocess.run([decode, folder], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "decode: usage: decode BUNDLE COUNT ID...\n"
