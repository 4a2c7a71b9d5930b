#!/bin/sh
# From a folder of files to a model that is measured, exported and talked to, with the commands that a user types.
#
#     sh examples/production/run.sh SOURCE OUT [prose|code] [MINUTES]
#
# SOURCE is any folder of at least twenty files. The same command again goes on where it was stopped. TRAIN="--steps 500 --preset cllm-1m" trains
# by those settings instead of by the clock, SAMPLES is the number of texts that the suite has written, THREADS the number of threads.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
source=$1 out=$2 suite=${3:-prose} minutes=${4:-60}
threads=${THREADS:-$(nproc)} samples=${SAMPLES:-100}

say() { printf '\n== %s\n' "$*"; }

say "collect: every twentieth file is held out, which no model is trained on"
python "$here/hold_out.py" "$source" "$out/text" "$out/held-out"

say "prepare: clean documents without duplicates; $out/corpus/report.html tells what was dropped and why"
cllm prepare "$out/text" --out "$out/corpus" --workers "$threads"

say "tokenizer"
cllm tokenizer train "$out/corpus" --out "$out/tokenizer.json"
cllm tokenizer stats "$out/tokenizer.json" "$out/held-out"

say "train, with validation; the best weights are kept, and it ends early where the text teaches no more"
# shellcheck disable=SC2086  # settings are words
cllm train "$out/corpus" --tokenizer "$out/tokenizer.json" --out "$out/run" --threads "$threads" ${TRAIN:---minutes "$minutes"}

say "checkpoints and figures"
cllm checkpoint verify "$out/run"
cllm checkpoint inspect "$out/run"
cllm report "$out/run"
python "$here/figures.py" "$out/run" "$out/curves.svg"

say "evaluate on the files that were held out"
cllm evaluate "$out/run" "$out/held-out" --threads "$threads"
cllm evaluate "$out/run" "$out/held-out" --suite "$suite" --samples "$samples" --threads "$threads"

say "export: one file of int8 weights, and a folder for transformers"
cllm export "$out/run" --to cllm --type int8 --out "$out/model.cllm"
[ -d "$out/model-hf" ] || cllm export "$out/run" --to hf --out "$out/model-hf"
cllm evaluate "$out/model.cllm" "$out/held-out" --threads "$threads"
cllm generate "$out/model.cllm" --prompt "The " --max-tokens 60 --threads "$threads"

say "chat: a few conversations on top, and a question"
cllm train "$here/../chats/chats.jsonl" --from "$out/run" --out "$out/chat" --steps "${CHAT_STEPS:-300}" --batch-size 8 --learning-rate 1e-3 --threads "$threads"
echo "What do owls eat?" | cllm chat "$out/chat" --system "You answer in a few words." --temperature 0 --max-tokens 20 --threads "$threads"
