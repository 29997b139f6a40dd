"""`python -m foveate` is the command line."""

from .commands import main

main()
