#!/usr/bin/env bash
# StatsQ against LSQ weights at 2 bits and equal budget: mean and spread over seeds, as Markdown.
#
#   benches/statsq-vs-lsq.sh MODEL DATA [OUT]
#
# Runs that are done are kept and runs that were cut short go on, so it can be started again at any
# time. QTUNE names the program, SEEDS the seeds, LIMIT and EPOCHS the budget.
set -euo pipefail
model=$1 data=$2 out=${3:-runs/statsq-vs-lsq}
qtune=${QTUNE:-target/release/qtune}
seeds=${SEEDS:-0 1 2} limit=${LIMIT:-20000} epochs=${EPOCHS:-1}
mkdir -p "$out"

figure() { sed -n "s/^ *\"$1\": \([-0-9.e]*\),*$/\1/p" "$2"; }

for act in 32 2; do
  recipe=vit-w2a$act
  for kind in statsq lsq; do
    for seed in $seeds; do
      run=$out/a$act-$kind-$seed
      [ -f "$run/summary.json" ] && continue
      if [ -d "$run" ]; then
        "$qtune" quantize --resume "$run" --quiet >/dev/null
      else
        "$qtune" quantize --recipe "$recipe" --bits 2 --weight-quant "$kind" --seed "$seed" \
          --model "$model" --data "$data" --limit-train "$limit" --epochs "$epochs" \
          --out "$run" --quiet >/dev/null
      fi
    done
  done
done

echo "| weights | activations | top-1, mean of seeds | lowest | highest | oscillating weights |"
echo "| --- | --- | --- | --- | --- | --- |"
for act in 32 2; do
  for kind in statsq lsq; do
    for seed in $seeds; do
      file=$out/a$act-$kind-$seed/summary.json
      echo "$(figure q_top1 "$file") $(figure oscillation "$file")"
    done | awk -v kind=$kind -v act=$act '
      { sum += $1; osc += $2; if (NR == 1 || $1 < low) low = $1; if (NR == 1 || $1 > high) high = $1 }
      END { printf "| %s, 2 bits | %s | %.2f %% | %.2f | %.2f | %.2f %% |\n", kind, act == 32 ? "float" : act " bits", sum / NR, low, high, osc / NR }'
  done
done
