"""The CPU backend: prefill as calls of torch's flash attention, decoding as matrix products."""
