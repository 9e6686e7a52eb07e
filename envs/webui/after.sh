#!/usr/bin/env bash
# Sees whether FastChat's web server can be imported.
set -euo pipefail

python -c 'import fastchat.conversation, gradio'
