"""Which entries of tensors are worth keeping: scores, groups of entries, exact choice."""
