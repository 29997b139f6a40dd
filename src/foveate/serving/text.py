"""The text of an answer while its tokens arrive: whatever is given out stays as it is."""

from __future__ import annotations

from collections.abc import Callable

UNFINISHED = "\ufffd"  # what decoding makes of a character whose last bytes are still to come


class Text:
    """Text from tokens, given out as soon as nothing can change it any more.

    Held back: the bytes of an unfinished character, white space (an answer ends without), and
    whatever may become a stop string. Pieces joined are `complete` text: the decoded tokens up to
    the first stop string, stripped.

    Args:
        decode: token ids to text. stops: strings that end the answer and are cut off it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[str, ...] = ()) -> None:
        self.decode, self.stops = decode, stops
        self.restart()
        self.given = 0  # characters of `raw` that are out, stripped ones included

    def restart(self) -> None:
        """Forget the tokens; what has been given out is not given out again."""
        self.ids: list[int] = []
        self.starts: list[int] = []  # where in `raw` each token's text begins
        self.raw = ""
        self.stopped = False

    def add(self, token: int) -> None:
        """Take one more token in; sets `stopped` where it completes a stop string."""
        self.starts.append(len(self.raw))
        self.ids.append(token)
        self.raw = self.decode(self.ids)
        found = [at for at in map(self.raw.find, self.stops) if at >= 0]
        if found:
            self.raw, self.stopped = self.raw[: min(found)], True

    def take(self, complete: bool = False) -> str:
        """What can be given out now and was not before; all the rest where it is `complete`."""
        text = self.raw if complete else self.raw.rstrip(UNFINISHED)
        if not complete:
            text = text[: len(text) - max(map(self._overlap, self.stops), default=0)]
        end = len(text.rstrip())
        piece = self.raw[self.given : end]
        if not self.raw[: self.given].strip():
            piece = piece.lstrip()
        self.given = max(self.given, end)
        return piece

    def _overlap(self, stop: str) -> int:
        """How many characters at the end may be the beginning of `stop`."""
        text = self.raw.rstrip(UNFINISHED)
        lengths = range(min(len(stop) - 1, len(text)), 0, -1)
        return next((n for n in lengths if text.endswith(stop[:n])), 0)
