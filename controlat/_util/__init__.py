"""What every part uses and none is about: files, randomness, checks, registries, texts."""
