#!/usr/bin/env bash
# Builds the documentation as a site: the pages of docs/ and a reference made of the docstrings.
#
#   bash scripts/docs.sh              writes results/site/, whose pages open in a browser; stops at any warning
#   bash scripts/docs.sh serve        shows it on http://127.0.0.1:8000, where the search works too, and follows changes
#
# Installs as scripts/test.sh does. Neither the build nor the pages use the network.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

use_environment
cd "$ROOT"
export NO_MKDOCS_2_WARNING=1 # an advertisement of mkdocs-material's successor
exec "$PYTHON" -m mkdocs "${1:-build}" --strict --quiet
