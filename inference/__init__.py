"""Decoding with a draft head. `SpeculativeModel` is where to begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headstart.inference.generate import SpeculativeModel as SpeculativeModel


def __getattr__(name: str) -> Any:
    """Import on first use: torch and transformers take seconds."""
    if name == "SpeculativeModel":
        from headstart.inference.generate import SpeculativeModel

        return SpeculativeModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
