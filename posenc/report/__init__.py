"""Pages made of result files: one self-contained HTML file and the same in Markdown."""
