"""Methods inside vLLM against the same methods in transformers; run by ``make test-vllm``."""
