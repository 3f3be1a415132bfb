#!/usr/bin/env bash
# Installs the one system package that the tests want: a Chromium, for the browser tests.
set -euo pipefail

for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null; then exit 0; fi
done

unable() {
    echo "scripts/system.sh: no Chromium here, and it cannot be installed ($1). Install it by hand; until then the browser tests are skipped." >&2
    exit 0
}

command -v apt-get >/dev/null || unable "no apt-get"
if [ "$(id -u)" -eq 0 ]; then
    sudo=()
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
    sudo=(sudo -n)
else
    unable "neither root nor a sudo that asks for no password"
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
echo "scripts/system.sh: installing chromium"
install() {
    "${sudo[@]}" apt-get update -qq &&
        "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core
}
if ! install >"$log" 2>&1; then
    tail -n 15 "$log" >&2
    unable "apt-get failed, see above"
fi
