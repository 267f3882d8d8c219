"""What posenc keeps about a KV cache: which tokens it holds, for which plans, and rotated copies of their keys."""
