"""Where prompts come from, whether splits overlap, and what a teacher is told. Knows no recipe and no run."""
