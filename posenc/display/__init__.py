"""Plans for people: in words, as numbers, as pictures, in notebooks, on a web page."""
