#!/usr/bin/env bash
# Installs PyTorch's CPU build: from where pip's configuration says, or else from PyTorch's own index.
set -euo pipefail

torch=$(grep '^torch==' "$(dirname "$0")/requirements.in")
pip install --quiet --no-deps "$torch" 2>/dev/null ||
    uv pip install --quiet --python "$(command -v python)" --torch-backend cpu --no-deps "$torch"
