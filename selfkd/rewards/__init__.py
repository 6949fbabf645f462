"""A user's function: finding it, checking it, calling it in processes of their own. Knows no recipe and no run; workers import this folder without polars."""
