"""What posenc keeps about a KV cache: which tokens it holds, under which plans, and rotated copies of their keys."""
