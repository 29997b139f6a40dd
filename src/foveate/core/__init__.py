"""What a method is, what it sees and how a stack of methods is applied; knows torch only."""

from ..base.errors import FoveateError
from ..base.form import costly, file
from .anatomy import Anatomy, Block
from .edit import weighted
from .method import Method, published_layers
from .plausible import away_from, plausible, together
from .prompt import Prompt, Vision
from .rows import FeedForward, Rows, Sequences, Stream
from .search import Beams, Found
from .simple import Mixing, Simple
from .turn import turned

__all__ = [
    "Anatomy",
    "Beams",
    "Block",
    "FeedForward",
    "Found",
    "FoveateError",
    "Method",
    "Mixing",
    "Prompt",
    "Rows",
    "Sequences",
    "Simple",
    "Stream",
    "Vision",
    "away_from",
    "costly",
    "file",
    "plausible",
    "published_layers",
    "together",
    "turned",
    "weighted",
]
