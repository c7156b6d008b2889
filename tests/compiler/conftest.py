import pytest
from compiles import save

from dfssm.cli.main import dfcompile


@pytest.fixture
def model(tmp_path):
    (tmp_path / "in").mkdir()
    return save(tmp_path / "in" / "model.pt")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs dfcompile in an empty folder `out`: (exit status, stdout, stderr, what is there afterwards)."""
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def run(*args):
        try:
            dfcompile([str(arg) for arg in args])
            status = 0
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return status, out, err, sorted(path.name for path in folder.iterdir())

    return run
