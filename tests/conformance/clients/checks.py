"""What the client scripts have in common: run checks by name, write down what failed. Standard library only.

A script is run with the environment of its client: `python script.py URL RESULT_FILE`.
"""

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

URL = sys.argv[1]  # of the server, with /v1
KEY = "none"
ADAPTER = "pirate"


def run(*checks: Callable[[], None]) -> None:
    """Each check raises if it is not satisfied."""
    said: dict[str, str | None] = {}
    for check in checks:
        try:
            check()
            said[check.__name__] = None
        except Exception as error:  # noqa: BLE001 - whatever a client raises is what it has to say
            traceback.print_exc()
            said[check.__name__] = f"{type(error).__name__}: {error}"
    Path(sys.argv[2]).write_text(json.dumps(said))
