"""Make open vision-language models look where they should."""

__version__ = "0.1.0"
