"""How one device computes. Never imports torch.distributed."""
