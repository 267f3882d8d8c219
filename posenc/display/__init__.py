"""Show plans to people: in words, as numbers, as pictures, in notebooks, on a web page."""
