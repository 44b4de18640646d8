#!/usr/bin/env bash
# Train a pixel transformer on Fashion-MNIST, score it, and compare it with softmax regression:
#
#     bash scripts/demo.sh [the recipe's options]
#
# Leaves everything under outputs/demo. A run that was interrupted goes on; a finished one is only reported again.
# The options go to recipes/fashion_mnist_pixels.py: bash scripts/demo.sh --threads 1 --output-dir outputs/slow
# One for the length (--epochs 1, --max-minutes 5) or the --stages brings the recipe's own schedule in place of 11 minutes.
# PYTHON=/path/to/python chooses the Python that .venv is made of.
set -euo pipefail
cd "$(dirname "$0")/.."

output_dir=outputs/demo data_dir=data previous=
for word in "$@"; do
    case "$word" in
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' scripts/demo.sh && exit ;;
        --output[-_]dir=*) output_dir=${word#*=} ;;
        --data[-_]dir=*) data_dir=${word#*=} ;;
    esac
    case "$word" in
        --no[-_]test) no_test=1 ;;
        --epochs | --epochs=* | --max[-_]minutes | --max[-_]minutes=* | --stages) own_schedule=1 ;;
    esac
    case "$previous" in
        --output[-_]dir) output_dir=$word ;;
        --data[-_]dir) data_dir=$word ;;
    esac
    previous=$word
done

source scripts/environment.sh
[ -z "${no_test:-}" ] || fail 'the demo compares test scores; for --no-test, run recipes/fashion_mnist_pixels.py.'
step() { echo && echo "== $*"; }
start=$SECONDS

# ------------------------------------------------------------------------------------------------------- environment
step '1 of 4: environment in .venv (about 2 minutes and 6 GB the first time, then nothing)'
prepare_environment train
echo "ready after $((SECONDS - start)) s"

# -------------------------------------------------------------------------------------------------------------- data
step "2 of 4: Fashion-MNIST in $data_dir (30 MB; seconds to a minute the first time, then nothing)"
fetch() {
    "$python" - "$data_dir" <<'EOF'
import sys
from linvision.data import create_dataset
try:
    sizes = [len(create_dataset('fashion_mnist', sys.argv[1], split)) for split in ('train', 'test')]
except FileNotFoundError as error:
    sys.exit(f'error: {error}')
print(f'{sizes[0]:,} training and {sizes[1]:,} test images')
EOF
}
if ! fetch; then
    command -v apt-get > /dev/null || fail 'no Fashion-MNIST; see above for the ways to get it.'
    echo 'fetching the Debian package dataset-fashion-mnist'
    [ "$(id -u)" != 0 ] || apt-get -qq update || fail 'apt-get update failed; see above.'
    "$python" -m scripts.tools.debian dataset-fashion-mnist usr/share/datasets/fashion-mnist "$data_dir/FashionMNIST/raw"
    fetch
fi

# ------------------------------------------------------------------------------------------------- training and score
# the schedule follows the clock, so that the demo takes as long on every machine
if [ -n "${own_schedule:-}" ]; then
    step "3 of 4: training with $* (the time left is printed on the way), then scoring on all test images"
else
    step '3 of 4: training (11 minutes), then scoring on all test images (about 2 minutes on 2 cores)'
    set -- --max-minutes 11 --stages 16 0.5 32 0.5 "$@"
fi
"$python" recipes/fashion_mnist_pixels.py --output-dir "$output_dir" --data-dir "$data_dir" "$@"

# ------------------------------------------------------------------------------------------------------------ report
step '4 of 4: softmax regression on the same pixels, and a picture (about a minute)'
"$python" -m scripts.tools.report --run "$output_dir"
cat <<EOF

Done in $((SECONDS - start)) s. In $output_dir:
  predictions.png           test images, what the model sees in them and what it attends to
  report.json, metrics.json the scores above, and all about the run
  model/                    the model, for timm.create_model('local-dir:$output_dir/model', pretrained=True)
Curves:    .venv/bin/tensorboard --logdir $output_dir/tensorboard
Predict:   .venv/bin/linvision predict $output_dir $output_dir/images
EOF
