"""Open the model and the tokenizer of a target: Hub id, folder or GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from . import gguf
from .modules import decoder_layers, inner_model
from .sharding import broadcast_from_rank0, shard, tensor_plan
from .support import check_config
from .weight_only import quantize_layers
from .weights_hash import weights_hash


class MiMoConfig(Qwen2Config):
    model_type = "mimo"


class MiMoForCausalLM(Qwen2ForCausalLM):
    """MiMo-7B: Qwen2 with a multi-token prediction layer beside it.

    transformers has no class for it, and the folder's own code (`trust_remote_code`) is for older
    versions.
    """

    config_class = MiMoConfig
    _keys_to_ignore_on_load_unexpected = [r"^model\.mtp_layers\."]  # noqa: RUF012


if MiMoConfig.model_type not in CONFIG_MAPPING:
    AutoConfig.register(MiMoConfig.model_type, MiMoConfig)
    AutoModelForCausalLM.register(MiMoConfig, MiMoForCausalLM)


def open_pretrained(
    name: str, dtype: torch.dtype | str, device: torch.device | str | None, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | str]:
    """The model on its device, and the tokenizer or the reason why there is none."""
    place = _place(device)
    source, file = _source(name)
    where = {"gguf_file": file, "revision": revision}
    config = _read_config(name, source, where)  # once: of a GGUF file that takes seconds
    extra = gguf.model_arguments() if file else {}
    model = _load(name, source, config=config, dtype=dtype_of(dtype, place), **where, **extra)
    if file:
        gguf.take_output_weight(model, Path(source) / file)
    return nn.Module.to(model, place), _tokenizer(source, where)


def _load(name: str, source: str, **options: Any) -> PreTrainedModel:
    """ValueError for weights that are missing or cannot be read."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(
            f"The weights of {name} cannot be read ({str(error).strip()}). A file is missing, was "
            "cut short, or does not fit config.json. Download or copy them again."
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:5])
        raise ValueError(
            f"{name} lacks weights that its configuration asks for ({missing}). The folder is "
            "incomplete or of another model. Download it again."
        )
    opened: PreTrainedModel = model
    return opened


def open_tokenizer(name: str) -> PreTrainedTokenizerBase | str:
    """The tokenizer alone, or the reason why there is none."""
    source, file = _source(name)
    return _tokenizer(source, {"gguf_file": file, "revision": None})


def open_weight_only(
    name: str,
    dtype: torch.dtype | str,
    device: torch.device | str | None,
    revision: str | None,
    kind: str,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | str]:
    """As `open_pretrained`, with the layers quantised on their way from main memory to the device.

    The model's hash is that of the original weights, with which a head is served.
    """
    place = _place(device)
    model, tokenizer = open_pretrained(name, dtype_of(dtype, place), "cpu", revision)
    weights_hash(model)
    config = model.config.get_text_config(decoder=True)
    quantize_layers(decoder_layers(inner_model(model), config, name), kind, place, name)
    return nn.Module.to(model, place), tokenizer


def open_skeleton(name: str, revision: str | None) -> PreTrainedModel:
    """The model on the meta device, without weights."""
    source, file = _source(name)
    config = _read_config(name, source, {"gguf_file": file, "revision": revision})
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def stored_dtype(name: str) -> torch.dtype:
    """The type in which a model's weights are stored: float32 for a GGUF file, or if unknown."""
    source, file = _source(name)
    config = _read_config(name, source, {"gguf_file": file, "revision": None})
    stored = None if file else config.dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _read_config(name: str, source: str, where: dict[str, str | None]) -> PretrainedConfig:
    """Read a configuration. ValueError for unsupported models and what is no language model."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source, **where)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ValueError(
            f"{name} cannot be opened as a language model: {error} Give a Hub id, a folder with "
            "config.json and weights, or a .gguf file."
        ) from error
    check_config(config, name)
    if where["gguf_file"] is None:
        _refuse_quantized(config, name)
    return config


def open_tensor_parallel(
    name: str, dtype: torch.dtype | str, device: torch.device, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | str]:
    """As `open_pretrained`, with the layers sharded by transformers' tensor parallelism.

    Every process calls it, and reads its part of the files.
    """
    source, file = _source(name)
    if file is not None:
        raise ValueError(
            f"{name} is a GGUF file, which cannot be sharded on load. Set parallel.target=sharded, "
            "or name the model's folder or Hub id."
        )
    plan = tensor_plan(open_skeleton(name, revision), name)
    where = {"gguf_file": None, "revision": revision}
    model = _load(
        name, source, dtype=dtype_of(dtype, device), revision=revision, distributed_config=plan
    )
    return model, _tokenizer(source, where)


def open_sharded(
    name: str, dtype: torch.dtype | str, device: torch.device, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | str, str]:
    """As `open_pretrained`, sharded over the processes; also returns the hash of all weights.

    Every process calls it; only rank 0 reads files, and needs memory for the full model.
    """
    whole: dict[str, Tensor] = {}
    wanted = dtype_of(dtype, device)

    def read() -> tuple[PretrainedConfig, PreTrainedTokenizerBase | str, str]:
        model, tokenizer = open_pretrained(name, wanted, "cpu", revision)
        whole.update(model.named_parameters())
        whole.update(model.named_buffers())
        return model.config, tokenizer, weights_hash(model)

    config, tokenizer, digest = broadcast_from_rank0(read)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=wanted)
    decoder = inner_model(model)
    layers = decoder_layers(decoder, config.get_text_config(decoder=True), name)
    shard(model, decoder, list(layers), whole or None, device)
    return model, tokenizer, digest


def _refuse_quantized(config: PretrainedConfig, name: str) -> None:
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise ValueError(
            f"{name} holds quantised weights ({method or 'of an unknown method'}), and a head "
            "needs dense ones. Use the folder or Hub id of the unquantised model, or a GGUF file, "
            "which is opened as dense weights."
        )


def _source(name: str) -> tuple[str, str | None]:
    """Folder or Hub id to load from, and the GGUF file's name. ValueError if it is missing."""
    path = Path(name).expanduser()
    if path.suffix == gguf.SUFFIX:
        if not path.is_file():
            raise ValueError(f"There is no file {path}. Check the path of the GGUF file.")
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(file.name for file in path.glob(f"*{gguf.SUFFIX}"))
            hint = (
                f"Name one of its GGUF files: {', '.join(files)}." if files else "Check the path."
            )
            raise ValueError(f"The folder {path} has no config.json, so it is no model. {hint}")
        return str(path), None
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ValueError(
            f"There is no folder {path}, and it is no Hub id (those look like owner/name). "
            "Check the path."
        )
    return name, None


def _place(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def dtype_of(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in named:
        raise ValueError(f"Unknown dtype {dtype!r}. There are: auto, {', '.join(named)}.")
    return named[dtype]


def _tokenizer(source: str, where: dict[str, str | None]) -> PreTrainedTokenizerBase | str:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        return f"It could not be opened: {error}"
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up from nothing but the config
        return "There are no tokenizer files."
    return tokenizer
