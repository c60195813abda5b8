"""What is seen: mask and score mods, their bounds, and the block mask. Pure: no process group."""
