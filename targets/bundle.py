"""The bundle on disk: its manifest, read strictly, and the check of its files. Standard library only.

A bundle is a folder made by `dfcompile`; docs/format.md has the format. This module is what a program that opens one
needs, so it imports neither torch nor onnx.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dfssm.opset import DfssmError, paths
from dfssm.opset.paths import MANIFEST
from dfssm.opset.schema import STATE_DTYPES

from . import TARGETS, get_target

FORMAT = "dfssm-bundle"
VERSION = 1

MODEL = "model.onnx"
DATA = "model.onnx.data"
ENGINE = "model.engine"
TOKENIZER = "tokenizer.json"

_ENTRY = {"sha256": str, "bytes": int}  # of a file


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json.

    `config` is the model config by its JSON keys, `files` maps a file name to {"sha256": hex, "bytes": int} for every
    file of the bundle but the manifest, `tools` the versions that made it, `verification` the result of comparing the
    bundle with the student it was made from ({"passed": None} when that was skipped). `engine` is what a target says of
    the model.engine it built, {} where there is none.
    """

    target: str
    config: dict[str, Any]
    state_dtype: str
    layout: int
    files: dict[str, dict[str, Any]]
    tools: dict[str, str] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> str:
        """Name of the file that holds the weights: its hash tells one model from another."""
        return get_target(self.target).WEIGHTS

    def to_json(self) -> str:
        """The text of manifest.json."""
        contents = asdict(self)
        if not self.engine:
            del contents["engine"]
        return json.dumps({"format": FORMAT, "version": VERSION} | contents, indent=2) + "\n"


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check `folder`/manifest.json.

    Raises DfssmError when the folder is no bundle, is of another version, or when its manifest lacks a key, has a key
    that this version does not know, or names a target, a state dtype or a file it cannot mean.
    """
    path = paths.bundle(folder) / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DfssmError(f"{path} cannot be read ({error}): compile the model again") from None
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise DfssmError(f'{path} is not the manifest of a bundle: it lacks "format": "{FORMAT}"')
    version = document.pop("version", None)
    if version != VERSION:
        raise DfssmError(
            f"{path} has bundle version {version!r}, this dfssm reads version {VERSION}: compile the model again"
        )
    document.setdefault("engine", {})
    expected = {f.name for f in fields(Manifest)}
    for key in sorted(expected ^ set(document)):
        raise DfssmError(f"{path}: key {key!r} is {'missing' if key in expected else 'unknown'}: compile again")
    for key in ("config", "files", "tools", "verification", "engine"):
        if not isinstance(document[key], dict):
            raise DfssmError(f"{path}: '{key}' is not an object: compile the model again")
    manifest = Manifest(**document)
    if manifest.target not in TARGETS:
        raise DfssmError(f"{path}: unknown target {manifest.target!r}, known are {', '.join(TARGETS)}")
    if manifest.state_dtype not in tuple(STATE_DTYPES):  # what JSON holds need not be hashable
        raise DfssmError(f"{path}: unknown state_dtype {manifest.state_dtype!r}, known are {', '.join(STATE_DTYPES)}")
    for name, entry in manifest.files.items():
        # A name is looked up below the bundle only: "../x" in a manifest from elsewhere must not reach out of it.
        of_bundle = Path(name).name == name and name.isprintable()
        whole = isinstance(entry, dict) and {key: type(value) for key, value in entry.items()} == _ENTRY
        if not (of_bundle and whole):
            raise DfssmError(f"{path}: the entry of file {name!r} is not valid: compile the model again")
    target = get_target(manifest.target)
    if bool(manifest.engine) != target.IS_ENGINE:
        engines = ", ".join(name for name in TARGETS if get_target(name).IS_ENGINE)
        raise DfssmError(f"{path}: key 'engine' is for target {engines}, and needed there: compile the model again")
    for name in target.FILES:
        if name not in manifest.files:
            raise DfssmError(f"{path}: no entry for {name}: compile the model again")
    return manifest


def open_bundle(folder: str | Path, hashes: bool = True) -> Manifest:
    """The manifest of a bundle whose files are those that it lists: `read_manifest`, then `check_files`. Whatever opens
    a bundle begins here.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest, hashes)
    return manifest


def check_files(folder: str | Path, manifest: Manifest, hashes: bool = True) -> None:
    """Compare every file of the bundle with its size and, unless `hashes` is False, its sha256 in the manifest.

    Raises DfssmError naming the first file that is missing or differs.
    """
    for name, entry in manifest.files.items():
        path = Path(folder) / name
        if not path.is_file():
            raise DfssmError(f"{path} is missing: the bundle is not complete, copy or compile it again")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise DfssmError(f"{path} has {size} bytes, its manifest says {entry['bytes']}: copy or compile it again")
        if hashes and sha256(path) != entry["sha256"]:
            raise DfssmError(f"{path} does not match the sha256 in its manifest: copy or compile it again")


def file_entry(path: Path) -> dict[str, Any]:
    """The manifest's entry of one file: {"sha256": hex, "bytes": int}."""
    return {"sha256": sha256(path), "bytes": path.stat().st_size}


def sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
