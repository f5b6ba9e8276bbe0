"""The `veneer` command: one file per command, heavy imports inside the commands."""
