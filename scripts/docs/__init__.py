"""The documentation site: what mkdocs generates beside the hand-written pages (``make docs``)."""
