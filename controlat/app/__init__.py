"""What the commands do: settings, runs on disk, the trainer, one file per command."""
