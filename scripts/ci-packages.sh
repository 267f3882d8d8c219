#!/usr/bin/env bash
# Installs what the tests need from the system: Chromium, which opens the pages of posenc report. Does nothing where it is.
set -euo pipefail
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" > /dev/null; then exit 0; fi
done
if ! command -v apt-get > /dev/null; then
    echo "Chromium is missing and there is no apt-get here: install Chromium yourself, and run this again." >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "Chromium is missing: run 'sudo apt-get install chromium', and this again." >&2
    exit 1
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null
