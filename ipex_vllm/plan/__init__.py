"""The settings that follow from this machine and this model."""
