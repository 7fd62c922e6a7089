"""Turn tokens into text as they come: no broken characters, and no stop strings.

Why not `tokenizers.decoders.DecodeStream` (0.23), which does the first half: it returns nothing of
a character that is incomplete when the response ends; it raises "Invalid prefix encountered" where
a tokenizer with byte fallback (Llama 2, Gemma) meets a stray byte after a character of bytes, as in
<0xC3> <0xA9> <0xA9> b; and it takes no tokenizers written in Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from headstart.model.target.target import Target

BROKEN = "\ufffd"  # what a tokenizer writes for an incomplete character
CONTEXT = 32  # tokens that are decoded again with new ones, whose text may depend on them


class TextStream:
    """Turns tokens into pieces of text, which joined are the text of all tokens.

    (Except for stray bytes of a tokenizer with byte fallback, which would change characters before
    them that were returned already: those stay.)

    A character can span several tokens, so text is held back while it ends in a broken one. So is
    text that could be the beginning of a stop string. The stop string that is complete first ends
    the text, however many tokens come at a time.

    count: tokens up to the end of the text.
    stopped: whether a stop string ended it.
    """

    def __init__(self, target: Target, stop: Sequence[str] = ()):
        self.count, self.stopped = 0, False
        self._target, self._stop = target, tuple(stop)
        self._tokens: list[int] = []  # the last ones only, so that long responses stay cheap
        self._known = 0  # characters of their text that were handled
        self._held = ""  # handled, but perhaps the beginning of a stop string
        self._broken = False

    @property
    def waiting(self) -> bool:
        """Whether text is held back."""
        return self._broken or bool(self._held)

    def add(self, tokens: Sequence[int]) -> str:
        """The text that can be shown now. Tokens after a stop string are ignored."""
        if not self._stop:
            return self._extended(tokens)
        piece = ""
        for token in tokens:
            if self.stopped:
                break
            piece += self._extended([token])
        return piece

    def end(self) -> str:
        """The text that is held back when no more tokens come."""
        piece = self._released(self._text()[self._known :])
        rest, self._held, self._broken = self._held, "", False
        self._tokens, self._known = [], 0
        return piece + rest

    def _text(self) -> str:
        return self._target.text(self._tokens)

    def _extended(self, tokens: Sequence[int]) -> str:
        self.count += len(tokens)
        self._tokens += tokens
        text = self._text()
        self._broken = text.endswith(BROKEN)
        if self._broken:
            return ""
        new, self._known = text[self._known :], len(text)
        if len(self._tokens) > 4 * CONTEXT:
            self._tokens = self._tokens[-CONTEXT:]
            self._known = len(self._text())
        return self._released(new)

    def _released(self, new: str) -> str:
        self._held += new
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            _, begin = min(found)
            piece, self._held, self.stopped = self._held[:begin], "", True
            return piece
        kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        piece = self._held[: len(self._held) - kept]
        self._held = self._held[len(self._held) - kept :]
        return piece


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text can be the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def pieces(target: Target, steps: Iterable[list[int]]) -> Iterator[tuple[str, int]]:
    """Yield the text that each step adds, and how many tokens it came from."""
    text = TextStream(target)
    held = 0
    for step in steps:
        held += len(step)
        piece = text.add(step)
        if step and not text.waiting:
            yield piece, held
            held = 0
    rest = text.end()
    if rest:
        yield rest, held
