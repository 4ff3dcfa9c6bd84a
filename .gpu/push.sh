set -e
cd /work/dev/wt/gpu
rsync -a --delete --exclude __pycache__ --exclude licenses src tests benchmarks pyproject.toml /work/main/.gpu/ 2>/dev/null || (rm -rf /work/main/.gpu/{src,tests,benchmarks}; cp -r src tests benchmarks pyproject.toml /work/main/.gpu/; find /work/main/.gpu -name __pycache__ -o -name '*.gguf' | xargs rm -rf)
cp /work/dev/gpuscratch/*.sh /work/dev/gpuscratch/sweep.py /work/dev/gpuscratch/prof.py /work/main/.gpu/
du -sh /work/main/.gpu
