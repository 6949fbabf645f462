"""Words in, exit code out. What a command means is decided below; here is only how it is asked and shown."""
