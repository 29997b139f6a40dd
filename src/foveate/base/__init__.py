"""What every room uses and what knows no model: errors, text forms, journals, pictures, numbers."""

__version__ = "0.2.0"
