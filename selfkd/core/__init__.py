"""The nouns of a chain and what everything rests on: tables, views, digests, files, the lease. Knows no recipe, no run and no machine."""
