"""What a method is, what it sees and how a stack of methods is applied; knows torch only."""

from ..base.errors import FoveateError
from ..base.form import costly, file
from .anatomy import Anatomy, Block
from .edit import weighted
from .method import Method
from .plausible import away_from, plausible
from .prompt import Prompt, Vision
from .rows import Rows, Sequences, Stream

__all__ = [
    "Anatomy",
    "Block",
    "FoveateError",
    "Method",
    "Prompt",
    "Rows",
    "Sequences",
    "Stream",
    "Vision",
    "away_from",
    "costly",
    "file",
    "plausible",
    "weighted",
]
