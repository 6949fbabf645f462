"""A user's function: found, checked, and called in processes of its own. Knows no recipe and no run.

This file imports nothing: workers start through it, without polars.
"""
