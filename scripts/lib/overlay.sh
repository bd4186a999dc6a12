#!/usr/bin/env bash
# Make or reuse an environment that has everything of another one, and on top of it what that one cannot have.
#
#   bash scripts/lib/overlay.sh PYTHON DIRECTORY REQUIREMENT...
#
# Prints the Python of the environment. The requirements are installed without what they need themselves: name it too.
# They come before the libraries of the environment of PYTHON, torch among them, which are not copied.
set -euo pipefail

python=$1 directory=$2
shift 2

# Written last, so an interrupted installation is begun again.
stamp=$({ echo "$python" "$@"; cat "${BASH_SOURCE[0]}"; } | cksum)
if [ "$(cat "$directory/.llava_lite" 2>/dev/null)" != "$stamp" ]; then
    if [ -d "$directory" ] && [ ! -f "$directory/pyvenv.cfg" ] && [ -n "$(ls -A "$directory")" ]; then
        echo "error: $directory exists and is no Python environment. Name another directory." >&2
        exit 1
    fi
    rm -rf "$directory"
    "$python" -m venv --without-pip "$directory"
    "$python" -m pip --python "$directory/bin/python" --disable-pip-version-check install -qq --retries 1 --timeout 15 --no-deps "$@" >&2
    # A directory in a .pth file is one to import from; its own .pth files, as of an editable install, are not read.
    "$python" -c 'import sysconfig; print(*{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}, sep="\n")' \
        >"$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/libraries.pth"
    echo "$stamp" >"$directory/.llava_lite"
fi
echo "$directory/bin/python"
