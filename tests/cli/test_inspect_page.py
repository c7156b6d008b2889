"""`dfssm inspect --html`: what the page shows, in a browser too, and that a stranger's bundle gets nothing into it."""

import json
import shutil

import onnx
import pytest
import tiny
from browser import CHROMIUM, Browser
from html_page import Page

from dfssm.base import DfssmError
from dfssm.targets.bundle import file_entry, sealed

EVIL = "<script>alert('&')</script>\"</style>"


@pytest.fixture(scope="module")
def written(tiny_bundle, tiny_model, tmp_path_factory):
    """The page of the tiny bundle with all that can be measured, and what --json printed beside it."""
    from click.testing import CliRunner

    from dfssm.cli.main import dfssm

    page = tmp_path_factory.mktemp("page") / "page.html"
    options = ["--html", page, "--against", tiny_model, "--measure", "--json"]
    done = CliRunner().invoke(dfssm, ["inspect", *map(str, [tiny_bundle, *options])], catch_exceptions=False)
    return page, json.loads(done.stdout)


def test_it_shows_what_was_found(written):
    path, result = written
    page = Page(path.read_text(encoding="utf-8"))
    charts = [tag["aria-labelledby"].removesuffix("-title desc") for tag in page.of("svg", "chart")]
    kinds = {name.rpartition(".")[2] for name in result["comparison"]["layers"]}
    states = {name.rpartition(".")[0] for name in result["comparison"]["outputs"]} - {""}
    assert len(charts) == len(kinds | states) + 1, "errors, and the roofline"
    for name in (*kinds, *states, "Roofline", "prompt of 128", "batch 8", "scaffold", "low rank", "fp16 between calls"):
        assert name in page.text, name
    assert f"{result['speed']['tok_s']:.1f}" in page.text and f"{result['comparison']['max_rel']:.1e}" in page.text
    (layer,) = page.of("svg", "layer")
    assert layer["aria-label"].startswith("/layers.0/norm, RMSNorm; /layers.0/in_proj, BinaryScaffoldMatMul; ")
    dots = page.of("circle", "dot")
    exact = sum(not entry["max_rel"] for name, entry in result["comparison"]["layers"].items())
    exact += sum(not entry["max_rel"] for name, entry in result["comparison"]["outputs"].items() if "." in name)
    layers = len(result["comparison"]["layers"]) + len(result["comparison"]["outputs"]) - 1
    assert len(dots) == layers - exact + 3, "a dot for each layer's error, for decode, batch 8 and the prompt"


def test_nothing_is_fetched_and_nothing_runs(written):
    page = Page(written[0].read_text(encoding="utf-8"))
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not any(key in ("src", "href") or key.startswith("on") for _, attrs in page.tags for key in attrs)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


CONTRAST = """(() => {
  const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = light(getComputedStyle(document.body).backgroundColor);
  const against = colour => (Math.max(light(colour), behind) + 0.05) / (Math.min(light(colour), behind) + 0.05);
  const colours = (which, of) => [...document.querySelectorAll(which)].map(e => getComputedStyle(e)[of]);
  const texts = colours('h1, h2, p, td, th, .tile b, .tile span', 'color'), drawn = colours('svg text', 'fill');
  return [behind, Math.min(...[...texts, ...drawn].map(against))];
})()"""
"""How light the page is, and the least contrast of a text on it (WCAG 2.1)."""

CUT = """[...document.querySelectorAll('svg text')].filter(text => {
  const all = text.ownerSVGElement.getBoundingClientRect(), box = text.getBoundingClientRect();
  return box.left < all.left - 1 || box.right > all.right + 1 || box.top < all.top - 1 || box.bottom > all.bottom + 1;
}).map(text => text.textContent)"""
"""Texts that stand out of their drawing."""

WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt-get install chromium")
def test_a_browser_shows_it_in_light_and_dark_on_a_screen_and_a_phone(written, tmp_path):
    address, seen = written[0].as_uri(), {}
    for dark, size in ((False, (1100, 900)), (True, (420, 800))):
        with Browser(tmp_path / str(dark), dark, size) as browser:
            browser.open(address)
            seen[dark], contrast = browser.run(CONTRAST)
            assert contrast >= 4.5, "WCAG 2.1, level AA"
            assert browser.run(CUT) == [] and browser.run(WIDER) == 0
            assert (browser.requests, browser.complaints) == ([address], [])
    assert seen[True] < 0.1 < 0.9 < seen[False]


