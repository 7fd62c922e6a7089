"""Responses that an evaluation shows, decode step by decode step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

SAMPLES = "samples.jsonl"
COLOURS = ("gray", "green", "teal", "darkorange", "magenta", "red")  # for 1, 2, ... tokens


@dataclass(frozen=True)
class Sample:
    """A prompt and its response: the text and number of tokens of each decode step."""

    prompt: str
    response: tuple[tuple[str, int], ...]


def as_html(samples: Sequence[Sample]) -> str:
    """Format each response below its prompt, coloured by the number of tokens of each step."""
    pages = []
    for sample in samples:
        spans = [
            f'<span style="color:{COLOURS[min(tokens, len(COLOURS)) - 1]}" title="{tokens}">'
            f"{escape(text)}</span>"
            for text, tokens in sample.response
        ]
        pages.append(_page(sample, "".join(spans), ' style="white-space:pre-wrap"'))
    return "\n".join(pages)


def as_text(samples: Sequence[Sample]) -> str:
    """Format for TensorBoard, which renders Markdown without colours: `|` separates steps."""
    return "\n\n".join(
        _page(sample, "|".join(escape(text) for text, _ in sample.response)) for sample in samples
    )


def _page(sample: Sample, response: str, style: str = "") -> str:
    return f"<pre{style}><strong>{escape(sample.prompt)}</strong>\n\n{response}</pre>"
