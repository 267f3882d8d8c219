"""Which prompt length every query plans with, and the plans and frequencies that are kept for it."""
