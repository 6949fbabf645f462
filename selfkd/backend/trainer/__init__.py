"""TRL: one update of a model. Knows no round and no Ray; `trl_options` is plain data that needs neither torch nor TRL."""

import logging

# PEFT imports bitsandbytes wherever it is installed, and that says on some CPUs that it lacks a kernel which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
