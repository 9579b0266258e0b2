"""What an update is: objective, step, optimizer, the policy's state and its checkpoints."""
