"""What clients speak with: FastChat's protocol over any engine."""
