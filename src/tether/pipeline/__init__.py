"""Where the rooms meet: what each command does, callable from Python."""
