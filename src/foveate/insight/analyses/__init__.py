"""Analyses: one file here is one analysis, found by walking this folder."""
