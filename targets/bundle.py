"""The bundle on disk: its manifest, read strictly, and the check of its files. Standard library only.

A bundle is a folder made by `dfcompile`; docs/format.md has the format. This module is what a program that opens one
needs, so it imports neither torch nor onnx.
"""

import hashlib
import json
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dfssm.base import DfssmError, hashing, paths
from dfssm.base.paths import MANIFEST
from dfssm.opset.schema import STATE_FORMS

from . import TARGETS, get_target
from .files import Files

FORMAT = "dfssm-bundle"
VERSION = 2

MODEL = "model.onnx"
DATA = "model.onnx.data"
TAPS = "taps.onnx"
"""A second graph over the same weights, which shows the hidden states; a bundle need not have it."""
ENGINE = "model.engine"
TOKENIZER = "tokenizer.json"

ITSELF = "manifest_sha256"
_BLANK = "0" * 64  # stands in its place while the manifest is hashed

# Each but the first takes a writer that ends just then. Some network file systems number a file anew at each look.
_TRIES = 10

# Of a file: what its entry holds.
_ENTRIES = {1: {"sha256": str, "bytes": int}, 2: {"sha256": str, "chunks_sha256": str, "bytes": int}}
_NEW = {"machine": None, "model_sha256": ""}  # since version 2


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json.

    `config` is the model config by its JSON keys, `files` maps a file name to its `file_entry` for every file of the
    bundle but the manifest, `tools` the versions that made it, `verification` the result of comparing the bundle with
    the student it was made from ({"passed": None} when that was skipped). `engine` is what a target says of the
    model.engine it built, {} where there is none. `machine`: the architecture that the bundle is for, as
    `platform.machine` names it; None for any. `model_sha256`: of the file of that student; "" in a bundle of version 1.
    """

    target: str
    config: dict[str, Any]
    state_dtype: str
    layout: int
    files: dict[str, dict[str, Any]]
    tools: dict[str, str] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    machine: str | None = None
    model_sha256: str = ""

    @property
    def weights(self) -> str:
        """Name of the file that holds the weights: its sha256 tells one model from another."""
        return get_target(self.target).WEIGHTS

    def to_json(self) -> str:
        """The text of manifest.json."""
        contents = asdict(self)
        if not self.engine:
            del contents["engine"]
        return sealed({"format": FORMAT, "version": VERSION} | contents)


def sealed(document: dict[str, Any]) -> str:
    """The text of a manifest of these contents, with the sha256 of itself as its last key."""
    text = json.dumps(document | {ITSELF: _BLANK}, indent=2) + "\n"
    before, _, after = text.rpartition(_BLANK)
    return before + hashlib.sha256(text.encode()).hexdigest() + after


class Bundle(Files):
    """A bundle, open: its `manifest`, and the files that this lists. To be closed, as Files."""

    def __init__(self, folder: str | Path):
        super().__init__(paths.bundle(folder))
        self.manifest = _read(self.folder / MANIFEST, self.read(MANIFEST))

    def check(self, hashes: bool = True, later: str = "") -> None:
        """Compare every file with its size and, unless `hashes` is False, its hash in the manifest; of the file `later`
        the hash is left to the caller. Raises DfssmError naming the first file that is missing or differs.
        """
        for name, entry in self.manifest.files.items():
            size = self.size(name)
            if size != entry["bytes"]:
                found = f"has {size} bytes, its manifest says {entry['bytes']}"
                raise DfssmError(f"{self.folder / name} {found}: copy or compile it again")
            if hashes and name != later:
                self.check_hash(name)

    def check_hash(self, name: str) -> None:
        """Compare the hash of a file with the manifest's. Raises DfssmError when they differ."""
        entry = self.manifest.files[name]
        # Of a file of version 1 there is only the sha256 of the whole, which takes one core.
        kind = "chunks_sha256" if "chunks_sha256" in entry else "sha256"
        if self.use(name, getattr(hashing, kind)) != entry[kind]:
            path = self.folder / name
            raise DfssmError(f"{path} does not match the sha256 in its manifest: copy or compile it again")


def open_bundle(folder: str | Path, hashes: bool = True) -> Bundle:
    """A bundle that may run on this machine, its files checked (`Bundle.check`). Whatever runs a bundle begins here, or
    with `loading`.

    Raises DfssmError as `read_manifest` and `check_files`, and for a bundle that is for another machine.
    """
    bundle = _for_this_machine(folder)
    bundle.check(hashes)
    return bundle


@contextmanager
def loading(folder: str | Path, hashes: bool = True) -> Iterator[Bundle]:
    """As `open_bundle`, but the hash of the weights, which are the time of it, is compared beside what the block does.

    The end of the block waits for that; damage is raised there, whatever the block raised. Weights are numbers of any
    values, so nothing is lost if a session is opened over damaged ones; what is code, an engine, is checked before.
    """
    with _for_this_machine(folder) as bundle:
        if not (hashes and DATA in bundle.manifest.files):
            bundle.check(hashes)
            yield bundle
            return
        bundle.check(hashes, later=DATA)
        with ThreadPoolExecutor(1) as beside:
            compared = beside.submit(bundle.check_hash, DATA)
            try:
                yield bundle
            finally:
                compared.result()


