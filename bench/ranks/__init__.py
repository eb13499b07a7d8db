"""What ranks send to each other, how long it takes, and how that scales."""
