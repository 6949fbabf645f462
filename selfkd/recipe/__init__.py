"""From a YAML file to checked steps, and what can be said of them before a run: lint, plan, reference. Opens no run and starts no machine."""
