"""What a method is, what it sees and how a stack of methods is applied; knows torch only."""

from ..base.errors import FoveateError
from ..base.form import costly, file
from .anatomy import Anatomy
from .method import Method
from .plausible import plausible
from .prompt import Prompt, Vision
from .rows import Rows, Sequences, Stream
from .search import Beams, Found

__all__ = [
    "Anatomy",
    "Beams",
    "Found",
    "FoveateError",
    "Method",
    "Prompt",
    "Rows",
    "Sequences",
    "Stream",
    "Vision",
    "costly",
    "file",
    "plausible",
]
