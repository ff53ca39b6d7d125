"""Where an actor lives, and how a message gets there."""
