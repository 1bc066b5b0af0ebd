"""`loramux` as a child of the server: the same program, below the server's priority, gone when the server is.

The server holds the other end of standard input and never writes to it: its end is the server's death, however that
came. What an export has written by then is taken up again with --resume. Arguments are those of `loramux`.
"""

from __future__ import annotations

import os
import threading

NICENESS = 10


def main() -> None:
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()
    os.nice(NICENESS)
    from loramux_server.cli import main as loramux

    loramux()


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
