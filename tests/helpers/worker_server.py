"""Runs workers of this folder in forked processes that form a process group.

Started by resident_workers.py. Forking saves every rank the seconds that importing takes; the
server itself imports only, so that no thread exists when it forks.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import torch
import transformers  # noqa: F401

import headstart.scripts.commands.train
import headstart.training.trainer  # noqa: F401

HELPERS = Path(__file__).parent
LOST = 20  # seconds that the other ranks may go on once one has failed


def run(job: dict[str, Any]) -> dict[str, int]:
    """Run a job: worker (file name), arguments, processes, log (file), timeout (seconds)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": job["processes"], "LOCAL_WORLD_SIZE": job["processes"]}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = {
        fork(job, group | {"RANK": rank, "LOCAL_RANK": rank}) for rank in range(job["processes"])
    }
    until, failed = time.monotonic() + job["timeout"], 0
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            running.discard(pid)
            if status and not failed:
                failed = os.waitstatus_to_exitcode(status)
                until = min(until, time.monotonic() + LOST)
        elif time.monotonic() > until:
            failed = failed or 124
            for left in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)
        else:
            time.sleep(0.005)
    return {"returncode": failed}


def fork(job: dict[str, Any], environment: dict[str, object]) -> int:
    """Start one rank; its process number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ |= {name: str(value) for name, value in environment.items()}
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = [job["worker"], *job["arguments"]]
        runpy.run_path(str(HELPERS / job["worker"]), run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
