"""Decodes fused checkpoints with plain transformers, for tests: no Headstart in this process.

Each line of standard input is a list of cases in JSON, with a `folder`, `ids` and `options` of
generate. The reply is one line too: for each case the tokens and forward passes, with transformers'
own loop and with the checkpoint's code, and the warnings or the error.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from importlib.abc import MetaPathFinder
from typing import Any


class NoHeadstart(MetaPathFinder):
    def find_spec(self, name: str, *_: object) -> None:
        if name.split(".")[0] == "headstart":
            raise ImportError("Headstart cannot be imported in this test.")


sys.meta_path.insert(0, NoHeadstart())

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: E402

torch.set_num_threads(1)


class Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def decoded(model: PreTrainedModel, case: dict[str, Any], **more: object) -> dict[str, Any]:
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    handle = model.register_forward_hook(count)
    torch.manual_seed(case.get("seed", 0))
    try:
        out = model.generate(torch.tensor(case["ids"]), **case.get("options", {}), **more)
    except ValueError as error:
        return {"refused": str(error)}
    finally:
        handle.remove()
    if isinstance(out, torch.Tensor):
        return {"ids": out.tolist(), "passes": passes}
    kept = [getattr(out, name) for name in ("scores", "logits")]
    near = [torch.cat(one)[:, :5].tolist() for one in kept if one is not None]
    return {"ids": out.sequences.tolist(), "passes": passes, "near": near}


def result_of(case: dict[str, Any], log: Warnings) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log.lines.clear()
        model = AutoModelForCausalLM.from_pretrained(case["folder"])
        opening = [*log.lines, *(str(one.message) for one in caught)]
    code = {"custom_generate": case.get("code", case["folder"]), "trust_remote_code": True}
    result = {"opening": opening, "plain": decoded(model, case)}
    result["own"] = decoded(model, case, **code)
    if case.get("trusted"):  # then `generate` itself is the checkpoint's
        model = AutoModelForCausalLM.from_pretrained(case["folder"], trust_remote_code=True)
        result["trusted"] = decoded(model, case)
    return result


def main() -> None:
    log = Warnings()
    logging.getLogger("transformers").addHandler(log)
    for line in sys.stdin:
        print(json.dumps([result_of(case, log) for case in json.loads(line)]), flush=True)


if __name__ == "__main__":
    main()
