"""A run on disk: frozen, walked, committed, sealed. The only package that knows a path of a run or writes into one."""
