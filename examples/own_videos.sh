#!/usr/bin/env bash
# Your own videos, from a folder to an aligned model:
#   examples/own_videos.sh VIDEOS OUT [KEY=VALUE ...]
# VIDEOS has captions.jsonl, or a .txt beside each video. CONFIG=wan2.1-1.3b in the environment takes another model.
set -euo pipefail
videos=$1 out=$2
shift 2

alignkit validate "${CONFIG:-wan-tiny-localdpo}" data.videos="$videos" "$@"                 # what cannot be used, and why
alignkit pairs "${CONFIG:-wan-tiny-localdpo}" data.videos="$videos" output.dir="$out" "$@"  # look at its previews
alignkit train "$out"
alignkit sample "$out"
alignkit eval "$out"
alignkit report "$out"
alignkit doctor "$out"
