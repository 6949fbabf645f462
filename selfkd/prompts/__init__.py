"""Where prompts come from, whether splits overlap, and what a teacher sees. Knows no recipe and no run."""
