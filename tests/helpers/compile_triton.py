"""Compiles the Triton kernels for an H100, which needs no GPU: run by test_cuda_ops.py."""

from __future__ import annotations

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from headstart.model.backends.kernels.triton import attention
from headstart.model.backends.kernels.triton import layer_ops as layers
from headstart.model.backends.kernels.triton import tree_ops as trees

POINTERS = {"lengths": "*i64", "pending": "*u8", "sums": "*fp32", "tops": "*fp32"}
POINTERS |= {"held": "*u8", "scores": "*fp32", "made": "*u8", "logp": "*fp32"}
POINTERS |= {"parents": "*i64", "visible": "*u8", "best": "*fp32", "places": "*i32", "ids": "*i64"}
LONGS = "tokens frontier candidates picked next_tokens next_parents positions"
POINTERS |= dict.fromkeys(LONGS.split(), "*i64")
NUMBERS = {"eps": "fp32", "scale": "fp32", "factor": "fp32"}
FLAGS = {"ROWS": 16, "SLOTS": 32, "SIZE": 128, "PARTS": 64, "EXACT": False}
FLAGS |= {"HAS_ADDED": True, "HAS_NORM": True, "WIDTH": 4, "CHUNKS": 8}
FLAGS |= {"FIRST": "norm", "HAS_BIAS": True, "ADDS": True, "OUTPUTS": 4, "INPUTS": 512}
FLAGS |= {"STAGES": 3, "HAS_COS_SIN": False}
TENSORS = "hidden added weight out qkv query_norm key_norm cosines sines queries keys values"
TENSORS += " both logits bias norm"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KERNELS = (
    layers._residual_norm,
    layers._rotate_store,
    attention._attend_part,
    attention._merge,
    layers._gate,
    trees._ancestors,
    trees._best_of_chunk,
    trees._best_of_all,
    layers._row_product,
    trees._inherit,
    trees._expand,
)

for kernel in KERNELS:
    for kind in DTYPES:
        types = {
            name: POINTERS.get(name) or NUMBERS.get(name) or "i32" for name in kernel.arg_names
        }
        types |= {name: f"*{kind}" for name in TENSORS.split() if name in types}
        types |= {"weights": "*fp32"} if "weights" in types else {}
        flags = {name: value for name, value in FLAGS.items() if name in types}
        if "EXACT" in flags:
            rows, slots = attention.block_sizes(flags["SIZE"], DTYPES[kind])
            flags |= {"ROWS": rows, "SLOTS": slots, "EXACT": kind == "fp32"}
        types |= dict.fromkeys(flags, "constexpr")
        places = {(kernel.arg_names.index(name),): value for name, value in flags.items()}
        if kernel is layers._row_product:
            types |= {"row": f"*{kind}"}
        source = ASTSource(kernel, types, places)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        print(kernel.fn.__name__, kind, len(made.asm["cubin"]))
