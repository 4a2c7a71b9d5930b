#!/bin/sh
# The small model that comes with CLLM (`cllm generate sample`), from its text on. On Debian; elsewhere fetch the R package janeaustenr otherwise.
#
#     sh examples/production/sample.sh OUT [MINUTES]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" && cd "$1"
minutes=${2:-25} threads=${THREADS:-$(nproc)}

apt-get download r-cran-janeaustenr
dpkg-deb -x r-cran-janeaustenr_*.deb package
python "$here/novels.py" package/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb novels
python "$here/hold_out.py" novels text held-out

cllm prepare text --out corpus
cllm train corpus --out run --minutes "$minutes" --threads "$threads" --set data.val_fraction=0.05
cllm report run
python "$here/figures.py" run curves.svg
cllm export run --to cllm --type int8 --out sample.cllm

cllm evaluate run held-out --suite prose --threads "$threads"
cllm evaluate run held-out --threads "$threads"
cllm evaluate sample.cllm held-out --threads "$threads"        # what int8 costs
cllm generate sample.cllm --prompt "It is a truth universally acknowledged, that" --threads "$threads"
