#!/usr/bin/env bash
# Installs the system packages that the tests need: Chromium and its driver, which open the pages of posenc report and
# posenc explore. Does nothing if they are already installed.
set -euo pipefail
browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
if browser > /dev/null && command -v chromedriver > /dev/null; then exit 0; fi
if ! command -v apt-get > /dev/null; then
    echo "Chromium or chromedriver is missing and there is no apt-get here: install both yourself, then run this again." >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "Chromium or chromedriver is missing: run 'sudo apt-get install chromium chromium-driver', then run this again." >&2
    exit 1
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver > /dev/null
