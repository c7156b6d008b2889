import pytest
import tiny
import torch
from click.testing import CliRunner

from dfssm.model.checkpoint import save_student


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """model.pt of the tiny student; not to be written to."""
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_student(path, tiny.CONFIG, {name: torch.from_numpy(array) for name, array in tiny.tensors().items()})
    return path


@pytest.fixture
def invoke():
    """invoke(*arguments) -> click's result of `dfssm arguments`, errors raised as they are."""
    from dfssm.cli.main import dfssm

    def run(*arguments):
        return CliRunner().invoke(dfssm, [str(a) for a in arguments], catch_exceptions=False)

    return run
