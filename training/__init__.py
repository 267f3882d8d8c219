"""How the tiny model that posenc ships was made: texts, recipe, training and evaluation."""
