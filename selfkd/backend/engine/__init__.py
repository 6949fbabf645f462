"""vLLM and the root of a chain: the only folder that imports vLLM. Knows no round and no Ray."""
