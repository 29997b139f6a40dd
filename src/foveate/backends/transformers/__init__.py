"""Methods inside Hugging Face transformers: hooks, an attention function and the KV cache."""
