"""Workers of this folder as processes of their own: alone, or several that know one another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HELPERS = Path(__file__).parent
ROOT = HELPERS.parent.parent
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")


def launch(*command: object, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """Run `python ...` with this folder's modules at hand, one thread each."""
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    here = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HELPERS), *inherited])}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | here,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def launch_together(
    processes: int, worker: str, *arguments: object, launcher: Sequence[str] = TORCHRUN
) -> subprocess.CompletedProcess[str]:
    """Run a file of this folder in several processes."""
    return launch("-m", *launcher, processes, HELPERS / worker, *arguments)
