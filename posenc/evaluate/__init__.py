"""Measure what a strategy does to a model: perplexity, retrieval, and the demo that runs both."""
