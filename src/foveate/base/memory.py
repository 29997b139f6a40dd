"""Running out of memory: how to tell, how to free it, and how many questions to ask at a time.

size = Size(64)
size.halve(64)      # 64 at a time did not fit: size.now is 32
size.end()          # of the call that ran short
size.end()          # of one in which memory sufficed: size.now is 64 again
"""

from __future__ import annotations

import gc
import traceback

import torch

_PATIENCE = 64  # calls at most until a larger size is tried again, or until all is forgotten


def out_of_memory(error: BaseException) -> bool:
    """Whether this failure is one of memory, on a CPU or an accelerator."""
    said = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError)
        and any(sign in said for sign in ("out of memory", "allocate memory", "alloc_failed"))
    )


def release(error: BaseException) -> None:
    """Free the tensors that a caught exception holds in its frames. Its traceback can still be
    logged.
    """
    starved, chain = out_of_memory(error), [error]
    for one in chain:  # grows on the way
        traceback.clear_frames(one.__traceback__)
        chain += [e for e in (one.__cause__, one.__context__) if e is not None and e not in chain]
    if starved:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Size:
    """How many questions go through the model at a time.

    A batch that does not fit halves the size (`halve`), for this call and later ones. A call in
    which memory sufficed (`end`) doubles it again, up to `most`. If the larger size fails, it takes
    twice as many such calls until the next try, 64 at most. After 64 calls at full size all is
    forgotten. So one shortage costs little, and a lasting one few failed batches.

    Args:
        most: never more at a time, 1 or more.

    Attributes:
        now: how many at a time.
    """

    def __init__(self, most: int) -> None:
        self.most = self.now = most
        self._patience, self._calm = 1, 0  # calls to wait for, and those that there were
        self._short = self._grown = False

    def halve(self, asked: int) -> bool:
        """`asked` questions did not fit, `now` of them at a time.

        Returns:
            whether fewer can be tried: a single question cannot be halved.
        """
        tried = min(self.now, asked)
        if tried > 1:
            if self._grown:
                self._patience = min(2 * self._patience, _PATIENCE)
            self.now, self._short, self._grown = tried // 2, True, False
        return tried > 1

    def restore(self, before: int) -> None:
        """Go back to the size of before: not the batch failed, but a question in it."""
        self.now, self._short = before, False

    def end(self) -> None:
        """A call is over."""
        self._calm = 0 if self._short else self._calm + 1
        self._short = False
        if self.now < self.most and self._calm >= self._patience:
            self.now, self._calm, self._grown = min(2 * self.now, self.most), 0, True
        elif self.now == self.most and self._calm >= _PATIENCE:
            self._patience, self._grown = 1, False
