#!/usr/bin/env bash
# Make or reuse an environment with lmms-eval for tests/eval/test_lmms.py, and print its Python.
#
#   bash scripts/lib/lmms_eval.sh PYTHON DIRECTORY
#
# Libraries that the environment of PYTHON has, torch among them, are those of that one. Of what lmms-eval names as its
# needs only what it imports to run a task is installed.
set -euo pipefail

python=$1 directory=$2
REQUIREMENTS=(
    lmms-eval==0.7.3
    loguru evaluate sacrebleu portalocker lxml tabulate pytz tenacity
    aiohttp aiosignal aiohappyeyeballs frozenlist multidict propcache yarl
    pytablewriter DataProperty mbstrdecoder pathvalidate tabledata tcolorpy typepy chardet
)

# Written last, so an interrupted installation is begun again.
stamp=$({ echo "$python"; cat "${BASH_SOURCE[0]}"; } | cksum)
if [ "$(cat "$directory/.llava_lite" 2>/dev/null)" != "$stamp" ]; then
    if [ -d "$directory" ] && [ ! -f "$directory/pyvenv.cfg" ] && [ -n "$(ls -A "$directory")" ]; then
        echo "error: $directory exists and is no Python environment. Name another directory." >&2
        exit 1
    fi
    rm -rf "$directory"
    "$python" -m venv --without-pip "$directory"
    "$python" -m pip --python "$directory/bin/python" --disable-pip-version-check install -qq --retries 1 --timeout 15 --no-deps "${REQUIREMENTS[@]}" >&2
    # A directory in a .pth file is one to import from; its own .pth files, as of an editable install, are not read.
    "$python" -c 'import sysconfig; print(*{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}, sep="\n")' \
        >"$("$directory/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/libraries.pth"
    echo "$stamp" >"$directory/.llava_lite"
fi
echo "$directory/bin/python"
