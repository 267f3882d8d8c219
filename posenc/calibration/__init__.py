"""Choose a strategy's parameters for a model by measurement, and write the choice down."""
