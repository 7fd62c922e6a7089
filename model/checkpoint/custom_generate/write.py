"""Copy the decoding code for transformers without Headstart into a fused checkpoint.

transformers runs `custom_generate/generate.py` of a folder or repository on request, with
`trust_remote_code=True`. The checkpoint gets the sources of this package unchanged.
"""

from __future__ import annotations

import shutil
from pathlib import Path

FOLDER = "custom_generate"  # transformers' names
REQUIREMENTS = "requirements.txt"
SOURCES = ("generate.py", "drafting.py")
FILES = tuple(f"{FOLDER}/{name}" for name in (*SOURCES, REQUIREMENTS))


def write_custom_generate(folder: Path) -> None:
    """Write the code into a fused checkpoint. folder: its root, without such code yet."""
    out = folder / FOLDER
    out.mkdir()
    for name in SOURCES:
        shutil.copyfile(Path(__file__).with_name(name), out / name)
    (out / REQUIREMENTS).write_text("transformers>=5.17\n", encoding="utf-8")
