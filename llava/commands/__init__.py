"""What the commands share: parsers, flags, the model that these name, what is shown; and commands that are one file."""
