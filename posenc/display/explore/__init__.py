"""``posenc explore``: a local page to choose a strategy's parameters by looking. Needs the extra ``explore``."""