def test_a_student_has_sizes_only(invoke, tiny_model, tmp_path):
    invoke("inspect", tiny_model, "--html", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Size by component" in page.text and "scaffold" in page.text and not page.of("svg")


def test_what_was_not_measured_is_said(invoke, tiny_bundle, tmp_path):
    done = invoke("inspect", tiny_bundle, "--html", tmp_path / "page.html")
    assert done.stdout.endswith(f"\n{tmp_path / 'page.html'}\n")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("Not measured: ") == 2 and "did not verify this bundle" in text


@pytest.mark.parametrize("option", ["--measure", "--against"])
def test_options_of_the_page_take_a_page_and_a_bundle(invoke, option, tiny_bundle, tiny_model, tmp_path):
    given = [option] + [tiny_model] * (option == "--against")
    done = invoke("inspect", tiny_bundle, *given)
    assert done.exit_code == 2 and "give --html FILE" in done.stderr
    done = invoke("inspect", tiny_model, "--html", tmp_path / "page.html", *given)
    assert done.exit_code == 2 and "is a student" in done.stderr and not (tmp_path / "page.html").exists()


@pytest.fixture
def strange(tiny_bundle, tmp_path):
    """strange(values, edit) -> a bundle whose manifest has these values, and whose graph `edit` has changed."""

    def make(values=None, edit=None):
        bundle = shutil.copytree(tiny_bundle, tmp_path / "b")
        document = json.loads((bundle / "manifest.json").read_text()) | (values or {})
        del document["manifest_sha256"]
        if edit:
            content = edit(onnx.load(bundle / "model.onnx", load_external_data=False))
            (bundle / "model.onnx").write_bytes(content)
            document["files"]["model.onnx"] = file_entry(bundle / "model.onnx")
        (bundle / "manifest.json").write_text(sealed(document))
        return bundle

    return make


def test_whatever_a_bundle_says_is_text(invoke, strange, tmp_path):
    def edit(model):
        for node in model.graph.node:
            if node.name == "/layers.0/norm":
                node.name, node.op_type = f"/layers.0/{EVIL}", EVIL
        for initializer in model.graph.initializer:
            initializer.name = initializer.name.replace("layers.0.norm", EVIL)
        for node in model.graph.node:
            node.input[:] = [name.replace("layers.0.norm", EVIL) for name in node.input]
        return model.SerializeToString()

    entry = {"max_abs": EVIL, "max_rel": [EVIL], "tolerance": {EVIL: 10**400}}
    verification = {"passed": True, "outputs": {EVIL: entry, "a": EVIL, "b": None}, "states": {"share": EVIL}}
    bundle = strange({"verification": verification, "tools": {EVIL: [EVIL]}}, edit)
    invoke("inspect", bundle, "--html", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in text and text.count("</style>") == 1
    assert Page(text).text.count("<script>alert(") >= 5, "tool, version, output, node, weight"


@pytest.mark.parametrize("verification", [{"outputs": []}, {"outputs": {}}, {"graph": {"outputs": "a"}}, {"graph": 1}])
def test_a_verification_that_is_none_is_not_shown(invoke, strange, verification, tmp_path):
    invoke("inspect", strange({"verification": verification}), "--html", tmp_path / "page.html")
    assert "did not verify this bundle" in (tmp_path / "page.html").read_text(encoding="utf-8")


def many(model):
    for i in range(1000):
        model.graph.node.add(op_type="Add", name=f"/layers.0/{i}")
    return model.SerializeToString()


def without(model):
    del model.graph.node[:]
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda model: b"\xff" * 1000, r"cannot be shown \("),
        (lambda model: b"", r"it has 0 nodes of layer 0"),
        (many, r"it has 10\d\d nodes of layer 0"),
        (without, r"it has 0 nodes of layer 0"),
    ],
    ids=["noise", "nothing", "many nodes", "no node"],
)
def test_a_graph_that_is_none_is_one_line_and_no_page(invoke, strange, edit, says, tmp_path):
    bundle = strange(edit=edit)
    with pytest.raises(DfssmError, match=rf"^{bundle}/model.onnx .*{says}.*compile the model again$"):
        invoke("inspect", bundle, "--html", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_bundle_is_not_overwritten(invoke, tiny_bundle):
    with pytest.raises(DfssmError, match="it is a file of .*, which is read"):
        invoke("inspect", tiny_bundle, "--html", tiny_bundle / "manifest.json")


def test_a_deferred_state_is_drawn_whole(invoke, cpu_target, tmp_path):
    bundle = tiny.write_bundle(tmp_path / "b", target=cpu_target, state_dtype="int8-deferred")
    invoke("inspect", bundle, "--html", tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    for name in ("ssm_state", "ssm_scale", "pending_x", "pending_B", "pending_decay", "pending_count", "conv_state"):
        assert f"{name}.0: " in text, name
