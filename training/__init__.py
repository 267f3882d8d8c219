"""Texts, recipe, training and evaluation of the tiny model that posenc ships."""
