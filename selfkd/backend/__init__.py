"""Machines behind one protocol (`base.Backend`). The only package that knows torch, vLLM, TRL or Ray; it knows no recipe and no run."""
