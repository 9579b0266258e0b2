"""Where an update's samples come from: sampled now, ahead of time, replayed, or read from files."""
