"""selfkd runs self-distillation chains: a model answers, is scored, and learns from what was kept, round after round."""

__version__ = "0.1.0"
