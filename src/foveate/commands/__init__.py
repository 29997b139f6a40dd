"""The `foveate` command: one file here is one command, found by walking this folder.

Heavy imports happen inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import sys
import warnings
from typing import Annotated

import typer

from ..base import __version__
from ..base.errors import FoveateError
from ..base.files import disk_error, refusal
from .common import note

# of the help; commands that are not named here follow by name
ORDER = (
    *(
        "ask",
        "trace",
        "serve",
        "methods",
        "heads",
        "directions",
        "eval",
        "sweep",
        "report",
        "reproduce",
        "analyze",
    ),
    *("demo", "draw", "doctor", "verify", "train"),
)

app = typer.Typer(
    help="Ask a vision-language model about an image, plain and with visual-attention methods.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake is one sentence on stderr and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="foveate")
        warnings.showwarning = note
        try:
            app(arguments)
        except FoveateError as error:
            refused = error
        except Exception as error:
            if disk_error(error) is None:
                raise
            where = getattr(error, "filename", None) or "A file"
            safe = "what was finished before is safe"
            refused = refusal(where, error, safe, "used")
        else:
            return
    print(f"foveate: {refused}", file=sys.stderr)
    sys.exit(2)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"foveate {__version__}")
        raise typer.Exit


def _register() -> None:
    """Import every file here: each adds its command to `app`."""
    names = [m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")]
    for name in dict.fromkeys((*ORDER, *names)):
        importlib.import_module(f"{__name__}.{name}")
    for command in app.registered_commands:  # whole first paragraphs in the list of commands
        about = inspect.getdoc(command.callback) or ""
        command.short_help = " ".join(about.partition("\n\n")[0].split())


_register()
