"""Answers that an evaluation shows: what a head helped to write, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

SAMPLES = "samples.jsonl"
COLOURS = ("gray", "green", "teal", "darkorange", "magenta", "red")  # of 1, 2, ... tokens per step


@dataclass(frozen=True)
class Sample:
    """answer: the text that each step of decoding gave, and how many tokens it came from."""

    prompt: str
    answer: tuple[tuple[str, int], ...]


def as_html(samples: Sequence[Sample]) -> str:
    """Each answer below its prompt, what a step gave in the colour of its number of tokens."""
    pages = []
    for sample in samples:
        spans = [
            f'<span style="color:{COLOURS[min(tokens, len(COLOURS)) - 1]}" title="{tokens}">'
            f"{escape(text)}</span>"
            for text, tokens in sample.answer
        ]
        pages.append(_page(sample, "".join(spans), ' style="white-space:pre-wrap"'))
    return "\n".join(pages)


def as_text(samples: Sequence[Sample]) -> str:
    """For TensorBoard, which renders Markdown and drops colours: `|` stands between steps."""
    return "\n\n".join(
        _page(sample, "|".join(escape(text) for text, _ in sample.answer)) for sample in samples
    )


def _page(sample: Sample, answer: str, style: str = "") -> str:
    return f"<pre{style}><strong>{escape(sample.prompt)}</strong>\n\n{answer}</pre>"
