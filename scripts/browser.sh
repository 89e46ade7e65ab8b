#!/bin/sh
# Chromium for the tests of the playground: by apt where that is there and may be used, else what is missing is said.
# Never fails: without a browser those tests skip.
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then exit 0; fi
done
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "installing chromium for the tests of the playground"
    export DEBIAN_FRONTEND=noninteractive
    timeout 120 apt-get -qq update >/dev/null 2>&1
    timeout 480 apt-get -qq install --yes --no-install-recommends chromium >/dev/null 2>&1 ||
        echo "chromium could not be installed; the tests of the playground are skipped"
else
    echo "no chromium here; the tests of the playground are skipped"
fi
exit 0
