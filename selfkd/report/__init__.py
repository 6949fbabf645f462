"""Reading a run folder: status, rows, proof, tables. Writes nothing."""
