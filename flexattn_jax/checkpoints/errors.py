"""What the commands and the loader raise when a user's files are at fault."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or converted; the message names the file and what to do."""
