"""How much host memory a program may still take.

Promises: what the kernel can hand out without swapping (page cache counts, as it is given up on demand), and never more
than the container's own limit leaves (cgroup v2 `memory.max`, as Docker and Kubernetes set it). Does not look at swap.
"""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(cgroup: Path = _CGROUP) -> int:
    available = int(psutil.virtual_memory().available)
    left = _container_left(cgroup)
    return available if left is None else min(available, left)


def _container_left(cgroup: Path) -> int | None:
    """None where there is no limit. File pages that are not in use are given up before the limit strikes."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None  # no cgroup v2 here, or one whose files are hidden: the machine's figure stands
