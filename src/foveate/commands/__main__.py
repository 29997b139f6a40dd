"""`python -m foveate.commands` is the `foveate` command."""

from . import main

main()
