"""`python -m dfssm.eval`: the command lm_eval of the harness, which then knows `--model dfssm` for any task."""

import sys

from dfssm.opset.errors import DfssmError
from dfssm.opset.extras import require

from .suite import PACKAGES


def main() -> None:
    """Run it; an error of the user's is one line, and exit code 1."""
    try:
        require(PACKAGES)
        from lm_eval.__main__ import cli_evaluate

        from . import harness  # noqa: F401 (registers the model type)

        cli_evaluate()
    except DfssmError as error:
        sys.exit(f"dfssm: error: {error}")


if __name__ == "__main__":
    main()
