"""Facts about the machine and about a model's files; what follows from them is decided elsewhere."""
