"""Slow restatements of the benchmarks' scoring rules, one file each, sharing nothing with foveate.

Each has `score(root, answers, options)`: the question files' folder, (split, line) -> answer, and
the benchmark's options -> the numbers under the names that foveate gives them.
"""
