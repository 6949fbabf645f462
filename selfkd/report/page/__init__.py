"""The page of a run, of several, or of a sweep: what other readers found, laid out for a person. Works out no figure that a record has."""
