"""The CPU backend: calls of torch's flash operator."""
