"""What runs a model. Only the modules in here know a model library."""
