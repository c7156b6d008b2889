import json

import pytest
import tiny
from click.testing import CliRunner

from dfssm.base import DfssmError
from dfssm.bench import decode
from dfssm.bench.speculation import RATES
from dfssm.cli.main import dfssm
from dfssm.runtime.speculation import Speculation


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return str(tiny.write_bundle(tmp_path_factory.mktemp("deferred") / "bundle", state_dtype="fp16-deferred"))


def test_each_rate_has_its_share_of_right_drafts(bundle):
    arguments = ["bench", bundle, "--speculate", "--rounds", "3", "--tokens", "96", "--prompt", "2"]
    result = json.loads(CliRunner().invoke(dfssm, [*arguments, "--json"], catch_exceptions=False).stdout)
    found = {entry["right"]: entry for entry in result["speculation"]}
    assert tuple(found) == RATES
    for entry in found.values():
        runs = 3 * 96 / entry["tokens_per_run"]
        assert runs + entry["kept"] == pytest.approx(3 * 96) and entry["kept"] <= entry["drafted"]
        assert entry["tok_s"] > 0 and entry["ratio"] > 0
    assert found[0]["kept"] == 0 and found[0]["tokens_per_run"] == 1
    # Those after a wrong one are lost, so that fewer are kept than are right.
    assert 0.2 < found[0.5]["kept"] / found[0.5]["drafted"] < 0.5 < found[0.8]["kept"] / found[0.8]["drafted"] < 0.8
    assert found[1]["drafted"] == found[1]["kept"] and found[1]["tokens_per_run"] > 5
    text = CliRunner().invoke(dfssm, arguments, catch_exceptions=False).stdout
    assert "speculation, 80%" in text and "tokens a run" in text


def test_other_tokens_are_a_fault(bundle, monkeypatch):
    monkeypatch.setattr(Speculation, "read", lambda self, token, left: self._engine.step([7], self._state))
    with pytest.raises(AssertionError, match="speculation chose other tokens"):
        decode.bench(bundle, prompt=2, tokens=8, rounds=1, speculate=True)


def test_a_bundle_that_cannot_is_refused_before_anything_is_timed(tiny_bundle, monkeypatch):
    monkeypatch.setattr(decode, "check_outputs", None)
    with pytest.raises(DfssmError, match="speculation needs"):
        decode.bench(str(tiny_bundle), speculate=True)
