"""A joint training run as one of several processes: for test_joint_lora.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from joint_run import JOINT, run

if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), Path(sys.argv[2]), JOINT)
    state = AcceleratorState()
    assert state.num_processes == 2
    state.destroy_process_group()
