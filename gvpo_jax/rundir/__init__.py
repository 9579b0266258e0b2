"""What is in a run folder, who writes it, and how it is read back."""
