"""`dfssm inspect`: config, sizes and files of a student or a bundle."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from dfssm.base import paths
from dfssm.base.extras import require
from dfssm.base.files import write_file
from dfssm.base.hashing import sha256
from dfssm.base.reading import open_file
from dfssm.model import PACKAGES
from dfssm.opset.layouts import LAYOUTS
from dfssm.targets.bundle import MODEL, Bundle, of_one_moment

from .compare import TOKENS
from .options import json_option, megabytes, print_result, progress_bars, spread, table, trust_option

_BAR = 40
_BATCHES = (8,)  # that are measured besides 1


@click.command()
@click.argument("path", metavar="MODEL|BUNDLE", type=click.Path())
@click.option("--html", type=click.Path(), metavar="FILE", help="Also write a page: sizes, errors, speed, the graph "
              "of a layer, numerics.")  # fmt: skip
@click.option("--against", type=click.Path(), metavar="MODEL", help="Also compare the bundle with this student, layer "
              "by layer, as `dfssm compare`.")  # fmt: skip
@click.option("--measure", is_flag=True, help="Also measure the speed of the bundle here, as `dfssm bench`.")
@trust_option
@json_option
def inspect(path: str, html: str | None, against: str | None, measure: bool, as_json: bool) -> None:
    """Show the sizes and files of a student or a bundle.

    With --html also as one page, which a browser shows without a network. Nothing of a bundle is run unless --against
    or --measure is given.
    """
    kind, found = paths.find(path, "student", "bundle")
    if (against or measure) and not html:
        raise click.UsageError("--against and --measure are for the page: give --html FILE too.")
    if (against or measure) and kind == "student":
        raise click.UsageError(f"--against and --measure take a bundle, {path} is a student.")
    student = paths.student(against) if against else None
    page = paths.output_file(html, found, student) if html else None
    if page and kind == "bundle":
        require({"compile": ["onnx"]})
    if student:
        require(PACKAGES, {"compile": ["onnx", "polygraphy"]})
    result = _bundle(found) if kind == "bundle" else _model(found)
    result |= {"comparison": None, "speed": None}
    with progress_bars() as progress:
        if student:
            from dfssm.verify.bundle import compare_bundle

            result["comparison"] = compare_bundle(found, student, TOKENS, partial(progress, "compare"))
        if measure:
            from dfssm.bench.decode import bench

            result["speed"] = bench(found, batches=_BATCHES, progress=partial(progress, "bench"))
    if page:
        _write_page(page, found, result)
    print_result(result, as_json, lambda result: _text(result) + (f"\n\n{page}" if page else ""))


def _write_page(page: Path, folder: Path, result: dict) -> None:
    from .inspect_page import page as made

    layer = []
    if MODEL in result["files"]:
        from dfssm.verify.layer import layer_nodes

        with Bundle(folder) as bundle:
            layer = layer_nodes(bundle, 0)
    write_file(page, made(result, _words(result), layer).encode(errors="replace"))  # a name need not be UTF-8


def _bundle(folder: Path) -> dict:
    from dfssm.bench.traffic import step_bytes
    from dfssm.model.config import DFSSMConfig
    from dfssm.model.ledger import bundle_bytes, operations_of_step

    with of_one_moment(folder) as bundle:
        bundle.check()
        manifest = bundle.manifest
    sizes = bundle_bytes(folder, manifest)
    return {
        "path": str(folder),
        "target": manifest.target,
        "state_dtype": manifest.state_dtype,
        "layout": manifest.layout,
        "config": DFSSMConfig.from_dict(manifest.config).to_dict(),
        "sizes": sizes,
        "files": {name: entry["bytes"] for name, entry in manifest.files.items()},
        "machine": manifest.machine,
        "model_sha256": manifest.model_sha256 or None,
        "tools": manifest.tools,
        "verification": manifest.verification,
        "step_bytes": step_bytes(manifest.config, manifest.layout, manifest.state_dtype),
        "step_operations": operations_of_step(manifest.config),
    }


def _model(path: Path) -> dict:
    require(PACKAGES)
    from dfssm.model.checkpoint import load_student_tensors
    from dfssm.model.tensors import ROLES, role

    config, tensors = load_student_tensors(path)
    sizes = dict.fromkeys(ROLES, 0)
    for name, tensor in tensors.items():
        sizes[role(name)] += tensor.numel() * tensor.element_size()
    with open_file(path) as file:
        digest = sha256(file)
    return {
        "path": str(path),
        "target": None,
        "state_dtype": None,
        "layout": None,
        "config": config.to_dict(),
        "sizes": sizes,
        "files": {path.name: path.stat().st_size},
        "machine": None,
        "model_sha256": digest,
        "tools": None,
        "verification": None,
        "step_bytes": None,
        "step_operations": None,
    }


def _words(result: dict) -> list[str]:
    """What it is, and its shape."""
    config = result["config"]
    kind, digest = "student", result["model_sha256"]
    if result["target"]:
        kind = f"bundle for {result['target']} on {result['machine'] or 'any machine'}, {result['state_dtype']} states"
        kind += f", layout {LAYOUTS[result['layout']].name}"
    shape = (
        f"{config['n_layer']} layers, d_model {config['d_model']}, d_state {config['d_state']}, "
        f"vocabulary {config['vocab_size']}, rank {spread(config['rank'])}, planes {spread(config['planes'])}"
    )
    return [kind, shape, *([f"student's sha256 {digest}"] if digest else [])]


def _text(result: dict) -> str:
    sizes, (kind, *others) = result["sizes"], _words(result)
    whole = sum(sizes.values())
    rows = [
        [name, "█" * round(_BAR * count / whole), megabytes(count), f"{100 * count / whole:.1f} %"]
        for name, count in sorted(sizes.items(), key=lambda item: -item[1])
        if count
    ]
    files = [[name, megabytes(count)] for name, count in result["files"].items()]
    lines = [
        f"{result['path']}: {kind}",
        *others,
        "",
        table(rows, right={2, 3}),
        f"all weights: {megabytes(whole)}",
        "",
    ]
    return "\n".join([*lines, table(files, right={1})])
