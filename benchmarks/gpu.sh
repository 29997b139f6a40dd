#!/bin/sh
# foveate on one data-centre GPU, within eight minutes and with nothing downloaded: is it right in
# half precision, and what does it cost? Writes benchmarks/results/gpu.json and gpu.md.
#
#     benchmarks/gpu.sh                       # with the Python that has torch, transformers, foveate
#     PYTHON=.venv/bin/python benchmarks/gpu.sh
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
