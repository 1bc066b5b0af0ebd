"""`python -m loramux_server.engine`: the worker process. Its children do not import this again, nor what it imports."""

import sys

from loramux_server.engine.worker import main

if __name__ == "__main__":
    sys.exit(main())
