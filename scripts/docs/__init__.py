"""The documentation site: the parts that mkdocs generates besides the hand-written pages (``make docs``)."""
