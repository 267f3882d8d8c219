"""Sweeps: a suite of strategies, lengths, tasks and seeds as independent cells that can be measured in any order."""
