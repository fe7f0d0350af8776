#!/usr/bin/env bash
# The lab pair from scenes to benchmark, in two parts that may be two calls on one machine:
#   XSD_RECORDS=records benchmarks/lab.sh make          # pretraining and scenes
#   XSD_RECORDS=records benchmarks/lab.sh measure       # extraction, adapters, benchmark
# RECIPE (experiments/lab.yaml), LEVELS, WORK (outputs/lab) and DEVICES (how many GPUs) may be set.
set -euo pipefail
RECIPE=${RECIPE:-experiments/lab.yaml} WORK=${WORK:-outputs/lab}
LEVELS=${LEVELS:-E1 E3 B1 E2 text X1 L4}
DEVICES=${DEVICES:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
xsd() { echo "== $SECONDS s: xsd $1" && python -m xsd "$@"; }
mkdir -p "$WORK"

make_pair() {
    # Rendering first; what trains afterwards leaves the cores to the scenes.
    xsd pretrain --config "$RECIPE" --output_dir "$WORK/pretrain" &
    local pretraining=$!
    (sleep "${SCENES_AFTER:-60}" && xsd scenes --config "$RECIPE" --output_dir "$WORK/scenes") &
    wait $! && wait $pretraining
}

measure_pair() {
    local pair made
    made=$(ls -d "$WORK"/pretrain/*/ | tail -1)
    pair=(--drafter "${made}drafter" --verifier "${made}verifier")
    xsd lm_head --config "$RECIPE" "${pair[@]}"
    xsd extract --config "$RECIPE" "${pair[@]}"
    local number=0 jobs=()
    for level in $LEVELS; do
        CUDA_VISIBLE_DEVICES=$((number++ % DEVICES)) \
            xsd train --config "$RECIPE" "${pair[@]}" --level "$level" --output_dir "$WORK/train" &
        jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job"; done
    xsd benchmark --config "$RECIPE" "${pair[@]}" --adapter_dir "$WORK/train"
}

case ${1:-all} in
make) make_pair ;;
measure) measure_pair ;;
all) make_pair && measure_pair ;;
*) echo "lab.sh: say make, measure or nothing" >&2 && exit 2 ;;
esac