def of_one_moment(folder: str | Path) -> Bundle:
    """A bundle whose files are open, those that there are: all of its manifest, whatever writers do meanwhile.

    A writer replaces the manifest before it touches a file of the old one, or replaces the folder that has both. So
    they are of one moment if the manifest is the same when they are open; else this begins again, with the new one.
    """
    for left in reversed(range(_TRIES)):
        bundle = Bundle(folder)
        for name in bundle.manifest.files:
            with suppress(DfssmError):  # `check` raises it
                bundle.open(name)
        if not left or not bundle.replaced():
            break
        bundle.close()
    return bundle


def _for_this_machine(folder: str | Path) -> Bundle:
    bundle = of_one_moment(folder)
    made_for, here = bundle.manifest.machine, platform.machine()
    if made_for not in (None, here):
        raise DfssmError(f"{folder} is for {made_for}, this machine is {here}: compile the model again here")
    return bundle


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check `folder`/manifest.json.

    Raises DfssmError when the folder is no bundle, is of another version, or when its manifest lacks a key, has a key
    that this version does not know, is not what was written, or names a target, a state dtype or a file it cannot mean.
    """
    with Bundle(folder) as bundle:
        return bundle.manifest


def check_files(folder: str | Path, hashes: bool = True) -> None:
    """`Bundle.check` of the bundle in a folder."""
    with of_one_moment(folder) as bundle:
        bundle.check(hashes)


def file_entry(path: Path) -> dict[str, Any]:
    """The manifest's entry of one file: the sha256 of the whole, that of its chunks (`hashing`), its size."""
    whole, chunks = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(hashing.CHUNK):
            whole.update(chunk)
            chunks.update(hashlib.sha256(chunk).digest())
        return {"sha256": whole.hexdigest(), "chunks_sha256": chunks.hexdigest(), "bytes": file.tell()}


def _read(path: Path, content: bytes) -> Manifest:
    try:
        document = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise DfssmError(f"{path} cannot be read ({error}): compile the model again") from None
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise DfssmError(f'{path} is not the manifest of a bundle: it lacks "format": "{FORMAT}"')
    version = document.pop("version", None)
    if version not in tuple(_ENTRIES):  # what JSON holds need not be hashable
        known = " and ".join(map(str, _ENTRIES))
        raise DfssmError(
            f"{path} has bundle version {version!r}, this dfssm reads versions {known}: compile the model again"
        )
    if version == 1:
        document = _NEW | document
    elif not _is_sealed(content.decode(), document.pop(ITSELF, None)):
        raise DfssmError(f"{path} does not match its own sha256: copy the bundle or compile the model again")
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
    if manifest.state_dtype not in tuple(STATE_FORMS):  # what JSON holds need not be hashable
        raise DfssmError(f"{path}: unknown state_dtype {manifest.state_dtype!r}, known are {', '.join(STATE_FORMS)}")
    if not (isinstance(manifest.machine, str | None) and isinstance(manifest.model_sha256, str)):
        raise DfssmError(f"{path}: 'machine' or 'model_sha256' is no text: compile the model again")
    for name, entry in manifest.files.items():
        # A name is looked up below the bundle only: "../x" in a manifest from elsewhere must not reach out of it.
        of_bundle = Path(name).name == name and name not in ("", "..") and name.isprintable()
        whole = isinstance(entry, dict) and {key: type(value) for key, value in entry.items()} == _ENTRIES[version]
        if not (of_bundle and whole):
            raise DfssmError(f"{path}: the entry of file {name!r} is not valid: compile the model again")
    target = get_target(manifest.target)
    if manifest.layout not in target.LAYOUTS or isinstance(manifest.layout, bool):
        has = " or ".join(map(str, target.LAYOUTS))
        found = f"layout is {manifest.layout!r}, target {manifest.target} has {has}"
        raise DfssmError(f"{path}: {found}: compile the model again")
    if bool(manifest.engine) != target.IS_ENGINE:
        engines = ", ".join(name for name in TARGETS if get_target(name).IS_ENGINE)
        raise DfssmError(f"{path}: key 'engine' is for target {engines}, and needed there: compile the model again")
    for name in target.FILES:
        if name not in manifest.files:
            raise DfssmError(f"{path}: no entry for {name}: compile the model again")
    return manifest


def _is_sealed(text: str, digest: object) -> bool:
    if not isinstance(digest, str) or len(digest) != len(_BLANK):
        return False
    before, _, after = text.rpartition(digest)
    return hashlib.sha256(f"{before}{_BLANK}{after}".encode()).hexdigest() == digest
