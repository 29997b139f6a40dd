"""Benchmarks run, scored, compared and merged; `records.jsonl` is the only truth."""
