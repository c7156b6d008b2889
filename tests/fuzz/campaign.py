"""`make fuzz SECONDS=N`: every entry for N seconds, one after the other; what each did and found.

    python tests/fuzz/campaign.py SECONDS [ENTRY...]

Findings lie in build/fuzz/findings/; what has led to new coverage in build/fuzz/corpus/: the next run goes on from it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from fuzz import entries, native  # noqa: E402

FINDINGS, CORPUS = native.BUILD / "findings", native.BUILD / "corpus"
PACKAGES = native.BUILD / "python"


def atheris() -> str:
    """Nothing, or why it cannot be used. Kept outside the environment: no other work needs it."""
    if not (PACKAGES / "atheris").is_dir():
        command = "-m pip install -q --disable-pip-version-check --no-deps --only-binary :all: --require-hashes".split()
        command += ["--target", str(PACKAGES), "-r", str(HERE / "requirements.txt")]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    return ""


def reader(name: str, seconds: str) -> bool:
    environment = os.environ | {"PYTHONPATH": f"{HERE.parent}:{PACKAGES}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fuzz.run", name, "--seconds", seconds, "--out", FINDINGS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(f"{name}: ")]
    print(*(lines or [f"{name}: ended with status {done.returncode}: {done.stderr[-1000:]}"]), sep="\n", flush=True)
    return done.returncode == 0


def kernel(program: Path, seconds: str) -> bool:
    name = str(program.relative_to(native.BUILD))  # "simulated/scan"
    corpus, prefix = CORPUS / name, FINDINGS / name.replace("/", "-")
    corpus.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={seconds}", "-max_len=512", "-verbosity=0", "-print_final_stats=1"]
    command = [program, *options, f"-artifact_prefix={prefix}-", corpus]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    executed = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    print(
        f"{name}: {executed[1] if executed else '?'} executions, {int(done.returncode != 0)} findings",
        flush=True,
    )
    if done.returncode:
        print(done.stderr[-3000:])
    return done.returncode == 0


def main() -> int:
    seconds, *names = sys.argv[1:]
    FINDINGS.mkdir(parents=True, exist_ok=True)
    clean = True
    if why_not := atheris():
        print(f"the readers are not fuzzed: {why_not}")
    else:
        for name in entries.ENTRIES:
            if not names or name in names:
                clean &= reader(name, seconds)
    for simulated in (False, True):
        try:
            for program in native.build(simulated):
                if not names or program.name in names:
                    clean &= kernel(program, seconds)
        except native.Unavailable as error:
            print(f"the {'simulated ' * simulated}kernels are not fuzzed: {error}")
    return not clean


if __name__ == "__main__":
    sys.exit(main())
