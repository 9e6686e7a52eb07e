#!/usr/bin/env bash
# Makes PyTorch load, and sees whether the extension does.
set -euo pipefail

"$(dirname "$0")/../drop-cuda.sh"
python -c 'import intel_extension_for_pytorch' >/dev/null
