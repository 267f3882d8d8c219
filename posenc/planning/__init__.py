"""Lengths over time: which prompt length each query plans with, and the plans and frequencies that are kept."""
