"""TRL: one update of a model. Knows no round and no Ray; `trl_options` is plain data that needs neither torch nor TRL."""
