"""Training: loss, adapters, batches, the loop, and the merge."""
