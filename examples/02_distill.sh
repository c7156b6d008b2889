#!/bin/sh
# Distil a 1-bit student from a small teacher, as that of 01_train_teacher.py, compile it, and have it write.
#
#   examples/02_distill.sh teacher student --data stories.txt --data books/ --total-tokens 8000000
#
# Two folders, then options of `dfssm distill`. After an interruption the same line with --resume goes on.
set -eu
teacher=${1:?give two folders: of the teacher, and for the student} output=${2:?give a folder for the student, too}
shift 2
# Rank 2 at a width of 256 is 1 % of the weights of the projections, as 16 is at 2048.
dfssm distill "$teacher" -o "$output" --rank 2 --tokens 256 "$@"
dfcompile "$output/model.pt" --target ort-cpu -o "$output/bundle" --force
dfssm run "$output/bundle" -p "Once upon a time" -n 100 --temperature 0.7 --seed 1
