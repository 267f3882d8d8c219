"""What apply measures on a model before it patches it, and what it refuses."""
