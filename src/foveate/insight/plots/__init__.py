"""Figures, by matplotlib: one file per kind, what they share in `style`."""
