"""``posenc explore``: a local page to choose a strategy's parameters visually. It needs the extra ``explore``."""
