"""Names of the files in a head's folder and in a fused checkpoint.

    config.json, model*.safetensors, tokenizer...    the target's files, byte for byte
    README.target.md                                 the target's own model card
    README.md                                        the model card of the fused checkpoint
    draft_heads/config.json                          keys for engines, and ours under "headstart"
    draft_heads/model.safetensors                    the head, bfloat16
    custom_generate/*                                code that lets transformers draft

`draft_heads/` alone is the folder of a head.
"""

from __future__ import annotations

HEADS = "draft_heads"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files
LM_HEAD = "lm_head.weight"  # the tensor that engines expect beside a pruned draft vocabulary
OURS = "headstart"  # the section of a head's config.json, and the name of the package
CARD = "README.md"
TARGET_CARD = "README.target.md"
CHAT_TEMPLATES = "additional_chat_templates"  # transformers' name for the folder
# Patterns of the files of a target, at the root of its repository.
TARGET_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
