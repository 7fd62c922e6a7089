"""Process groups of workers (gloo) without the cost of starting Python for each rank.

One server per test session takes jobs, one after the other, and forks a rank for each.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from processes import HELPERS


def run_together(
    processes: int, worker: str, *arguments: object, timeout: float = 400
) -> subprocess.CompletedProcess[str]:
    """Run a file of this folder in several processes that form a group.

    Like `launch_together`, for workers that need no launcher: stderr holds the output of all ranks.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "worker": worker,
            "arguments": [str(one) for one in arguments],
            "processes": processes,
            "log": str(Path(folder) / "log"),
            "timeout": timeout,
        }
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        reply = server.stdout.readline()
        assert reply, "the server of workers has ended"
        output = Path(job["log"]).read_text(errors="replace")
    return subprocess.CompletedProcess([worker], json.loads(reply)["returncode"], "", output)


@functools.cache
def _server() -> subprocess.Popen[str]:
    paths = filter(None, [str(HELPERS), os.environ.get("PYTHONPATH")])
    here = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    server = subprocess.Popen(
        [sys.executable, HELPERS / "worker_server.py"],
        env=os.environ | here,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    """Close its input, which ends it."""
    assert server.stdin is not None
    server.stdin.close()
    server.wait(timeout=30)
