"""Attention seen: traces, heads, analyses, plots and pages."""
