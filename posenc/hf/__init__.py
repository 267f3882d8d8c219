"""The bridge to Hugging Face transformers: the only package that imports it."""
