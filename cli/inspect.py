"""`dfssm inspect`: config, sizes and files of a student or a bundle."""

from __future__ import annotations

from pathlib import Path

import click

from dfssm.model import PACKAGES
from dfssm.opset import paths
from dfssm.opset.extras import require
from dfssm.opset.hashing import sha256
from dfssm.opset.layouts import LAYOUTS
from dfssm.opset.reading import open_file

from .options import json_option, megabytes, print_result, spread, table

_BAR = 40


@click.command()
@click.argument("path", metavar="MODEL|BUNDLE", type=click.Path())
@json_option
def inspect(path: str, as_json: bool) -> None:
    """Show the sizes and files of a student or a bundle."""
    kind, found = paths.find(path, "student", "bundle")
    print_result(_bundle(found) if kind == "bundle" else _model(found), as_json, _text)


def _bundle(folder: Path) -> dict:
    from dfssm.model.config import DFSSMConfig
    from dfssm.model.ledger import bundle_bytes
    from dfssm.targets.bundle import Bundle

    with Bundle(folder) as bundle:
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
    }


def _text(result: dict) -> str:
    config, sizes = result["config"], result["sizes"]
    kind, digest = "student", result["model_sha256"]
    if result["target"]:
        kind = f"bundle for {result['target']} on {result['machine'] or 'any machine'}, {result['state_dtype']} states"
        kind += f", layout {LAYOUTS[result['layout']].name}"
    shape = (
        f"{config['n_layer']} layers, d_model {config['d_model']}, d_state {config['d_state']}, "
        f"vocabulary {config['vocab_size']}, rank {spread(config['rank'])}, planes {spread(config['planes'])}"
    )
    whole = sum(sizes.values())
    rows = [
        [name, "█" * round(_BAR * count / whole), megabytes(count), f"{100 * count / whole:.1f} %"]
        for name, count in sorted(sizes.items(), key=lambda item: -item[1])
        if count
    ]
    files = [[name, megabytes(count)] for name, count in result["files"].items()]
    lines = [
        f"{result['path']}: {kind}",
        shape,
        *([f"student's sha256 {digest}"] if digest else []),
        "",
        table(rows, right={2, 3}),
        f"all weights: {megabytes(whole)}",
        "",
    ]
    return "\n".join([*lines, table(files, right={1})])
