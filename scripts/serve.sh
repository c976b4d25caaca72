#!/usr/bin/env bash
# An OpenAI-compatible server of a zipped model, vLLM's, on this machine's CPU: one command from nothing.
#
#   bash scripts/serve.sh                                    the embedded model at 32 of 144 visual tokens, on port 8000
#   MODEL_PATH=checkpoints/qwen-mini bash scripts/serve.sh   the embedded Qwen3-VL at 18 of 36
#   SETTING='{"keep": 16, "method": "cen-prune"}' bash scripts/serve.sh        another setting; null: all visual tokens;
#                                                            empty: what the checkpoint has in its config.visionzip
#   MODEL_PATH=my-llava PORT=8001 bash scripts/serve.sh --max-model-len 4096   another checkpoint, of LLaVA's layout or of
#                                                            transformers'; all arguments go to vLLM's server
#
# It listens on 127.0.0.1 only, takes no file paths from requests and runs no code of checkpoints. Once it says "Application
# startup complete", ask it (docs/serving.md has more):
#
#   curl -s http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "llava-mini", "messages":
#     [{"role": "user", "content": [{"type": "text", "text": "What color is the circle?"}, {"type": "image_url", "image_url":
#     {"url": "data:image/jpeg;base64,'"$(base64 -w0 examples/scene.jpg)"'"}}]}], "max_tokens": 8, "temperature": 0}'
#
# The first run installs vLLM with the versions of constraints-serve.txt into .venv-serve/ (3.5 GB; SERVE_ENV names another
# folder): it wants an older transformers than the rest of the repository. `bash scripts/serve.sh --install` does only that.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
SERVE_ENV="${SERVE_ENV:-$ROOT/.venv-serve}"

install_server() {
    local log="$SERVE_ENV/install.log" stamp="$SERVE_ENV/visionzip-installed" checksum pip
    checksum="$(cd "$ROOT" && { pwd && cat constraints-serve.txt setup.py; } | cksum)"
    [[ "$(cat "$stamp" 2>/dev/null)" != "$checksum" ]] || return 0
    [[ -e "$SERVE_ENV" ]] || { require_python python3 && python3 -m venv "$SERVE_ENV"; }
    pip=("$SERVE_ENV/bin/python" -m pip)
    say "installing vLLM into $SERVE_ENV: minutes, and 3.5 GB (log: $log)"
    {
        # PyTorch's builds for CPUs are on an index of its own
        { "${pip[@]}" install -c "$ROOT/constraints-serve.txt" torch==2.13.0+cpu ||
            "${pip[@]}" install -c "$ROOT/constraints-serve.txt" torch torchvision \
                --index-url https://download.pytorch.org/whl/cpu; } &&
            "${pip[@]}" install -c "$ROOT/constraints-serve.txt" setuptools wheel &&
            "${pip[@]}" install --no-compile -c "$ROOT/constraints-serve.txt" --no-build-isolation -e "$ROOT[serve-cpu]" &&
            # builds for CUDA, which do not load here, and of which only models of sound and video have a use
            "${pip[@]}" uninstall -y torchaudio torchcodec
    } >"$log" 2>&1 || {
        grep -i error "$log" >&2 || tail -n 5 "$log" >&2
        die "pip did not install everything into $SERVE_ENV: $log has all that it said. Run this again when that is mended"
    }
    mend_torchvision >>"$log" 2>&1
    echo "$checksum" >"$stamp"
}

# PyPI's torchvision is built for CUDA: without that, it stops at two operators that it does not find. Declaring them is
# enough for what transformers needs of it, which is in Python. It must hold in each of vLLM's processes.
mend_torchvision() {
    (cd / && "$SERVE_ENV/bin/python" -c "import torchvision") && return
    local site
    site="$("$SERVE_ENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    cat >"$site/visionzip_torchvision.py" <<'PYTHON'
import sys


class DeclareOperators:
    """Runs before torchvision is imported, once."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                torch.library.define(f"torchvision::{operator}", "(Tensor a, Tensor b, float c) -> Tensor")


sys.meta_path.insert(0, DeclareOperators())
PYTHON
    echo "import visionzip_torchvision" >"$site/visionzip_torchvision.pth"
    (cd / && "$SERVE_ENV/bin/python" -c "import torchvision")
}

install_server
[[ "${1:-}" != --install ]] || exit 0

MODEL_PATH="${MODEL_PATH:-$ROOT/checkpoints/llava-mini}"
if [[ -d "$MODEL_PATH" ]]; then MODEL_PATH="$(cd "$MODEL_PATH" && pwd)"; fi # else a name on the hub
default='{"dominant": 27, "contextual": 5}' is_qwen=
if grep -qs '"Qwen[0-9_]*VLFor' "$MODEL_PATH/config.json" || [[ "$MODEL_PATH" == Qwen/*VL* ]]; then
    default='{"keep": 0.5}' is_qwen=1
fi
SETTING="${SETTING-$default}"
NAME="$(basename "$MODEL_PATH")"
if grep -q '"LlavaL\|"LlavaM\|"LlavaQ' "$MODEL_PATH/config.json" 2>/dev/null; then # LLaVA's layout, which vLLM does not read
    converted="$ROOT/results/serve/$NAME" stamp="$ROOT/results/serve/$NAME.from"
    # another checkpoint may have the same name
    if [[ "$(cat "$stamp" 2>/dev/null)" != "$MODEL_PATH" || "$MODEL_PATH/config.json" -nt "$converted/config.json" ]]; then
        say "converting $MODEL_PATH to $converted"
        rm -rf "$converted" "$stamp" # left from an older checkpoint, by this script
        mkdir -p "$ROOT/results/serve"
        (cd "$ROOT" && "$SERVE_ENV/bin/python" -m llava.cli convert "$MODEL_PATH" "$converted" --to transformers)
        echo "$MODEL_PATH" >"$stamp"
    fi
    MODEL_PATH="$converted"
fi

# transformers' processors begin a LLaVA's prompt with <s>, vLLM's chat does not, unless the template says so
if [[ -z "$is_qwen" ]] && ! grep -qs bos_token "$MODEL_PATH/chat_template.jinja"; then
    set -- --middleware visionzip.serving.prompts.SpecialTokens "$@"
fi

# Without a folder for media, vLLM answers a request for file:// with 500, as if the server were at fault; with an empty one
# it is a 400
mkdir -p "$SERVE_ENV/no-media"

export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" # GB; with it, the share of memory below only has to be free
say "serving $MODEL_PATH as $NAME with visionzip=${SETTING:-that of its config} on http://127.0.0.1:${PORT:-8000}"
# `vllm serve` of this version looks for a distribution "vllm", and that for CPUs has another name
exec "$SERVE_ENV/bin/python" -m vllm.entrypoints.openai.api_server --host 127.0.0.1 --port "${PORT:-8000}" \
    --model "$MODEL_PATH" --served-model-name "$NAME" --dtype float32 --enforce-eager --max-num-seqs 16 \
    --gpu-memory-utilization 0.3 \
    --allowed-local-media-path "$SERVE_ENV/no-media" \
    ${SETTING:+--hf-overrides "{\"visionzip\": $SETTING}"} "$@"
