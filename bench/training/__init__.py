"""One training loop, and the job that make train runs with it."""
