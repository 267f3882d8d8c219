"""The Triton backend: any plan in one pass, prefill and decoding."""
